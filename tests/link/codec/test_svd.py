"""FedDLR's truncated singular value decomposition against the laws of linear algebra."""

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from photon.errors import WireError
from photon.link.codec.base import Context, Reduced
from photon.link.codec.factors import pack, rebuild, unpack
from photon.link.codec.svd import Svd

DENSE = 2**32 - 1
SHAPES = st.lists(st.integers(0, 12), max_size=4).map(tuple)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def planted(rows: int = 64, columns: int = 96, noise: float = 0.05, seed: int = 0) -> Tensor:
    """Rank four with some noise."""
    signal = random(rows, 4, seed=seed) @ random(4, columns, seed=seed + 1)
    return signal + noise * random(rows, columns, seed=seed + 2)


def with_spectrum(values: list[float], rows: int = 40, columns: int = 50) -> Tensor:
    left, _ = torch.linalg.qr(random(rows, len(values)).double())
    right, _ = torch.linalg.qr(random(columns, len(values), seed=1).double())
    out: Tensor = (left * torch.tensor(values).double() @ right.T).float()
    return out


def singular_values(matrix: Tensor) -> list[float]:
    return list(np.linalg.svd(matrix.double().numpy(), compute_uv=False))


def smallest_rank(values: list[float], energy: float, power: int = 2) -> int:
    """The definition, one singular value after the other; power 1 is the mutant."""
    total, so_far = sum(s**power for s in values), 0.0
    for rank, s in enumerate(values, 1):
        so_far += s**power
        if so_far >= energy * total:
            return rank
    return len(values)


def rank_of(reduced: Reduced) -> int:
    return int.from_bytes(bytes(reduced.side.tolist()), "little")


def truncated(stage: Svd, tensor: Tensor) -> Tensor:
    reduced = stage.encode(tensor, Context(0))
    return stage.decode(reduced.values, reduced.side, tuple(tensor.shape))


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.98])
@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (600, 500), (16, 4, 3, 3)])
def test_eckart_young_and_the_smallest_rank(shape: tuple[int, ...], energy: float) -> None:
    rows, columns = shape[0], prod(shape[1:])
    tensor = (with_spectrum([0.8**i for i in range(16)], rows, columns) + 1e-3 * random(rows, columns)).view(shape)
    stage = Svd(energy)
    reduced = stage.encode(tensor, Context(0))
    values = singular_values(tensor.view(rows, columns))
    rank, total = smallest_rank(values, energy), sum(s**2 for s in values)
    assert rank_of(reduced) == rank
    assert sum(s**2 for s in values[: rank - 1]) < energy * total
    error = (stage.decode(reduced.values, reduced.side, shape).double() - tensor.double()).square().sum().item()
    assert abs(error - sum(s**2 for s in values[rank:])) < 1e-6 * total
    assert 4 * reduced.values.numel() + reduced.side.numel() == 4 * rank * (rows + columns) + 4
    assert stage.value_count(reduced.side, shape) == reduced.values.numel() <= stage.size(shape).values


def test_planted_rank_is_found_and_the_mutant_on_plain_singular_values_misses_it() -> None:
    matrix = planted()
    for energy in (0.9, 0.98):
        assert rank_of(Svd(energy).encode(matrix, Context(0))) == 4
    assert smallest_rank(singular_values(matrix), 0.98) == 4
    assert smallest_rank(singular_values(matrix), 0.98, power=1) > 4


def test_ratio_keeps_what_is_strong_enough() -> None:
    matrix = with_spectrum([8.0, 4.0, 2.1, 1.9, 0.5])
    assert rank_of(Svd(0.25, "ratio").encode(matrix, Context(0))) == 3
    assert rank_of(Svd(0.2, "ratio").encode(matrix, Context(0))) == 4
    assert rank_of(Svd(1.0, "ratio").encode(matrix, Context(0))) == 1


@given(st.integers(0, 50), st.floats(0.05, 0.9))
@settings(deadline=None, max_examples=40)
def test_ratio_is_idempotent(seed: int, ratio: float) -> None:
    stage, matrix = Svd(ratio, "ratio"), random(20, 6, seed=seed) @ random(6, 30, seed=seed + 1)
    once = truncated(stage, matrix)
    assert (truncated(stage, once) - once).norm() <= 1e-5 * matrix.norm()


def test_energy_is_idempotent_where_it_keeps_its_rank() -> None:
    stage, once = Svd(0.9), truncated(Svd(0.9), planted())
    assert (truncated(stage, once) - once).norm() <= 1e-5 * once.norm()
    # It need not: of 85 + 9 parts, 90% are less than the first 85.
    shrinking = with_spectrum([85**0.5, 9**0.5, 6**0.5])
    assert rank_of(stage.encode(shrinking, Context(0))) == 2
    assert rank_of(stage.encode(truncated(stage, shrinking), Context(0))) == 1


def test_all_energy_is_lossless() -> None:
    low, full = random(30, 5) @ random(5, 40, seed=1), random(30, 40)
    assert rank_of(Svd(1.0).encode(low, Context(0))) <= 17
    assert (truncated(Svd(1.0), low) - low).norm() <= 1e-5 * low.norm()
    assert rank_of(Svd(1.0).encode(full, Context(0))) == DENSE
    assert torch.equal(truncated(Svd(1.0), full), full)


def test_near_full_rank_is_sent_dense() -> None:
    matrix = random(64, 64)
    reduced = Svd(0.9).encode(matrix, Context(0))
    assert rank_of(reduced) == DENSE
    assert reduced.values.numel() == 64 * 64
    assert torch.equal(truncated(Svd(0.9), matrix), matrix)


