"""Shared moments against a plain loop of torch's AdamW: K models, whose weights and moments are averaged by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support import CPU, Federation, Text, largest_difference, new_model, tiny_recipe, untrained, weights
from torch import Tensor

from photon.config import Recipe
from photon.errors import ConfigError
from photon.node.optimizers import build_optimizer, import_state
from photon.node.shared import with_shared_state
from photon.parts.method import Method
from photon.parts.share import Share

NODES = ("ada", "bob", "cyd")
# An epsilon well above the grid of the merge (2e-16): the root of a second moment of 1e-16 would show it.
ADAMW = {"optimizer": "adamw", "lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-4, "batch_size": 2}


def recipe(*parts: str, rounds: int = 4, **sections: Any) -> Recipe:
    return tiny_recipe(
        node={**ADAMW, **sections.pop("node", {})}, federation={"rounds": rounds, "parts": list(parts)}, **sections
    )


def plain_loop(
    recipe: Recipe,
    periods: Mapping[str, int],
    sets_steps: bool = True,
    mean: bool = True,
    factors: Callable[[list[Tensor]], None] | None = None,
) -> dict[str, Tensor]:
    """Local AdamW at each node; weights are averaged each round, a moment every `periods[kind]` rounds (0: never).

    Without `mean` everybody gets the first node's moments; without `sets_steps` their counts of steps stay their own.
    `factors` is what to do with the second moments of a matrix, where that is not to average them.
    """
    tau, size = recipe.federation.tau, recipe.node.batch_size
    models = {name: new_model(recipe, torch.float64) for name in NODES}
    optimizers = {name: build_optimizer(model, recipe.node, CPU) for name, model in models.items()}
    for index in range(recipe.federation.rounds):
        for name, model in models.items():
            if index and not sets_steps:
                for state in optimizers[name].state.values():
                    state["step"].fill_(1.0)
            for step in range(index * tau, (index + 1) * tau):
                batch = torch.from_numpy(Text(name).batch(step * size, size))
                model.zero_grad()
                model.loss(batch[:, :-1], batch[:, 1:]).backward()
                optimizers[name].step()
        with torch.no_grad():
            for group in zip(*(model.parameters() for model in models.values()), strict=True):
                average(list(group), mean=True)
                for kind, period in periods.items():
                    if period and (index + 1) % period == 0:
                        moments = [optimizers[name].state[p][kind] for name, p in zip(NODES, group, strict=True)]
                        if factors is not None and kind == "exp_avg_sq" and moments[0].ndim == 2:
                            factors(moments)
                        else:
                            average(moments, mean)
                first, second = periods.get("exp_avg"), periods.get("exp_avg_sq")
                if first and (index + 1) % first == 0 and not (second and (index + 1) % second == 0):
                    for name, parameter in zip(NODES, group, strict=True):
                        floor_by_first(optimizers[name].state[parameter])
    return {name: parameter.detach() for name, parameter in models["ada"].named_parameters()}


def floor_by_first(state: dict[str, Tensor]) -> None:
    """A second moment that stayed at home is at least a hundredth of the square of the mean first one."""
    state["exp_avg_sq"] = torch.maximum(state["exp_avg_sq"], state["exp_avg"].square() / 100)


def average(tensors: list[Tensor], mean: bool) -> None:
    value = torch.stack([tensor.detach() for tensor in tensors]).mean(0) if mean else tensors[0].detach().clone()
    for tensor in tensors:
        tensor.copy_(value)


def adafactor(moments: list[Tensor]) -> None:
    """Everybody gets the product of the mean row sums and column sums, over the sum of all (arXiv 1804.04235)."""
    together = torch.stack(moments).mean(0)
    value = together.sum(1, keepdim=True) * together.sum(0, keepdim=True) / together.sum()
    for moment in moments:
        moment.copy_(value)


def own_factors(moments: list[Tensor]) -> None:
    """A mutant: everybody's own, factored."""
    for moment in moments:
        adafactor([moment])


def rows_alone(moments: list[Tensor]) -> None:
    """A mutant: the columns are forgotten."""
    value = torch.stack(moments).mean(0).mean(1, keepdim=True)
    for moment in moments:
        moment.copy_(value.expand_as(moment))


