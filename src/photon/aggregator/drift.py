"""How far nodes pull apart: pairwise cosines of their updates, from a sample that does not grow with the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

SAMPLE_VALUES = 2**20
# Primes that divide no usual width, so a sample does not keep meeting the same columns of a matrix.
_STRIDES = (1, 11, 101, 1009, 10_007, 100_003)


def sample_update(update: Iterable[tuple[str, Tensor]], total_values: int) -> Tensor:
    """Every s-th value of an update as float32; all of them up to SAMPLE_VALUES values (then cosines are exact)."""
    stride = next((s for s in _STRIDES if total_values <= SAMPLE_VALUES * s), _STRIDES[-1])
    # Copies: a view would keep the whole tensor, and all of them the whole update.
    return torch.cat([tensor.reshape(-1)[::stride].to(torch.float32, copy=True) for _, tensor in update])


def pairwise_cosine(samples: Mapping[str, Tensor]) -> list[list[float]]:
    """Cosine of each pair, rows and columns as sorted(samples). A zero update has cosine 0 with everything."""
    names = sorted(samples)
    units = [samples[name].double() / max(float(samples[name].double().norm()), 1e-300) for name in names]
    return [[round(float(a @ b), 6) for b in units] for a in units]
