"""The live display: one screen, redrawn in place, that answers 'is it learning, what is it doing, how long yet'."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from threading import RLock
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from photon.display import RunView, started_line
from photon.events import Event, NodeProgress, RoundDone, RunStarted
from photon.readable import byte_size, count, duration, one_line, significant

_BARS = "▁▂▃▄▅▆▇█"
_STYLES = {
    "failed": "bold red",
    "training": "green",
    "evaluating": "cyan",
    "sending": "blue",
    "waiting": "dim",
    "done": "dim green",
}
_LINES_ABOVE_NODES = 13
_FEWEST_NODE_ROWS = 4
_REDRAWS_PER_SECOND = 4


@dataclass(frozen=True)
class _DataProgress:
    phase: str
    done_bytes: int
    total_bytes: int | None
    note: str


class LiveDisplay:
    """Redraws four times a second between entry and exit; notes scroll by above it and stay.

    Calls may come from several threads. Text from models and other sites is shown literally, never as markup.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._view = RunView()
        self._nodes: dict[str, NodeProgress] = {}
        self._data: dict[str, _DataProgress] = {}
        self._heard_at_s = time.monotonic()
        self._lock = RLock()
        self._live = Live(console=console, refresh_per_second=_REDRAWS_PER_SECOND, get_renderable=self.render)

    def write(self, event: Event) -> None:
        """Take in an event; training events replace the view of data preparation."""
        with self._lock:
            self._view.fold(event)
            self._heard_at_s = time.monotonic()
            if isinstance(event, RunStarted):
                self._data.clear()
                self._nodes = {
                    name: NodeProgress(node=name, round=event.first_round, state="waiting") for name in event.nodes
                }
            elif isinstance(event, RoundDone):
                for name, reason in event.missing.items():
                    self.note(f"round {event.round} went on without {name}: {reason}")

    def progress(self, progress: NodeProgress) -> None:
        """Take in a node's state."""
        with self._lock:
            self._nodes[progress.node] = progress

    def note(self, text: str) -> None:
        """Print a remark above the screen."""
        self._console.print(Text(one_line(text, 400), style="yellow"))

    def data_progress(self, silo: str, phase: str, done_bytes: int, total_bytes: int | None, note: str) -> None:
        """Take in how far a silo's text is prepared."""
        with self._lock:
            self._data[silo] = _DataProgress(phase, done_bytes, total_bytes, note)

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def render(self) -> RenderableType:
        """The screen of this moment."""
        with self._lock:
            if self._view.start is None:
                return self._data_panel()
            rows: list[RenderableType] = [self._clock_row(), Text(), self._numbers()]
            if self._nodes:
                rows += [Text(), self._node_table()]
            return Panel(Group(*rows), title=self._title(), title_align="left", border_style="dim")

    def _title(self) -> Text:
        start = self._view.start
        return Text(f" Photon  {started_line(start)} " if start is not None else " Photon ", style="bold")

    def _clock_row(self) -> Table:
        view = self._view
        left = "time left: after the first round"
        if view.finish is not None:
            left = "finished"
        elif view.seconds_left is not None:  # counts down between rounds, which may last for hours
            left = f"{duration(view.seconds_left - (time.monotonic() - self._heard_at_s))} left"
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        row.add_row(
            Text(f"round {view.rounds_done}/{view.rounds_planned}", style="bold"),
            ProgressBar(total=view.steps_planned, completed=view.steps_done),
            Text(left),
        )
        return row

    def _numbers(self) -> Table:
        view, last = self._view, self._view.last
        grid = Table.grid(padding=(0, 3))
        for _ in range(2):
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(no_wrap=True)
        evaluations = view.evaluations
        if evaluations:
            first, now = evaluations[0].pooled, evaluations[-1].pooled
            fall = f"{first.loss:.2f} → {now.loss:.2f}" if len(evaluations) > 1 else f"{now.loss:.2f}"
            curve = sparkline([e.pooled.loss for e in evaluations], 24)
            quality = f"perplexity {significant(now.perplexity)}  {now.bits_per_byte:.3f} bits/byte"
            grid.add_row("held-out loss", Text.assemble((fall, "bold"), "  ", (curve, "green")), "", Text(quality))
        grid.add_row(
            "training loss",
            f"{last.train_loss:.2f}" if last else "-",
            "tokens",
            f"{count(last.tokens)}  {count(last.tokens_per_second)} tok/s" if last else "0",
        )
        moved = f"up {byte_size(last.bytes_up)}  down {byte_size(last.bytes_down)}" if last else "nothing moved yet"
        grid.add_row("sequential step", str(view.steps_done), "bytes", moved)
        return grid

    def _node_table(self) -> Table:
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(no_wrap=True, max_width=24)
        table.add_column(no_wrap=True, width=10)
        table.add_column(ratio=1)
        table.add_column(no_wrap=True, justify="right")
        table.add_column(no_wrap=True, ratio=1)
        order = list(_STYLES)
        nodes = sorted(self._nodes.values(), key=lambda n: (order.index(n.state), n.node))
        room = max(_FEWEST_NODE_ROWS, self._console.height - _LINES_ABOVE_NODES)
        shown = nodes if len(nodes) <= room else nodes[: room - 1]
        if len(shown) == len(nodes):
            shown = sorted(nodes, key=lambda n: n.node)  # when all fit, rows stay where they are
        for node in shown:
            loss = f"loss {node.loss:.2f}" if node.loss is not None else ""
            bar: RenderableType = ProgressBar(total=node.steps, completed=node.step) if node.steps else Text()
            steps = f"{node.step}/{node.steps}  {loss}" if node.steps else loss
            state = Text(node.state, style=_STYLES[node.state])
            table.add_row(Text(one_line(node.node)), state, bar, Text(steps), Text(one_line(node.note), style="dim"))
        hidden = nodes[len(shown) :]
        if hidden:
            tally: Counter[str] = Counter(node.state for node in hidden)
            states = ", ".join(f"{tally[state]} {state}" for state in order if tally[state])
            table.add_row(Text(f"{len(hidden)} more"), Text(), Text(states))
        return table

    def _data_panel(self) -> RenderableType:
        if not self._data:
            return Text("preparing", style="dim")
        table = Table.grid(padding=(0, 2), expand=True)
        for ratio in (None, None, 1, None, 1):
            table.add_column(no_wrap=True, ratio=ratio)
        for silo, data in self._data.items():
            done = Text(byte_size(data.done_bytes))
            bar: RenderableType = Text()
            if data.total_bytes:
                bar = ProgressBar(total=data.total_bytes, completed=data.done_bytes)
                done.append(f" of {byte_size(data.total_bytes)}", style="dim")
            table.add_row(Text(one_line(silo)), Text(data.phase), bar, done, Text(one_line(data.note), style="dim"))
        return Panel(
            table,
            title=Text(" Photon  preparing each owner's text ", style="bold"),
            title_align="left",
            border_style="dim",
        )


def sparkline(values: list[float], width: int) -> str:
    """The latest values as a line of bars between their minimum and maximum; at most `width` characters.

    More values than `width` are thinned evenly, first and last kept. A value that is not finite is a blank.
    """
    if len(values) > width:
        values = [values[round(i * (len(values) - 1) / (width - 1))] for i in range(width)]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return " " * len(values)
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    top = len(_BARS) - 1
    return "".join(_BARS[round((v - low) / span * top)] if math.isfinite(v) else " " for v in values)
