"""Where a run's events go: metrics.jsonl always, TensorBoard, Weights & Biases or MLflow on request, and the displays.

metrics.jsonl is the record of the run: if it cannot be written, training stops. Everything else is a copy: a sink
that fails is reported once, dropped, and training goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from photon.config import TrackConfig
from photon.display import Display
from photon.errors import StateError
from photon.events import Event, NodeProgress, parse_event
from photon.sinks import MlflowSink, Sink, TensorBoardSink, WandbSink

METRICS_FILE = "metrics.jsonl"


class JsonlSink:
    """metrics.jsonl: one event a line, appended. A line counts once its newline is written.

    Opening cuts off the torn last line that a crash may have left. Raises StateError, here and in every method, when
    the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.exists():
                _cut(path, len(_whole_lines(path.read_bytes())))
            self._file = path.open("ab")
            self._durable_bytes = self._file.tell()
        except OSError as error:
            raise _unwritable(path, error) from error

    def write(self, event: Event) -> None:
        """Append an event and hand it to the operating system, so that a reader sees it at once."""
        try:
            self._file.write(event.model_dump_json().encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def sync(self) -> int:
        """Force everything written to the disk and return the length that is now safe: `offset()`."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self._durable_bytes = self._file.tell()
        return self._durable_bytes

    def offset(self) -> int:
        """Bytes known to be on the disk. A committed round stores it; a resume hands it to `truncate_to`."""
        return self._durable_bytes

    def close(self) -> None:
        """Sync and close; closing twice is allowed."""
        if not self._file.closed:
            self.sync()
            self._file.close()


def truncate_to(path: Path, offset: int) -> None:
    """Cut metrics.jsonl back to the `offset` of the last committed round: later events belong to a lost round.

    Raises StateError if the file ends before `offset`, or if `offset` is not the end of a line: then it is not the
    file that the committed state spoke of.
    """
    try:
        data = path.read_bytes() if path.exists() else b""
        if offset > len(data):
            raise StateError(
                f"{path} has {len(data)} bytes, but the committed state counts {offset}: events are lost. Restore the "
                "file from a copy, or start a new run."
            )
        if _whole_lines(data[:offset]) != data[:offset]:
            raise StateError(
                f"{path}: byte {offset}, where the last committed round ends, is inside a line. The file was edited; "
                "restore it from a copy, or start a new run."
            )
        if path.exists():
            _cut(path, offset)
    except OSError as error:
        raise _unwritable(path, error) from error


def read_events(path: Path) -> list[Event]:
    """All events of a metrics.jsonl, in order. A torn last line (a run being written, or killed) is left out.

    Raises StateError naming the file and the line when a line is damaged, or when there is no such file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}. Is this the folder of a run?") from error
    events: list[Event] = []
    for number, line in enumerate(_whole_lines(data).splitlines(), start=1):
        try:
            events.append(parse_event(line))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            reason = f"{place}: {first['msg']}" if place else first["msg"]
            raise StateError(
                f"{path} line {number} is damaged ({reason}). Remove that line, or restore the file from a copy."
            ) from error
    return events


def _whole_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


def _cut(path: Path, length: int) -> None:
    if length == path.stat().st_size:
        return
    with path.open("r+b") as file:
        file.truncate(length)
        os.fsync(file.fileno())


def _unwritable(path: Path, error: OSError) -> StateError:
    return StateError(
        f"cannot write {path}: {error.strerror}. It is the record of the run, so training stops here; "
        "make room or fix the permissions, then resume."
    )


class Tracker:
    """Hands each event to metrics.jsonl, then to the optional sinks, then to the displays.

    `metrics` failing raises StateError. A sink that raises anything is reported once on the displays and dropped; a
    display that can no longer write (a closed terminal) is dropped too: both only show what metrics.jsonl holds.
    """

    def __init__(self, sinks: Sequence[Sink], displays: Sequence[Display], metrics: JsonlSink | None = None) -> None:
        self._sinks = list(sinks)
        self._displays = list(displays)
        self._metrics = metrics

    def add(self, display: Display) -> None:
        """Show what comes from now on there too."""
        self._displays.append(display)

    def write(self, event: Event) -> None:
        """Record and show an event."""
        if self._metrics is not None:
            self._metrics.write(event)
        for sink in list(self._sinks):
            self._guard(sink, partial(sink.write, event))
        self._show(lambda display: display.write(event))

    def progress(self, progress: NodeProgress) -> None:
        """Show a node's state; nothing is recorded."""
        self._show(lambda display: display.progress(progress))

    def note(self, text: str) -> None:
        """Show a line for people; nothing is recorded."""
        self._show(lambda display: display.note(text))

    def sync(self) -> int:
        """Make every event so far durable; returns the length of metrics.jsonl to store with the committed round."""
        return self._metrics.sync() if self._metrics is not None else 0

    def close(self) -> None:
        """Close metrics.jsonl and the sinks. The displays belong to whoever opened them."""
        for sink in list(self._sinks):
            self._guard(sink, sink.close)
        self._sinks.clear()
        if self._metrics is not None:
            self._metrics.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _guard(self, sink: Sink, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - third-party code raises anything; the policy is above
            self._sinks.remove(sink)
            name = type(sink).__name__.removesuffix("Sink")
            self.note(
                f"{name} failed and is switched off for this run ({type(error).__name__}: {error}). "
                f"Training goes on; {METRICS_FILE} has every event."
            )

    def _show(self, action: Callable[[Display], None]) -> None:
        for display in list(self._displays):
            try:
                action(display)
            except OSError:  # its terminal is gone: there is nowhere left to say so
                self._displays.remove(display)


def open_tracker(track: TrackConfig, run_folder: Path, run: str, display: Display) -> Tracker:
    """The tracker of a run: RUN/metrics.jsonl, what `track` switches on, and `display`.

    Raises ConfigError naming the extra to install if a tracker that is switched on is missing, StateError if
    metrics.jsonl cannot be opened.
    """
    sinks: list[Sink] = []
    if track.tensorboard:
        sinks.append(TensorBoardSink(run_folder / "tensorboard"))
    if track.wandb:
        sinks.append(WandbSink(track.wandb, run, run_folder))
    if track.mlflow:
        sinks.append(MlflowSink(track.mlflow, run))
    return Tracker(sinks, [display], JsonlSink(run_folder / METRICS_FILE))
