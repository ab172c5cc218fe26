"""kill -9 of any part of a federation at any moment: it ends by itself in the model of the undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from tests.faults.federations import OWNERS
from tests.faults.proxy import Proxy
from tests.faults.sites import Sites, undisturbed

pytestmark = [pytest.mark.sites, pytest.mark.timeout(1800)]

ROUNDS, TAU, BATCH = 40, 30, 2  # more rounds than any story here takes, on a fast machine too
EXTRA = "quorum = 1.0\ndeadline_s = 300.0\n[checkpoint]\nkeep_last = 99\n"
SLOW_BYTES_PER_S = 30_000  # an update of 140 kB then takes seconds
FAR = "ada"  # her node reaches the gateway through a proxy


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The texts, and the model that comes out where nothing goes wrong."""
    texts = tmp_path_factory.mktemp("whole") / "texts"
    return texts, undisturbed(texts, ROUNDS, EXTRA, tau=TAU)


class Havoc:
    """A federation, and what may happen to it. Each disturbance is followed by what its systemd would do, no more."""

    def __init__(self, sites: Sites, seed: int) -> None:
        self.sites, self.dice = sites, random.Random(seed)
        self.proxy = Proxy("127.0.0.1", sites.port)

    def start(self) -> None:
        self.sites.start_aggregator()
        for owner in OWNERS:
            self.start_node(owner)

    def start_node(self, owner: str) -> None:
        self.sites.start_node(owner, port=self.proxy.port if owner == FAR else None)

    def node(self) -> None:
        """A node's own process; its trainer ends with it."""
        owner = self.dice.choice(OWNERS)
        trainer = self.sites.trainer(owner)
        self.sites.kill_node(owner)
        if trainer is not None:
            trainer.wait(20)
        self.start_node(owner)

    def trainer(self) -> None:
        """The process in which a node trains; its node starts another."""
        trainer = self.sites.trainer(self.dice.choice(OWNERS))
        if trainer is not None:
            trainer.kill()

    def rounds(self) -> None:
        """The round loop, wherever it is."""
        self.sites.kill_part("rounds")

    def commit(self) -> None:
        """The round loop, between the first file of a commit and the rename that makes it count."""
        folder, rounds = self.sites.run_folder / "rounds", self.sites.wait_for_part("rounds")

        def is_caught() -> bool:
            if not list(folder.glob(".pending-0*")):
                return False
            os.kill(rounds.pid, signal.SIGSTOP)
            if list(folder.glob(".pending-0*")):
                return True
            os.kill(rounds.pid, signal.SIGCONT)  # it was over before we stopped it
            return False

        before = self.sites.committed()
        end = time.monotonic() + 120
        while not is_caught():
            assert time.monotonic() < end, f"no commit was seen in 120 s\n{self.sites.story()}"
        rounds.kill()
        rounds.wait(20)
        assert self.sites.committed() - before in (0, 1, 2), "the round that was being written counts already"
        assert list(folder.glob(".pending-0*")), "it was over before it was killed"

    def superlink(self) -> None:
        self.sites.kill_part("superlink")

    def gateway(self) -> None:
        """The gateway, while an update is being uploaded."""
        with self.slow_transfers():
            uploads = self.sites.run_folder / "exchange" / "blobs" / "up" / FAR
            self.sites.wait_until(lambda: bool(list(uploads.glob("*.partial"))), f"{FAR} uploads")
            self.sites.kill_part("gateway")

    def supervisor(self) -> None:
        """`photon aggregator`, all its children with it; then `--resume`."""
        self.sites.kill_aggregator()
        self.sites.start_aggregator()

    def stop(self) -> None:
        """SIGTERM to `photon aggregator`, as systemd sends it; then `--resume`."""
        code, output = self.sites.stop_aggregator()
        assert code == 1
        assert "photon aggregator --resume" in output
        self.sites.start_aggregator()

    def until_others_are_done(self, disturb: Callable[[], None]) -> int:
        """Disturb a round, and say which, when all but the far node have trained it and she is still at it."""
        self.go_on()
        with self.slow_transfers():
            number = self.sites.committed()
            self.sites.wait_until(lambda: others_are_done(self.sites, number), f"two have trained round {number}")
            disturb()
            assert self.sites.committed() == number, "the round was over before it was disturbed"
        return number

    @contextmanager
    def slow_transfers(self) -> Iterator[None]:
        self.proxy.throttle(SLOW_BYTES_PER_S)
        try:
            yield
        finally:
            self.proxy.throttle(None)

    def kinds(self) -> list[Callable[[], None]]:
        return [self.node, self.trainer, self.rounds, self.commit, self.superlink, self.gateway, self.supervisor]

    def go_on(self) -> None:
        """Wait until a round more is committed: whatever happened has been got over."""
        self.sites.wait_for_round(self.sites.committed() + 1)

    def pause(self, longest_s: float) -> None:
        time.sleep(self.dice.uniform(0, longest_s))

    def finish(self, model_sha256: str) -> None:
        """The run ends by itself, in the model of the undisturbed run, and no node has trained a token too many."""
        output = self.sites.finish(600)
        assert "Traceback" not in output
        assert self.sites.model_sha256() == model_sha256
        for owner in OWNERS:
            assert self.sites.nodes[owner].poll() is None, f"the node of {owner} has ended"
            places = self.sites.positions(owner)
            assert places == {ready: ready * TAU * BATCH for ready in range(ROUNDS + 1)}
        self.sites.check_streams()
        for event in self.sites.rounds():
            assert set(event["nodes"]) == set(OWNERS)
            assert event["missing"] == {}

    def end_again(self, model_sha256: str) -> None:
        """As if the last kill had come between the model's export and its record; then nothing is left to do."""
        folder = self.sites.run_folder
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        assert json.loads(lines[-1])["event"] == "run_finished"
        (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
        for result in ("summary.json", "report.html"):
            (folder / result).unlink()
        self.sites.start_aggregator()
        self.sites.finish()
        assert self.sites.model_sha256() == model_sha256
        self.sites.start_aggregator()
        assert "is finished" in self.sites.finish()


@contextmanager
def havoc(folder: Path, texts: Path, seed: int) -> Iterator[Havoc]:
    with Sites(folder, texts, rounds=ROUNDS, extra=EXTRA, tau=TAU) as sites:
        all_of_it = Havoc(sites, seed)
        try:
            all_of_it.start()
            yield all_of_it
        finally:
            all_of_it.proxy.close()


def others_are_done(sites: Sites, number: int) -> bool:
    """Whether all but the far node have trained the open round and stored what came of it."""
    for owner in set(OWNERS) - {FAR}:
        node = next((sites.home(owner) / "runs").iterdir()) / "nodes" / owner
        reply, state = node / "replies" / f"{number:06d}", node / "state" / f"{number + 1:06d}"
        if not (reply.exists() and state.exists()):
            return False
    return True


def handed_in_again(sites: Sites, number: int) -> set[str]:
    """Whose trainer has answered this round from its stored reply."""
    line = f"round {number}: was trained before; its update is handed in again"
    return {owner for owner in OWNERS if line in sites.trainer_log(owner)}


def test_each_part_is_killed_once(whole: tuple[Path, str], tmp_path: Path) -> None:
    texts, model_sha256 = whole
    with havoc(tmp_path, texts, seed=1) as here:
        sites = here.sites
        sites.wait_for_round(0)

        # Between the replies and the commit: who has finished hands in the same update, untrained.
        number = here.until_others_are_done(here.rounds)
        here.go_on()
        assert handed_in_again(sites, number) >= set(OWNERS) - {FAR}

        # The same when the Aggregator is stopped in good order: what was uploaded is removed, and comes again.
        number = here.until_others_are_done(here.stop)
        here.go_on()
        assert handed_in_again(sites, number) >= set(OWNERS) - {FAR}

        for kill in here.kinds():
            here.pause(1.5)
            kill()
            assert sites.committed() < ROUNDS, "the run was over before it was disturbed"
            here.go_on()
        here.finish(model_sha256)
        here.end_again(model_sha256)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_many_kills_at_random_moments(whole: tuple[Path, str], tmp_path: Path, seed: int) -> None:
    texts, model_sha256 = whole
    with havoc(tmp_path, texts, seed=100 + seed) as here:
        here.sites.wait_for_round(0)
        for _ in range(8):
            here.pause(3.0)
            here.dice.choice(here.kinds())()
            assert here.sites.committed() < ROUNDS, "the run was over before it was disturbed"
            if here.dice.random() < 0.6:  # else the next one comes while the first is being got over
                here.go_on()
        here.finish(model_sha256)


def test_a_trainer_that_dies_again_and_again_costs_the_round_not_the_run(
    whole: tuple[Path, str], tmp_path: Path
) -> None:
    """The node says that it failed; asked for the same round again, it tries again instead of repeating that."""
    texts, model_sha256 = whole
    with havoc(tmp_path, texts, seed=2) as here:
        sites = here.sites
        sites.wait_for_round(1)
        number, seen = sites.committed(), set[psutil.Process]()

        def has_failed() -> bool:
            trainer = sites.trainer("bob")
            if trainer is not None and trainer not in seen:
                seen.add(trainer)
                trainer.kill()
            return "its worker died 3 times" in sites.node_log("bob").read_text()

        sites.wait_until(has_failed, "bob gives up")
        assert sites.committed() <= number + 1
        here.finish(model_sha256)
