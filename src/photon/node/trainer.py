"""The local loop: `tau` optimizer steps of one node on its own stream.

One `Trainer` serves every virtual node of a device. It owns the model, the optimizer and the compiled loss; what
belongs to a node (weights, optimizer state, place in the data) is swapped in from outside between calls of `train`.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from photon.config import NodeConfig
from photon.errors import PhotonError
from photon.model.base import LanguageModel
from photon.node.device import available_cores, resolve_precision, use_compile
from photon.node.memory import available_memory
from photon.node.optimizers import build_optimizer, set_learning_rate
from photon.node.schedule import learning_rate_scale
from photon.parts.method import Method


class TrainingError(PhotonError):
    """Local training cannot go on. The trainer's weights and optimizer state are then worth nothing: reload both."""


class BatchSource(Protocol):
    """Where batches come from: a pure function of the position, so that a round can be repeated exactly."""

    def batch(self, position: int, size: int) -> np.ndarray:
        """Sequences `position` to `position + size` of the node's stream, int64 [size, sequence_length + 1]."""


@dataclass(frozen=True)
class LocalRun:
    """What one call of `Trainer.train` did. Losses are training losses in nats per token, before each step."""

    steps: int
    tokens: int
    loss_first: float
    loss_last: float
    loss_mean: float
    gradient_norm_mean: float
    gradient_norm_max: float
    clipped_steps: int
    seconds: float
    learning_rate_last: float
    stopped_early: bool


