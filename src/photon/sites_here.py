"""`photon train --fabric flower`: every node a process of its own on this machine, joined as if they were far apart.

The same text, the same options and the same threads as the local fabric, so the same model comes out, to the last bit.
The keys are made for this run and stay in its folder.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tomli_w

from photon.config import Recipe, SiloConfig
from photon.durable import write_atomic
from photon.errors import ConfigError
from photon.fabric.base import Fabric
from photon.fabric.hub import Hub
from photon.fabric.supervise import Child, Supervisor
from photon.keys import create_authority, issue_node
from photon.run import Run
from photon.runfolder import RunFolder
from photon.sites_far import hub_fabric
from photon.track import Tracker

_HOST = "127.0.0.1"


@contextmanager
def open_sites_here(threads: int, run: Run, payload_bytes: int, tracker: Tracker) -> Iterator[Fabric]:
    """Start hub and nodes, give their fabric, and end them all.

    Raises ConfigError for the centralised baseline, which has one node that reads every owner's text.
    """
    if run.recipe.federation.outer == "none":
        raise ConfigError('federation.outer = "none" is the centralised baseline: it runs with link.fabric = "local"')
    hub = Hub(run.folder)
    keys = hub.path / "keys"
    if not keys.is_dir():
        create_authority(keys, [_HOST])
    for silo in run.recipe.silo:
        if not (keys / f"{silo.name}.key").exists():
            issue_node(keys, silo.name)
        write_atomic(_site_file(run.folder, silo.name), _site(run.recipe, silo, threads))
    hub.prepare(run.recipe, keys, _HOST, 0)
    outer = Supervisor(hub.children())
    nodes: Supervisor | None = None
    try:
        host, port = hub.gateway_address()
        nodes = Supervisor([_node(run.folder, silo.name, keys, f"https://{host}:{port}") for silo in run.recipe.silo])
        with hub_fabric(hub, run, payload_bytes, tracker) as fabric:
            yield fabric
    finally:
        if nodes is not None:
            nodes.close()
        outer.close()
        hub.remove_leftovers()


def _node(folder: RunFolder, name: str, keys: Path, url: str) -> Child:
    command = [
        *(sys.executable, "-m", "photon", "node", "--keys", str(keys / f"{name}.key"), "--aggregator", url),
        *("--silo", str(_site_file(folder, name)), "--state", str(folder.node(name) / "home")),
    ]
    return Child(f"node {name}", command, folder.logs / f"node-{name}.log")


def _site_file(folder: RunFolder, name: str) -> Path:
    return folder.node(name) / "site.toml"


def _site(recipe: Recipe, silo: SiloConfig, threads: int) -> str:
    site: dict[str, object] = {
        "text": silo.text,
        "field": silo.field,
        "data": str(Path(recipe.data.dir).expanduser().resolve()),
        "batch_size": recipe.batch_size_of(silo),
        "device": silo.device or recipe.node.device,
        "threads": threads,
        "streams": 2,
    }
    if silo.weights is not None:
        site["weights"] = silo.weights
    return tomli_w.dumps(site)
