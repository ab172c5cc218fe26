"""What a person sees while the runs of a comparison go on: a line for each that begins or ends, and on a terminal a
status line below them."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from photon.compare_plan import Job, run_tokens
from photon.events import Evaluated, RoundDone, parse_event
from photon.readable import duration
from photon.track import METRICS_FILE

_SHOW_EVERY_S = 1.0
_TAIL_BYTES = 2**18


class Progress:
    """Which job of how many, its loss, and how long it will all take. `waiting` are the keys that are not finished."""

    def __init__(self, console: Console, title: str, jobs: Sequence[Job], waiting: Collection[str]) -> None:
        self._console, self._title = console, title
        self._number = {job.key: index for index, job in enumerate(jobs, 1)}
        self._jobs = {job.key: job for job in jobs}
        self._left = set(waiting)
        self._begun_at: dict[str, float] = {}  # share of a job that was done when this command took it up
        self._began_s = time.monotonic()
        self._shown_s = 0.0
        self._done_tokens = 0.0
        self._status: Status | None = None

    def __enter__(self) -> Self:
        reused = len(self._jobs) - len(self._left)
        if reused:
            self._say(f"{self._title}: {reused} of {len(self._jobs)} runs are finished already")
        if self._console.is_terminal and self._left:
            self._status = self._console.status("")
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def began(self, job: Job) -> None:
        """A job was started or taken up."""
        self._say(f"{self._name(job)} begins")

    def show(self, running: Mapping[str, Path]) -> None:
        """Refresh the status line, from the records of the runs that go on."""
        now = time.monotonic()
        if now - self._shown_s < _SHOW_EVERY_S:
            return
        self._shown_s = now
        parts, partial = [], 0.0
        for key, folder in running.items():
            job = self._jobs[key]
            rounds, loss = latest(folder / METRICS_FILE)
            share = rounds / job.recipe.federation.rounds
            partial += (share - self._begun_at.setdefault(key, share)) * run_tokens(job.recipe)
            told = f" loss {loss:.2f}" if loss is not None else ""
            parts.append(f"{self._name(job)} round {rounds}/{job.recipe.federation.rounds}{told}")
        if self._status is not None:
            self._status.update(escape("  ".join([*parts, self._time_left(partial)])))

    def ended(self, job: Job, folder: Path, failure: str | None) -> None:
        """A job is over."""
        self._left.discard(job.key)
        self._done_tokens += (1 - self._begun_at.pop(job.key, 0.0)) * run_tokens(job.recipe)
        _, loss = latest(folder / METRICS_FILE)
        result = f"failed: {failure}" if failure else f"held-out loss {loss:.4f}" if loss is not None else "ended"
        self._say(f"{self._name(job)} {result}  {self._time_left(0.0)}")

    def _time_left(self, partial_tokens: float) -> str:
        """At the pace of this command so far, in tokens."""
        done = self._done_tokens + partial_tokens
        before = sum(share * run_tokens(self._jobs[key].recipe) for key, share in self._begun_at.items())
        left = sum(run_tokens(self._jobs[key].recipe) for key in self._left) - before - partial_tokens
        if not self._left or done <= 0:
            return ""
        return f"about {duration((time.monotonic() - self._began_s) / done * left)} left"

    def _name(self, job: Job) -> str:
        point = f" ({job.point})" if job.point else ""
        return f"{self._title} {self._number[job.key]}/{len(self._jobs)} {job.method} seed {job.seed}{point}"

    def _say(self, line: str) -> None:
        self._console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)


def latest(metrics: Path) -> tuple[int, float | None]:
    """Rounds committed, and the newest held-out loss, of a run that may be writing this moment."""
    rounds, loss = 0, None
    with suppress(OSError):
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
        for line in lines[:-1]:  # the last one may be half written
            with suppress(ValidationError):  # so may the first be, where the tail begins
                event = parse_event(line)
                if isinstance(event, RoundDone):
                    rounds = event.round
                elif isinstance(event, Evaluated):
                    loss = event.pooled.loss
    return rounds, loss
