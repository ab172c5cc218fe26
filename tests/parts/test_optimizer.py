"""What local optimizers of ours take over from torch's, and that they do it without torch's compiler."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from photon.parts.optimizer import LocalOptimizer


class Descent(LocalOptimizer):
    """Plain descent."""

    def __init__(self, parameters: object) -> None:
        super().__init__(parameters, defaults={"lr": 0.5})  # type: ignore[arg-type]  # wrong ones too

    def state_names(self, group: Mapping[str, Any]) -> list[str]:
        """None."""
        return []

    def step_group(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Along the gradient."""
        for parameter in parameters:
            parameter.sub_(group["lr"] * parameter.grad)


def test_groups_and_gradients_are_kept_as_torch_keeps_them() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    ours, theirs = Descent([first]), torch.optim.SGD([first], lr=0.5)
    for optimizer in (ours, theirs):
        optimizer.add_param_group({"params": second, "lr": 0.25})
    assert [group["params"] for group in ours.param_groups] == [group["params"] for group in theirs.param_groups]
    assert [group["lr"] for group in ours.param_groups] == [0.5, 0.25]
    first.grad, second.grad = torch.ones(2), torch.ones(3)
    ours.step()
    assert first.tolist() == [0.5, 0.5]
    assert second.tolist() == [0.75, 0.75, 0.75]
    kept = first.grad
    ours.zero_grad(set_to_none=False)
    assert first.grad is kept
    assert kept.tolist() == [0, 0]
    ours.zero_grad()
    assert [p.grad for p in (first, second)] == [None, None]


@pytest.mark.parametrize("wrong", [lambda p: [{"params": [p]}, {"params": [p]}], lambda _: []])
def test_groups_are_checked_as_torch_checks_them(wrong: Callable[[nn.Parameter], list[object]]) -> None:
    parameters = wrong(nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError) as theirs:  # the messages are compared
        torch.optim.SGD(parameters, lr=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError) as ours:
        Descent(parameters)
    assert str(ours.value) == str(theirs.value)


def test_building_and_stepping_wait_for_no_compiler() -> None:
    """The Aggregator builds one for the names of its state."""
    code = """
import sys, torch
from torch import nn
from photon.config import NodeConfig
from photon.node.optimizers import build_optimizer
model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
optimizer = build_optimizer(model, NodeConfig(optimizer="muon"), torch.device("cpu"))
model(torch.ones(2, 4)).square().sum().backward()
optimizer.step()
optimizer.zero_grad()
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