def trained(folder: Path, recipe: Recipe) -> dict[str, Tensor]:
    state = Federation(folder, recipe, dtype=torch.float64).run()
    return {name: tensor for name, tensor in weights(state).items() if "/" not in name}


@pytest.mark.parametrize(
    ("part", "periods"),
    [
        ("share", {"exp_avg": 1, "exp_avg_sq": 1}),
        ("share(first=0)", {"exp_avg": 0, "exp_avg_sq": 1}),
        ("share(second=0)", {"exp_avg": 1, "exp_avg_sq": 0}),
        ("share(first=2, second=3)", {"exp_avg": 2, "exp_avg_sq": 3}),
    ],
)
def test_it_is_local_adam_with_averaged_moments(tmp_path: Path, part: str, periods: dict[str, int]) -> None:
    asked = recipe(part)
    ours = trained(tmp_path, asked)
    assert largest_difference(ours, plain_loop(asked, periods)) < 1e-8
    # The mutants: moments that stay at home, one node's moments for all, steps counted from each round's start.
    assert largest_difference(ours, plain_loop(asked, {"exp_avg": 0, "exp_avg_sq": 0})) > 1e-6
    assert largest_difference(ours, plain_loop(asked, periods, mean=False)) > 1e-6
    assert largest_difference(ours, plain_loop(asked, periods, sets_steps=False)) > 1e-6


@pytest.mark.parametrize(
    ("part", "periods"),
    [
        ("share(factored=true)", {"exp_avg": 1, "exp_avg_sq": 1}),
        ("share(first=0, factored=true)", {"exp_avg": 0, "exp_avg_sq": 1}),
        ("share(first=0, second=2, factored=true)", {"exp_avg": 0, "exp_avg_sq": 2}),
        ("share(first=2, second=3, factored=true)", {"exp_avg": 2, "exp_avg_sq": 3}),
    ],
)
def test_a_second_moment_may_travel_as_its_rows_and_columns(tmp_path: Path, part: str, periods: dict[str, int]) -> None:
    asked = recipe(part)
    ours = trained(tmp_path, asked)
    assert largest_difference(ours, plain_loop(asked, periods, factors=adafactor)) < 1e-8
    for mutant in (own_factors, rows_alone):
        assert largest_difference(ours, plain_loop(asked, periods, factors=mutant)) > 1e-6
    assert largest_difference(ours, plain_loop(asked, periods)) > 1e-6
    # And one that factors in every round what travels in some.
    if periods["exp_avg_sq"] > 1:
        each = {**periods, "exp_avg_sq": 1}
        assert largest_difference(ours, plain_loop(asked, each, factors=adafactor)) > 1e-6


def test_without_it_moments_stay_at_home(tmp_path: Path) -> None:
    asked = recipe()
    assert largest_difference(trained(tmp_path, asked), plain_loop(asked, {})) < 1e-8


def test_what_it_costs_is_on_the_ledger(tmp_path: Path) -> None:
    def bodies(name: str, *parts: str) -> tuple[int, int]:
        link = Federation(tmp_path / name, recipe(*parts, rounds=6)).run().progress.link
        return link.up.body, link.down.body

    (up, _), (both_up, both_down) = bodies("plain"), bodies("both", "share")
    _, plain_down = bodies("again")
    assert both_up / up == pytest.approx(3, rel=0.1)
    assert both_down / plain_down == pytest.approx(3, rel=0.1)
    rare_up, _ = bodies("rare", "share(first=3, second=6)")
    assert rare_up / up == pytest.approx(1 + 1 / 3 + 1 / 6, rel=0.1)


def test_factors_are_as_many_values_as_matrices_have_rows_and_columns() -> None:
    shared = weights(untrained(recipe("share(first=0, factored=true)")))
    for name, weight in [(name, weight) for name, weight in shared.items() if "/" not in name]:
        kinds = {key.partition("/")[2]: tuple(of.shape) for key, of in shared.items() if key.startswith(f"{name}/")}
        if weight.ndim == 2:
            rows, columns = weight.shape
            assert kinds == {"exp_avg_sq_rows": (rows,), "exp_avg_sq_columns": (columns,)}
        else:
            assert kinds == {"exp_avg_sq_rows": tuple(weight.shape)}


