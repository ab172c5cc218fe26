"""Time this machine for a plan: local steps of the recipe's model, and what a node and the Aggregator do beside them.

The link is not timed: what lies between two sites only they can measure. All rates of bytes are of the float32 model.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from photon.devices import CONTROL_S
from photon.errors import InputError
from photon.estimate import memory_estimate
from photon.plan_bytes import FLOAT32_BYTES
from photon.planner import MachineSpeed
from photon.readable import byte_size

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from photon.config import Recipe
    from photon.node.trainer import Trainer

TRAIN_LIMIT_S = 6.0  # of timed steps
STEP_LIMIT_S = 3.0  # of one step: a larger batch is timed in part, and tokens per second taken to stay
STAGE_LIMIT_S = 1.0  # of each stage beside training
SAMPLE_BYTES = 64 * 10**6  # of the model's tensors that the stages beside training are timed on
MOST_STEPS = 30
_RANDOM_SEED = 7


@dataclass(frozen=True)
class Measured:
    """The speed, what was measured in words, and the memory of the device it was measured on."""

    speed: MachineSpeed
    told: str
    memory_bytes: int


class RandomTokens:
    """A Data Source of uniform noise: a step costs the same on any text."""

    def __init__(self, vocab_size: int, sequence_length: int) -> None:
        self.vocab_size, self.sequence_length = vocab_size, sequence_length

    def batch(self, position: int, size: int) -> np.ndarray:
        """int64 [size, sequence_length + 1]."""
        import numpy as np

        return np.random.default_rng([_RANDOM_SEED, position]).integers(
            0, self.vocab_size, (size, self.sequence_length + 1), dtype=np.int64
        )


def measure(recipe: Recipe, on_progress: Callable[[str], None], processes: int = 1) -> Measured:
    """Time this machine; under half a minute for the preset demo.

    `processes` such as this one share its cores, as the workers of virtual nodes do. Raises InputError if the recipe's
    model does not fit here.
    """
    import torch

    from photon.model.build import build_model, named_weights
    from photon.node.device import WorkerPlan, available_cores, configure_process, describe_device, resolve_devices
    from photon.node.trainer import Trainer
    from photon.plan_sizes import model_facts

    name = resolve_devices(recipe.node.device)[0]
    device, memory_bytes = torch.device(name), _memory_bytes(name)
    facts = model_facts(recipe)
    _check_memory(memory_estimate(recipe, facts.parameters, facts.shared).node_bytes, memory_bytes)
    threads = recipe.node.threads if recipe.node.threads != "auto" else max(1, available_cores() // processes)
    before = torch.get_num_threads()
    try:
        configure_process(WorkerPlan(name, threads))
        on_progress(f"local steps on {describe_device(device)}")
        model = build_model(recipe.model, recipe.data.vocab_size, recipe.data.sequence_length, recipe.seed)
        trainer = Trainer(model, recipe.node, device, recipe.total_steps)
        tokens_per_s = _training(recipe, trainer)
        on_progress("scoring")
        evaluation_tokens_per_s = _evaluation(recipe, trainer)
        sample = _sample({key: weight.cpu() for key, weight in named_weights(model).items()})
        on_progress(f"codec, merge and disk on {byte_size(_size(sample))} of its tensors")
        torch.set_num_threads(threads)
        rates = _rates(recipe, sample)
        told = f"measured here: {describe_device(device)}, {tokens_per_s:,.0f} tokens/s"
    finally:
        torch.set_num_threads(before)
    return Measured(
        MachineSpeed(tokens_per_s, evaluation_tokens_per_s, *rates, control_s=CONTROL_S["flower"]), told, memory_bytes
    )


def _training(recipe: Recipe, trainer: Trainer) -> float:
    """Tokens per second of the recipe's batch, or of the part of it that a step has time for; first steps left out."""
    source = RandomTokens(recipe.data.vocab_size, recipe.data.sequence_length)

    def steps(batch_size: int, count: int, limit_s: float) -> float:
        end = time.perf_counter() + limit_s
        run = trainer.train(source, 0, batch_size, count, 0, lambda step, loss: time.perf_counter() < end)
        return run.tokens / run.seconds

    wanted = max(recipe.batch_size_of(silo) for silo in recipe.silo)
    steps(1, 1, STEP_LIMIT_S)  # first use: allocator, kernels, compilation
    began = time.perf_counter()
    steps(1, 1, STEP_LIMIT_S)
    batch_size = max(1, min(wanted, int(STEP_LIMIT_S / (time.perf_counter() - began))))
    steps(batch_size, 1, STEP_LIMIT_S)
    return steps(batch_size, MOST_STEPS, TRAIN_LIMIT_S)


