"""Bad lines between a node and the Aggregator change nothing but the time: the same model, and hardly a byte twice.

Every federation here is compared with the same recipe on the local fabric, which no network disturbs. `ada` is at the
end of a bad line; `bob`, whose line is good, shows how many bytes the work takes.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.faults import netns
from tests.faults.federations import run, start
from tests.faults.netns import LossyLine
from tests.faults.proxy import Proxy, _Connection, _Pipe
from tests.faults.sites import Sites, recipe_text, write_texts

from photon.keys import create_authority, issue_node

pytestmark = [pytest.mark.sites, pytest.mark.timeout(1500)]

OWNERS = ("ada", "bob")
WAIT_S = 300.0
LATE = 0.75  # of a blob: whoever began it anew would pay that once more
MBIT_S = 125_000.0
# What a break may cost: what was under way in sockets and buffers, and some control messages.
BREAK_BYTES = 900_000
WIDTH, SMALL_WIDTH, ROUNDS = 256, 96, 3  # 6.6 MB, 1 MB on the wire
SILENCE_S = 40.0  # longer than either end waits for the next byte of a blob


def until(condition: Callable[[], bool], story: Callable[[], str], timeout_s: float = WAIT_S) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, story()
        time.sleep(0.01)


def wider(recipe: str, width: int) -> str:
    assert recipe.count("width = 32") == 1
    return recipe.replace("width = 32", f"width = {width}")


def undisturbed(folder: Path, width: int, rounds: int) -> str:
    """`model_sha256` of the same recipe and text on the local fabric; `folder` then holds the owners' text."""
    write_texts(folder, OWNERS)
    recipe = folder / "local.toml"
    recipe.write_text(wider(recipe_text(folder, OWNERS, rounds, with_text=True), width))
    code, output = run("train", recipe, "--run", folder / "local")
    assert code == 0, output
    return str(json.loads((folder / "local" / "summary.json").read_text())["model_sha256"])


class Line(Sites):
    """A federation of two with a wider model: so many bytes that a line can break in the middle of them."""

    def __init__(self, folder: Path, texts: Path, *, width: int, rounds: int, host: str = "127.0.0.1") -> None:
        super().__init__(folder, texts, rounds=rounds, owners=OWNERS)
        self.host, self.planned = host, rounds
        self.recipe.write_text(wider(self.recipe.read_text(), width))
        shutil.rmtree(self.keys)
        create_authority(self.keys, [host])
        for owner in OWNERS:
            issue_node(self.keys, owner)

    def start_aggregator(self) -> None:
        listen = ["--keys", self.keys, "--listen", f"{self.host}:{self.port}"]
        self.aggregator = start("aggregator", self.recipe, "--run", self.run_folder, *listen)

    def join(self, owner: str, *, port: int = 0, prefix: Sequence[str] = ()) -> None:
        """A node, by way of `port`; `prefix` is the command that runs it elsewhere."""
        silo = self.folder / f"{owner}.toml"
        silo.write_text(f'text = ["{self.texts / owner}"]\nthreads = 1\n')
        command = [*prefix, sys.executable, "-m", "photon", "node", "--keys", str(self.keys / f"{owner}.key")]
        command += ["--aggregator", f"https://{self.host}:{port or self.port}", "--silo", str(silo)]
        command += ["--state", str(self.home(owner))]
        with self.node_log(owner).open("ab") as log:
            self.nodes[owner] = subprocess.Popen(command, stdout=log, stderr=log, process_group=0)

    def payload_bytes(self) -> int:
        """Of one model on the wire."""
        events = [json.loads(line) for line in (self.run_folder / "metrics.jsonl").read_text().splitlines()]
        return next(int(event["payload_bytes"]) for event in events if event["event"] == "run_started")

    def traffic(self, owner: str) -> dict[str, int]:
        """`blob_up` and `blob_down`: bytes of blobs that crossed the gateway, as it counts them."""
        accounts = json.loads((self.run_folder / "exchange" / "traffic.json").read_text())
        return {key: int(accounts[owner][key]) for key in ("blob_up", "blob_down")}

    @property
    def bases(self) -> Path:
        """Where ada's bases arrive, and the newest one stays."""
        return self.home("ada") / "bases"

    def uploads(self, state: str) -> Path:
        """Where ada's updates are at the gateway: `up` while they arrive, `taken` once the Aggregator has them."""
        return self.run_folder / "exchange" / "blobs" / state / "ada"

    def finish_as(self, expected_sha256: str) -> None:
        """Every round had both nodes, nobody trained twice, and the model is that of a run without a network."""
        self.finish()
        told = self.rounds()
        assert [(sorted(event["nodes"]), event["missing"]) for event in told] == [(list(OWNERS), {})] * self.planned
        places = [self.positions(owner)[self.planned] for owner in OWNERS]
        assert places == [self.planned * 4 * 2] * 2
        assert self.model_sha256() == expected_sha256
        for key, needed in self.traffic("bob").items():
            assert self.traffic("ada")[key] >= needed >= self.planned * self.payload_bytes()