def test_with_muon_each_parameter_shares_what_its_own_rule_keeps() -> None:
    shared = weights(untrained(recipe("share", node={"optimizer": "muon"})))
    names = [name for name in shared if "/" not in name]
    kinds = {name: {key.partition("/")[2] for key in shared if key.startswith(f"{name}/")} for name in names}
    assert kinds["embed_tokens.weight"] == {"exp_avg", "exp_avg_sq"}
    assert {frozenset(of) for of in kinds.values()} == {
        frozenset({"momentum_buffer"}),
        frozenset({"exp_avg", "exp_avg_sq"}),
    }


def test_a_node_that_comes_late_takes_the_moments_of_the_others(tmp_path: Path) -> None:
    """With one node a round in turn, the moments go from hand to hand: that is one Adam over all their text."""
    asked = recipe("share", rounds=5).model_copy()
    one = asked.model_copy(update={"federation": asked.federation.model_copy(update={"nodes_per_round": 1})})
    federation = Federation(tmp_path, one, dtype=torch.float64)
    ours = {name: tensor for name, tensor in weights(federation.run()).items() if "/" not in name}
    model = new_model(one, torch.float64)
    optimizer, places = build_optimizer(model, one.node, CPU), dict.fromkeys(NODES, 0)
    for event in federation.rounds():
        (name,) = event.nodes
        for _ in range(one.federation.tau):
            batch = torch.from_numpy(Text(name).batch(places[name], 2))
            places[name] += 2
            model.zero_grad()
            model.loss(batch[:, :-1], batch[:, 1:]).backward()
            optimizer.step()
    assert largest_difference(ours, {n: p.detach() for n, p in model.named_parameters()}) < 1e-8


def from_hand_to_hand(
    recipe: Recipe, turns: list[str], periods: Mapping[str, int], takes_all: bool
) -> dict[str, Tensor]:
    """One node a round, each with an AdamW of its own, which takes over of its moments what rounds have exchanged.

    With `takes_all`, the mutant, also what none has exchanged yet: zeros, and everybody's count of steps.
    """
    tau, size, keys = recipe.federation.tau, recipe.node.batch_size, [*periods, "step"]
    model, places = new_model(recipe, torch.float64), dict.fromkeys(turns, 0)
    parameters = list(model.parameters())
    base: list[dict[str, Tensor]] = [{} for _ in parameters]
    own: dict[str, list[dict[str, Tensor]]] = {}
    for index, name in enumerate(turns):
        optimizer = build_optimizer(model, recipe.node, CPU)
        for parameter, given, kept in zip(parameters, base, own.get(name, base and [{}] * len(base)), strict=True):
            was_there = index > 0 and turns[index - 1] == name
            taken = {kind: value for kind, value in given.items() if not was_there or index % periods[kind] == 0}
            count = {"step": torch.tensor(float(index * tau))}
            if takes_all and not was_there:
                state = {kind: torch.zeros_like(parameter) for kind in periods} | given | count
            else:
                none = {"exp_avg": torch.zeros_like(parameter)}
                state = none | kept | taken | (count if "exp_avg_sq" in taken else {})
                if "exp_avg" in taken and "exp_avg_sq" in state and "exp_avg_sq" not in taken:
                    floor_by_first(state)
            if "exp_avg_sq" in state:
                optimizer.state[parameter] = {key: state[key].detach().clone() for key in keys}
        for _ in range(tau):
            batch = torch.from_numpy(Text(name).batch(places[name], size))
            places[name] += size
            model.zero_grad()
            model.loss(batch[:, :-1], batch[:, 1:]).backward()
            optimizer.step()
        own[name] = [{key: optimizer.state[p][key].clone() for key in keys} for p in parameters]
        for given, state in zip(base, own[name], strict=True):
            given |= {kind: state[kind] for kind, period in periods.items() if period and (index + 1) % period == 0}
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("first", "second"), [(1, 0), (1, 6), (2, 3), (3, 2)])
def test_a_node_that_was_away_takes_what_was_exchanged_and_no_more(tmp_path: Path, first: int, second: int) -> None:
    """Else it has a first moment over a second one of nothing: steps hundreds of times the learning rate long."""
    asked = recipe(f"share(first={first}, second={second})", rounds=8)
    one = asked.model_copy(update={"federation": asked.federation.model_copy(update={"nodes_per_round": 1})})
    federation = Federation(tmp_path, one, dtype=torch.float64)
    ours = {name: tensor for name, tensor in weights(federation.run()).items() if "/" not in name}
    turns = [name for event in federation.rounds() for name in event.nodes]
    assert len(set(turns)) > 1
    assert any(turns[index] in turns[: index - 1] and turns[index] != turns[index - 1] for index in range(2, 8))
    periods = {"exp_avg": first, "exp_avg_sq": second}
    assert largest_difference(ours, from_hand_to_hand(one, turns, periods, takes_all=False)) < 1e-8
    if (first, second) != (3, 2):
        assert largest_difference(ours, from_hand_to_hand(one, turns, periods, takes_all=True)) > 1e-3


