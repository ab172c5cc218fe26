"""Three forms of one cross-entropy: same value, same gradients, bounded pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import photon.model.loss as loss_module
from photon.model.loss import chunked, fused, linear_cross_entropy, whole

Form = Callable[[Tensor, Tensor, Tensor], Tensor]
has_fused = pytest.mark.skipif(not hasattr(functional, "linear_cross_entropy"), reason="this torch has no fused form")


def problem(rows: int, width: int, vocab: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * vocab + width)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, vocab, (rows,), generator=generator)


def by_definition(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log softmax, written out."""
    logits = hidden @ weight.T
    return (logits.logsumexp(1) - logits.gather(1, targets[:, None]).squeeze(1)).mean()


def error(form: Form, hidden: Tensor, weight: Tensor, targets: Tensor) -> float:
    """Largest difference to the definition, of the value and both gradients, through a factor as with micro-batches."""
    got = 3 * form(hidden, weight, targets)
    expected = 3 * by_definition(hidden, weight, targets)
    pairs = zip(
        (got, *torch.autograd.grad(got, (hidden, weight))),
        (expected, *torch.autograd.grad(expected, (hidden, weight))),
        strict=True,
    )
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@settings(deadline=None)
@given(rows=st.integers(1, 23), vocab=st.integers(2, 40), piece=st.integers(1, 25))
def test_whole_and_chunked_are_the_definition(rows: int, vocab: int, piece: int) -> None:
    hidden, weight, targets = problem(rows, 5, vocab)
    assert error(whole, hidden, weight, targets) < 1e-12
    assert error(lambda h, w, t: chunked(h, w, t, piece, h.dtype), hidden, weight, targets) < 1e-12


@has_fused
@settings(deadline=None)
@given(rows=st.integers(1, 23), vocab=st.integers(2, 40), piece=st.integers(1, 25))
def test_fused_is_the_definition(rows: int, vocab: int, piece: int) -> None:
    assert error(lambda h, w, t: fused(h, w, t, piece), *problem(rows, 5, vocab)) < 1e-12


def test_the_check_rejects_the_mean_of_the_pieces_means() -> None:
    """Wrong as soon as the last piece is shorter."""

    def mean_of_means(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        pieces = zip(torch.split(hidden, 4), torch.split(targets, 4), strict=True)
        return torch.stack([whole(h, weight, t) for h, t in pieces]).mean()

    hidden, weight, targets = problem(8, 5, 11)
    assert error(mean_of_means, hidden, weight, targets) < 1e-12
    hidden, weight, targets = problem(9, 5, 11)
    assert error(mean_of_means, hidden, weight, targets) > 1e-3


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_chunked_never_holds_all_logits() -> None:
    hidden, weight, targets = problem(64, 4, 100)
    with Largest() as mode:
        chunked(hidden, weight, targets, 8, hidden.dtype).backward()
    assert mode.numel == 8 * 100
    with Largest() as mode:
        whole(hidden, weight, targets).backward()
    assert mode.numel == 64 * 100, "the check must see logits where there are any"


@pytest.mark.parametrize("old_torch", [False, True])
def test_the_choice_does_not_change_the_loss(old_torch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if old_torch:
        monkeypatch.delattr(functional, "linear_cross_entropy", raising=False)
    for rows in (1, 7, 1000):
        monkeypatch.setattr(loss_module, "CPU_ROWS", rows)
        assert error(linear_cross_entropy, *problem(20, 6, 31)) < 1e-12


@pytest.mark.parametrize("rows", [7, 1000])
def test_under_autocast_the_softmax_is_float32(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CPU_ROWS", rows)
    hidden, weight, targets = problem(200, 16, 500, torch.float32)
    exact = by_definition(hidden, weight, targets)
    gradients = torch.autograd.grad(exact, (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = linear_cross_entropy(hidden, weight, targets)
    assert rounded.dtype == torch.float32
    assert float((rounded - exact).detach().abs()) < 5e-3
    for got, expected in zip(torch.autograd.grad(rounded, (hidden, weight)), gradients, strict=True):
        assert got.dtype == torch.float32
        assert float((got - expected).norm() / expected.norm()) < 0.02


@has_fused
def test_that_check_rejects_the_fused_form_in_bfloat16() -> None:
    """Why it is not chosen there: the loss is rounded to the inputs' precision."""
    hidden, weight, targets = problem(200, 16, 500, torch.float32)
    rounded = fused(hidden.bfloat16(), weight.bfloat16(), targets, 7)
    assert float((rounded - by_definition(hidden, weight, targets)).detach().abs()) > 5e-3


def test_chunked_traces_without_a_break() -> None:
    hidden, weight, targets = problem(20, 6, 31)
    compiled = torch.compile(chunked, backend="eager", fullgraph=True)
    assert error(lambda h, w, t: compiled(h, w, t, 7, h.dtype), hidden, weight, targets) < 1e-12


def test_without_gradients_too() -> None:
    problem_ = problem(20, 6, 31)
    expected = pytest.approx(by_definition(*problem_).item(), abs=1e-12)
    with torch.no_grad():
        assert float(linear_cross_entropy(*problem_)) == expected
        assert float(chunked(*problem_, 7, torch.float64)) == expected
