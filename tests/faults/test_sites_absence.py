"""Slow, silent, leaving and absent nodes: each costs its own contribution, is named, and finds its place again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self

import psutil
import pytest
from tests.faults.sites import Sites, write_texts

pytestmark = [pytest.mark.sites, pytest.mark.timeout(1800)]

BATCH, LENGTH = 2, 32
ROUNDS = 1000  # more than any story here can take, however fast the machine: it is stopped when the story is over
RUN_S, REST_S = 0.01, 0.4  # of a slow trainer: forty times slower than it could be
LATE = "no answer before the deadline"


class Slowed:
    """The trainer of a node, made many times slower while the block runs by stopping it again and again."""

    def __init__(self, sites: Sites, owner: str) -> None:
        sites.wait_until(lambda: sites.trainer(owner) is not None, f"{owner} has a trainer")
        trainer = sites.trainer(owner)
        assert trainer is not None
        self.trainer: psutil.Process = trainer
        self._ending = Event()
        self._thread = Thread(target=self._slow_down, daemon=True)

    def _slow_down(self) -> None:
        with suppress(psutil.NoSuchProcess):
            while not self._ending.is_set():
                self.trainer.suspend()
                self._ending.wait(REST_S)
                self.trainer.resume()
                time.sleep(RUN_S)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join(20)


def rounds_of(sites: Sites) -> list[dict[str, Any]]:
    """The recorded rounds while the record is being written: a line without its end is none yet."""
    metrics = sites.run_folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event for event in events if event["event"] == "round"]


def await_round(sites: Sites, after: int, what: str, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first committed round later than `after` that `fits`; `what` says it in words."""

    def found() -> list[dict[str, Any]]:
        return [event for event in rounds_of(sites) if after < event["round"] <= sites.committed() and fits(event)]

    sites.wait_until(lambda: bool(found()), f"a round after {after} in which {what}")
    return found()[0]


def await_training(sites: Sites, *owners: str) -> int:
    """Wait until all of them are in the middle of the open round; which one that is."""
    for owner in owners:
        sites.wait_until(lambda owner=owner: sites.is_training(owner), f"{owner} trains")
    return sites.committed()


def slow_then_silent(sites: Sites, full: int) -> None:
    """Cyd hands in at the deadline what it has done, then never answers, and then counts again."""
    with Slowed(sites, "cyd"):
        slow = await_round(
            sites, sites.committed(), "cyd has done a part", lambda event: 0 < _tokens_of(event, "cyd") < full
        )
        assert slow["missing"] == {}
        assert _tokens_of(slow, "ada") == _tokens_of(slow, "bob") == full

        # A node that never answers: its processes stand still, its connections stay open.
        silent_round = await_training(sites, "cyd")
        agent = psutil.Process(sites.nodes["cyd"].pid)
        agent.suspend()
    trainer = sites.trainer("cyd")
    assert trainer is not None
    trainer.suspend()
    silent = await_round(sites, silent_round, "cyd is missing", lambda event: "cyd" in event["missing"])
    assert silent["missing"] == {"cyd": LATE}
    assert set(silent["nodes"]) == {"ada", "bob"}
    for process in (trainer, agent):
        process.resume()
    await_round(sites, silent["round"], "cyd counts again", lambda event: _tokens_of(event, "cyd") == full)


def leave_and_come_back(sites: Sites, full: int) -> None:
    """Bob leaves in the middle of a round and hands in what it has; later it goes on from there."""
    with Slowed(sites, "bob"):
        left_in = await_training(sites, "bob")
        assert sites.stop_node("bob") == 0
    left = await_round(sites, left_in, "bob is counted", lambda event: "bob" in event["nodes"])
    assert left["round"] == left_in + 1, "it was given up before what it had handed in was counted"
    assert 0 < _tokens_of(left, "bob") < full
    without = await_round(sites, left["round"], "bob has left", lambda event: "bob" not in event["nodes"])
    assert "bob" not in without["missing"], "a node that has left was asked"
    sites.start_node("bob")
    back = await_round(sites, without["round"], "bob is back", lambda event: "bob" in event["nodes"])
    begin = max(ready for ready in sites.positions("bob") if ready < back["round"])
    assert begin == left["round"], "it did not go on where it had left"