def test_beside_fragments_moments_are_taken_as_late_as_weights() -> None:
    """With a delay: else they would be taken before there are any, and a round's rounds too late."""
    method = Method.of(recipe("fragments(count=4, delay=1)", "share(first=3)", rounds=24))
    shapes = {f"layers.{index}.w{kind}": (4, 4) for index in range(4) for kind in ("", "/exp_avg", "/exp_avg_sq")}
    for name in shapes:
        exchanged = [index for index in range(24) if name in method.exchanged(shapes, index)]
        taken = [index for index in range(1, 24) if name in method.taken(shapes, index)]
        assert taken == [index + 2 for index in exchanged if index + 2 < 24]
        assert len(taken) >= (1 if name.endswith("exp_avg") else 5)


def test_beside_fragments_factors_are_mixed_as_weights_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed: set[str] = set()
    start = Method.start

    def seen(method: Method, name: str, own: Tensor, base: Tensor) -> Tensor:
        if not torch.equal(own, base):
            mixed.add(name)
        return start(method, name, own, base)

    monkeypatch.setattr(Method, "start", seen)
    asked = recipe("fragments(count=2, delay=1)", "share(first=0, factored=true)", rounds=6)
    shared = weights(Federation(tmp_path, asked).run())
    assert mixed == set(shared)


@pytest.mark.parametrize(("square", "least", "most"), [(0.0, 5.0, 10.0), (1e-9, 5.0, 10.0), (1e-6, 0.5, 1.0)])
def test_what_others_have_met_and_a_node_has_not_is_no_step_of_any_length(
    square: float, least: float, most: float
) -> None:
    """Rows of an embedding, say: a mean first moment over an own second one of nothing was 1e5 learning rates."""
    asked = recipe("share(second=0)", node={"eps": 1e-8})
    model = new_model(asked)
    optimizer, names = build_optimizer(model, asked.node, CPU), [name for name, _ in model.named_parameters()]
    own = {f"{name}/exp_avg_sq": torch.full_like(p, square) for name, p in model.named_parameters()}
    own |= {f"{name}/exp_avg": torch.zeros_like(p) for name, p in model.named_parameters()}
    own |= {f"{name}/step": torch.tensor(40.0) for name in names}
    taken = {f"{name}/exp_avg": torch.full_like(p, 1e-3) for name, p in model.named_parameters()}
    state = with_shared_state(optimizer, model, own, taken, taken, 40)
    assert all((state[f"{name}/exp_avg_sq"] >= square).all() for name in names)
    if square == 1e-6:
        assert all(torch.equal(state[f"{name}/exp_avg_sq"], own[f"{name}/exp_avg_sq"]) for name in names)
    import_state(optimizer, model, state)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        steps = (before[name] - parameter.detach()).abs() / asked.node.lr
        assert least < steps.min() <= steps.max() < most


def test_what_cannot_be_is_refused() -> None:
    for parameters in ({"first": 0, "second": 0}, {"first": -1}):
        with pytest.raises(ValueError, match="share"):
            Share(**parameters)
    with pytest.raises(ConfigError, match="keep"):
        Method.of(recipe("share(second=2)", node={"optimizer_state": "reset"}))
    with pytest.raises(ConfigError, match="thrown away"):
        Method.of(recipe("share(second=0)", node={"optimizer_state": "reset"}))
    with pytest.raises(ConfigError, match="nothing to share"):
        Method.of(recipe("share", node={"optimizer": "sgd"}))
    with pytest.raises(ConfigError, match=r"there is no part `shares`; did you mean `share`\?"):
        Method.of(recipe("shares"))