def _evaluation(recipe: Recipe, trainer: Trainer) -> float:
    batch_size = recipe.evaluation.batch_size
    source = RandomTokens(recipe.data.vocab_size, recipe.data.sequence_length)
    sequences = source.batch(0, 1)
    trainer.evaluate(sequences, 1)
    began = time.perf_counter()
    trainer.evaluate(sequences, 1)
    count = max(1, min(recipe.evaluation.sequences, int(STAGE_LIMIT_S / (time.perf_counter() - began))))
    sequences = source.batch(0, count)
    began = time.perf_counter()
    _, tokens = trainer.evaluate(sequences, batch_size)
    return tokens / (time.perf_counter() - began)


def _rates(recipe: Recipe, sample: Mapping[str, Tensor]) -> tuple[float, float, float, float, float]:
    """Bytes of float32 model per second: decode, encode, merge, outer step, disk."""
    import torch

    from photon.aggregator.merge import Merge
    from photon.aggregator.outer import OuterOptimizer
    from photon.link.codec.feedback import encode_update
    from photon.link.codec.notation import parse_pipeline
    from photon.link.codec.pipeline import Pipeline
    from photon.link.tensors import encode_tensors, iterate_tensors, sha256_hex

    up, down = (
        parse_pipeline(getattr(recipe.link, way), f"link.{way}", recipe.link.exact_tensors) for way in ("up", "down")
    )
    size = _size(sample)
    generator = torch.Generator().manual_seed(_RANDOM_SEED)
    # An update is smaller than the weights and as dense: what lossless stages do to it depends on its values.
    update = {name: torch.randn(tensor.shape, generator=generator).mul_(1e-3) for name, tensor in sample.items()}
    state = encode_update(up, dict(update), {}, recipe.link.up_decay, "first").state

    def encoded(codec: Pipeline) -> bytes:
        link = recipe.link
        sent = encode_update(codec, dict(update), state, link.up_decay, "plan", rescale=link.up_rescales)
        return encode_tensors(sent.wire)

    room = {name: tensor.clone() for name, tensor in sample.items()}
    received, sent = encoded(down), encoded(up)
    outer = OuterOptimizer(sample.items(), recipe.federation)

    def decoded(codec: Pipeline, body: bytes) -> Iterator[tuple[str, Tensor]]:
        for name, wire in iterate_tensors(body):
            yield name, codec.of(name).decode(wire, tuple(sample[name].shape), torch.float32).tensor

    def decode() -> None:
        sha256_hex(received)
        for name, tensor in decoded(down, received):
            room[name].copy_(tensor)

    def encode() -> None:
        for name, tensor in sample.items():
            torch.sub(tensor, room[name])
        sha256_hex(encoded(up))

    def merge() -> None:
        sha256_hex(sent)
        for _, delta in decoded(up, sent):  # verified whole before any of it counts, so decoded twice
            torch.aminmax(delta)
            torch.linalg.vector_norm(delta, dtype=torch.float64)
        Merge(sample, 1).fold(decoded(up, sent), 1)

    def step() -> None:
        outer.step(update.items())
        sha256_hex(encode_tensors(outer.weights()))
        if down.labels:
            encoded(down)

    disk = _disk_rate(size, encode_tensors(sample))
    return _rate(size, decode), _rate(size, encode), _rate(size, merge), _rate(size, step), disk


def _disk_rate(size_bytes: int, base: bytes) -> float:
    """Bytes per second of a state that is hashed, written and made durable, in the folder at hand."""
    from photon.link.tensors import sha256_hex

    with tempfile.TemporaryDirectory(prefix=".photon-plan-", dir=Path.cwd()) as folder:
        path = Path(folder) / "state"

        def write() -> None:
            sha256_hex(base)
            with path.open("wb") as file:
                file.write(base)
                file.flush()
                os.fsync(file.fileno())

        return _rate(size_bytes, write)


def _rate(size_bytes: int, work: Callable[[], object]) -> float:
    """Bytes per second of the median repeat; the first is not counted."""
    work()
    seconds: list[float] = []
    end = time.perf_counter() + STAGE_LIMIT_S
    while len(seconds) < 3 or (time.perf_counter() < end and len(seconds) < MOST_STEPS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return size_bytes / sorted(seconds)[len(seconds) // 2]


def _sample(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors, largest last, as far as they stay within SAMPLE_BYTES; at least one."""
    chosen: dict[str, Tensor] = {}
    left = SAMPLE_BYTES
    for name in sorted(weights, key=lambda key: weights[key].numel()):
        left -= weights[name].numel() * FLOAT32_BYTES
        if chosen and left < 0:
            break
        chosen[name] = weights[name].detach().clone()
    return chosen


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(prod(tensor.shape) for tensor in tensors.values()) * FLOAT32_BYTES


def _memory_bytes(device: str) -> int:
    import torch

    from photon.node.memory import total_memory

    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    return total_memory()


def _check_memory(needed: int, memory_bytes: int) -> None:
    if needed > 0.8 * memory_bytes:
        raise InputError(
            f"--device measured: to train the model takes {byte_size(needed)}, this machine has "
            f"{byte_size(memory_bytes)}; name a device instead, such as --device h100"
        )
