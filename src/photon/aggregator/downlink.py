"""The way down: what nodes start a round from, and how each of them is told.

With an exact or lossless downlink the base is the global model. A lossy one sends less: then the base is what nodes
rebuild from what they were sent, the Aggregator rebuilds it with the same function from the same bytes, and the outer
optimizer goes on with the exact model. What the codec left out is the difference between the two, and so is part of
the next message: error feedback without a residual to keep. The base is what is evaluated, exported and committed.

A node that is known to hold the base before gets the difference; one that comes new, or has missed a round, the whole
model, exact. Of the untrained model nothing is sent: everybody makes it from the recipe's seed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from photon.aggregator.state import Progress
from photon.config import LinkConfig
from photon.link.body import Body
from photon.link.codec.feedback import named_memory, stage_memory, tensor_of, tensor_seed
from photon.link.codec.notation import parse_pipeline
from photon.link.codec.pipeline import EXACT
from photon.link.difference import changed, rebuilt
from photon.link.tensors import encode_tensors, iterate_tensors, sha256_hex
from photon.link.update import EMPTY_SHA256, Task

_EXACT = "exact/"


@dataclass(frozen=True)
class Told:
    """How a task tells its base: these fields of its header, and the body."""

    form: Literal["whole", "difference", "held"]
    held_sha256: str
    codec: str
    body_sha256: str
    body: Body
    stage_bytes: Mapping[str, int]


class Downlink:
    """`message` is the newest base as the codec wrote it, relative to the base `message_from` if it is a difference;
    `memory` what the stages remember; `holders` the base that each node is known to hold; `written_as` how all of
    this run's messages are written."""

    def __init__(
        self,
        link: LinkConfig,
        state: Mapping[str, Tensor] | None = None,
        holders: Mapping[str, str] | None = None,
        is_partial: bool = False,
    ) -> None:
        self._codec = parse_pipeline(link.down, "link.down", link.exact_tensors)
        self._decay = link.down_feedback
        self.is_exact = not self._codec.labels and not is_partial
        self.is_lossy = not self._codec.is_lossless
        self.sends_differences = is_partial or (self.is_lossy and link.of == "difference")
        self.sends_other_weights = self.is_lossy and not self.sends_differences and self._decay > 0
        self.memory = {name: tensor for name, tensor in (state or {}).items() if not name.startswith(_EXACT)}
        self.holders = dict(holders or {})
        self.written_as = f"{self._codec.name} of {link.of} without {link.exact_tensors}{' in part' * is_partial}"
        self.message: Body = b""
        self.message_from = ""
        self.stage_bytes: dict[str, int] = {}
        self._message_sha256 = EMPTY_SHA256

    def restore(self, message: Body, progress: Progress) -> None:
        """Go on with a committed message; one that was written otherwise (the recipe has changed) is of no use."""
        if progress.message_as == self.written_as:
            self.message, self._message_sha256 = message, sha256_hex(message)
            self.message_from, self.stage_bytes = progress.message_from, dict(progress.message_stages)

    def export_state(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What has to be committed beside the base: what stages remember, and the exact model where it differs."""
        exact = {_EXACT + name: tensor for name, tensor in weights.items()} if self.is_lossy and self._decay else {}
        return self.memory | exact

    @staticmethod
    def exact_weights(state: Mapping[str, Tensor], base: Body) -> Iterator[tuple[str, Tensor]]:
        """The exact model, out of what `export_state` gave and the base."""
        for name, tensor in iterate_tensors(base):
            yield name, state.get(_EXACT + name, tensor)

    def advance(
        self,
        weights: Mapping[str, Tensor],
        base: Body,
        base_sha256: str,
        seed: str,
        moved: Collection[str] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """The base after `base`, which is `weights` as far as the codec gets them across: tensors in writing order.

        Only the tensors in `moved` (all, if None) have changed since; where differences are sent, only they are told.
        `message` is the new one from then on. With a decay below 1 a share of what was left out is taken from
        `weights` too, in place, tensor by tensor as they are given.
        """
        told = weights.keys() if moved is None or not self.sends_differences else moved
        wire = self._encode(weights, base, seed, told)
        self.message = encode_tensors(wire)
        self._message_sha256 = sha256_hex(self.message)
        self.message_from = base_sha256 if self.sends_differences else ""
        self.stage_bytes = {}
        rebuild = partial(changed, base) if self.sends_differences else partial(rebuilt, weights)
        tensors = rebuild(wire, self._codec, self.stage_bytes)
        for name, tensor in tensors:
            if self.is_lossy and self._decay < 1 and name in told:
                if not self._decay:
                    weights[name].copy_(tensor)  # to the last bit: the sum below loses the sign of a zero
                elif not self._codec.of(name).is_lossless:  # else nothing is left out, and they may be one tensor
                    weights[name].sub_(tensor).mul_(self._decay).add_(tensor)
            yield name, tensor

    def _encode(self, weights: Mapping[str, Tensor], base: Body, seed: str, told: Collection[str]) -> dict[str, Tensor]:
        """Every tensor that is told, or what it differs by from the base, as it travels; one is in memory in full."""
        subtracts = self.sends_differences and self.is_lossy

        def inputs() -> Iterator[tuple[str, Tensor]]:
            for name, old in iterate_tensors(base):
                if name in told:
                    yield name, torch.sub(weights[name].float(), old.float()) if subtracts else weights[name]

        survey = self._codec.survey(inputs)
        wire: dict[str, Tensor] = {}
        memory = {key: kept for key, kept in self.memory.items() if tensor_of(key) not in told}
        for name, tensor in inputs():
            encoded = self._codec.of(name).encode(
                tensor, tensor_seed(seed, name), survey, stage_memory(self.memory, name)
            )
            wire[name] = encoded.wire
            memory |= named_memory(encoded.memory, name)
        self.memory = memory
        return wire

    def tell(self, node: str, base: Body, base_sha256: str, is_untrained: bool) -> Told:
        """How to tell `node` the base, in as few bytes as it can be."""
        if self.sends_differences:
            if is_untrained or self.holders.get(node) == base_sha256:
                return Told("held", EMPTY_SHA256, EXACT.name, EMPTY_SHA256, b"", {})
            if self.message_from and self.holders.get(node) == self.message_from:
                return self._tell_message("difference")
        elif self.message and not is_untrained:
            return self._tell_message("whole")
        return self.tell_whole(base, base_sha256)

    def _tell_message(self, form: Literal["whole", "difference"]) -> Told:
        held = self.message_from or EMPTY_SHA256
        return Told(form, held, self._codec.name, self._message_sha256, self.message, self.stage_bytes)

    @staticmethod
    def tell_whole(base: Body, base_sha256: str) -> Told:
        """The exact way, for a node that has nothing to build on."""
        return Told("whole", EMPTY_SHA256, EXACT.name, base_sha256, base, {})

    def heard(self, node: str, base_sha256: str) -> None:
        """A node has answered a task from that base: it holds it."""
        if self.sends_differences:
            self.holders[node] = base_sha256


def telling(task: Task, told: Told) -> tuple[Task, Told]:
    """The task with a header that says how its base is told."""
    fields = ("form", "held_sha256", "codec", "body_sha256")
    return task.model_copy(update={name: getattr(told, name) for name in fields}), told
