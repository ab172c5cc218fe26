"""Optimizer state that nodes share: what of it travels, and how a node's own state is made of what came.

A kind of state travels as it is, as `parameter/kind`, or by its factors, `parameter/kind_rows` and
`parameter/kind_columns`: the means of a matrix's rows and of its columns, from which the matrix is rebuilt as their
outer product over the mean of all. Of a second moment that is what Adafactor keeps (Shazeer and Stern 2018,
arXiv 1804.04235): as many values as the matrix has rows and columns, never negative, and exact in those means. What is
no matrix travels whole, as its own rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from photon.node.optimizers import expected_state, state_views
from photon.parts.base import COLUMNS, ROWS
from photon.parts.method import is_state
from photon.parts.optimizer import FLOORS, LocalOptimizer

_STEP, _FIRST, _SQUARE = "step", "exp_avg", "exp_avg_sq"
# AdamW by itself makes no step so many learning rates long: its limit is (1 - beta1) / sqrt(1 - beta2), 3.2 by default.
_LONGEST_STEP = 10.0


def shared_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, kinds: Collection[str], device: str = "cpu"
) -> dict[str, Tensor]:
    """What a federation shares before its first round: the weights, and the optimizer state of these kinds.

    State begins at its floor (see `with_shared_state`), without one at zero. Keyed as in `export_state`; on `device`,
    of which `meta` gives names and shapes alone. A kind that the optimizer does not keep of a parameter is left out.
    """
    expected, floors = expected_state(optimizer), _floors(optimizer)
    weights = {name: parameter.detach().to(device) for name, parameter in model.named_parameters()}
    state = {
        f"{name}/{kind}": torch.full(shape, floors.get(of, 0.0), dtype=parameter.dtype, device=device)
        for name, parameter in model.named_parameters()
        for of in sorted(expected.get(parameter, frozenset()))
        for kind, shape in _ways(of, parameter).items()
        if kind in kinds
    }
    return weights | state


def shared_state(optimizer: torch.optim.Optimizer, model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The node's own state as it travels under these names of shared tensors: views, or factors made of it."""
    state = state_views(optimizer, model)
    return {name: as_shared(state, name) for name in names}


def as_shared(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The shared tensor of that name, from tensors that have it or what it is of. Raises KeyError if they do not."""
    return tensors[name] if name in tensors else _factor(tensors[whole(name)], name)


def whole(name: str) -> str:
    """Of what a shared tensor is, by name: `parameter/kind` of `parameter/kind_rows`; a weight is of itself."""
    return name.removesuffix(ROWS).removesuffix(COLUMNS) if is_state(name) else name


def with_shared_state(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    own: Mapping[str, Tensor],
    taken: Mapping[str, Tensor],
    names: Collection[str],
    sequential_step: int,
) -> dict[str, Tensor]:
    """A node's own state with `taken` in its place: complete for `import_state`, whatever the node had.

    `names` are all shared tensors, be they taken or not. The count of a parameter's steps belongs to its second moment:
    with one that is taken it is the sequential step, as at every node; a node's own goes on. Without any second moment,
    neither taken nor its own, a parameter begins anew: a first moment over none would be a step of any length. For the
    same reason a second moment of the node's own is raised to a hundredth of the square of a first one that is taken:
    others may have met tokens that it has not. What else is lacking is zero. State that a lossy codec has put below its
    floor is raised to it: a second moment is never negative.

    An optimizer of ours tells its `floors` by kind, and under `copies` which kinds begin each round as a copy of which
    shared ones (`photon.parts.optimizer`).
    """
    state = dict(own)
    expected, floors = expected_state(optimizer), _floors(optimizer)
    copies = optimizer.copies if isinstance(optimizer, LocalOptimizer) else {}
    sharing = {name.rpartition("/")[0] for name in names}
    for name, parameter in model.named_parameters():
        if name not in sharing:
            continue
        kinds = expected[parameter]
        sources = {kind: copies.get(kind, kind) for kind in kinds}
        came = {kind: _rebuilt(f"{name}/{source}", taken, floors.get(source)) for kind, source in sources.items()}
        found = {kind: state.pop(f"{name}/{kind}", None) if (value := came[kind]) is None else value for kind in kinds}
        if _SQUARE in kinds and found[_SQUARE] is None:
            continue
        own_square, first = found.get(_SQUARE), came.get(_FIRST)
        if own_square is not None and first is not None and came[_SQUARE] is None:
            found[_SQUARE] = torch.maximum(own_square, (first / _LONGEST_STEP).square())
        for kind, value in found.items():
            key = f"{name}/{kind}"
            if kind == _STEP and (value is None or came.get(_SQUARE) is not None):
                state[key] = torch.tensor(float(sequential_step))
            elif value is None:
                state[key] = torch.zeros(parameter.shape, dtype=parameter.dtype)
            else:
                state[key] = value
    return state


def _ways(kind: str, parameter: Tensor) -> dict[str, tuple[int, ...]]:
    """The kinds of shared tensors that a kind of state may travel as, and their shapes."""
    if parameter.ndim != 2:
        return {kind: tuple(parameter.shape), kind + ROWS: tuple(parameter.shape)}
    rows, columns = parameter.shape
    return {kind: (rows, columns), kind + ROWS: (rows,), kind + COLUMNS: (columns,)}


def _factor(state: Tensor, name: str) -> Tensor:
    if state.ndim != 2:
        return state
    return state.mean(1) if name.endswith(ROWS) else state.mean(0)


def _rebuilt(name: str, taken: Mapping[str, Tensor], floor: float | None) -> Tensor | None:
    """The state of that name, from what was taken of it; None if that is nothing."""

    def at_least(value: Tensor) -> Tensor:
        return value if floor is None else value.clamp_min(floor)

    if name in taken:
        return at_least(taken[name])
    if name + ROWS not in taken:
        return None
    rows = at_least(taken[name + ROWS])
    if name + COLUMNS not in taken:
        return rows
    columns = at_least(taken[name + COLUMNS])
    # The columns over their mean first: the product of two small numbers could be none.
    mean = columns.mean()
    return torch.outer(rows, columns / mean) if mean > 0 else torch.zeros(len(rows), len(columns), dtype=rows.dtype)


def _floors(optimizer: torch.optim.Optimizer) -> Mapping[str, float]:
    return optimizer.floors if isinstance(optimizer, LocalOptimizer) else FLOORS
