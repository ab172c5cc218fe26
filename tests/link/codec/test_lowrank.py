"""PowerSGD's low rank: projection, convergence by warm start, and what must not kill it."""

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from photon.errors import WireError
from photon.link.codec import lowrank
from photon.link.codec.base import Context, Reduced
from photon.link.codec.lowrank import LowRank

SHAPES = st.lists(st.integers(0, 12), max_size=4).map(tuple)
NO_SIDE = torch.empty(0, dtype=torch.uint8)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decaying(rows: int = 40, columns: int = 60, factor: float = 0.8) -> Tensor:
    """A matrix of singular values factor^i."""
    rank = min(rows, columns)
    left, _ = torch.linalg.qr(random(rows, rank).double())
    right, _ = torch.linalg.qr(random(columns, rank, seed=1).double())
    out: Tensor = (left * factor ** torch.arange(rank) @ right.T).float()
    return out


def best_error(matrix: Tensor, rank: int) -> float:
    """What Eckart and Young leave: no matrix of that rank is nearer."""
    return float(np.linalg.norm(np.linalg.svd(matrix.double().numpy(), compute_uv=False)[rank:]))


def rebuilt(stage: LowRank, tensor: Tensor, reduced: Reduced) -> Tensor:
    return stage.decode(reduced.values, reduced.side, tuple(tensor.shape))


def error_after(stage: LowRank, matrix: Tensor, rounds: int, keeps_memory: bool = True) -> float:
    memory: dict[str, Tensor] = {}
    for number in range(rounds):
        reduced = stage.encode(matrix, Context(number, memory=memory))
        memory = dict(reduced.memory) if keeps_memory else {}
    return float((rebuilt(stage, matrix, reduced) - matrix).norm())


@given(SHAPES, st.integers(1, 5))
@settings(deadline=None, max_examples=100)
def test_sizes_follow_from_the_shape_alone(shape: tuple[int, ...], rank: int) -> None:
    stage, tensor = LowRank(rank), random(*shape)
    reduced, size = stage.encode(tensor, Context(3)), stage.size(shape)
    rows, columns = (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, prod(shape))
    assert size.is_exact
    assert reduced.values.shape == (min(rank * (rows + columns), rows * columns),)
    assert reduced.values.numel() == size.values == stage.value_count(reduced.side, shape)
    assert reduced.side.numel() == size.side_bytes == 0
    out = rebuilt(stage, tensor, reduced)
    assert out.shape == shape
    assert out.dtype == torch.float32
    if reduced.values.numel() == tensor.numel():
        assert torch.equal(out, tensor)


def test_equals_the_paper_spelled_out() -> None:
    matrix, start = random(20, 31), random(31, 3, seed=5)
    out = rebuilt(LowRank(3), matrix, LowRank(3).encode(matrix, Context(0, memory={"q": start})))
    m, p = matrix.double().numpy(), matrix.double().numpy() @ start.double().numpy()
    for column in range(3):  # Gram-Schmidt
        for before in range(column):
            p[:, column] -= p[:, before] @ p[:, column] * p[:, before]
        p[:, column] /= np.linalg.norm(p[:, column])
    assert np.abs(out.numpy() - p @ (p.T @ m)).max() < 1e-5


@pytest.mark.parametrize("shape", [(33, 47), (8, 3, 5, 5), (700, 900)])
def test_a_matrix_of_that_rank_needs_one_round(shape: tuple[int, ...]) -> None:
    tensor = (random(shape[0], 4) @ random(4, prod(shape[1:]), seed=1)).view(shape)
    assert error_after(LowRank(4), tensor, 1) < 1e-5 * tensor.norm()


def test_warm_start_converges_to_the_best_of_that_rank_and_without_it_does_not() -> None:
    matrix, stage = decaying(), LowRank(4)
    best = best_error(matrix, 4)

    def converges(keeps_memory: bool) -> bool:
        return best * (1 - 1e-4) <= error_after(stage, matrix, 20, keeps_memory) <= 1.01 * best

    assert converges(True)
    assert not converges(False)  # the mutant that drops its memory


def test_a_zero_round_moves_nothing_and_is_not_remembered() -> None:
    matrix, stage = decaying(), LowRank(4)
    memory = stage.encode(matrix, Context(0)).memory
    zero = stage.encode(torch.zeros(40, 60), Context(1, memory=memory))
    assert torch.equal(rebuilt(stage, matrix, zero), torch.zeros(40, 60))
    assert torch.equal(zero.memory["q"], memory["q"])
    assert not stage.encode(torch.zeros(40, 60), Context(0)).memory


