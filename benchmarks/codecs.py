"""How fast is each codec stage on one core, how small does it make an update, and how much of it is lost?

GB/s are float32 input bytes per CPU second, the same for encoding and decoding, so that stages compare with each other,
with a plain copy of the same tensor in the same turns, and with a network link. The copy is shown twice: into memory
that is there, and into new memory, as every encoder and decoder writes. A lossless stage alone gets the raw tensor,
whose mantissas are noise; what it is good for shows behind a quantiser.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.common import RESULTS, Out, Report, pin, take_turns
from photon.link.codec.base import Context, Quantiser, Stage, Transform
from photon.link.codec.notation import parse_pipeline, parse_stage

_SEED = 1
_COLUMNS = 1024
_FLOAT32_BYTES = 4
# A stage or a chain of them each, as in a recipe.
_CODECS = [
    "bf16",
    "fp16",
    "int8",
    "int8(rounding=stochastic)",
    "int4",
    "int4(rounding=stochastic)",
    "int2",
    "int2(rounding=stochastic)",
    "sign",
    "topk",
    "topk(scope=tensor)",
    "topk(scope=global)",
    "lowrank",
    "zstd",
    "lz4",
    "bf16 | zstd",
    "int8 | zstd",
    "topk | int2 | zstd",
]


@dataclass(frozen=True)
class Candidate:
    """What is timed: `encode` gives the tensors that travel, `decode` the tensor [rows, columns] made of them."""

    label: str
    encode: Callable[[Tensor], list[Tensor]]
    decode: Callable[[list[Tensor]], Tensor]


def main(
    megabytes: Annotated[int, typer.Option(help="Size of the float32 tensor.", min=1)] = 64,
    turns: Annotated[int, typer.Option(help="Measurements of each codec.", min=1)] = 5,
    codec: Annotated[list[str] | None, typer.Option(help="`int4 | zstd`; repeatable; default a list of all.")] = None,
    out: Out = RESULTS,
) -> None:
    """CPU time of every stage beside that of a copy."""
    pin()
    report = Report("codecs", out)
    update = pseudo_gradient(megabytes * 10**6 // (_FLOAT32_BYTES * _COLUMNS), _COLUMNS)
    there = torch.empty_like(update)
    variants: dict[str, Callable[[], object]] = {
        "copy": lambda: there.copy_(update),
        "copy to new memory": update.clone,
    }
    rows: dict[str, dict[str, object]] = {label: {"codec": label, "megabytes": megabytes} for label in variants}
    for candidate in [_candidate(text, update) for text in codec or _CODECS]:
        encoded = candidate.encode(update)
        decoded = candidate.decode(encoded)
        rows[candidate.label] = {
            "codec": candidate.label,
            "megabytes": megabytes,
            "times fewer bytes": update.nbytes / max(1, sum(part.nbytes for part in encoded)),
            "relative L2 error": float((decoded - update).norm() / update.norm()),
        }
        variants[f"{candidate.label} encode"] = _encoding(candidate, update)
        variants[f"{candidate.label} decode"] = _decoding(candidate, encoded)
    seconds = take_turns({name: _without_result(work) for name, work in variants.items()}, turns)
    speed = {name: update.nbytes / 1e9 / statistics.median(taken) for name, taken in seconds.items()}
    for label, row in rows.items():
        speeds = (
            {"copy GB/s": speed[label]}
            if label in speed
            else {"encode GB/s": speed[f"{label} encode"], "decode GB/s": speed[f"{label} decode"]}
        )
        report.add({**row, **speeds})
    report.show(f"Codecs on {megabytes} MB of float32: GB of input per CPU second, one thread")


def pseudo_gradient(rows: int, columns: int) -> Tensor:
    """float32 [rows, columns], heavy-tailed like an update: normal values, each row at a scale of its own."""
    random = torch.Generator().manual_seed(_SEED)
    scale = torch.randn((rows, 1), generator=random).exp_().mul_(1e-4)
    return torch.randn((rows, columns), generator=random).mul_(scale)


def _candidate(text: str, update: Tensor) -> Candidate:
    stages = [part.strip() for part in text.split("|")]
    return _chain(text, stages, update) if len(stages) > 1 else _alone(text, parse_stage(text), update)


def _chain(label: str, stages: list[str], update: Tensor) -> Candidate:
    """As a run uses it, with its check that all values are finite."""
    codec = parse_pipeline(stages)
    survey = codec.survey(lambda: [("update", update)])
    return Candidate(
        label,
        lambda tensor: [codec.encode(tensor, _SEED, survey, {}).wire],
        lambda parts: codec.decode(parts[0], tuple(update.shape), torch.float32).tensor,
    )


def _alone(label: str, stage: Stage, update: Tensor) -> Candidate:
    """The stage and nothing around it."""
    shape = tuple(update.shape)
    if isinstance(stage, Transform):
        transform, context = stage, Context(_SEED, stage.survey([update]))

        def reduce(tensor: Tensor) -> list[Tensor]:
            reduced = transform.encode(tensor, context)
            return [reduced.values, reduced.side]

        return Candidate(label, reduce, lambda parts: transform.decode(parts[0], parts[1], shape))
    if isinstance(stage, Quantiser):
        quantiser = stage
        return Candidate(
            label,
            lambda tensor: [quantiser.encode(tensor.view(-1), _SEED)],
            lambda parts: quantiser.decode(parts[0], update.numel()).view(shape),
        )
    lossless = stage
    return Candidate(
        label,
        lambda tensor: [lossless.encode(tensor.view(-1).view(torch.uint8), _FLOAT32_BYTES)],
        lambda parts: lossless.decode(parts[0], update.nbytes, _FLOAT32_BYTES).view(torch.float32).view(shape),
    )


def _encoding(candidate: Candidate, update: Tensor) -> Callable[[], object]:
    return lambda: candidate.encode(update)


def _decoding(candidate: Candidate, encoded: list[Tensor]) -> Callable[[], object]:
    return lambda: candidate.decode(encoded)


def _without_result(work: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        work()

    return run


if __name__ == "__main__":
    typer.run(main)
