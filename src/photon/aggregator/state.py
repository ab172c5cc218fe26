"""The Aggregator's committed state: all that is needed to go on after a crash, one folder a round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from photon.aggregator.norms import NormHistory
from photon.aggregator.trust import Charge
from photon.durable import Chunk, Draft, NumberedStates, kept_numbers
from photon.errors import InputError, StateError
from photon.link.body import Body, FileBody, pieces, whole_file
from photon.link.ledger import Traffic
from photon.link.tensors import decode_tensors, sha256_hex, tensor_chunks

MODEL_FILE = "model.safetensors"
OUTER_FILE = "outer.safetensors"
DOWNLINK_FILE = "downlink.safetensors"
MESSAGE_FILE = "message.safetensors"


@dataclass(frozen=True)
class Progress:
    """Where a run stands after `round` committed rounds, and what it has learnt of its nodes."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    run: str
    round: int = 0
    sequential_step: int = 0
    tokens: int = 0
    link: Traffic = field(default_factory=Traffic)
    seconds: float = 0.0
    metrics_bytes: int = 0  # metrics.jsonl up to here belongs to committed rounds
    norms: NormHistory = ()
    charges: dict[str, Charge] = field(default_factory=dict)
    seconds_per_step: dict[str, float] = field(default_factory=dict)
    agreement: float | None = None  # mean cosine between the updates of the last round
    tau: int | None = None  # local steps of the last round
    message_from: str = ""  # sha256 of the base that the downlink's message is relative to
    message_as: str = ""  # how it is written
    message_stages: dict[str, int] = field(default_factory=dict)  # what each stage of its codec left
    holders: dict[str, str] = field(default_factory=dict)  # by node, sha256 of the base that it is known to hold

    def after_round(self, sequential_step: int, tokens: int, agreement: float | None) -> Progress:
        """The next round's progress; bytes, seconds and metrics are filled in at the commit."""
        return replace(
            self,
            round=self.round + 1,
            sequential_step=sequential_step,
            tokens=self.tokens + tokens,
            agreement=agreement,
            tau=sequential_step - self.sequential_step,
        )


_PROGRESS = TypeAdapter(Progress)


@dataclass(frozen=True)
class GlobalState:
    """The global model as nodes hold it (in memory, or in its file), and the outer optimizer's state.

    Of a downlink that is not exact also its state (`Downlink.export_state`) and its last message.
    """

    progress: Progress
    payload: Body
    outer: Mapping[str, Tensor]
    downlink: Mapping[str, Tensor] = field(default_factory=dict)
    message: Body = b""

    @property
    def model_sha256(self) -> str:
        """Identity of the global model: sha256 of `model.safetensors`, which is also what nodes receive."""
        return sha256_hex(self.payload)


class RoundStore:
    """`RUN/rounds`: commit, load and prune global states."""

    def __init__(self, folder: Path, keep_last: int, keep_every: int) -> None:
        self._states = NumberedStates(folder)
        self._keep_last, self._keep_every = keep_last, keep_every
        self._draft: Draft | None = None

    def rounds(self) -> list[int]:
        """Committed rounds, ascending."""
        return self._states.numbers()

    def commit(self, state: GlobalState) -> None:
        """Make `state` durable, then drop what the retention rule lets go."""
        draft, self._draft = self._draft, None
        is_drafted = draft is not None and isinstance(state.payload, FileBody) and state.payload.path == draft.path
        files: dict[str, Iterable[Chunk] | Draft] = {
            MODEL_FILE: draft if draft is not None and is_drafted else pieces(state.payload),
            OUTER_FILE: tensor_chunks(state.outer),
            DOWNLINK_FILE: tensor_chunks(state.downlink),
            MESSAGE_FILE: pieces(state.message),
        }
        fields = asdict(replace(state.progress, link=Traffic())) | {"link": state.progress.link.model_dump()}
        self._states.commit(state.progress.round, files, fields)
        self._states.prune(kept_numbers(self._states.numbers(), self._keep_last, self._keep_every))

    def draft_model(self, chunks: Iterable[Chunk]) -> tuple[FileBody, str]:
        """Write the next global model, which nodes may need before it is committed: its file, and its sha256."""
        self._draft = self._states.draft(chunks)
        return whole_file(self._draft.path), self._draft.sha256

    def forecast(self, chunks: Iterable[Chunk]) -> tuple[FileBody, str]:
        """Write what will most likely be the next global model, until the next commit: its file, and its sha256."""
        draft = self._states.draft(chunks)
        return whole_file(draft.path), draft.sha256

    @property
    def spool(self) -> Path:
        """A folder for what is of no use after the round; should it be left there, the next commit removes it."""
        return self._states.pending("updates")

    def model_file(self, round_index: int) -> FileBody:
        """The global model of a committed round, in its file."""
        return whole_file(self._states.folder(round_index) / MODEL_FILE)

    def message_file(self, round_index: int) -> FileBody:
        """The downlink's message of a committed round, in its file; empty where there is none."""
        return whole_file(self._states.folder(round_index) / MESSAGE_FILE)

    def load(self, run: str | None, round_index: int | None = None) -> GlobalState:
        """The newest state, or the one asked for. Raises StateError if it is damaged or foreign, or if there is none at
        all, and InputError if the one asked for is not there.

        A damaged newest state is never skipped silently: the error names the good rounds to ask for.
        """
        rounds = self._states.numbers()
        if not rounds:
            raise StateError(f"{self._states.root} holds no committed round")
        wanted = rounds[-1] if round_index is None else round_index
        if wanted not in rounds:
            raise InputError(f"there is no committed round {wanted} in {self._states.root}: --round is one of {rounds}")
        try:
            committed = self._states.load(wanted)
            progress = _PROGRESS.validate_python(committed.fields)
            if run is not None and progress.run != run:
                raise StateError(f"{committed.folder} belongs to run {progress.run}, not to {run}.")
            # The model stays in its file; of the outer state, tensor by tensor, there is one copy in memory.
            outer = decode_tensors(whole_file(committed.folder / OUTER_FILE))
            if DOWNLINK_FILE not in committed.sha256:  # a state from before there was one
                return GlobalState(progress, self.model_file(wanted), outer)
            downlink = decode_tensors(whole_file(committed.folder / DOWNLINK_FILE))
            return GlobalState(progress, self.model_file(wanted), outer, downlink, self.message_file(wanted))
        except (StateError, ValidationError) as error:
            others = [number for number in rounds if number != wanted]
            advice = f"Other committed rounds: {others}; ask for one with --round N." if others else "No other is left."
            raise StateError(f"round {wanted} cannot be used: {error} {advice}") from error

    def set_aside(self, after: int) -> None:
        """Rename rounds later than `after`, so that a run can go on from it without destroying them."""
        self._states.set_aside(after)