class Blob:
    """The next blob that arrives in one direction; those that were seen before are not meant."""

    def __init__(self, sites: Line, direction: str, seen: set[str]) -> None:
        self.sites, self.direction, self.seen = sites, direction, seen
        self.folder = sites.bases if direction == "down" else sites.uploads("up")
        self.path: Path | None = None
        self.base: Path | None = None  # that an update was made from

    def size(self) -> int:
        """Bytes that are here of what has begun to arrive; -1 if nothing has."""
        if self.path is None:
            self.path = next((path for path in self.folder.glob("*.partial") if path.name not in self.seen), None)
            if self.path is None:
                return -1
            self.seen.add(self.path.name)
            if self.direction == "up":
                self.base = next(path for path in self.sites.bases.iterdir() if not path.suffix)
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return -1

    def is_whole(self) -> bool:
        """Whether it has its own name, or what comes after it has begun."""
        if self.path is None:
            return False
        if self.base is None:
            return (self.folder / self.path.stem).exists()
        found = any((self.sites.uploads(state) / self.path.stem).exists() for state in ("up", "taken"))
        return found or not self.base.exists()

    def wait(self, share: float) -> int:
        """Until more than `share` of it is here; how many bytes are."""
        until(lambda: self.size() > 0, lambda: f"nothing arrives in {self.folder}\n{self.sites.story()}")
        wanted = share * self.sites.payload_bytes()
        until(lambda: self.size() > wanted or self.is_whole(), self.sites.story)
        size = self.size()
        assert size > wanted, f"{self.path} arrived too fast to be disturbed"
        return size

    def wait_whole(self) -> int:
        """Until it is whole; the fewest bytes that were here meanwhile."""
        sizes = [2**62]

        def is_whole() -> bool:
            size = self.size()
            if size >= 0:
                sizes.append(size)
            return self.is_whole()

        until(is_whole, lambda: f"{self.path} stays at {sizes[-1]} bytes\n{self.sites.story()}")
        return min(sizes)


class ForgetfulProxy(Proxy):
    """Can forget its connections, as a router does that was switched off and on: they lead nowhere, new ones do."""

    def __init__(self, upstream_host: str, upstream_port: int) -> None:
        self._forgotten: set[_Connection] = set()
        super().__init__(upstream_host, upstream_port)

    def forget(self) -> None:
        """Whoever is connected now waits in vain; nobody is told."""
        with self._lock:
            self._forgotten |= self._connections

    def _send(self, connection: _Connection, pipe: _Pipe, data: bytes) -> int:
        if connection not in self._forgotten:
            return super()._send(connection, pipe, data)
        with self._lock:
            pipe.changed.wait_for(lambda: connection.dropped)
        return 0


@contextmanager
def again_and_again(passed: Callable[[], int], least_bytes: int, disturb: Callable[[], None]) -> Iterator[list[int]]:
    """`disturb` each time that between one and two times `least_bytes` more have passed; the list grows with each."""
    ending, times = threading.Event(), list[int]()
    chance = random.Random(5)

    def work() -> None:
        due = passed() + least_bytes
        while not ending.wait(0.005):
            if passed() >= due:
                disturb()
                times.append(passed())
                due = passed() + chance.randint(least_bytes, 2 * least_bytes)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield times
    finally:
        ending.set()
        thread.join(WAIT_S)


def cut_for(seconds: float, *, blackhole: bool = False) -> Callable[[Proxy], None]:
    """Every connection is reset, and so is every new one, or with `blackhole` nobody answers it."""

    def disturb(proxy: Proxy) -> None:
        proxy.cut(blackhole=blackhole)
        time.sleep(seconds)
        proxy.mend()

    return disturb


def stall(proxy: Proxy) -> None:
    """Nothing comes through; when it does again, both ends have given up, and what they sent then arrives late."""
    proxy.stall()
    time.sleep(SILENCE_S)
    proxy.mend()


BREAKS: list[tuple[str, Callable[[ForgetfulProxy], None]]] = [
    ("down", cut_for(30.0)),
    ("up", cut_for(12.0, blackhole=True)),
    ("down", ForgetfulProxy.forget),
    ("up", stall),
]