def test_averages_are_of_rebuilt_matrices_not_of_factors() -> None:
    stage, base = Svd(0.98), planted(noise=0.0)
    matrices = [base + 0.05 * random(64, 96, seed=10 + node) for node in range(4)]
    mean = torch.stack(matrices).mean(0)
    reduced = [stage.encode(matrix, Context(0)) for matrix in matrices]
    assert {rank_of(one) for one in reduced} == {4}
    tails = [np.linalg.norm(singular_values(matrix)[4:]) for matrix in matrices]

    def is_near(average: Tensor) -> bool:
        return bool((average - mean).norm() <= np.mean(tails) + 1e-5 * mean.norm())

    assert is_near(torch.stack([stage.decode(one.values, one.side, (64, 96)) for one in reduced]).mean(0))
    signed = [unpack(one.values, 4, 64, 96) for one in reduced]
    signs = [torch.tensor([1.0, (-1.0) ** node, 1.0, (-1.0) ** (node // 2)]) for node in range(4)]
    left = torch.stack([one[0] * sign for one, sign in zip(signed, signs, strict=True)]).mean(0)
    right = torch.stack([one[1] * sign[:, None] for one, sign in zip(signed, signs, strict=True)]).mean(0)
    assert not is_near(rebuild(left, right))  # the signs of singular vectors are free: the mutant averages them away


@given(SHAPES, st.sampled_from([0.5, 0.99]), st.integers(1, 6))
@settings(deadline=None, max_examples=100)
def test_shapes_and_sizes(shape: tuple[int, ...], energy: float, min_dim: int) -> None:
    stage, tensor = Svd(energy, min_dim=min_dim), random(*shape)
    reduced, size = stage.encode(tensor, Context(0)), stage.size(shape)
    assert reduced.values.numel() == stage.value_count(reduced.side, shape) <= size.values == tensor.numel()
    assert reduced.side.numel() == size.side_bytes
    if size.is_exact:
        assert reduced.values.numel() == size.values
    if len(shape) < 2 or min(shape[0], prod(shape[1:])) < min_dim:
        assert size.is_exact
        assert torch.equal(truncated(stage, tensor), tensor)
    assert truncated(stage, tensor).shape == shape


def test_zero_stays_exactly_zero() -> None:
    reduced = Svd().encode(torch.zeros(20, 30), Context(0))
    assert rank_of(reduced) == reduced.values.numel() == 0
    assert torch.equal(Svd().decode(reduced.values, reduced.side, (20, 30)), torch.zeros(20, 30))


@pytest.mark.parametrize("value", [1.4e-45, 1e-40, 3e38, -1.0])
def test_denormals_spikes_and_the_largest_numbers(value: float) -> None:
    spike, full = torch.zeros(30, 20), torch.full((30, 20), value)
    spike[4, 5] = value
    for matrix in (spike, full):
        assert rank_of(Svd().encode(matrix, Context(0))) == 1
        assert torch.allclose(truncated(Svd(), matrix), matrix, rtol=1e-5, atol=1.4e-45)


def test_views_are_read_right_and_nothing_is_changed() -> None:
    matrix = planted()
    before, view = matrix.clone(), planted().T.contiguous().T
    assert torch.equal(Svd().encode(view, Context(0)).values, Svd().encode(matrix, Context(1)).values)
    assert torch.equal(matrix, before)


def test_a_decomposition_that_fails_costs_bytes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("no convergence")  # type: ignore[attr-defined]  # torch forgot to export it

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    assert torch.equal(truncated(Svd(), planted()), planted())


@given(st.binary(max_size=6), st.integers(0, 160), SHAPES)
@settings(deadline=None, max_examples=200)
def test_whatever_arrives_is_refused_or_has_the_shape(data: bytes, count: int, shape: tuple[int, ...]) -> None:
    side = torch.tensor(list(data), dtype=torch.uint8)
    try:
        assert Svd().value_count(side, shape) <= prod(shape)
        assert Svd().decode(torch.ones(count), side, shape).shape == shape
    except WireError:
        pass


def test_lies_about_the_rank_are_refused() -> None:
    reduced = Svd().encode(planted(), Context(0))
    for rank in (3, 5, 38, 39, 64, DENSE - 1, DENSE):
        side = torch.tensor(list(rank.to_bytes(4, "little")), dtype=torch.uint8)
        with pytest.raises(WireError):
            Svd().decode(reduced.values, side, (64, 96))
    for side_bytes in (0, 1, 2, 3, 5):
        with pytest.raises(WireError, match="expected 4 bytes of side information"):
            Svd().value_count(torch.zeros(side_bytes, dtype=torch.uint8), (64, 96))
    for count in (0, 1, reduced.values.numel() - 1):
        with pytest.raises(WireError, match="expected 640 float32 values"):
            Svd().decode(reduced.values[:count], reduced.side, (64, 96))
    assert pack(torch.empty(64, 0), torch.empty(0, 96)).numel() == 0


def test_parameters_are_checked() -> None:
    for energy in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="energy must be above 0 and at most 1"):
            Svd(energy)
    with pytest.raises(ValueError, match="criterion must be 'energy' or 'ratio', got 'rank'"):
        Svd(criterion="rank")  # type: ignore[arg-type]  # what a recipe could say
    with pytest.raises(ValueError, match="min_dim must be at least 1, got 0"):
        Svd(min_dim=0)
    assert Svd().survey([]) is None
