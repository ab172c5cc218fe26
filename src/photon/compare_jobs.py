"""Runs the jobs of a comparison, each `photon train` in a process of its own; what is finished is not run again.

Every job has a run folder under OUT/runs that ends with the key of its content. A finished one is used, an unfinished
one resumed. If an earlier command was killed and left a run behind that still goes on, that run is waited for.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from photon.compare_curve import is_finished
from photon.compare_plan import Job
from photon.compare_progress import Progress
from photon.durable import only_process, write_atomic
from photon.errors import InputError, StoppedError
from photon.readable import one_line
from photon.recipe import dump_recipe
from photon.stopsignals import sigterm_as_ctrl_c

RUNS, RECIPES, LOGS = "runs", "recipes", "logs"
_POLL_S = 0.2
_STOP_WITHIN_S = 60.0
_WRONG_INPUT = 2
_LAST_LINES_BYTES = 4000

Slot = Mapping[str, str]  # what a job finds in its environment beside ours


@dataclass
class _Running:
    """A job at work; `process` None: an earlier command's, which is waited for."""

    job: Job
    folder: Path
    slot: Slot
    log: Path
    process: subprocess.Popen[bytes] | None


@dataclass
class Runner:
    """Brings jobs to their end, as many at once as there are slots. `again` is the command that goes on later."""

    out: Path
    slots: Sequence[Slot]
    console: Console
    again: str
    failures: dict[str, str] = field(default_factory=dict)  # by key

    def folder(self, job: Job) -> Path:
        """The job's run folder, under the name of whichever method first had this content."""
        found = sorted((self.out / RUNS).glob(f"*-{job.key}"))
        return found[0] if found else self.out / RUNS / job.name

    def run(self, jobs: Sequence[Job], title: str) -> None:
        """Bring all jobs to their end; those that fail are told in `failures`, the others go on.

        Raises InputError if a job was refused (a missing text or device: all would be), StoppedError on Ctrl-C or
        SIGTERM.
        """
        unique = list({job.key: job for job in jobs}.values())
        waiting = [job for job in unique if job.key not in self.failures and not is_finished(self.folder(job))]
        running: list[_Running] = []
        free = list(self.slots)
        shown = Progress(self.console, title, unique, {job.key for job in waiting})
        with sigterm_as_ctrl_c(), shown as progress:
            try:
                while waiting or running:
                    while waiting and free:
                        running.append(self._start(waiting.pop(0), free.pop(0)))
                        progress.began(running[-1].job)
                    time.sleep(_POLL_S)
                    progress.show({one.job.key: one.folder for one in running})
                    for one in [one for one in running if self._is_over(one)]:
                        running.remove(one)
                        free.append(one.slot)
                        self._settle(one, waiting)
                        progress.ended(one.job, one.folder, self.failures.get(one.job.key))
            except BaseException as error:
                _stop([one.process for one in running if one.process is not None])
                if isinstance(error, KeyboardInterrupt):
                    raise StoppedError(
                        f"stopped; finished runs and committed rounds are safe. Go on with: {self.again}"
                    ) from None
                raise

    def _start(self, job: Job, slot: Slot) -> _Running:
        folder = self.folder(job)
        log = self.out / LOGS / f"{job.name}.log"
        if _is_held(folder):
            return _Running(job, folder, slot, log, None)
        if (folder / "run.json").is_file():
            arguments = ["--resume", str(folder)]
        else:
            if folder.exists():  # stopped before it was a run: nothing in it is worth keeping
                shutil.rmtree(folder)
            recipe = self.out / RECIPES / f"{job.name}.toml"
            recipe.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(recipe, dump_recipe(job.recipe))
            # Absolute, so that a `=` in a folder's name is not taken for an option.
            arguments = [str(recipe.absolute()), "--run", str(folder)]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(  # noqa: S603 - this Python and our own module
                [sys.executable, "-m", "photon", "train", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **slot},
                start_new_session=True,  # Ctrl-C reaches us alone; we pass it on
            )
        return _Running(job, folder, slot, log, process)

    @staticmethod
    def _is_over(one: _Running) -> bool:
        return one.process.poll() is not None if one.process is not None else not _is_held(one.folder)

    def _settle(self, one: _Running, waiting: list[Job]) -> None:
        """Note a failure; a run that somebody else left unfinished is taken up."""
        if is_finished(one.folder):
            return
        if one.process is None:
            waiting.insert(0, one.job)
            return
        said = _last_words(one.log)
        if one.process.returncode == _WRONG_INPUT:
            raise InputError(f"{one.job.name}: {said} (all of it: {one.log})")
        self.failures[one.job.key] = said or f"exit code {one.process.returncode}"


def _is_held(folder: Path) -> bool:
    """Whether a process trains in the folder now."""
    if not (folder / ".lock").is_file():
        return False
    try:
        with only_process(folder / ".lock", "held"):
            return False
    except InputError:
        return True


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask for an end as Ctrl-C does; what does not end in time is killed. A second Ctrl-C kills at once."""
    for process in processes:
        process.terminate()  # of a command in a shell's background SIGINT is ignored, and in its children
    deadline = time.monotonic() + _STOP_WITHIN_S
    try:
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _last_words(log: Path) -> str:
    """The last line of a log that says something."""
    with suppress(OSError):
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LAST_LINES_BYTES))
            lines = [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return one_line(lines[-1].removeprefix("photon: "), 300) if lines else ""
    return ""
