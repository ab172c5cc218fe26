"""The schedule is a pure function of the global step: hand-computed values, torch's own schedulers, and properties."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from photon.config import NodeConfig
from photon.node.schedule import learning_rate_scale

nodes = st.builds(
    NodeConfig,
    schedule=st.sampled_from(["constant", "cosine", "wsd"]),
    warmup_steps=st.integers(0, 50),
    final_lr_fraction=st.floats(0.0, 1.0),
    decay_fraction=st.floats(0.0, 1.0),
)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.25),
        (1, 0.5),
        (3, 1.0),
        (4, 1.0),
        (6, 0.1 + 0.9 * (0.5 + math.sqrt(0.125))),
        (8, 0.55),
        (12, 0.1),
        (99, 0.1),
    ],
)
def test_cosine_by_hand(step: int, expected: float) -> None:
    node = NodeConfig(schedule="cosine", warmup_steps=4, final_lr_fraction=0.1)
    assert learning_rate_scale(step, node, total_steps=12) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.5), (1, 1.0), (4, 1.0), (5, 1.0 - 0.8 / 6), (7, 0.6), (10, 0.2), (11, 0.2)]
)
def test_wsd_by_hand(step: int, expected: float) -> None:
    node = NodeConfig(schedule="wsd", warmup_steps=2, final_lr_fraction=0.2, decay_fraction=0.6)
    assert learning_rate_scale(step, node, total_steps=10) == pytest.approx(expected, abs=1e-12)


def test_constant_holds_after_warm_up() -> None:
    node = NodeConfig(schedule="constant", warmup_steps=2, final_lr_fraction=0.1)
    assert [learning_rate_scale(s, node, 4) for s in (0, 1, 2, 3, 4, 100)] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_equals_torch_schedulers(schedule: str) -> None:
    """Without warm-up: CosineAnnealingLR, and (decay over everything) LinearLR."""
    node = NodeConfig.model_validate({"schedule": schedule, "final_lr_fraction": 0.1, "decay_fraction": 1.0})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = (
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.1)
        if schedule == "cosine"
        else torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.1, total_iters=20)
    )
    for step in range(21):
        assert learning_rate_scale(step, node, 20) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        scheduler.step()


@given(nodes, st.integers(0, 300), st.integers(1, 200))
def test_bounded_and_at_rest_past_the_end(node: NodeConfig, step: int, total_steps: int) -> None:
    scale = learning_rate_scale(step, node, total_steps)
    assert 0.0 <= scale <= 1.0 + 1e-12
    if step >= max(total_steps, node.warmup_steps):
        assert scale == pytest.approx(1.0 if node.schedule == "constant" else node.final_lr_fraction, abs=1e-12)


@given(nodes, st.integers(1, 200))
def test_no_jumps(node: NodeConfig, total_steps: int) -> None:
    """No step changes the rate by more than the steepest slope of warm-up and decay allows."""
    start = {
        "constant": 0.0,
        "cosine": node.warmup_steps,
        "wsd": max(node.warmup_steps, total_steps * (1 - node.decay_fraction)),
    }[node.schedule]
    steepest = max(1 / max(1, node.warmup_steps), math.pi / 2 / max(1.0, total_steps - start))
    scales = [learning_rate_scale(step, node, total_steps) for step in range(total_steps + 60)]
    assert all(abs(b - a) <= steepest + 1e-9 for a, b in itertools.pairwise(scales))


def assert_never_restarts(scale: Callable[[int, NodeConfig, int], float], node: NodeConfig, total_steps: int) -> None:
    """Up during warm-up, never up again after it."""
    scales = [scale(step, node, total_steps) for step in range(total_steps + 5)]
    warm, rest = scales[: node.warmup_steps], scales[node.warmup_steps :]
    assert warm == sorted(warm)
    assert rest == sorted(rest, reverse=True)


@given(nodes, st.integers(1, 200))
def test_never_restarts(node: NodeConfig, total_steps: int) -> None:
    assert_never_restarts(learning_rate_scale, node, total_steps)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_rejects_a_schedule_restarted_each_round(schedule: str) -> None:
    node = NodeConfig.model_validate({"schedule": schedule, "warmup_steps": 3})

    def restarted(step: int, node: NodeConfig, total_steps: int) -> float:
        return learning_rate_scale(step % 8, node, total_steps)  # the mutant: the round's own step

    with pytest.raises(AssertionError):
        assert_never_restarts(restarted, node, 24)
