"""The status of a run between machines, as its Aggregator keeps it: one small JSON file, `RUN/exchange/status.json`.

It is written every few seconds from what the round loop said and what the fabric knows. It holds names, numbers and
reasons: no text of an owner, no update. `photon.status` reads it; the gateway shows a node its own entry alone.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event as Signal
from threading import Lock, Thread
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from photon.display import RunView
from photon.events import Event, NodeProgress, RoundDone, RunFinished, RunStarted
from photon.fabric.traffic import BlobTraffic, read_traffic
from photon.link.partial import replace_file
from photon.readable import one_line

if TYPE_CHECKING:  # Flower takes seconds to import, and whoever only reads a status needs nothing of it
    from photon.fabric.flower import Peer

SAVE_EVERY_S = 2.0
MAX_ERRORS = 20
TEXT_CHARACTERS = 400
_JOIN_S = 10.0
_REFUSED, _SPARE = "refused: ", "not needed: "  # how the exchange begins the reasons of these two
_LOG = logging.getLogger("photon.status")


class _Entry(BaseModel):
    """Closed to numbers JSON does not have; what a later version adds is passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class NodeEntry(_Entry):
    """One node of the recipe. Everything has a default: a node that was never heard of has an entry too."""

    online: bool = False
    state: str = Field("unknown", description="As it says itself: preparing, ready, resting, leaving.")
    phase: str = "idle"
    step: int = 0
    steps: int = 0
    loss: float | None = None
    round: int = Field(0, description="Rounds committed before the one it works on, or worked on last.")
    tokens_per_second: float = 0.0
    tokens_available: int = 0
    late: bool = Field(False, description="Others have answered in this round; it was asked and has not.")
    last_heard_s_ago: float | None = None
    bytes_up: int = Field(0, description="Measured at the gateway, node to Aggregator.")
    bytes_down: int = 0
    last_error: str = ""
    refusals: int = Field(0, description="Over the whole run; a readmission does not set it back.")
    suspended: str = Field("", description="Why it is no longer asked; empty: it is.")
    counted_rounds: int = 0


class Remark(_Entry):
    """A note or an error, and when it was said (Unix seconds)."""

    time: float
    text: str


class Status(_Entry):
    """`status.json`. A node is shown `run`, `round` and its own entry: the other fields then are None or empty."""

    version: Literal[1] = 1
    run: str
    recipe: str = ""
    round: int = Field(description="Rounds committed.")
    rounds: int | None = Field(None, description="Rounds planned; None where a method has changed tau: nobody knows.")
    committed: float | None = Field(None, description="When the last of them was, in Unix seconds.")
    updated: float | None = Field(None, description="Unix seconds.")
    state: Literal["waiting for nodes", "training", "finished"] | None = None
    nodes: dict[str, NodeEntry]
    errors: list[Remark] = []


@dataclass(frozen=True)
class RunFacts:
    """What stays the same in a run. `nodes` are all of the recipe, in its order."""

    run: str
    recipe: str
    rounds: int
    nodes: tuple[str, ...]


@dataclass
class History:
    """What the round loop has said so far, folded. Counts are those of the events it was shown."""

    round: int = 0
    view: RunView = field(default_factory=RunView)
    committed: float | None = None
    finished: bool = False
    counted: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    missing: dict[str, str] = field(default_factory=dict)  # of the last round
    suspended: dict[str, str] = field(default_factory=dict)
    answered: set[tuple[str, int]] = field(default_factory=set)  # (node, local steps) in the open round
    remarks: deque[Remark] = field(default_factory=lambda: deque(maxlen=MAX_ERRORS))

    def fold(self, event: Event) -> None:
        """Take in one event, live or read back from metrics.jsonl."""
        self.view.fold(event)
        if isinstance(event, RunStarted):
            self.round, self.finished = event.first_round, False
        elif isinstance(event, RoundDone):
            self.round, self.committed = event.round, event.time
            self.counted.update(event.nodes.keys())
            self.refusals.update(node for node, reason in event.missing.items() if reason.startswith(_REFUSED))
            self.missing, self.suspended = dict(event.missing), dict(event.suspended)
            self.answered.clear()
        elif isinstance(event, RunFinished):
            self.round, self.finished = event.round, True

    def progress(self, progress: NodeProgress, now: float) -> None:
        """Take in a node's state: who has answered, and who failed."""
        if progress.state == "done" and progress.round == self.round:
            self.answered.add((progress.node, progress.steps))
        # A refusal is told by a note, which also counts it: once is enough.
        if progress.state == "failed" and not progress.note.startswith(_REFUSED):
            self.remark(f"round {progress.round}: {progress.node}: {progress.note}", now)

    def remark(self, text: str, now: float) -> None:
        """Keep a line for people; what is said again and again takes one place, with its latest time."""
        line = one_line(text, TEXT_CHARACTERS)
        if self.remarks and self.remarks[-1].text == line:
            self.remarks.pop()
        self.remarks.append(Remark(time=now, text=line))

    def rounds_of(self, planned: int) -> int | None:
        """The rounds of the run: as planned, unless rounds have had another tau. A run ends by its steps."""
        return planned if self.view.keeps_tau else None

    def has_answer_beside(self, node: str) -> bool:
        """Whether another node has answered. Scores alone are quick and say nothing, but for the last of all."""
        is_trained = self.view.start is not None and not self.view.steps_left
        return any(name != node and (steps > 0 or is_trained) for name, steps in self.answered)


