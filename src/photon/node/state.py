"""What an LLM Node keeps between rounds: optimizer, place in its own text, what its codec left out. It stays there.

A state is filed under the round it is ready for. The Aggregator may repeat a round after a crash, so a node never
throws away the state before the newest one until a later round proves that it is no longer needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from photon.durable import NumberedStates, kept_numbers
from photon.errors import StateError
from photon.link.tensors import decode_tensors, tensor_chunks

OPTIMIZER_FILE = "optimizer.safetensors"
LINK_FILE = "link.safetensors"
WEIGHTS_FILE = "weights.safetensors"


@dataclass(frozen=True)
class NodeState:
    """Position in the Data Source (sequences consumed), totals, optimizer tensors (empty = fresh), codec state.

    `weights` are the node's own, of methods that let it go on with them, and under `weight/kind` what it remembers of
    its last round (`photon.parts.base.Part.remembers`); `ready_for` is the round after that.
    `optimizer_is_held` says that `optimizer` was left on the disk, since whoever asked has it.
    """

    run: str
    node: str
    position: int = 0
    tokens: int = 0
    steps: int = 0
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    link: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    ready_for: int = 0
    optimizer_is_held: bool = False


class NodeStore:
    """`nodes/<name>/state`: states filed by the round they are ready for."""

    def __init__(self, folder: Path, keep_last: int, keep_every: int) -> None:
        self._states = NumberedStates(folder)
        self._keep_last, self._keep_every = keep_last, keep_every

    def load(self, run: str, node: str, round_index: int, held: str = "") -> NodeState:
        """The state to begin round `round_index` with: the newest one filed at or before it.

        A node that never trained gets a fresh state, filed under round 0. Optimizer tensors of which the caller already
        holds those with the sha256 `held` (`commit`) are not read. Raises StateError if the state is damaged, another
        run's, or already dropped.
        """
        if not self._states.numbers():
            self.commit(NodeState(run, node), 0)
        numbers = self._states.numbers()
        ready = [number for number in numbers if number <= round_index]
        if not ready:
            raise StateError(
                f"{self._states.root}: the oldest state is for round {numbers[0]}, round {round_index} was asked for; "
                "checkpoint.keep_last says how far back a run can go"
            )
        committed = self._states.open(ready[-1])
        fields = committed.fields
        if fields.get("run") != run or fields.get("node") != node:
            raise StateError(
                f"{committed.folder} belongs to node {fields.get('node')!r} of run {fields.get('run')!r}, "
                f"not to {node!r} of {run!r}"
            )
        is_held = bool(held) and committed.sha256.get(OPTIMIZER_FILE) == held
        optimizer = {} if is_held else decode_tensors(committed.read(OPTIMIZER_FILE))
        # A state from before codecs kept anything has no such file.
        link = decode_tensors(committed.read(LINK_FILE)) if LINK_FILE in committed.sha256 else {}
        weights = decode_tensors(committed.read(WEIGHTS_FILE)) if WEIGHTS_FILE in committed.sha256 else {}
        return NodeState(
            **fields,
            optimizer=optimizer,
            link=link,
            weights=weights,
            ready_for=ready[-1],
            optimizer_is_held=is_held,
        )

    def commit(self, state: NodeState, ready_for: int) -> str:
        """File `state` as ready for round `ready_for`, durably; keep every state that a kept round may need.

        Gives the sha256 of its optimizer tensors as they are on the disk.
        """
        fields = {
            "run": state.run,
            "node": state.node,
            "position": state.position,
            "tokens": state.tokens,
            "steps": state.steps,
        }
        files = {OPTIMIZER_FILE: tensor_chunks(state.optimizer), LINK_FILE: tensor_chunks(state.link)}
        if state.weights:
            files[WEIGHTS_FILE] = tensor_chunks(state.weights)
        hashes = self._states.commit(ready_for, files, fields)
        # The Aggregator keeps rounds up to ready_for - 1 (ready_for itself is not committed there yet). Each of them
        # needs the newest state filed at or before it.
        numbers = self._states.numbers()
        rounds = kept_numbers(range(ready_for), self._keep_last, self._keep_every)
        needed = {max((number for number in numbers if number <= wanted), default=ready_for) for wanted in rounds}
        self._states.prune(needed | {ready_for} | {number for number in numbers if number > ready_for})
        return hashes[OPTIMIZER_FILE]

    def position_of(self, ready_for: int) -> int | None:
        """The place in the data of the state filed under exactly this round; None if there is none that can be read."""
        try:
            position = self._states.fields(ready_for).get("position")
        except StateError:
            return None
        return position if isinstance(position, int) else None

    def set_aside(self, after: int) -> None:
        """Put away states of rounds later than `after`, where the run goes on: they belong to what was undone."""
        self._states.set_aside(after)
