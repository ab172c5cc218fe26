"""Children come back when they die and go when their supervisor does, however that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from photon.fabric import supervise
from photon.fabric.supervise import Child, Supervisor, free_port, start_child

DEADLINE_S = 20.0
# Writes its process id, and that of a process that it starts itself, into a file; then waits. With `deaf` it asks for
# no lifeline: the mutant that outlives its supervisor.
CHILD = """
import argparse, os, pathlib, signal, subprocess, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--socket", type=int)
parser.add_argument("out", type=pathlib.Path)
parser.add_argument("how", nargs="*")
arguments = parser.parse_args()
if "deaf" not in arguments.how:
    from photon.fabric.lifeline import end_with
    os.set_inheritable(arguments.socket, False)
    end_with(arguments.socket)
if "stubborn" in arguments.how:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "end" in arguments.how:
    print("ending", flush=True)
    sys.exit(3)
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with arguments.out.open("a") as file:
    file.write(f"{os.getpid()} {helper.pid}\\n")
time.sleep(600)
"""


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def lives(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def starts(path: Path) -> list[tuple[int, int]]:
    """(process, its helper) of every start so far."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(line.split()[0]), int(line.split()[1])) for line in lines if len(line.split()) == 2]


def child(folder: Path, name: str = "one", *how: str) -> Child:
    command = [sys.executable, "-c", CHILD, "--", str(folder / name), *how]
    return Child(name, command, folder / "logs" / f"{name}.log")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "_LOOK_S", 0.02)
    monkeypatch.setattr(supervise, "_FIRST_PAUSE_S", 0.01)


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Callable[..., Supervisor]]:
    made: list[Supervisor] = []

    def supervise_all(*children: Child) -> Supervisor:
        for one in children:
            one.pause_s = 0.01
        made.append(Supervisor(children))
        return made[-1]

    yield supervise_all
    for supervisor in made:
        supervisor.close()


def test_a_child_that_is_killed_comes_back_and_what_it_started_is_gone(
    tmp_path: Path, supervised: Callable[..., Supervisor]
) -> None:
    supervisor = supervised(child(tmp_path), child(tmp_path, "two"))
    for number in range(1, 3):
        until(lambda number=number: len(starts(tmp_path / "one")) == number, "it was not started")
        process, helper = starts(tmp_path / "one")[-1]
        assert supervisor.process_id("one") == process
        os.kill(process, signal.SIGKILL)
        until(lambda helper=helper: not lives(helper), "its helper was left behind")
    until(lambda: len(starts(tmp_path / "one")) == 3, "it was not started again")
    until(lambda: len(starts(tmp_path / "two")) == 1, "the other one was not started")
    assert [one.restarts for one in supervisor.children] == [2, 0]  # the other one had nothing of it
    assert lives(starts(tmp_path / "two")[0][0])


def test_a_child_that_cannot_live_is_started_again_and_again_ever_more_slowly(
    tmp_path: Path, supervised: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "_LONGEST_PAUSE_S", 0.05)
    one = child(tmp_path, "one", "end")
    supervised(one)
    until(lambda: one.restarts >= 4, "it was not started again and again")
    assert one.pause_s == 0.05
    monkeypatch.setattr(supervise, "_STEADY_S", 0.0)  # from now on every life is a long one
    until(lambda: one.pause_s == 0.01, "the pause did not begin anew")


class _Dead:
    """Stands for a process that has ended; its number is beyond what a kernel gives out."""

    pid = 2**22 + 1

    def poll(self) -> int:
        return 1

    def wait(self, timeout: float) -> int:
        return 1


class _Clock:
    """Stands for the supervisor's event and for the time: nobody waits, and after so many starts it is over."""

    def __init__(self, starts: int) -> None:
        self.now, self.starts, self.started = 1000.0, starts, list[float]()

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return len(self.started) >= self.starts

    def is_set(self) -> bool:
        return False


