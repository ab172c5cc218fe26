"""FedProx against a plain loop of SGD with the proximal gradient written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tests.support import Federation, Text, largest_difference, new_model, tiny_recipe, untrained, weights
from torch import Tensor

from photon.config import Recipe
from photon.model.build import load_weights
from photon.parts.fedprox import FedProx

NODES = ("ada", "bob", "cyd")


def recipe(*parts: str, **node: Any) -> Recipe:
    return tiny_recipe(node=node, federation={"rounds": 2, "tau": 3, "parts": list(parts)})


def plain_loop(recipe: Recipe, mu: float, anchored: str = "base", clip_first: bool = False) -> dict[str, Tensor]:
    """theta <- theta - lr clip(g + mu (theta - theta_t)) at each node; then the mean.

    The mutants: `anchored` at the weights of the step before, and the pull added after the clip.
    """
    tau, size, lr, limit = recipe.federation.tau, 2, recipe.node.lr, recipe.node.clip_norm
    base = weights(untrained(recipe, torch.float64))
    for index in range(recipe.federation.rounds):
        ends: list[dict[str, Tensor]] = []
        for name in NODES:
            model = new_model(recipe, torch.float64)
            load_weights(model, base)
            before = {key: tensor.clone() for key, tensor in base.items()}
            for step in range(index * tau, (index + 1) * tau):
                batch = torch.from_numpy(Text(name).batch(step * size, size))
                model.zero_grad()
                torch.autograd.backward(model.loss(batch[:, :-1], batch[:, 1:]))
                anchor = base if anchored == "base" else before
                now = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
                gradients = {key: cast(Tensor, p.grad).clone() for key, p in model.named_parameters()}
                pulls = {key: mu * (now[key] - anchor[key]) for key in now}
                if not clip_first:
                    gradients = {key: gradients[key] + pulls[key] for key in now}
                norm = torch.sqrt(torch.stack([g.square().sum() for g in gradients.values()]).sum())
                scale = min(1.0, limit / (float(norm) + 1e-6)) if limit else 1.0
                steps = {key: scale * g + (pulls[key] if clip_first else 0.0) for key, g in gradients.items()}
                before = now
                load_weights(model, {key: now[key] - lr * steps[key] for key in now})
            ends.append({key: parameter.detach().clone() for key, parameter in model.named_parameters()})
        base = {key: torch.stack([end[key] for end in ends]).mean(0) for key in base}
    return base


def trained(folder: Path, recipe: Recipe) -> dict[str, Tensor]:
    return weights(Federation(folder, recipe, dtype=torch.float64).run())


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_it_is_the_proximal_gradient_at_the_base_of_the_round(tmp_path: Path, clip_norm: float) -> None:
    asked = recipe("fedprox(mu=0.7)", clip_norm=clip_norm)
    ours = trained(tmp_path, asked)
    assert largest_difference(ours, plain_loop(asked, 0.7)) < 1e-12
    assert largest_difference(ours, plain_loop(asked, 0.0)) > 1e-4
    assert largest_difference(ours, plain_loop(asked, 0.7, anchored="step before")) > 1e-4
    if clip_norm:
        assert largest_difference(ours, plain_loop(asked, 0.7, clip_first=True)) > 1e-4


def test_without_a_pull_it_is_fedavg_to_the_last_bit(tmp_path: Path) -> None:
    adamw = {"optimizer": "adamw", "lr": 0.01, "clip_norm": 1.0}
    states = [
        Federation(tmp_path / name, recipe(*parts, **adamw)).run()
        for name, parts in {"with": ["fedprox(mu=0)"], "without": []}.items()
    ]
    assert states[0].model_sha256 == states[1].model_sha256


def test_a_stronger_pull_keeps_nodes_nearer_to_the_base(tmp_path: Path) -> None:
    norms = []
    for mu in (0.0, 0.5, 2.0):
        federation = Federation(tmp_path / str(mu), recipe(f"fedprox(mu={mu})"))
        federation.run()
        norms.append(max(node.update_norm for node in federation.rounds()[0].nodes.values()))
    assert norms == sorted(norms, reverse=True)
    assert norms[0] > norms[2] > 0


def test_a_negative_pull_is_refused() -> None:
    with pytest.raises(ValueError, match="mu"):
        FedProx(mu=-1.0)
