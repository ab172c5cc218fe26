"""PowerSGD's low rank: one step of power iteration a round, warm-started with the last one's result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from photon.errors import WireError
from photon.link.codec.base import Context, Reduced, ReducedSize, Shape
from photon.link.codec.factors import CHUNK_ELEMENTS, dense, matrix_shape, pack, rebuild, saves, unpack

_DEAD = 1e-12  # of the strongest component: float64 rounding noise


@dataclass(frozen=True)
class LowRank:
    """A matrix as a product of rank `rank`: Vogels et al. 2019, "PowerSGD", Algorithm 1, with a single worker.

    P = M Q, orthonormalised; Q' = M^T P; sent are P and Q', and Q' is where the next round starts (`memory["q"]`,
    float32 [n, rank], orthonormal: only the space it spans matters). Vectors, scalars, and matrices that the factors
    would not make smaller are sent as they are. What is left out is for error feedback to bring later.
    """

    rank: int = 4

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    def survey(self, tensors: Iterable[Tensor]) -> float | None:
        """Nothing: every matrix stands alone."""
        return None

    def encode(self, tensor: Tensor, context: Context) -> Reduced:
        """Factors of a float32 tensor, or a view of it where it is sent as it is; no side information.

        A zero matrix gives zero factors and keeps the memory as it was.
        """
        tensor, side = tensor.contiguous(), torch.empty(0, dtype=torch.uint8)
        rows, columns = matrix_shape(tuple(tensor.shape))
        if not saves(self.rank, rows, columns):
            return Reduced(tensor.view(-1), side)
        if not tensor.any():
            return Reduced(torch.zeros(self.rank * (rows + columns)), side, context.memory)
        generator = torch.Generator().manual_seed(context.seed)
        fresh = torch.randn(columns, self.rank, generator=generator)
        start = context.memory.get("q")
        if start is None or start.shape != fresh.shape:  # the first round, or one after a change of rank
            start = fresh
        left, right = _power_step(tensor.view(rows, columns), start)
        return Reduced(pack(left, right), side, {"q": _next_start(right, fresh)})

    def size(self, shape: Shape) -> ReducedSize:
        """Exact: rank * (m + n) values, or all of them."""
        rows, columns = matrix_shape(shape)
        count = self.rank * (rows + columns) if saves(self.rank, rows, columns) else prod(shape)
        return ReducedSize(values=count, side_bytes=0, is_exact=True)

    def value_count(self, side: Tensor, shape: Shape) -> int:
        """As `size` says. Raises WireError if there is any side information."""
        if side.numel():
            raise WireError(f"low rank has no side information, got {side.numel()} bytes")
        return self.size(shape).values

    def decode(self, values: Tensor, side: Tensor, shape: Shape) -> Tensor:
        """The product of the factors, or a view of values sent as they are. Raises WireError on a wrong count."""
        rows, columns = matrix_shape(shape)
        self.value_count(side, shape)
        if not saves(self.rank, rows, columns):
            return dense(values, shape)
        return rebuild(*unpack(values, self.rank, rows, columns)).view(shape)


def _power_step(matrix: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """float64 P [m, rank], orthonormal, and P^T M [rank, n] of float32 M [m, n] and Q [n, rank].

    In float64, which neither 1e38 overflows when squared nor 1e-45 underflows; chunk by chunk, so that M is never
    copied whole.
    """
    rows, columns = matrix.shape
    height = max(1, CHUNK_ELEMENTS // columns)
    left = torch.empty(rows, start.shape[1], dtype=torch.float64)
    start = start.double()
    for row in range(0, rows, height):
        torch.mm(matrix[row : row + height].double(), start, out=left[row : row + height])
    left = _orthonormal(left)
    right = torch.zeros(start.shape[1], columns, dtype=torch.float64)
    for row in range(0, rows, height):
        # The thin factor on the left, contiguous: three times as fast as M^T P.
        right.addmm_(left[row : row + height].T.contiguous(), matrix[row : row + height].double())
    return left, right


def _next_start(right: Tensor, fresh: Tensor) -> Tensor:
    """Orthonormal float32 [n, rank] of the rows of `right` [rank, n]; those that vanished start afresh.

    After a matrix of lower rank than ours the rest of Q would be zero, or noise, and a zero never recovers.
    """
    norms = right.norm(dim=1)
    is_dead = norms <= _DEAD * norms.max()
    basis = torch.where(is_dead, fresh.double(), right.T / norms.where(~is_dead, torch.ones(())))
    return _orthonormal(basis).float().contiguous()


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis [d, rank] whose first k columns span the first k given: Householder, never short of one."""
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis
