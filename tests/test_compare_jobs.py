"""The runner of a comparison's jobs, with a `photon train` that writes a record in no time."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from photon.cli import split_words
from photon.compare_curve import is_finished
from photon.compare_jobs import Runner
from photon.compare_plan import Job, Request, make_plan
from photon.errors import InputError, StoppedError
from photon.events import Event
from photon.method import load_method
from photon.recipe import load_recipe

MakeEvents = Callable[..., list[Event]]
# It notes how it was called, and does once what the file `orders` has for its job's method: an exit code, or "stop".
FAKE = """
import json, pathlib, sys
here = pathlib.Path(__file__).parent
arguments = sys.argv[2:]
with (here / "calls").open("a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
folder = pathlib.Path(arguments[-1])
method = folder.name.split("-s1337-")[0]
orders = json.loads((here / "orders").read_text())
order = orders.pop(method, None)
if order is not None:  # whole or not at all: another job may be reading
    (here / f"orders-{method}").write_text(json.dumps(orders))
    (here / f"orders-{method}").replace(here / "orders")
folder.mkdir(parents=True, exist_ok=True)
if order == "early":
    print("photon: stopped before it was a run")
    (folder / "half").write_text("")
    sys.exit(1)
(folder / "run.json").write_text("{}")
if isinstance(order, int):
    print("photon: it went wrong")
    sys.exit(order)
if order == "stop":
    (folder / "metrics.jsonl").write_text("")
    sys.exit(1)
(folder / "metrics.jsonl").write_bytes((here / "metrics.jsonl").read_bytes())
"""


class Trainer:
    """The stand-in: `orders` say what goes wrong once for a method."""

    def __init__(self, folder: Path, events: list[Event]) -> None:
        self.folder = folder / "photon"
        self.folder.mkdir(parents=True)
        (self.folder / "__init__.py").write_text("")
        (self.folder / "__main__.py").write_text(FAKE)
        lines = [event.model_dump_json() for event in events]
        (self.folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
        self.order({})
        self.slot = {"PYTHONPATH": str(folder)}

    def order(self, orders: dict[str, object]) -> None:
        (self.folder / "orders").write_text(json.dumps(orders))

    def calls(self) -> list[list[str]]:
        """The arguments of each call since the last question."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]


@pytest.fixture
def trainer(tmp_path: Path, make_events: MakeEvents) -> Trainer:
    return Trainer(tmp_path / "stand-in", make_events())


def jobs(*methods: str) -> list[Job]:
    plan = make_plan(Request("demo", (), tuple(map(load_method, methods))))
    return [job for one in plan.methods for job in plan.runs(one, one.points[0])]


def runner(tmp_path: Path, trainer: Trainer, slots: int = 1) -> Runner:
    return Runner(tmp_path / "out", [trainer.slot] * slots, Console(file=io.StringIO()), "photon compare again")


def test_a_finished_run_is_used_and_an_unfinished_one_resumed(tmp_path: Path, trainer: Trainer) -> None:
    wanted = jobs("fedavg", "diloco")
    trainer.order({"diloco": "stop"})
    first = runner(tmp_path, trainer)
    first.run(wanted, "run")
    recipe, folder = tmp_path / "out" / "recipes" / f"{wanted[0].name}.toml", tmp_path / "out" / "runs"
    assert trainer.calls() == [
        [str(recipe), "--run", str(folder / wanted[0].name)],
        [str(recipe.with_name(f"{wanted[1].name}.toml")), "--run", str(folder / wanted[1].name)],
    ]
    assert load_recipe(recipe) == wanted[0].recipe
    assert list(first.failures) == [wanted[1].key]
    again = runner(tmp_path, trainer)
    again.run(wanted, "run")
    assert trainer.calls() == [["--resume", str(folder / wanted[1].name)]]
    assert not again.failures
    again.run(wanted, "run")
    assert trainer.calls() == []


def test_a_folder_with_an_equals_sign_is_no_option(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (wanted,) = jobs("fedavg")
    Runner(Path("lr=0.1"), [trainer.slot], Console(file=io.StringIO()), "photon compare again").run([wanted], "run")
    ((recipe, *_),) = trainer.calls()
    recipes = tmp_path / "lr=0.1" / "recipes"
    assert split_words([recipe]) == (str(recipes / f"{wanted.name}.toml"), [])
    monkeypatch.chdir("/")  # and where a word is a file is not asked
    assert split_words([recipe]) == (recipe, [])


def test_what_was_stopped_before_it_was_a_run_begins_anew(tmp_path: Path, trainer: Trainer) -> None:
    wanted = jobs("fedavg")
    trainer.order({"fedavg": "early"})
    one = runner(tmp_path, trainer)
    one.run(wanted, "run")
    assert one.failures == {wanted[0].key: "stopped before it was a run"}
    again = runner(tmp_path, trainer)
    again.run(wanted, "run")
    assert [call[1] for call in trainer.calls()] == ["--run", "--run"]
    assert is_finished(again.folder(wanted[0]))
    assert not (again.folder(wanted[0]) / "half").exists()


def test_a_failed_run_does_not_stop_the_others(tmp_path: Path, trainer: Trainer) -> None:
    wanted = jobs("fedavg", "diloco", "muloco")
    trainer.order({"fedavg": 1})
    one = runner(tmp_path, trainer, slots=2)
    one.run(wanted, "run")
    assert one.failures == {wanted[0].key: "it went wrong"}
    assert [is_finished(one.folder(job)) for job in wanted] == [False, True, True]


def test_wrong_input_stops_everything(tmp_path: Path, trainer: Trainer) -> None:
    trainer.order({"fedavg": 2})
    with pytest.raises(InputError, match="it went wrong"):
        runner(tmp_path, trainer).run(jobs("fedavg", "diloco"), "run")
    assert len(trainer.calls()) == 1


def test_equal_content_is_run_once_whoever_asks(tmp_path: Path, trainer: Trainer) -> None:
    same = [Job("one", 1337, "", load_recipe("demo"), "abc"), Job("two", 1337, "", load_recipe("demo"), "abc")]
    one = runner(tmp_path, trainer)
    one.run(same, "run")
    assert len(trainer.calls()) == 1
    assert one.folder(same[0]) == one.folder(same[1])


def test_a_run_that_another_process_holds_is_waited_for(tmp_path: Path, trainer: Trainer) -> None:
    """As after `kill -9` of the command alone: its run goes on, and is neither disturbed nor begun twice."""
    wanted = jobs("fedavg")
    one = runner(tmp_path, trainer)
    folder = tmp_path / "out" / "runs" / wanted[0].name
    folder.mkdir(parents=True)
    hold = (
        "import pathlib, sys, time\nfrom photon.durable import only_process\n"
        "with only_process(pathlib.Path(sys.argv[1]), 'held'):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(folder / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    started = one._start(wanted[0], trainer.slot)
    assert started.process is None
    assert not one._is_over(started)
    holder.communicate("")
    assert one._is_over(started)
    one.run(wanted, "run")
    assert is_finished(folder)
    assert len(trainer.calls()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_the_runs_and_says_how_to_go_on(number: signal.Signals, tmp_path: Path, trainer: Trainer) -> None:
    (trainer.folder / "__main__.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def stop(*_):\n    raise KeyboardInterrupt\n"
        "signal.signal(signal.SIGTERM, stop)\npathlib.Path(sys.argv[-1]).mkdir(parents=True)\n"
        "try:\n    time.sleep(200)\nexcept KeyboardInterrupt:\n    (pathlib.Path(sys.argv[-1]) / 'told').touch()\n"
    )
    script = (
        "import pathlib, sys\nfrom rich.console import Console\nfrom photon.compare_jobs import Runner\n"
        "from photon.compare_plan import Request, make_plan\nfrom photon.method import load_method\n"
        "plan = make_plan(Request('demo', (), (load_method('fedavg'),)))\n"
        "slot = {'PYTHONPATH': sys.argv[2]}\n"
        "runner = Runner(pathlib.Path(sys.argv[1]), [slot], Console(), 'photon compare again')\n"
        "runner.run(plan.runs(plan.methods[0], plan.methods[0].points[0]), 'run')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "out"), trainer.slot["PYTHONPATH"]],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("runs/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert StoppedError.__name__ in said
    assert "Go on with: photon compare again" in said
    assert list((tmp_path / "out").glob("runs/*/told"))
