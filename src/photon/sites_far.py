"""`photon aggregator`: the Aggregator's side of a run whose nodes are elsewhere, kept alive.

Three children: SuperLink, gateway, and the round loop (`python -m photon.sites_far --run RUN`). Whichever dies is
started again; the round loop goes on from the last committed round. This process only looks after them.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from photon.config import Recipe
from photon.data.build import Progress, prepare_tokenizer
from photon.display import Display, open_display
from photon.durable import NumberedStates, only_process, write_atomic
from photon.errors import ConfigError, FabricError, InputError, PhotonError, StoppedError
from photon.events import RunFinished
from photon.fabric.base import Fabric
from photon.fabric.flower import FlowerFabric
from photon.fabric.hub import Hub
from photon.fabric.lifeline import end_with
from photon.fabric.supervise import Supervisor, start_child
from photon.recipe import dump_recipe, load_recipe
from photon.results import show_results
from photon.run import Run, Setting, embedding_rows, open_run, run_to_end, write_results
from photon.runfolder import RunFolder
from photon.status_board import StatusBoard
from photon.stopsignals import sigterm_as_ctrl_c
from photon.track import Tracker, read_events

_MAX_FAILURES = 10  # of the round loop in a row, without a round committed between
_LONGEST_PAUSE_S = 60.0
_STOP_S = 30.0
_LOOK_S = 0.5


def prepare_run_folder(recipe: Recipe, folder: RunFolder, display: Display) -> None:
    """Make `folder` a run without any owner's text: recipe, tokenizer, identity. Raises DataError, ConfigError."""
    if recipe.federation.outer == "none":
        raise ConfigError('federation.outer = "none" is the centralised baseline: it has no nodes elsewhere')

    def show(step: Progress) -> None:
        display.data_progress(step.silo, step.phase, step.done_bytes, step.total_bytes, step.note)

    with folder.lock():
        tokenizer = prepare_tokenizer(recipe, progress=show)
        folder.tokenizer.mkdir(exist_ok=True)
        tokenizer.save(folder.tokenizer)
        write_atomic(folder.recipe, dump_recipe(recipe))
        folder.write_identity(embedding_rows(recipe, tokenizer))


def aggregate(folder: RunFolder, keys: Path, host: str, port: int) -> None:
    """Run the hub and the round loop of `folder` to the end.

    Raises what ends a run for good; StoppedError on Ctrl-C or SIGTERM.
    """
    folder.identity()
    recipe = load_recipe(folder.recipe)
    if _is_finished(folder, recipe):
        write_results(folder)  # the last that a run does: it may have been ended before that
        print(f"{folder.path} is finished: its model is {folder.model}", flush=True)
        return
    hub = Hub(folder)
    hub.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with only_process(hub.path / "lock", f"{folder.path} has a photon aggregator already"), sigterm_as_ctrl_c():
        hub.prepare(recipe, keys, host, port)
        supervisor = Supervisor(hub.children())
        try:
            print(f"gateway on {_address(*hub.gateway_address())}, run {folder.path}", flush=True)
            _run_rounds(folder)
        except KeyboardInterrupt:
            raise StoppedError(
                "stopped; committed rounds are safe. Go on with: "
                f"photon aggregator --resume {folder.path} --keys {keys} --listen {_address(host, port)}"
            ) from None
        finally:
            supervisor.close()
    hub.remove_leftovers()


def _address(host: str, port: int) -> str:
    """As --listen takes it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_finished(folder: RunFolder, recipe: Recipe) -> bool:
    """Whether nothing is left to do but to write the results: the last event says so, and follows the export."""
    states = NumberedStates(folder.rounds)
    newest = max(states.numbers(), default=None)
    # By steps: with a tau that varies a run may end after fewer rounds than planned, or more.
    steps = states.fields(newest).get("sequential_step", 0) if newest is not None else 0
    if steps < recipe.federation.sequential_steps or not folder.model.is_dir():
        return False
    events = read_events(folder.metrics)
    return bool(events) and isinstance(events[-1], RunFinished)


@contextmanager
def hub_fabric(hub: Hub, run: Run, payload_bytes: int, tracker: Tracker) -> Iterator[FlowerFabric]:
    """The fabric over a hub that runs, with its status kept in `status.json`."""
    fabric = hub.open_fabric(run.recipe, payload_bytes, tracker.note)
    board = StatusBoard(
        hub.status,
        hub.traffic,
        run.identity.run,
        run.recipe.name,
        run.recipe.federation.rounds,
        [silo.name for silo in run.recipe.silo],
        fabric.peers,
    )
    for event in read_events(run.folder.metrics):  # what happened before a restart counts too
        board.write(event)
    tracker.add(board)
    try:
        yield fabric
    except PhotonError as error:
        board.note(str(error))
        raise
    finally:
        fabric.close()
        board.close()


def _run_rounds(folder: RunFolder) -> None:
    """The round loop as a child, started again until it ends well. Raises FabricError when that is in vain."""
    states = NumberedStates(folder.rounds)
    failures, newest = 0, -1
    command = [sys.executable, "-m", "photon.sites_far", "--run", str(folder.path)]
    while True:
        process, lifeline = start_child(command, os.environ, None)
        try:
            code = _wait(process)
        finally:
            lifeline.close()
        if code == 0:
            return
        if code == InputError.exit_code:
            raise InputError(f"the round loop cannot go on with {folder.path}; what it said stands above")
        committed = max(states.numbers(), default=-1)
        failures = 1 if committed > newest else failures + 1
        newest = committed
        if failures >= _MAX_FAILURES:
            raise FabricError(f"the round loop failed {failures} times after round {newest}; what it said stands above")
        pause_s = min(2.0 ** (failures - 1), _LONGEST_PAUSE_S)
        print(f"the round loop ended ({_ending(code)}); starting it again in {pause_s:g} s", flush=True)
        time.sleep(pause_s)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Its exit code. On Ctrl-C or SIGTERM it is stopped, within a deadline, and KeyboardInterrupt goes on."""
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(_LOOK_S)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
        process.kill()
        process.wait()
        raise


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


@contextmanager
def _open_hub_fabric(run: Run, payload_bytes: int, tracker: Tracker) -> Iterator[Fabric]:
    with hub_fabric(Hub(run.folder), run, payload_bytes, tracker) as fabric:
        yield fabric


def main() -> None:
    """Entry point of `python -m photon.sites_far`: the round loop of a run whose hub is up."""
    parser = argparse.ArgumentParser(description="the round loop of photon aggregator; started by it")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--socket", type=int)
    arguments = parser.parse_args()
    if arguments.socket is not None:
        os.set_inheritable(arguments.socket, False)
        end_with(arguments.socket)
    folder = RunFolder(arguments.run)
    try:
        with sigterm_as_ctrl_c(), open_display(sys.stdout) as display, folder.lock():
            for note in folder.changes():
                display.note(note)
            run = open_run(folder)
            setting = Setting("sites", len(run.recipe.silo), 1, False, _open_hub_fabric)
            summary = run_to_end(run, display, setting, f"photon aggregator --resume {folder.path} ...")
        show_results(folder, summary, Console())
    except PhotonError as error:
        print(f"photon: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
