"""Muon against the singular value decomposition, a float64 trace, and torch.optim.Muon."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from photon.node import muon
from photon.node.muon import NEWTON_SCHULZ_STEPS, QUINTIC, MuonAdamW, orthogonalise

SHAPES = [(6, 6), (12, 5), (4, 9)]


def by_svd(matrix: Tensor) -> Tensor:
    """The same polynomial, applied to the singular values themselves."""
    u, s, vh = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
    a, b, c = QUINTIC
    for _ in range(NEWTON_SCHULZ_STEPS):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


def muon_group(parameters: list[nn.Parameter], lr: float = 0.02, weight_decay: float = 0.1) -> dict[str, Any]:
    return {"params": parameters, "algorithm": "muon", "lr": lr, "momentum": 0.95, "weight_decay": weight_decay}


def adamw_group(parameters: list[nn.Parameter], lr: float = 3e-3) -> dict[str, Any]:
    return {
        "params": parameters,
        "algorithm": "adamw",
        "lr": lr,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.1,
    }


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Two matrices of each shape, so that some share a kernel."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES * 2]


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    for index, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(1000 * step + index)
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalise_equals_the_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    for got, matrix in zip(orthogonalise(matrices), matrices, strict=True):
        torch.testing.assert_close(got.double(), by_svd(matrix), atol=2e-4, rtol=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**16), st.sampled_from([1e-4, 1.0, 1e4]))
def test_orthogonalise_brings_singular_values_into_the_band(rows: int, columns: int, seed: int, scale: float) -> None:
    matrix = scale * torch.randn(1, rows, columns, generator=torch.Generator().manual_seed(seed))
    before = torch.linalg.svdvals(matrix[0] / matrix[0].norm())
    after = torch.linalg.svdvals(orthogonalise(matrix)[0])
    large = before > 0.003
    assert float(after.max()) < 1.22
    # Singular values keep no order under the polynomial, but small ones stay the smallest.
    assert float(after.sort(descending=True).values[: int(large.sum())].min()) > 0.67


def test_orthogonalise_keeps_zero_matrices_and_dtype() -> None:
    zeros = torch.zeros(2, 3, 5, dtype=torch.float64)
    result = orthogonalise(zeros)
    assert result.dtype == torch.float64
    assert torch.equal(result, zeros)


def reference_trace(matrix: Tensor, steps: int, nesterov: bool = True, scaled: bool = True) -> Tensor:
    """One matrix, lr 0.02, momentum 0.95, decay 0.1, in float64, with the classical (summed) momentum."""
    weight, momentum = matrix.double().clone(), torch.zeros_like(matrix, dtype=torch.float64)
    rows, columns = matrix.shape
    for step in range(steps):
        gradient = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1000 * step)).double()
        momentum = 0.95 * momentum + gradient
        update = by_svd(gradient + 0.95 * momentum if nesterov else momentum)
        scale = math.sqrt(max(1.0, rows / columns)) if scaled else 1.0
        weight = weight * (1 - 0.02 * 0.1) - 0.02 * scale * update
    return weight


def trained(matrix: Tensor, steps: int) -> Tensor:
    parameter = nn.Parameter(matrix.clone())
    optimizer = MuonAdamW([muon_group([parameter])])
    for step in range(steps):
        set_gradients([parameter], step)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", SHAPES)
def test_trace_equals_the_reference_and_rejects_wrong_ones(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    got = trained(matrix, steps=6).double()
    torch.testing.assert_close(got, reference_trace(matrix, 6), atol=5e-5, rtol=0)
    mutants: list[Callable[[], Tensor]] = [lambda: reference_trace(matrix, 6, nesterov=False)]
    if shape[0] > shape[1]:
        mutants.append(lambda: reference_trace(matrix, 6, scaled=False))
    for mutant in mutants:
        with pytest.raises(AssertionError):
            torch.testing.assert_close(got, mutant(), atol=5e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_torch_muon_to_its_bfloat16(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    parameter = nn.Parameter(matrix.clone())
    optimizer = torch.optim.Muon([parameter], lr=0.02, momentum=0.95, weight_decay=0.1)
    for step in range(4):
        set_gradients([parameter], step)
        optimizer.step()
    ours = trained(matrix, steps=4)
    moved = (parameter.detach() - matrix).norm()
    assert float((ours - parameter.detach()).norm() / moved) < 0.02
    assert float((ours - matrix).norm() / moved) == pytest.approx(1.0, abs=0.02)


def test_adamw_group_equals_torch_adamw_bit_for_bit() -> None:
    ours, theirs = parameters(), parameters()
    optimizers = [
        MuonAdamW([adamw_group(ours)]),
        torch.optim.AdamW(theirs, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True),
    ]
    for step in range(5):
        for group, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(group, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_matrices_in_one_kernel_train_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for chunk_elements in (1, 60, 2**20):
        monkeypatch.setattr(muon, "CHUNK_ELEMENTS", {"cpu": chunk_elements})
        group = parameters(torch.float64)
        optimizer = MuonAdamW([muon_group(group)])
        for step in range(3):
            set_gradients(group, step)
            optimizer.step()
        results.append(group)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-12, rtol=0)


def test_a_rate_of_zero_changes_nothing_and_a_missing_gradient_is_skipped() -> None:
    matrices, vectors = parameters(), [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    before = [p.detach().clone() for p in matrices + vectors]
    optimizer = MuonAdamW([muon_group(matrices, lr=0.0), adamw_group(vectors, lr=0.0)])
    set_gradients(matrices[1:] + vectors[1:], 0)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(matrices + vectors, before, strict=True))
    assert matrices[0] not in optimizer.state
    assert vectors[0] not in optimizer.state
    assert matrices[1] in optimizer.state


def test_closure_and_wrong_shapes() -> None:
    parameter = nn.Parameter(torch.eye(2))
    optimizer = MuonAdamW([muon_group([parameter])])

    def closure() -> float:
        loss = parameter.sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert not torch.equal(parameter, torch.eye(2))
    with pytest.raises(ValueError, match="matrices"):
        MuonAdamW([muon_group([nn.Parameter(torch.ones(3))])])
