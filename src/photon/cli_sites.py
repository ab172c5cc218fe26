"""The commands of a federation across machines: parse, call, print. No logic."""

from __future__ import annotations

import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from photon.errors import InputError
from photon.extras import require
from photon.readable import one_line

# An address of IPv6 has colons of its own: without brackets its end would be taken for a port.
_ADDRESS = re.compile(r"(?:\[([^\[\]]+)\]|([^\[\]:]+)):([0-9]{1,5})")

KeysFolder = Annotated[Path, typer.Option("--keys", metavar="DIR", help="The authority (photon keys init DIR).")]


def add_commands(app: typer.Typer) -> None:
    """Add them to the command `photon`."""
    app.command(
        epilog="""Examples:\n
photon aggregator consortium.toml --keys keys --listen 0.0.0.0:8443 --run runs/consortium\n
photon aggregator --resume runs/consortium --keys keys --listen 0.0.0.0:8443"""
    )(aggregator)
    app.command(
        epilog="Example: photon node --keys ada.key --aggregator https://hub.example.org:8443 --silo site.toml"
    )(node)
    app.command(
        epilog="""Examples:\n
photon status runs/consortium\n
photon status https://hub.example.org:8443 --keys keys/operator.key --json"""
    )(status)
    app.command(epilog="Example: photon readmit ada runs/consortium")(readmit)


def aggregator(
    keys: KeysFolder,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [section.key=value ...]", help="Preset or TOML file; options."),
    ] = None,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="The one public port.")
    ] = "0.0.0.0:8443",  # to be reached is what it is for
    run: Annotated[Path | None, typer.Option(help="Run folder; default runs/<recipe>-<time>.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on exactly where this run was.")] = None,
) -> None:
    """Hold the global model and run the rounds with nodes on other machines; restarts its own parts."""
    require("sites")
    from photon import sites_far
    from photon.cli import split_words
    from photon.display import open_display
    from photon.recipe import load_recipe
    from photon.runfolder import RunFolder, new_run_folder

    host, port = split_address(listen)
    words = words or []
    if resume is not None:
        if words or run is not None:
            raise InputError("--resume takes no recipe, options or --run: the run folder holds its own recipe")
        folder = RunFolder(resume)
    else:
        recipe_name, overrides = split_words(words)
        recipe = load_recipe(recipe_name, [*overrides, "link.fabric=flower"])
        folder = new_run_folder(recipe.name, run)
        with open_display(sys.stdout) as display:
            sites_far.prepare_run_folder(recipe, folder, display)
    sites_far.aggregate(folder, keys, host, port)


def node(
    keys: Annotated[Path, typer.Option(metavar="NAME.key", help="This node's identity, one file.")],
    aggregator: Annotated[str, typer.Option(metavar="https://HOST:PORT", help="Where the Aggregator listens.")],
    silo: Annotated[Path, typer.Option(metavar="site.toml", help="Text, hardware and limits; stays here.")],
    state: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What the node keeps; default photon-node-NAME.")
    ] = None,
    socket: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Take part as one owner's node. Outbound connections only; the text stays here. Ctrl-C: hand in, then leave."""
    require("sites")
    from photon.certificates import check_dates, load_bundle
    from photon.fabric.agent import Agent, NodeOptions, default_home
    from photon.fabric.home import NodeHome
    from photon.fabric.lifeline import end_with
    from photon.identity import bundle_identity, client_context
    from photon.siteconfig import load_site

    if socket is not None:
        os.set_inheritable(socket, False)
        end_with(socket)
    site = load_site(silo)
    identity = bundle_identity(keys)
    if site.name is not None and site.name != identity.name:
        raise InputError(f"{silo} is for node {site.name!r}, {keys} is the key of {identity.name!r}")
    home = NodeHome(state if state is not None else default_home(identity.name))
    check_key = partial(check_dates, keys, load_bundle(keys))
    Agent(NodeOptions(identity.name, aggregator, client_context(keys), check_key, site, home)).run()


def status(
    target: Annotated[str, typer.Argument(metavar="RUN|URL", help="A run folder, or https://HOST:PORT.")],
    keys: Annotated[Path | None, typer.Option(metavar="FILE", help="For a URL: operator.key, or a node's key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    watch: Annotated[float | None, typer.Option(metavar="SECONDS", help="Again and again.", min=0.5)] = None,
) -> None:
    """Nodes, round, who is late, bytes, last errors of a run that goes on."""
    from photon.status import show_status

    show_status(target, keys, as_json, watch)


def readmit(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A suspended node.")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
) -> None:
    """Let a suspended node take part again, from the next round on."""
    from photon import status as statuses
    from photon.runfolder import RunFolder

    typer.echo(statuses.readmit(RunFolder(run), name))


def split_address(listen: str) -> tuple[str, int]:
    """`HOST:PORT` in parts, an IPv6 address in brackets. Raises InputError."""
    found = _ADDRESS.fullmatch(listen)
    if found is None or int(found[3]) >= 2**16:
        raise InputError(
            f"--listen is HOST:PORT, such as 0.0.0.0:8443 or [2001:db8::1]:8443, not {one_line(listen, 60)!r}"
        )
    return found[1] or found[2], int(found[3])
