"""What a person sees while a run goes on: one live screen on a terminal, plain lines everywhere else."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from photon.events import Evaluated, Event, NodeProgress, RoundDone, RunFinished, RunStarted, Sampled
from photon.readable import byte_size, count, duration, one_line, printable, significant
from photon.summary import Quality, Summary

_ROUNDS_FOR_TIME_LEFT = 8
_DATA_LINE_EVERY_S = 2.0


class Display(Protocol):
    """Shows a run. Use it as a context manager: it owns its part of the terminal from entry to exit."""

    def write(self, event: Event) -> None:
        """Show an event of the run."""

    def progress(self, progress: NodeProgress) -> None:
        """Show what a node is doing now."""

    def note(self, text: str) -> None:
        """Show a remark or a warning; it stays visible."""

    def data_progress(self, silo: str, phase: str, done_bytes: int, total_bytes: int | None, note: str) -> None:
        """Show how far a silo's text is prepared; `total_bytes` None = not known."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class RunView:
    """What both displays know of the run so far, folded from its events."""

    def __init__(self) -> None:
        self.start: RunStarted | None = None
        self.last: RoundDone | None = None
        self.evaluations: list[Evaluated] = []
        self.finish: RunFinished | None = None
        self._latest: deque[tuple[float, int]] = deque(maxlen=_ROUNDS_FOR_TIME_LEFT)  # seconds and steps of rounds
        self._round_began_s = 0.0

    def fold(self, event: Event) -> None:
        """Take in one event."""
        if isinstance(event, RunStarted):
            self.start, self._round_began_s = event, event.seconds
        elif isinstance(event, RoundDone):
            self._latest.append((event.seconds - self._round_began_s, event.sequential_step - self.steps_done))
            self.last, self._round_began_s = event, event.seconds
        elif isinstance(event, Evaluated):
            self.evaluations.append(event)
        elif isinstance(event, RunFinished):
            self.finish = event

    @property
    def rounds_done(self) -> int:
        """Rounds committed."""
        if self.last is not None:
            return self.last.round
        return self.start.first_round if self.start is not None else 0

    @property
    def steps_planned(self) -> int:
        """Sequential steps of the whole run; 1 before it is known."""
        return self.start.rounds * self.start.tau if self.start is not None else 1

    @property
    def steps_done(self) -> int:
        """Sequential steps of the rounds committed."""
        if self.last is not None:
            return self.last.sequential_step
        return self.start.first_step if self.start is not None else 0

    @property
    def steps_left(self) -> int:
        """Sequential steps to go."""
        return max(0, self.steps_planned - self.steps_done)

    @property
    def keeps_tau(self) -> bool:
        """Whether every round so far had the tau of the recipe, so that there will be as many as planned."""
        return self.start is None or self.steps_done == self.rounds_done * self.start.tau

    @property
    def rounds_planned(self) -> str:
        """Of the whole run; `~` before it where a method has changed tau: as many as there are if tau stays so now."""
        if self.start is None:
            return "?"
        if self.keeps_tau:
            return str(self.start.rounds)
        if not self.steps_left:
            return str(self.rounds_done)
        tau = self._latest[-1][1] if self._latest else self.start.tau
        return f"~{self.rounds_done + math.ceil(self.steps_left / max(1, tau))}"

    @property
    def seconds_left(self) -> float | None:
        """Sequential steps to go x wall time of a step in the latest rounds of this session; None before the first."""
        steps = sum(steps for _, steps in self._latest)
        if self.start is None or self.last is None or steps < 1:
            return None
        step_s = sum(seconds for seconds, _ in self._latest) / steps
        return self.steps_left * step_s


