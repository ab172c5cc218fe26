"""FedLALR against its equations in numpy; the rules that look like it fail the same trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import CPU, Federation, Text, largest_difference, new_model, tiny_recipe, untrained, weights
from torch import Tensor, nn

from photon.config import Recipe
from photon.errors import ConfigError
from photon.model.base import LanguageModel
from photon.model.build import load_weights
from photon.node.optimizers import build_optimizer
from photon.node.shared import shared_tensors, with_shared_state
from photon.parts.fedlalr import FedLalr, LocalAmsGrad
from photon.parts.method import Method

NODES = ("ada", "bob", "cyd")
LR, BETA1, BETA2, EPS = 0.01, 0.8, 0.9, 1e-2
PART = f"fedlalr(beta1={BETA1}, beta2={BETA2}, eps={EPS})"
NODE = {"optimizer": "adamw", "lr": LR, "batch_size": 2}
MEAN, FLOOR = "exp_avg", "max_exp_avg_sq"
Arrays = dict[str, np.ndarray]


def recipe(*parts: str, node: Mapping[str, Any] | None = None, **federation: Any) -> Recipe:
    asked = {"rounds": 3, "tau": 2, "weighting": "uniform", "parts": list(parts or [PART])} | federation
    return tiny_recipe(node=NODE | dict(node or {}), federation=asked)


def gradients(model: LanguageModel, x: Arrays, node: str, step: int) -> Arrays:
    load_weights(model, {name: torch.from_numpy(value) for name, value in x.items()})
    batch = torch.from_numpy(Text(node).batch(step * 2, 2))
    model.zero_grad()
    torch.autograd.backward(model.loss(batch[:, :-1], batch[:, 1:]))
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}


def numpy_trace(recipe: Recipe, mutant: str = "") -> dict[str, Tensor]:
    """Weights, m and vhat after all rounds, keyed as they are shared. `mutant` names what is wrong with it."""
    model = new_model(recipe, torch.float64)
    x = {name: tensor.numpy().copy() for name, tensor in weights(untrained(recipe, torch.float64)).items()}
    x = {name: value for name, value in x.items() if "/" not in name}
    m = {name: np.zeros_like(value) for name, value in x.items()}
    h = {name: np.full_like(value, EPS**2) for name, value in x.items()}
    own: dict[str, Arrays] = {}
    for index in range(recipe.federation.rounds):
        ends = []
        for node in NODES:
            xi, mi, hi = dict(x), dict(m), dict(own.get(node, h) if mutant == "vhat stays" else h)
            vi = {name: np.zeros_like(value) for name, value in hi.items()} if mutant == "v from zero" else dict(hi)
            for k in range(recipe.federation.tau):
                g = gradients(model, xi, node, index * recipe.federation.tau + k)
                for name in x:
                    mi[name] = BETA1 * mi[name] + (1 - BETA1) * g[name]
                    vi[name] = BETA2 * vi[name] + (1 - BETA2) * g[name] ** 2
                    hi[name] = np.maximum(hi[name], vi[name])
                    t = index * recipe.federation.tau + k + 1
                    corrected = (1 - BETA2**t) ** 0.5 / (1 - BETA1**t) if mutant == "bias corrected" else 1.0
                    root = np.sqrt(hi[name]) + (EPS if mutant == "eps in the root's sum" else 0.0)
                    xi[name] = xi[name] - LR * corrected * mi[name] / root
            ends.append((xi, mi, hi))
            own[node] = hi
        x, m, h = ({name: np.mean([end[i][name] for end in ends], 0) for name in x} for i in range(3))
        if mutant == "vhat by maximum":
            h = {name: np.max([end[2][name] for end in ends], 0) for name in x}
    state = {f"{n}/{MEAN}": m[n] for n in x} | {f"{n}/{FLOOR}": h[n] for n in x}
    return {name: torch.from_numpy(value) for name, value in (x | state).items()}


def test_it_is_its_equations(tmp_path: Path) -> None:
    asked = recipe()
    ours = weights(Federation(tmp_path, asked, dtype=torch.float64).run())
    assert largest_difference(ours, numpy_trace(asked)) < 1e-12


@pytest.mark.parametrize(
    "mutant", ["vhat stays", "v from zero", "vhat by maximum", "bias corrected", "eps in the root's sum"]
)
def test_what_looks_like_it_is_not_it(mutant: str) -> None:
    asked = recipe()
    right, wrong = numpy_trace(asked), numpy_trace(asked, mutant)
    names = [name for name in right if "/" not in name]
    assert largest_difference({n: right[n] for n in names}, {n: wrong[n] for n in names}) > 1e-6


def test_what_a_node_keeps_makes_no_difference(tmp_path: Path) -> None:
    states = [
        Federation(tmp_path / how, recipe(node={"optimizer_state": how})).run().model_sha256
        for how in ("keep", "reset")
    ]
    assert states[0] == states[1]


def test_it_goes_on_after_a_stop_as_if_there_had_been_none(tmp_path: Path) -> None:
    whole = Federation(tmp_path / "whole", recipe(rounds=4)).run()
    Federation(tmp_path / "parts", recipe(rounds=2)).run()
    assert Federation(tmp_path / "parts", recipe(rounds=4)).run().model_sha256 == whole.model_sha256


def test_equal_clients_are_one_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Text, "__init__", lambda self, owner: setattr(self, "seed", 1))  # one text for all
    three = recipe()
    one = three.model_copy(update={"silo": three.silo[:1]})
    states = [Federation(tmp_path / str(len(r.silo)), r, dtype=torch.float64).run() for r in (three, one)]
    assert largest_difference(weights(states[0]), weights(states[1])) < 1e-12


def test_vhat_never_falls_within_a_round_nor_below_its_floor() -> None:
    parameter = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = LocalAmsGrad([parameter], LR, (BETA1, BETA2), EPS)
    before = torch.full((5,), EPS**2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for step in range(20):
        parameter.grad = torch.randn(5, generator=generator, dtype=torch.float64) * 10.0 ** (step % 5 - 4)
        parameter.grad[0] = 0.0  # a coordinate that never meets a gradient
        optimizer.step()
        floor = optimizer.state[parameter][FLOOR]
        assert bool((floor >= before).all())
        before = floor.clone()
    assert before[0] == EPS**2
    assert parameter[0] == 0


def test_torch_adam_with_amsgrad_is_another_rule() -> None:
    def four_steps(build: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Tensor:
        parameter = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = build([parameter])
        for step in range(4):
            parameter.grad = torch.tensor([0.5, -1.0, 0.1 * step], dtype=torch.float64)
            optimizer.step()
        return parameter.detach()

    ours = four_steps(lambda p: LocalAmsGrad(p, 0.1, (0.9, 0.99), 1e-3))
    theirs = four_steps(lambda p: torch.optim.Adam(p, 0.1, (0.9, 0.99), 1e-3, amsgrad=True))
    assert (ours - theirs).abs().max() > 0.05


def test_rates_of_a_round_are_each_clients_own() -> None:
    rates = []
    for scale in (1.0, 10.0, 0.1):
        parameter = nn.Parameter(torch.zeros(50, dtype=torch.float64))
        optimizer, generator = LocalAmsGrad([parameter], LR, (0.9, 0.99), 1e-3), torch.Generator().manual_seed(3)
        for _ in range(5):
            parameter.grad = scale * torch.randn(50, generator=generator, dtype=torch.float64)
            optimizer.step()
        rates.append(float(optimizer.state[parameter][FLOOR].rsqrt().mean()))
    assert max(rates) / min(rates) > 1.15


def test_it_costs_three_times_the_bytes_of_fedavg(tmp_path: Path) -> None:
    def bodies(name: str, asked: Recipe) -> tuple[int, int]:
        link = Federation(tmp_path / name, asked).run().progress.link
        return link.up.body, link.down.body

    theirs = bodies("fedavg", recipe().model_copy(update={"federation": tiny_recipe().federation}))
    ours = bodies("fedlalr", recipe(rounds=2))
    # Of a model of 700 numbers, names and shapes are a good part: their bytes are more than three times as many.
    assert [a / b for a, b in zip(ours, theirs, strict=True)] == pytest.approx([3.0, 3.0], rel=0.15)
    shared = weights(untrained(recipe()))
    values = {True: 0, False: 0}
    for name, tensor in shared.items():
        values["/" in name] += tensor.numel()
    assert values[True] == 2 * values[False]


def noisy_quadratic(clients: int, seed: int) -> float:
    """|x|^2, mean over the last rounds, of clients that see the gradient x with noise of their own."""
    generator = torch.Generator().manual_seed(seed)
    size, tau, tail = 200, 4, []
    model = nn.Linear(size, 1, bias=False).double()
    optimizer = LocalAmsGrad(model.parameters(), 0.05, (0.9, 0.99), 1e-1)
    shared = shared_tensors(model, optimizer, {MEAN, FLOOR})
    shared = {name: torch.zeros_like(t) if "/" not in name else t.clone() for name, t in shared.items()}
    for index in range(150):
        ends = []
        for _ in range(clients):
            model.load_state_dict({"weight": shared["weight"]})
            state = with_shared_state(optimizer, model, {}, shared, shared, 0)
            optimizer.state[model.weight] = {k.partition("/")[2]: v.clone() for k, v in state.items()}
            for _ in range(tau):
                noise = torch.randn(1, size, generator=generator, dtype=torch.float64)
                model.weight.grad = model.weight.detach() + noise
                optimizer.step()
            kept = optimizer.state[model.weight]
            end = {"weight": model.weight.detach(), f"weight/{MEAN}": kept[MEAN], f"weight/{FLOOR}": kept[FLOOR]}
            ends.append({name: tensor.clone() for name, tensor in end.items()})
        shared = {name: torch.stack([end[name] for end in ends]).mean(0) for name in shared}
        if index >= 100:
            tail.append(float(shared["weight"].square().mean()))
    return float(np.mean(tail))


def test_eight_clients_are_about_eight_times_nearer() -> None:
    assert 5 < noisy_quadratic(1, seed=0) / noisy_quadratic(8, seed=1) < 13


def test_shared_state_begins_at_its_floor_and_a_round_at_v_equal_to_vhat() -> None:
    model = new_model(recipe())
    optimizer = Method.of(recipe()).optimizer(build_optimizer(model, recipe().node, CPU))
    shared = shared_tensors(model, optimizer, {MEAN, FLOOR})
    begun = torch.cat([tensor.flatten() for name, tensor in shared.items() if name.endswith(FLOOR)])
    assert torch.equal(begun, torch.full_like(begun, EPS**2))
    low = {name: t * 0 - 1 if name.endswith(FLOOR) else t for name, t in shared.items()}  # a lossy codec's
    state = with_shared_state(optimizer, model, {}, low, low, 7)
    for name, _ in model.named_parameters():
        assert float(state[f"{name}/{FLOOR}"].min()) == pytest.approx(EPS**2)
        assert torch.equal(state[f"{name}/{FLOOR}"], state[f"{name}/exp_avg_sq"])
    assert not any(name.endswith("/step") for name in state)


@pytest.mark.parametrize(
    ("node", "federation", "said"),
    [
        ({"optimizer": "muon"}, {}, "adamw"),
        ({"weight_decay": 0.1}, {}, "weight_decay = 0"),
        ({"clip_norm": 1.0}, {}, "clip_norm = 0"),
        ({}, {"weighting": "tokens"}, "uniform"),
        ({}, {"outer": "nesterov"}, "fedavg"),
        ({}, {"outer_lr": 0.7}, "outer_lr = 1"),
        ({}, {"parts": [PART, "share"]}, "share"),
        ({}, {"parts": [PART, "median"]}, "median"),
        ({}, {"parts": [PART, "outer_lr_schedule"]}, "outer_lr_schedule"),
        ({}, {"parts": [PART, "slow_momentum"]}, "optimizer"),
    ],
)
def test_a_mixed_recipe_is_refused(node: dict[str, Any], federation: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Method.of(recipe(node=node, **federation))


def test_parameters_out_of_range_are_refused() -> None:
    for parameters in ({"beta1": 1.0}, {"beta2": -0.1}, {"eps": 1e-8}, {"eps": 1e30}):
        with pytest.raises(ValueError, match="fedlalr"):
            FedLalr(**parameters)
