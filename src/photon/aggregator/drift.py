"""How far nodes pull apart: pairwise cosines of their updates, from a sample that does not grow with the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from photon.parts.method import is_state

SAMPLE_VALUES = 2**20
# Primes that divide no usual width, so a sample does not keep meeting the same columns of a matrix.
_STRIDES = (1, 11, 101, 1009, 10_007, 100_003)


def sample_update(update: Iterable[tuple[str, Tensor]], like: Mapping[str, Tensor]) -> Tensor:
    """Every s-th value of the weights' update as float32; all up to SAMPLE_VALUES values (then cosines are exact).

    `like` has the tensors of the update. Optimizer state that is shared is left out.
    """
    total_values = sum(tensor.numel() for name, tensor in like.items() if not is_state(name))
    stride = next((s for s in _STRIDES if total_values <= SAMPLE_VALUES * s), _STRIDES[-1])
    # Copies: a view would keep the whole tensor, and all of them the whole update.
    parts = [tensor.reshape(-1)[::stride].to(torch.float32, copy=True) for name, tensor in update if not is_state(name)]
    return torch.cat([torch.zeros(0), *parts])


def mean_cosine(rows: Sequence[Sequence[float]]) -> float | None:
    """The mean over all pairs of what `pairwise_cosine` gives; None if there is no pair."""
    pairs = [row[column] for index, row in enumerate(rows) for column in range(index)]
    return math.fsum(pairs) / len(pairs) if pairs else None


def pairwise_cosine(samples: Mapping[str, Tensor]) -> list[list[float]]:
    """Cosine of each pair, rows and columns as sorted(samples). A zero update has cosine 0 with everything."""
    names = sorted(samples)
    units = [samples[name].double() / max(float(samples[name].double().norm()), 1e-300) for name in names]
    return [[round(float(a @ b), 6) for b in units] for a in units]