@pytest.mark.parametrize("is_steady", [False, True])
def test_the_pauses_of_a_real_run(is_steady: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real lengths
    clock = _Clock(starts=9)
    monkeypatch.setattr(supervise, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def start(supervisor: Supervisor, child: Child) -> None:
        lived_s = supervise._STEADY_S + 1 if is_steady else 0.0
        clock.started.append(clock.now)
        child.process, child.started_at = _Dead(), clock.now - lived_s  # type: ignore[assignment]  # a stand-in

    monkeypatch.setattr(Supervisor, "_start", start)
    monkeypatch.setattr(supervise, "Thread", lambda **_: SimpleNamespace(start=lambda: None))
    supervisor = Supervisor([Child("one", [], tmp_path / "log")])
    supervisor._closing = clock  # type: ignore[assignment]  # a stand-in
    supervisor._look_after()
    pauses = [after - before for before, after in zip(clock.started, clock.started[1:], strict=False)]
    if is_steady:
        wanted = [supervise._FIRST_PAUSE_S] * 8
    else:
        wanted = [min(supervise._FIRST_PAUSE_S * 2**n, supervise._LONGEST_PAUSE_S) for n in range(1, 9)]
        assert wanted[-1] == supervise._LONGEST_PAUSE_S
    assert all(least <= pause <= least + 3 * supervise._LOOK_S for pause, least in zip(pauses, wanted, strict=True))


def test_a_child_that_pauses_keeps_nobody_waiting(
    tmp_path: Path, supervised: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = child(tmp_path, "one", "end"), child(tmp_path, "two")
    supervised(one, two)
    one.pause_s = 300.0
    monkeypatch.setattr(supervise, "_LONGEST_PAUSE_S", 600.0)
    until(lambda: one.start_at is not None and one.pause_s == 600.0, "it does not pause")
    until(lambda: len(starts(tmp_path / "two")) == 1, "the other one was not started")
    os.kill(starts(tmp_path / "two")[0][0], signal.SIGKILL)
    until(lambda: len(starts(tmp_path / "two")) == 2, "the other one waited for it")


OUTER = """
import sys, time
from pathlib import Path
from photon.fabric.supervise import Child, Supervisor
folder, child = Path(sys.argv[1]), Path(sys.argv[2]).read_text()
Supervisor([
    Child(name, [sys.executable, "-c", child, "--", str(folder / name), *how], folder / f"{name}.log")
    for name, how in (("one", ()), ("two", ()), ("deaf", ("deaf",)))
])
time.sleep(600)
"""


def test_children_are_gone_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    """kill -9: nothing of the supervisor runs any more, and yet nothing that it started is left."""
    (tmp_path / "child.py").write_text(CHILD)
    outer = subprocess.Popen([sys.executable, "-c", OUTER, tmp_path, tmp_path / "child.py"], start_new_session=True)
    mutants: tuple[int, ...] = ()
    try:
        names = ("one", "two", "deaf")
        until(lambda: all(starts(tmp_path / name) for name in names), "they were not started")
        processes = [pid for name in names[:2] for pid in starts(tmp_path / name)[0]]
        mutants = starts(tmp_path / "deaf")[0]
        assert all(lives(pid) for pid in processes)
        outer.kill()
        outer.wait(DEADLINE_S)
        until(lambda: not any(lives(pid) for pid in processes), "they were left behind")
        assert all(lives(pid) for pid in mutants)  # mutant: a child without the lifeline outlives its supervisor
    finally:
        outer.kill()
        outer.wait(DEADLINE_S)
        for pid in mutants:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_closing_ends_them_all_and_nothing_comes_back(tmp_path: Path, supervised: Callable[..., Supervisor]) -> None:
    """Also one that does not listen to SIGTERM, and what they started."""
    supervisor = supervised(child(tmp_path), child(tmp_path, "two", "stubborn"))
    until(lambda: all(starts(tmp_path / name) for name in ("one", "two")), "they were not started")
    supervisor.close(deadline_s=0.5)
    for name in ("one", "two"):
        assert not any(lives(pid) for pid in starts(tmp_path / name)[0])
        assert supervisor.process_id(name) is None
    assert not supervisor._thread.is_alive()
    assert [one.restarts for one in supervisor.children] == [0, 0]


def test_the_log_says_what_the_child_said_and_a_large_one_makes_room(
    tmp_path: Path, supervised: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "logs" / "one.log"
    log.parent.mkdir()
    log.write_text("small\n")
    supervised(child(tmp_path))
    until(lambda: len(starts(tmp_path / "one")) == 1, "it was not started")
    assert log.read_text().startswith("small\n---")
    assert "one starting\n" in log.read_text()

    monkeypatch.setattr(supervise, "_LOG_BYTES", 100)
    log.write_text("l" * 101)
    os.kill(starts(tmp_path / "one")[0][0], signal.SIGKILL)
    until(lambda: len(starts(tmp_path / "one")) == 2, "it was not started again")
    assert log.with_name("one.log.old").read_text() == "l" * 101
    assert log.read_text().startswith("---")
    # A second one takes the place of the first: two files at most, however long the run.
    log.write_text("m" * 101)
    os.kill(starts(tmp_path / "one")[1][0], signal.SIGKILL)
    until(lambda: len(starts(tmp_path / "one")) == 3, "it was not started again")
    assert log.with_name("one.log.old").read_text() == "m" * 101
    assert sorted(path.name for path in log.parent.iterdir()) == ["one.log", "one.log.old"]


def test_output_of_a_child_that_ends_is_kept(tmp_path: Path, supervised: Callable[..., Supervisor]) -> None:
    one = child(tmp_path, "one", "end")
    supervised(one)
    until(lambda: one.log.exists() and one.log.read_text().count("ending") >= 2, "it did not say it")


def test_a_child_gets_its_environment_alone_and_keeps_its_own_arguments(tmp_path: Path) -> None:
    said = tmp_path / "said"
    environment: Mapping[str, str] = {**os.environ, "PHOTON_TEST_WORD": "told"}
    code = "import os, sys; print(os.environ['PHOTON_TEST_WORD'], os.getpgrp() == os.getpid(), sys.argv[1:])"
    with said.open("wb") as output:
        process, lifeline = start_child([sys.executable, "-c", code, "a", "--", "b"], environment, output)
        with lifeline:
            assert process.wait(DEADLINE_S) == 0
    word, is_leader, *rest = said.read_text().split()
    assert (word, is_leader) == ("told", "True")
    assert [part.strip("[],'") for part in rest][:2] == ["a", "--socket"]
    assert [part.strip("[],'") for part in rest][3:] == ["--", "b"]


def test_a_free_port_can_be_used() -> None:
    assert 1024 <= free_port() < 2**16