def lose_two_then_all(sites: Sites) -> int:
    """Killed in the middle of rounds: one is enough, none is not; then all come back. Gives the round given up."""
    with Slowed(sites, "bob"), Slowed(sites, "cyd"):
        number = await_training(sites, "bob", "cyd")
        for owner in ("bob", "cyd"):
            sites.kill_node(owner)
    alone = await_round(sites, number, "two are missing", lambda event: len(event["missing"]) == 2)
    assert alone["missing"] == {"bob": LATE, "cyd": LATE}
    assert set(alone["nodes"]) == {"ada"}

    # Nobody is left. The round is given up, and nothing is lost.
    loop = sites.wait_for_part("rounds").pid
    with Slowed(sites, "ada"):
        number = await_training(sites, "ada")
        sites.kill_node("ada")
    sites.wait_for_part("rounds", other_than=loop)
    assert sites.committed() == number
    for owner in sites.owners:
        sites.start_node(owner)
    again = await_round(sites, number, "all three count", lambda event: len(event["nodes"]) == 3)
    assert again["missing"] == {}
    return number


def stop(sites: Sites) -> str:
    """End the run where it is: no round is missing and no token was trained twice. What the Aggregator said."""
    code, output = sites.stop_aggregator()
    assert code == 1
    assert "photon aggregator --resume" in output
    last = sites.committed()  # it may have been stopped while one more was being committed
    assert [event["round"] for event in sites.rounds()][:last] == list(range(1, last + 1))
    sites.check_streams(LENGTH)
    return output


def test_slow_silent_leaving_and_absent_nodes(tmp_path: Path) -> None:
    """The life of a federation of three, of whom one is enough."""
    tau = 300
    full = tau * BATCH * LENGTH
    extra = "quorum = 0.3\ngrace_s = 25.0\ndeadline_s = 25.0\nassemble_s = 15.0\n[checkpoint]\nkeep_last = 99\n"
    write_texts(tmp_path / "texts")
    with Sites(tmp_path / "sites", tmp_path / "texts", rounds=ROUNDS, extra=extra, tau=tau) as sites:
        sites.start()
        await_round(sites, 0, "all three have done everything", lambda event: _tokens(event) == [full] * 3)
        slow_then_silent(sites, full)
        leave_and_come_back(sites, full)
        number = lose_two_then_all(sites)
        for owner in sites.owners:
            assert sites.nodes[owner].poll() is None, f"the node of {owner} has ended"
        output = stop(sites)
        assert f"round {number}: 0 of " in output, "the round loop did not say why it ended"


def test_spares_are_let_go_and_the_slow_are_given_less(tmp_path: Path) -> None:
    """Two of three make a round; where only two are left, the slow one gets as many steps as fit."""
    tau = 100
    extra = (
        'nodes_per_round = 2\noversample = 0.5\nbalance = "time"\nquorum = 1.0\ndeadline_s = 600.0\nassemble_s = 5.0\n'
        "[checkpoint]\nkeep_last = 99\n"
    )
    write_texts(tmp_path / "texts")
    with Sites(tmp_path / "sites", tmp_path / "texts", rounds=ROUNDS, extra=extra, tau=tau) as sites:
        sites.start()
        await_round(sites, 0, "two have counted", lambda event: len(event["nodes"]) == 2)
        with Slowed(sites, "cyd"):
            spare = await_round(sites, sites.committed(), "cyd was not needed", lambda event: "cyd" in event["missing"])
            assert spare["missing"]["cyd"] == "not needed: 2 others had answered"
            assert set(spare["nodes"]) == {"ada", "bob"}
            sites.kill_node("bob")
            quarter = tau * BATCH * LENGTH // 4
            less = await_round(
                sites, spare["round"], "cyd has far fewer steps", lambda event: 0 < _tokens_of(event, "cyd") < quarter
            )
        assert less["nodes"]["ada"]["steps"] == tau
        assert set(less["nodes"]) == {"ada", "cyd"}
        stop(sites)


def _tokens(event: dict[str, Any]) -> list[int]:
    return [node["tokens"] for node in event["nodes"].values()]


def _tokens_of(event: dict[str, Any], owner: str) -> int:
    return int(event["nodes"].get(owner, {"tokens": 0})["tokens"])
