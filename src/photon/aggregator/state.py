"""The Aggregator's committed state: all that is needed to go on after a crash, one folder a round."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from photon.aggregator.norms import NormHistory
from photon.aggregator.trust import Charge
from photon.durable import NumberedStates, kept_numbers
from photon.errors import StateError
from photon.link.body import Body, FileBody, pieces, whole_file
from photon.link.tensors import decode_tensors, sha256_hex, tensor_chunks

MODEL_FILE = "model.safetensors"
OUTER_FILE = "outer.safetensors"


@dataclass(frozen=True)
class Progress:
    """Where a run stands after `round` committed rounds, and what it has learnt of its nodes."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    run: str
    round: int = 0
    sequential_step: int = 0
    tokens: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    metrics_bytes: int = 0  # metrics.jsonl up to here belongs to committed rounds
    norms: NormHistory = ()
    charges: dict[str, Charge] = field(default_factory=dict)
    seconds_per_step: dict[str, float] = field(default_factory=dict)

    def after_round(self, sequential_step: int, tokens: int) -> Progress:
        """The next round's progress; bytes, seconds and metrics are filled in at the commit."""
        return replace(self, round=self.round + 1, sequential_step=sequential_step, tokens=self.tokens + tokens)


_PROGRESS = TypeAdapter(Progress)


@dataclass(frozen=True)
class GlobalState:
    """The global model as it travels (in memory, or in its committed file), and the outer optimizer's state."""

    progress: Progress
    payload: Body
    outer: dict[str, Tensor]

    @property
    def model_sha256(self) -> str:
        """Identity of the global model: sha256 of `model.safetensors`, which is also what nodes receive."""
        return sha256_hex(self.payload)


class RoundStore:
    """`RUN/rounds`: commit, load and prune global states."""

    def __init__(self, folder: Path, keep_last: int, keep_every: int) -> None:
        self._states = NumberedStates(folder)
        self._keep_last, self._keep_every = keep_last, keep_every

    def rounds(self) -> list[int]:
        """Committed rounds, ascending."""
        return self._states.numbers()

    def commit(self, state: GlobalState) -> None:
        """Make `state` durable, then drop what the retention rule lets go."""
        files = {MODEL_FILE: pieces(state.payload), OUTER_FILE: tensor_chunks(state.outer)}
        self._states.commit(state.progress.round, files, asdict(state.progress))
        self._states.prune(kept_numbers(self._states.numbers(), self._keep_last, self._keep_every))

    def model_file(self, round_index: int) -> FileBody:
        """The global model of a committed round, in its file."""
        return whole_file(self._states.folder(round_index) / MODEL_FILE)

    def load(self, run: str | None, round_index: int | None = None) -> GlobalState:
        """The newest state, or the one asked for. Raises StateError if it is damaged, foreign or absent.

        A damaged newest state is never skipped silently: the error names the good rounds to ask for.
        """
        rounds = self._states.numbers()
        if not rounds:
            raise StateError(f"{self._states.root} holds no committed round")
        wanted = rounds[-1] if round_index is None else round_index
        try:
            committed = self._states.load(wanted)
            progress = _PROGRESS.validate_python(committed.fields)
            if run is not None and progress.run != run:
                raise StateError(f"{committed.folder} belongs to run {progress.run}, not to {run}.")
            return GlobalState(progress, committed.read(MODEL_FILE), decode_tensors(committed.read(OUTER_FILE)))
        except (StateError, ValidationError) as error:
            others = [number for number in rounds if number != wanted]
            advice = f"Other committed rounds: {others}; ask for one with --round N." if others else "No other is left."
            raise StateError(f"round {wanted} cannot be used: {error} {advice}") from error

    def set_aside(self, after: int) -> None:
        """Rename rounds later than `after`, so that a run can go on from it without destroying them."""
        self._states.set_aside(after)