class Trainer:
    """Trains one model on one device.

    `total_steps` is the schedule's length in sequential steps. With bfloat16 precision the weights, gradients and
    optimizer state stay float32 and autocast casts the inputs of matrix products.
    """

    def __init__(
        self,
        model: LanguageModel,
        node: NodeConfig,
        device: torch.device,
        total_steps: int,
        method: Method | None = None,
    ) -> None:
        self.model = model.to(device)
        given = build_optimizer(self.model, node, device)
        self.optimizer = method.optimizer(given) if method else given
        # The sha256 of the file to which the optimizer's state, as it is now, was committed; empty if it never was.
        self.committed_sha256 = ""
        self.correct: Callable[[], None] | None = None  # what a part does to the gradients of each step
        self.node = node
        self.device = device
        self.total_steps = total_steps
        # The most sequences per forward pass; with `auto` unknown until the first step, and lowered when memory ends.
        self.micro_batch_limit = None if node.micro_batch_size == "auto" else node.micro_batch_size
        self._loss = torch.compile(self.model.loss) if use_compile(node, device) else self.model.loss
        self._autocast = resolve_precision(node, device) is torch.bfloat16
        # On CUDA the host reads the loss of a step while the device computes the next, so the device never waits.
        self._steps_in_flight = 1 if device.type == "cuda" else 0

    def train(
        self,
        stream: BatchSource,
        position: int,
        batch_size: int,
        tau: int,
        sequential_step: int,
        on_step: Callable[[int, float], bool],
    ) -> LocalRun:
        """Take up to `tau` steps, the first at the global `sequential_step`, on sequences from `position` on.

        `on_step(steps_done, loss)` follows each step (1, 2, ...); when it returns False, training stops there. On CUDA
        it runs one step late, so one more step is then done, and counted. Raises TrainingError on a loss or gradient
        that is not finite (on a CPU before the step is taken, on CUDA at most one step later), and when not even one
        sequence fits into memory.
        """
        self.committed_sha256 = ""
        self.model.train()
        log = _StepLog()
        in_flight: deque[_Reading] = deque()
        steps = tokens = 0
        started = time.perf_counter()
        with closing(self._batches(stream, position, batch_size, tau)) as batches:
            for batch in batches:
                learning_rate = self._set_learning_rate(sequential_step + steps)
                loss = self._compute_gradients(batch)
                if self.correct is not None:
                    self.correct()
                norm = self._clip_gradients()
                in_flight.append(_Reading(sequential_step + steps, learning_rate, loss, norm))
                settled = len(in_flight) > self._steps_in_flight
                if settled:  # a CPU learns of a bad loss here, before it reaches the weights
                    log.add(in_flight.popleft())
                self.optimizer.step()
                steps += 1
                tokens += batch[:, 1:].numel()
                if settled and not on_step(len(log.losses), log.losses[-1]):
                    break
        for reading in in_flight:
            log.add(reading)
            on_step(len(log.losses), log.losses[-1])
        self.optimizer.zero_grad(set_to_none=True)
        return LocalRun(
            steps=steps,
            tokens=tokens,
            loss_first=log.losses[0],
            loss_last=log.losses[-1],
            loss_mean=math.fsum(log.losses) / steps,
            gradient_norm_mean=math.fsum(log.gradient_norms) / steps,
            gradient_norm_max=max(log.gradient_norms),
            clipped_steps=sum(0 < self.node.clip_norm < norm for norm in log.gradient_norms),
            seconds=time.perf_counter() - started,
            learning_rate_last=learning_rate,
            stopped_early=steps < tau,
        )

    def evaluate(self, sequences: np.ndarray, batch_size: int) -> tuple[float, int]:
        """Sum of the loss in nats over all next-token predictions, and their number.

        `sequences`: int64 [count, sequence_length + 1]. Same precision as in training, no dropout. Never compiled: so
        few forward passes do not earn a graph of their own.
        """
        self.model.eval()
        nats, tokens = 0.0, 0
        with torch.no_grad():
            for start in range(0, len(sequences), batch_size):
                batch = torch.from_numpy(sequences[start : start + batch_size]).to(self.device)
                predictions = batch[:, 1:].numel()
                nats += self._forward(self.model.loss, batch).item() * predictions
                tokens += predictions
        return nats, tokens

    def _batches(self, stream: BatchSource, position: int, batch_size: int, tau: int) -> Generator[Tensor, None, None]:
        """The batch of each step, on the device. The step's batch is read whole, whatever the micro-batch.

        On CUDA a thread reads one batch ahead into pinned memory, so the copy overlaps with computing. On a CPU a
        thread would only take the core away from training.
        """
        if self.device.type != "cuda":
            for step in range(tau):
                yield torch.from_numpy(stream.batch(position + step * batch_size, batch_size)).to(self.device)
            return

        def read(step: int) -> Tensor:
            return torch.from_numpy(stream.batch(position + step * batch_size, batch_size)).pin_memory()

        with ThreadPoolExecutor(max_workers=1) as reader:
            ahead = reader.submit(read, 0)
            for step in range(tau):
                batch = ahead.result()
                if step + 1 < tau:
                    ahead = reader.submit(read, step + 1)
                yield batch.to(self.device, non_blocking=True)

    def _set_learning_rate(self, sequential_step: int) -> float:
        scale = learning_rate_scale(sequential_step, self.node, self.total_steps)
        set_learning_rate(self.optimizer, scale)
        return self.node.lr * scale

    def _compute_gradients(self, batch: Tensor) -> Tensor:
        """Leave the gradient of the batch's mean loss in the parameters; return that loss, detached, on the device.

        With `micro_batch_size = "auto"`, a batch that does not fit is tried again from zero gradients with half the
        micro-batch, in any step: the optimizer's own buffers, for one, only appear after the first.
        """
        if self.micro_batch_limit is None:
            self.micro_batch_limit = self._estimate_micro_batch(batch)
        while True:
            # Equal parts where possible: 6 sequences at a limit of 4 are 3 + 3, one shape for the compiled loss.
            parts = math.ceil(len(batch) / self.micro_batch_limit)
            micro_batch = math.ceil(len(batch) / parts)
            try:
                return self._accumulate(batch, micro_batch)
            except torch.OutOfMemoryError as error:
                if self.node.micro_batch_size != "auto":
                    raise TrainingError(
                        f"out of memory on {self.device} with node.micro_batch_size = {micro_batch}; "
                        'lower it, or set it to "auto"'
                    ) from error
                if micro_batch == 1:
                    raise TrainingError(
                        f"out of memory on {self.device} with a single sequence of {batch.shape[1] - 1} tokens; "
                        "use a shorter data.sequence_length or a smaller model"
                    ) from error
            # Only here, past the handler, are the failed pass and its tensors gone.
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.micro_batch_limit = micro_batch // 2

    def _accumulate(self, batch: Tensor, micro_batch: int) -> Tensor:
        # None rather than zeros: the first backward then stores its gradients instead of adding to zeros, which saves
        # two passes over the memory of all gradients.
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for part in torch.split(batch, micro_batch):
            loss = self._forward(self._loss, part) * (len(part) / len(batch))
            torch.autograd.backward(loss)
            total += loss.detach()
        return total

    def _forward(self, loss: Callable[[Tensor, Tensor], Tensor], sequences: Tensor) -> Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._autocast):
            return loss(sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous())

    def _clip_gradients(self) -> Tensor:
        """Scale the gradients down to `clip_norm` (0 = never); return their global norm from before."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.node.clip_norm:
            clip_grads_with_norm_(parameters, self.node.clip_norm, norm)
        return norm

    def _estimate_micro_batch(self, batch: Tensor) -> int:
        """The limit to begin with: none on CUDA, where an error tells, and elsewhere as many sequences as should fit.

        A CPU process would run into swap or be killed, so one sequence is measured. Activations may take half of the
        available memory, and of that the share that this process has of the cores: others like it train beside it.
        """
        if self.device.type == "cuda":
            return sys.maxsize
        cores_share = min(1.0, torch.get_num_threads() / available_cores())
        budget_bytes = available_memory() / 2 * cores_share
        one_sequence = batch[:1].clone()  # a view would keep, and count, the whole batch
        return max(1, int(budget_bytes / max(1, self._activation_bytes(one_sequence))))

    def _activation_bytes(self, sequences: Tensor) -> int:
        """Memory that a forward pass keeps for its backward pass, without the weights."""
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        # A model with dropout must not draw other numbers because its memory was measured.
        with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self._forward(self.model.loss, sequences)
        del loss  # until here the graph held every storage, so no address was counted for two
        return sum(kept.values())


class _Reading:
    """Loss and gradient norm of one step, on their way to the host."""

    def __init__(self, sequential_step: int, learning_rate: float, loss: Tensor, gradient_norm: Tensor) -> None:
        self.sequential_step = sequential_step
        self.learning_rate = learning_rate
        values = torch.stack([loss.float(), gradient_norm.float()])
        self._values = values.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def values(self) -> tuple[float, float]:
        """Wait for this step, and not for the work queued after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, gradient_norm = self._values.tolist()
        return loss, gradient_norm


@dataclass
class _StepLog:
    """The numbers of the steps so far."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)

    def add(self, reading: _Reading) -> None:
        loss, gradient_norm = reading.values()
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            raise TrainingError(
                f"training diverged at sequential step {reading.sequential_step} (local step {len(self.losses) + 1}): "
                f"loss {loss}, gradient norm {gradient_norm}, learning rate {reading.learning_rate:.3g}; "
                "lower node.lr and node.muon_lr, lengthen node.warmup_steps, or lower node.clip_norm"
            )
        self.losses.append(loss)
        self.gradient_norms.append(gradient_norm)