class PlainDisplay:
    """One line a round, for logs and pipes: no colours, no cursor movement, every line flushed.

    Data preparation is told in a line at most every 2 s. `clock` returns seconds (monotonic). When the reader of a pipe
    leaves (`photon train | head`), the display falls silent and the run goes on: metrics.jsonl has every number.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._view = RunView()
        self._untold: Evaluated | None = None
        self._reader_left = False
        self._data_line_at_s = float("-inf")
        self._lock = RLock()

    def write(self, event: Event) -> None:
        """Print the line of an event."""
        with self._lock:
            self._view.fold(event)
            if isinstance(event, RunStarted):
                self._print(started_line(event))
            elif isinstance(event, RoundDone):
                self._print(self._round_line(event, self._untold))
                self._untold = None
            elif isinstance(event, Evaluated):
                # Nodes score the model of one round while they do the next, so that round's line tells it. The first
                # and the last score stand alone.
                is_last = self._view.start is not None and event.sequential_step >= self._view.steps_planned
                if event.round == 0 or is_last:
                    self._print(_evaluation_line(event))
                else:
                    self._untold = event
            elif isinstance(event, RunFinished):
                self._print(
                    f"finished after {event.round} rounds in {duration(event.seconds)}  model {event.model_sha256[:12]}"
                )

    def progress(self, progress: NodeProgress) -> None:
        """Print failures only: the rest is for a screen that can be overwritten."""
        if progress.state == "failed":
            self.note(f"node {progress.node} failed in round {progress.round}: {progress.note}")

    def note(self, text: str) -> None:
        """Print a remark."""
        with self._lock:
            self._print(f"note: {one_line(text, 400)}")

    def data_progress(self, silo: str, phase: str, done_bytes: int, total_bytes: int | None, note: str) -> None:
        """Print how far a silo's text is, unless a line was printed within the last 2 s."""
        with self._lock:
            now_s = self._clock()
            if now_s - self._data_line_at_s < _DATA_LINE_EVERY_S:
                return
            self._data_line_at_s = now_s
            total = f" of {byte_size(total_bytes)} ({_percent(done_bytes, total_bytes)})" if total_bytes else ""
            remark = f"  {one_line(note)}" if note else ""
            self._print(f"data {silo}: {phase} {byte_size(done_bytes)}{total}{remark}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to undo: every line was flushed."""

    def _round_line(self, event: RoundDone, heldout: Evaluated | None) -> str:
        left_s = self._view.seconds_left
        loss = f"loss {event.train_loss:.2f} train"
        if heldout is not None:
            of = "" if heldout.round == event.round else f" (of round {heldout.round})"
            loss += f" {heldout.pooled.loss:.2f} held-out{of}  {heldout.pooled.bits_per_byte:.2f} bpb"
        parts = [
            f"round {event.round}/{self._view.rounds_planned}",
            f"step {event.sequential_step}",
            f"{count(event.tokens)} tokens",
            f"{count(event.tokens_per_second)} tok/s",
            loss,
            f"up {byte_size(event.bytes_up)} down {byte_size(event.bytes_down)}",
        ]
        if left_s is not None:
            parts.append(f"{duration(left_s)} left")
        parts += [f"without {name} ({one_line(reason)})" for name, reason in sorted(event.missing.items())]
        return "  ".join(parts)

    def _print(self, line: str) -> None:
        if self._reader_left:
            return
        # A stream that cannot show a letter (LANG=C) must not end a run.
        encoding = self._stream.encoding or "utf-8"
        try:
            self._stream.write(line.encode(encoding, "replace").decode(encoding) + "\n")
            self._stream.flush()
        except OSError:
            self._reader_left = True


def open_display(stream: TextIO) -> Display:
    """A live display if `stream` is a terminal that can redraw and shows UTF-8, else plain lines."""
    from photon.display_live import LiveDisplay  # here, because it builds on this module

    console = Console(file=stream)
    unicode = (stream.encoding or "").lower().replace("-", "") == "utf8"
    if stream.isatty() and unicode and not console.is_dumb_terminal:
        return LiveDisplay(console)
    return PlainDisplay(stream)


def started_line(event: RunStarted) -> str:
    """The facts of a run in one line, used by both displays."""
    nodes = f"{len(event.nodes)} node{'s' if len(event.nodes) != 1 else ''}"
    if event.nodes_per_round != len(event.nodes):
        nodes += f" ({event.nodes_per_round} a round)"
    again = f"  resumed after round {event.first_round}" if event.first_round else ""
    return (
        f"run {one_line(event.run)}  {nodes}  {event.rounds} rounds x {event.tau} steps  "
        f"{count(event.parameters)} parameters ({byte_size(event.payload_bytes)})  "
        f"{one_line(event.device)}, {event.workers} x {event.threads} threads{again}"
    )


def final_table(
    summary: Summary,
    before_sample: Sampled | None,
    after_sample: Sampled | None,
    report_path: Path | None,
    model_path: Path | None,
    console: Console,
) -> None:
    """Print what a run reached and cost: quality per silo and pooled, bytes, a sample before and after, the paths.

    What does not exist (yet) is None and is left out.
    """
    if summary.before is not None and summary.after is not None:
        console.print(_quality_table(summary))
    if summary.apart:
        console.print(Text(printable(summary.apart)))
    console.print(
        f"{count(summary.tokens)} tokens in {duration(summary.seconds)} ({count(summary.tokens_per_second)} tok/s), "
        f"{summary.rounds} rounds, {summary.sequential_steps} sequential steps, "
        f"{count(summary.parameters)} parameters",
        highlight=False,
    )
    console.print(_bytes_line(summary), highlight=False)
    for moment, sample in (("before", before_sample), ("after", after_sample)):
        if sample is not None:
            console.print(Text(f"\nsample {moment} training", style="bold"))
            text = Text.assemble((printable(sample.prompt), "bold"), printable(sample.text.rstrip()))
            console.print(Padding(text, (0, 0, 0, 2)))
    console.print()
    for label, path in (("report", report_path), ("model", model_path)):
        if path is not None:  # whole, on one line, so that it can be copied
            console.print(Text(f"{label:<7} {path}"), soft_wrap=True)


def _bytes_line(summary: Summary) -> str:
    moved = summary.bytes_up + summary.bytes_down
    if not moved or summary.nodes == 1:  # which may be the baseline: its traffic is that of its own process
        return "no bytes moved between sites"
    both = f"{byte_size(moved)} moved (up {byte_size(summary.bytes_up)}, down {byte_size(summary.bytes_down)})"
    if summary.bytes_ratio is None:  # one node a round, which has nobody to exchange gradients with at every step
        return both
    return (
        f"{both}, {significant(summary.bytes_ratio)} times fewer than the {byte_size(summary.bytes_ddp)} of per-step "
        "data-parallel training for the same steps"
    )


def _quality_table(summary: Summary) -> Table:
    table = Table(title="Held-out quality, before and after", title_justify="left", title_style="bold")
    table.add_column("silo", overflow="fold")
    for quantity in ("perplexity", "bits/byte"):
        for moment in ("before", "after"):
            table.add_column(f"{quantity}\n{moment}", justify="right", no_wrap=True)
    if summary.before is None or summary.after is None:
        return table
    before, after = summary.before, summary.after
    for name in sorted(before.silos.keys() | after.silos.keys()):
        table.add_row(Text(printable(name)), *_quality_cells(before.silos.get(name), after.silos.get(name)))
    table.add_section()
    table.add_row(Text("pooled"), *_quality_cells(before, after), style="bold")
    return table


def _quality_cells(before: Quality | None, after: Quality | None) -> list[str]:
    moments = before, after
    perplexities = ["-" if quality is None else significant(quality.perplexity) for quality in moments]
    return perplexities + ["-" if quality is None else f"{quality.bits_per_byte:.3f}" for quality in moments]


def _evaluation_line(event: Evaluated) -> str:
    moment = "before training" if event.round == 0 else f"after round {event.round}"
    pooled = event.pooled
    return (
        f"{moment}: held-out loss {pooled.loss:.2f}  perplexity {significant(pooled.perplexity)}  "
        f"{pooled.bits_per_byte:.2f} bpb"
    )


def _percent(done: float, total: float) -> str:
    return f"{100 * done / total:.0f} %"