def test_a_line_that_breaks_costs_what_was_under_way(tmp_path: Path) -> None:
    """A payload of 6.6 MB over 8 Mbit/s, broken late in a blob, four times; then reset again and again."""
    expected = undisturbed(tmp_path / "texts", WIDTH, ROUNDS)
    with (
        Line(tmp_path / "sites", tmp_path / "texts", width=WIDTH, rounds=ROUNDS) as sites,
        ForgetfulProxy(sites.host, sites.port) as proxy,
    ):
        proxy.throttle(8 * MBIT_S)
        sites.start_aggregator()
        sites.join("ada", port=proxy.port)
        sites.join("bob")
        seen: set[str] = set()
        for direction, disturb in BREAKS:
            assert_goes_on(sites, proxy, Blob(sites, direction, seen), direction, disturb)
        payload, resets = sites.payload_bytes(), 0
        for direction in ("down", "up"):
            blob = Blob(sites, direction, seen)
            blob.wait(0.05)
            with again_and_again(
                lambda: proxy.bytes_up + proxy.bytes_down, payload // 10, lambda: cut_for(0.0)(proxy)
            ) as times:
                assert blob.wait_whole() > 0
            assert len(times) >= 4  # it can fail: a blob that began anew each time would never have become whole
            resets += len(times)
        sites.finish_as(expected)
        bob, breaks = sites.traffic("bob"), len(BREAKS) + resets
        # A break may cost a quarter of a megabyte; four blobs that began anew would cost five megabytes each.
        assert sites.traffic("ada")["blob_up"] - bob["blob_up"] < breaks * BREAK_BYTES // 4
        assert proxy.bytes_down - bob["blob_down"] < breaks * BREAK_BYTES // 4


def assert_goes_on(
    sites: Line, proxy: ForgetfulProxy, blob: Blob, direction: str, disturb: Callable[[ForgetfulProxy], None]
) -> None:
    """Disturb the line late in a blob: it goes on where it was. Anew, it would cost what was here once more."""

    def passed() -> int:
        return proxy.bytes_down if direction == "down" else proxy.bytes_up

    here, payload, before, accepted = blob.wait(LATE), sites.payload_bytes(), passed(), proxy.accepted
    disturb(proxy)
    fewest, after = blob.wait_whole(), passed()
    assert proxy.accepted > accepted  # somebody noticed
    assert fewest >= here, "what had arrived was thrown away"
    assert after - before < payload - here + BREAK_BYTES < payload - BREAK_BYTES


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Texts, and the model that three undisturbed rounds make of them; a megabyte on the wire."""
    texts = tmp_path_factory.mktemp("small") / "texts"
    return texts, undisturbed(texts, SMALL_WIDTH, ROUNDS)


def test_a_slow_long_line_on_which_connections_drop(small: tuple[Path, str], tmp_path: Path) -> None:
    """1 Mbit/s, 0.2 s there and back, and a connection that is reset every hundred kilobytes or two."""
    texts, expected = small
    with (
        Line(tmp_path / "sites", texts, width=SMALL_WIDTH, rounds=ROUNDS) as sites,
        Proxy(sites.host, sites.port) as proxy,
    ):
        proxy.throttle(MBIT_S)
        proxy.delay(0.1)
        sites.start_aggregator()
        sites.join("bob")
        with (
            again_and_again(lambda: proxy.bytes_down, 100_000, lambda: cut_for(0.0)(proxy)) as cuts,
            again_and_again(lambda: proxy.bytes_up, 100_000, lambda: proxy.drop_after(1)) as drops,
        ):
            sites.join("ada", port=proxy.port)
            sites.finish_as(expected)
        blobs, least = sites.traffic("bob"), sites.payload_bytes() // 100_000
        assert min(len(cuts), len(drops)) >= least  # no blob crossed in one piece
        assert sites.traffic("ada")["blob_up"] - blobs["blob_up"] < blobs["blob_up"] / 2


@pytest.fixture
def lossy() -> Iterator[LossyLine]:
    if reason := netns.why_not():
        pytest.skip(reason)
    with LossyLine(seed=7) as line:
        yield line


def vanish_for(seconds: float) -> Callable[[LossyLine], None]:
    """No packet comes through, and nobody is told."""

    def disturb(line: LossyLine) -> None:
        line.vanish()
        time.sleep(seconds)
        line.mend()

    return disturb


LOSSES: list[tuple[str, Callable[[LossyLine], None]]] = [
    ("down", LossyLine.forget),
    ("up", vanish_for(12.0)),
    ("down", vanish_for(SILENCE_S)),
    ("up", LossyLine.forget),
]


def test_a_line_that_loses_packets(small: tuple[Path, str], lossy: LossyLine, tmp_path: Path) -> None:
    """One packet in twenty is lost, in both directions, of 0.2 s there and back; now and then all of them are."""
    texts, expected = small
    with Line(tmp_path / "sites", texts, width=SMALL_WIDTH, rounds=ROUNDS, host=lossy.address) as sites:
        lossy.loses(0.05)
        lossy.delays(0.1)
        lossy.carries(2 * MBIT_S)
        sites.start_aggregator()
        sites.join("bob")
        sites.join("ada", prefix=lossy.command)
        seen: set[str] = set()
        for direction, disturb in LOSSES:
            blob = Blob(sites, direction, seen)
            here = blob.wait(0.5)
            disturb(lossy)
            assert blob.wait_whole() >= here, "what had arrived was thrown away"
        sites.finish_as(expected)
        needed = sites.traffic("bob")["blob_up"]
        assert sites.traffic("ada")["blob_up"] - needed < len(LOSSES) * sites.payload_bytes() / 4
        assert min(lossy.lost.values()) > 100
