"""Two thin factors in place of a matrix: how they are packed into values, and how the matrix is rebuilt from them.

A tensor of two or more dimensions counts as the matrix [shape[0], rest]. Of a matrix [m, n] as the product of `left`
[m, K] and `right` [K, n], the values are K columns of `left` and then K rows of `right`: K * (m + n) float32 numbers.
Component by component, so that neighbours have like magnitudes and a blockwise quantiser behind loses little.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from photon.errors import WireError
from photon.link.codec.base import Shape

CHUNK_ELEMENTS = 2**18  # 2 MB of float64: about what a core's cache holds, the fastest measured


def matrix_shape(shape: Shape) -> tuple[int, int]:
    """(m, n) of a tensor as a matrix; (numel, 1), which no factors make smaller, for vectors and scalars."""
    return (shape[0], prod(shape[1:])) if len(shape) >= 2 else (prod(shape), 1)


def saves(rank: int, rows: int, columns: int) -> bool:
    """Whether the factors are fewer numbers than the matrix."""
    return rank * (rows + columns) < rows * columns


def pack(left: Tensor, right: Tensor) -> Tensor:
    """float32 [K * (m + n)] of float64 `left` [m, K] and `right` [K, n].

    What a component weighs is shared equally between its column and its row. So neither overflows float32 nor sinks
    into its denormals where the matrix itself does not: the root of 1e-40 is 1e-20.
    """
    left_norms, right_norms = left.norm(dim=0), right.norm(dim=1)
    is_alive = (left_norms > 0) & (right_norms > 0)
    balance = torch.where(is_alive, (right_norms / left_norms).sqrt(), 0.0)
    inverse = torch.where(is_alive, 1.0 / balance, 0.0)
    return torch.cat([(left * balance).T.reshape(-1), (right * inverse[:, None]).reshape(-1)]).float()


def unpack(values: Tensor, rank: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Views `left` [rows, rank] and `right` [rank, columns] of float32 [rank * (rows + columns)].

    Raises WireError on any other number of values.
    """
    check_values(values, rank * (rows + columns))
    left, right = values[: rank * rows], values[rank * rows :]
    return left.view(rank, rows).T, right.view(rank, columns)


def check_values(values: Tensor, count: int) -> None:
    """Raises WireError unless `values` is float32 [count]."""
    if values.dtype != torch.float32 or values.shape != (count,):
        raise WireError(f"expected {count} float32 values, got {tuple(values.shape)} of {values.dtype}")


def dense(values: Tensor, shape: Shape) -> Tensor:
    """A view of values that were sent as they are. Raises WireError if they do not fill the shape."""
    check_values(values, prod(shape))
    return values.view(shape)


def rebuild(left: Tensor, right: Tensor) -> Tensor:
    """The product, float32 [m, n], of float32 `left` [m, K] and `right` [K, n]; the same bits on every machine.

    Libraries differ in the order in which a matrix product adds up, so this one is spelled out: in float64, component
    after component, rounded to float32 once. The product of two float32 is exact in float64 (24 + 24 of 53 bits), so
    whether a processor fuses multiplication and addition or not, the same sum is rounded the same way. An entry beyond
    float32 becomes infinite. Temporary memory: the factors in float64, and two megabytes.
    """
    (rows, rank), columns = left.shape, right.shape[1]
    out = torch.empty(rows, columns)
    if not rank or not out.numel():
        return out.zero_()
    left_double, right_double = left.double(), right.double()
    width = min(columns, CHUNK_ELEMENTS)
    height = min(rows, max(1, CHUNK_ELEMENTS // width))
    scratch = torch.empty(height * width, dtype=torch.float64)
    for column in range(0, columns, width):
        for row in range(0, rows, height):
            target = out[row : row + height, column : column + width]
            a, b = left_double[row : row + height], right_double[:, column : column + width]
            total = torch.mul(a[:, :1], b[0], out=scratch[: target.numel()].view(target.shape))
            for k in range(1, rank):
                total.addcmul_(a[:, k : k + 1], b[k])
            target.copy_(total)
    return out
