"""What does it cost to move a model to a node and an update back, against a plain copy of the same bytes?

One exchange: the base goes down, the update comes up, with TLS, sha256 at both ends and everything on disk, through
the real gateway as a process of its own. The plain copy (`benchmarks.plain_copy`) has neither TLS nor hash. They take
turns. In the last part each node is a process too (`benchmarks.exchange_node`), connected before the clock starts.

One turn of each kind beforehand is not counted: memory that a virtual machine touches for the first time is slow.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import psutil  # type: ignore[import-untyped]  # it ships no types
import typer

from benchmarks import flower_arrays, plain_copy
from benchmarks.common import RESULTS, ROOT, Out, Report
from benchmarks.exchange_node import DEADLINE_S, exchange
from photon.fabric.gateway import GatewayConfig
from photon.identity import client_context
from photon.keys import create_authority, issue_node
from photon.link.body import whole_file
from photon.link.client import GatewayClient
from photon.link.store import FolderStore
from photon.link.tensors import sha256_hex


def main(
    megabytes: Annotated[int, typer.Option(help="Size of the base, and of the update.", min=1)] = 500,
    turns: Annotated[int, typer.Option(help="Exchanges of each kind.", min=1)] = 5,
    streams: Annotated[int, typer.Option(help="Connections of one transfer.", min=1)] = 2,
    nodes: Annotated[int, typer.Option(help="Nodes that exchange at once, in the last part.", min=1)] = 8,
    arrays: Annotated[bool, typer.Option(help="Also through Flower's own arrays.")] = True,
    out: Out = RESULTS,
) -> None:
    """Exchange against a plain copy, many nodes against one, and Flower's arrays."""
    report = Report("exchange", out)
    folder = Path(tempfile.mkdtemp(prefix="photon-exchange-", dir=Path.cwd()))
    try:
        names = [f"node{index}" for index in range(nodes)]
        base = _random_file(folder / "base", megabytes * 10**6)
        updates = {
            name: _random_file(folder / f"update-{name}", megabytes * 10**6 // (1 if name == names[0] else 4))
            for name in names
        }
        with _plain(folder) as plain_port, _gateway(folder, names) as (port, gateway, store):
            ours, plain = [], []
            used: list[tuple[float, float]] = []
            for turn in range(-1, turns):
                theirs = _plain_turn(plain_port, folder, base)
                before = _cpu_s(os.getpid()), _cpu_s(gateway.pid)
                mine = _our_turn(folder, store, port, names[0], base, updates[names[0]], streams)
                if turn >= 0:
                    plain.append(theirs)
                    ours.append(mine)
                    used.append((_cpu_s(os.getpid()) - before[0], _cpu_s(gateway.pid) - before[1]))
            ratios = [mine / theirs for mine, theirs in zip(ours, plain, strict=True)]
            row = {
                "what": f"{megabytes} MB down and up",
                "plain s": round(statistics.median(plain), 2),
                "ours s": round(statistics.median(ours), 2),
                "ratio": round(statistics.median(ratios), 2),
                "worst ratio": round(max(ratios), 2),
                "node CPU s": round(statistics.median(node for node, _ in used), 2),
                "gateway CPU s": round(statistics.median(other for _, other in used), 2),
                "gateway peak MB": round(_peak(gateway.pid) / 1e6),
            }
            report.add(row)
            report.add(_many(folder, store, port, names, base, updates, streams))
        if arrays:
            down_s, up_s, peak = flower_arrays.round_trip(folder / "flower", megabytes * 10**6)
            report.add(
                {
                    "what": f"{megabytes} MB down and up as Flower's arrays",
                    "theirs s": round(down_s + up_s, 2),
                    "times ours": round((down_s + up_s) / statistics.median(ours), 1),
                    "superlink peak MB": round(peak / 1e6),
                }
            )
        report.show("Exchange of a model through the gateway")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _our_turn(folder: Path, store: FolderStore, port: int, name: str, base: Path, update: Path, streams: int) -> float:
    """Seconds of one exchange: publish, download, upload, fetch."""
    client, home = GatewayClient(_url(port), client_context(_key(folder, name))), folder / f"home-{name}"
    home.mkdir(exist_ok=True)
    base_sha256, update_sha256 = _sha256(base), _sha256(update)
    began = time.monotonic()
    _invite(store, name, base, update)
    exchange(client, home, base_sha256, update, update_sha256, streams)
    body = store.fetch(name, update_sha256, update.stat().st_size)
    seconds = time.monotonic() - began
    assert len(body) == update.stat().st_size
    assert (home / "base").stat().st_size == base.stat().st_size
    (home / "base").unlink()
    store.discard(name)
    client.close()
    return seconds


def _invite(store: FolderStore, name: str, base: Path, update: Path) -> None:
    """What the Aggregator does before a node's exchange."""
    store.publish(_sha256(base), whole_file(base))
    store.allow(name, update.stat().st_size, time.time() + DEADLINE_S)


def _many(
    folder: Path,
    store: FolderStore,
    port: int,
    names: list[str],
    base: Path,
    updates: dict[str, Path],
    streams: int,
) -> dict[str, object]:
    """Bytes per second of all nodes at once against one alone, with the same files (a quarter of the base each)."""
    small = folder / "small"
    small.write_bytes(base.read_bytes()[: base.stat().st_size // 4])
    other = {name: updates[name] for name in names[1:]} | {names[0]: small}
    size = small.stat().st_size + min(path.stat().st_size for path in other.values())
    with ExitStack() as stack:
        nodes = [stack.enter_context(_node(folder, port, name, small, other[name], streams)) for name in names]
        alone = [_at_once(store, nodes[:1], small) for _ in range(4)][1:]
        together = [_at_once(store, nodes, small) for _ in range(2)][1]
    one, all_of_them = size / statistics.median(alone), size * len(names) / together
    return {
        "what": f"{len(names)} nodes at once, {size // 2 // 10**6} MB down and up each",
        "one node MB/s": round(one / 1e6),
        "all nodes MB/s": round(all_of_them / 1e6),
        "ratio": round(all_of_them / one, 2),
    }


@dataclass(frozen=True)
class _Node:
    """A node's process."""

    name: str
    update: Path
    process: subprocess.Popen[str]

    def exchange(self) -> None:
        """Have it make one exchange."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.hear("done")

    def hear(self, word: str) -> None:
        """Wait until it says this."""
        assert self.process.stdout is not None
        said = self.process.stdout.readline().strip()
        assert said == word, f"{self.name} says {said!r}, expected {word!r}"


def _at_once(store: FolderStore, nodes: list[_Node], base: Path) -> float:
    """Seconds until the last of these nodes has exchanged, publish and fetch among them."""

    def one(node: _Node) -> None:
        _invite(store, node.name, base, node.update)
        node.exchange()
        assert len(store.fetch(node.name, _sha256(node.update), node.update.stat().st_size))

    for node in nodes:
        node.hear("ready")
    with ThreadPoolExecutor(len(nodes)) as pool:
        began = time.monotonic()
        list(pool.map(one, nodes))
        seconds = time.monotonic() - began
    for node in nodes:
        store.discard(node.name)
    return seconds


@contextmanager
def _node(folder: Path, port: int, name: str, base: Path, update: Path, streams: int) -> Iterator[_Node]:
    home = folder / f"home-{name}"
    home.mkdir(exist_ok=True)
    words = [_url(port), _key(folder, name), home, _sha256(base), update, _sha256(update), streams]
    command = [sys.executable, "-m", "benchmarks.exchange_node", *map(str, words)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as process:
        try:
            yield _Node(name, update, process)
        finally:
            process.kill()


def _plain_turn(port: int, folder: Path, base: Path) -> float:
    began = time.monotonic()
    plain_copy.get(port, base.name, folder / "plain-down")
    plain_copy.put(port, "plain-up", base)
    seconds = time.monotonic() - began
    for copy in (folder / "plain-down", folder / "plain-up.received"):
        assert copy.stat().st_size == base.stat().st_size
        copy.unlink()  # both sides write new files: one written over is begun to be flushed when it is closed
    return seconds


@contextmanager
def _plain(folder: Path) -> Iterator[int]:
    command = [sys.executable, "-m", "benchmarks.plain_copy", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


@contextmanager
def _gateway(folder: Path, names: list[str]) -> Iterator[tuple[int, subprocess.Popen[str], FolderStore]]:
    keys, exchange = folder / "keys", folder / "exchange"
    create_authority(keys, ["127.0.0.1"])
    for name in names:
        issue_node(keys, name)
    exchange.mkdir()
    (exchange / "secret").write_bytes(os.urandom(32))
    (exchange / "run.json").write_text("{}")
    config = GatewayConfig(
        host="127.0.0.1",
        port=0,
        keys=keys,
        workspace=exchange / "blobs",
        nodes=names,
        run_file=exchange / "run.json",
        status_file=exchange / "run.json",
        superlink_port=1,
        fleet_secret_file=exchange / "secret",
    )
    (exchange / "gateway.json").write_text(config.model_dump_json())
    command = [sys.executable, "-m", "photon.fabric.gateway", "--config", str(exchange / "gateway.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().rpartition(":")[2])
            yield port, process, FolderStore(exchange / "blobs")
        finally:
            process.terminate()


def _url(port: int) -> str:
    return f"https://127.0.0.1:{port}"


def _key(folder: Path, name: str) -> Path:
    return folder / "keys" / f"{name}.key"


@cache
def _sha256(path: Path) -> str:
    """Known before: the Aggregator and a node hash what they send when they write it."""
    return sha256_hex(whole_file(path))


def _random_file(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        for begin in range(0, size, 2**24):
            file.write(os.urandom(min(2**24, size - begin)))
    return path


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, user and system: on a busy machine they say more than a clock."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _peak(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024


if __name__ == "__main__":
    typer.run(main)