def build_status(
    facts: RunFacts, history: History, peers: Collection[Peer], traffic: Mapping[str, BlobTraffic], now: float
) -> Status:
    """The status at `now` (Unix seconds). Pure. Each node of the recipe has an entry, and nobody else."""
    known = {peer.info.name: peer for peer in peers}
    entries = {}
    for name in facts.nodes:
        entry = _entry_of(facts, history, name, known.get(name), now)
        moved = traffic.get(name, BlobTraffic())
        entries[name] = entry.model_copy(update={"bytes_up": moved.bytes_up, "bytes_down": moved.bytes_down})
    return Status(
        run=facts.run,
        recipe=facts.recipe,
        round=history.round,
        rounds=history.rounds_of(facts.rounds),
        committed=history.committed,
        updated=now,
        state=_state_of(facts, history, list(known.values())),
        nodes=entries,
        errors=list(history.remarks),
    )


def _entry_of(facts: RunFacts, history: History, name: str, peer: Peer | None, now: float) -> NodeEntry:
    missed = history.missing.get(name, "")
    entry = NodeEntry(
        last_error=one_line("" if missed.startswith(_SPARE) else missed, TEXT_CHARACTERS),
        refusals=history.refusals[name],
        suspended=one_line(history.suspended.get(name, ""), TEXT_CHARACTERS),
        counted_rounds=history.counted[name],
    )
    if peer is None:
        return entry
    changes: dict[str, object] = {
        "online": peer.is_online,
        "late": peer.task is not None and history.has_answer_beside(name),
        "last_heard_s_ago": round(max(0.0, now - peer.heard_at), 1) if peer.heard_at else None,
        "last_error": entry.last_error or one_line(peer.last_error, TEXT_CHARACTERS),
    }
    status = peer.status
    if status is not None:
        shared = ["state", "tokens_per_second", "tokens_available"]
        if status.run == facts.run:  # else it may still speak of the work it did for another run
            shared += ["phase", "step", "steps", "loss", "round"]
        changes |= {key: getattr(status, key) for key in shared}
    return entry.model_copy(update=changes)


def _state_of(
    facts: RunFacts, history: History, peers: Collection[Peer]
) -> Literal["waiting for nodes", "training", "finished"]:
    """Between two rounds no task is open; then it is only waiting if somebody is wanted who is not there."""
    if history.finished:
        return "finished"
    ready = {
        peer.info.name
        for peer in peers
        if peer.is_online and peer.status is not None and (peer.status.run, peer.status.state) == (facts.run, "ready")
    }
    wanted = set(facts.nodes) - history.suspended.keys()
    is_training = any(peer.task is not None for peer in peers) or wanted <= ready
    return "training" if is_training else "waiting for nodes"


class StatusBoard:
    """A `Display` that keeps `path` (status.json) up to date from a thread of its own, until `close`.

    `traffic` is the gateway's file, `nodes` are all of the recipe, `peers` gives copies of what the fabric knows. What
    went wrong before a restart is read back from `path`; to count the rounds before it too, hand the events of
    metrics.jsonl to `write` first.
    """

    def __init__(
        self,
        path: Path,
        traffic: Path,
        run: str,
        recipe: str,
        rounds: int,
        nodes: Iterable[str],
        peers: Callable[[], Collection[Peer]],
    ) -> None:
        self.path, self._traffic_path, self._peers = path, traffic, peers
        self._facts = RunFacts(run, recipe, rounds, tuple(nodes))
        self._history = History()
        self._history.remarks.extend(_earlier_remarks(path, run))
        self._traffic: dict[str, BlobTraffic] = {}
        self._lock, self._saving, self._closing = Lock(), Lock(), Signal()
        self._is_unwritable = False
        self._thread = Thread(target=self._keep_saving, name="photon-status", daemon=True)
        self._thread.start()

    def write(self, event: Event) -> None:
        """Take in an event of the run."""
        with self._lock:
            self._history.fold(event)

    def progress(self, progress: NodeProgress) -> None:
        """Take in what a node is doing; how far it is, the fabric knows better."""
        with self._lock:
            self._history.progress(progress, time.time())

    def note(self, text: str) -> None:
        """Keep a remark or a warning."""
        with self._lock:
            self._history.remark(text, time.time())

    def data_progress(self, silo: str, phase: str, done_bytes: int, total_bytes: int | None, note: str) -> None:
        """Nothing: text is prepared at the nodes, and its details stay there."""

    def save(self) -> None:
        """Write the file now; readers see the old status or this one. Raises OSError."""
        with self._saving:  # of two saves the later one stays
            peers = self._peers()
            self._read_traffic()
            with self._lock:
                status = build_status(self._facts, self._history, peers, self._traffic, time.time())
            replace_file(self.path, status.model_dump_json() + "\n")

    def close(self) -> None:
        """Stop the thread and save once more; closing twice is allowed."""
        if not self._closing.is_set():
            self._closing.set()
            self._thread.join(_JOIN_S)
            self._try_to_save()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _keep_saving(self) -> None:
        while not self._closing.is_set():
            self._try_to_save()
            self._closing.wait(SAVE_EVERY_S)

    def _try_to_save(self) -> None:
        """A status that cannot be written is said once, and must not end the run."""
        try:
            self.save()
            self._is_unwritable = False
        except OSError as error:
            if not self._is_unwritable:
                _LOG.warning("%s cannot be written: %s", self.path, error.strerror)
            self._is_unwritable = True

    def _read_traffic(self) -> None:
        try:
            self._traffic = read_traffic(self._traffic_path)
        except (ValidationError, OSError) as error:  # the numbers read before stay
            reason = error.strerror if isinstance(error, OSError) else "it is damaged"
            self.note(f"bytes are not up to date, {self._traffic_path.name} cannot be read: {reason}")


def _earlier_remarks(path: Path, run: str) -> list[Remark]:
    """What an earlier process of the run had to say: a round loop that failed is started again, and people ask why.

    A file that is missing or damaged says nothing; it is about to be written anew.
    """
    try:
        status = Status.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return []
    return status.errors if status.run == run else []