def test_a_round_of_lower_rank_kills_no_component(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, stage, one = torch.zeros(50, 70), LowRank(4), torch.zeros(50, 70)
    matrix[10:, 10:] = decaying()  # tokens that never occur: where a start made of unit vectors would look
    one[13, 17] = 1.0

    def recovers() -> bool:
        reduced = stage.encode(one, Context(0))
        assert torch.allclose(rebuilt(stage, one, reduced), one, atol=1e-6)
        q = reduced.memory["q"].double()
        assert torch.allclose(q.T @ q, torch.eye(4).double(), atol=1e-6)
        for number in range(20):
            reduced = stage.encode(matrix, Context(number, memory=reduced.memory))
        return bool((rebuilt(stage, matrix, reduced) - matrix).norm() <= 1.01 * best_error(matrix, 4))

    assert recovers()
    # The mutant that keeps what vanished: orthonormal all the same, but of vectors that mean nothing.
    monkeypatch.setattr(lowrank, "_next_start", lambda right, fresh: torch.linalg.qr(right.T).Q.float())
    assert not recovers()


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1.0, 1e30, 1e36])
def test_scale_does_not_matter(scale: float) -> None:
    matrix = decaying()
    reduced = LowRank(4).encode(matrix * scale, Context(0))
    plain = LowRank(4).encode(matrix, Context(0))
    assert reduced.values.isfinite().all()
    difference = rebuilt(LowRank(4), matrix, reduced).double() / scale - rebuilt(LowRank(4), matrix, plain).double()
    assert difference.norm() < 1e-5 * matrix.norm()


def test_denormals_spikes_and_the_largest_numbers() -> None:
    stage = LowRank(2)
    for value in (1.4e-45, 1e-40, 3e38, -1.0):
        spike = torch.zeros(30, 20)
        spike[4, 5] = value
        assert torch.allclose(rebuilt(stage, spike, stage.encode(spike, Context(0))), spike, rtol=1e-6, atol=1.4e-45)
        full = torch.full((30, 20), value)
        assert torch.allclose(rebuilt(stage, full, stage.encode(full, Context(0))), full, rtol=1e-5, atol=1.4e-45)


def test_the_same_seed_gives_the_same_bits_and_nothing_is_changed() -> None:
    matrix = random(64, 48)
    before = matrix.clone()
    first, second, other = (LowRank(4).encode(matrix, Context(seed)).values for seed in (7, 7, 8))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(matrix, before)
    view = matrix.T.contiguous().T
    assert torch.equal(LowRank(4).encode(view, Context(7)).values, first)


def test_memory_of_another_rank_starts_afresh() -> None:
    matrix = decaying()
    other = LowRank(2).encode(matrix, Context(0)).memory
    reduced = LowRank(4).encode(matrix, Context(1, memory=other))
    assert torch.equal(reduced.values, LowRank(4).encode(matrix, Context(1)).values)
    assert reduced.memory["q"].shape == (60, 4)


@given(st.binary(max_size=400), st.integers(0, 120), st.integers(0, 3), SHAPES)
@settings(deadline=None, max_examples=150)
def test_whatever_arrives_is_refused_or_has_the_shape(
    data: bytes, count: int, side_bytes: int, shape: tuple[int, ...]
) -> None:
    values = torch.zeros(count)
    head = torch.tensor(list(data[: 4 * (len(data) // 4)]), dtype=torch.uint8).view(torch.float32)[:count]
    values[: head.numel()] = head
    stage = LowRank(2)
    try:
        out = stage.decode(values, torch.zeros(side_bytes, dtype=torch.uint8), shape)
    except WireError:
        assert side_bytes or count != stage.size(shape).values
    else:
        assert out.shape == shape


def test_every_truncation_is_refused() -> None:
    values = LowRank(2).encode(random(9, 8), Context(0)).values
    for count in range(values.numel()):
        with pytest.raises(WireError, match="expected 34 float32 values"):
            LowRank(2).decode(values[:count], NO_SIDE, (9, 8))
    with pytest.raises(WireError, match="no side information"):
        LowRank(2).value_count(torch.zeros(1, dtype=torch.uint8), (9, 8))


def test_parameters_are_checked() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        LowRank(0)
    assert LowRank().survey([]) is None
