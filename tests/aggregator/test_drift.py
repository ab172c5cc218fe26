"""Cosines against numpy; sampled ones near the exact ones, also where the update has the shape of its matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from photon.aggregator import drift
from photon.aggregator.drift import mean_cosine, pairwise_cosine, sample_update


def update(seed: int, shapes: dict[str, tuple[int, ...]], scale: float = 1e-3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in shapes.items()}


def samples(updates: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {node: sample_update(tensors.items(), tensors) for node, tensors in updates.items()}


def exact(updates: dict[str, dict[str, Tensor]]) -> np.ndarray:
    rows = np.stack([torch.cat([t.flatten() for t in updates[node].values()]).double() for node in sorted(updates)])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def test_small_updates_are_compared_whole() -> None:
    shapes = {"w": (30, 40), "b": (7,), "empty": (0,)}
    base = update(0, shapes)
    updates = {
        "zoe": base,
        "ada": {name: tensor + 0.5 * update(1, shapes)[name] for name, tensor in base.items()},
        "bob": {name: -3.0 * tensor for name, tensor in base.items()},
    }
    cosines = np.array(pairwise_cosine(samples(updates)))
    assert np.abs(cosines - exact(updates)).max() < 1e-6
    assert np.allclose(np.diag(cosines), 1.0)
    assert cosines[1, 2] == pytest.approx(-1.0, abs=1e-6)  # bob and zoe: rows are sorted(nodes)
    assert np.array_equal(cosines, cosines.T)


def test_a_zero_update_is_like_no_other() -> None:
    zero = {"w": torch.zeros(4)}
    assert pairwise_cosine(samples({"a": zero, "b": {"w": torch.ones(4)}})) == [[0.0, 0.0], [0.0, 1.0]]


def test_tiny_and_huge_updates_keep_their_direction() -> None:
    one = torch.tensor([1.0, 2.0, -1.0])
    cosines = pairwise_cosine({"a": one * 1e-30, "b": one * 1000.0})
    assert cosines[0][1] == pytest.approx(1.0, abs=1e-6)


def test_a_sample_stays_small_and_near_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes agree in all columns of a matrix but every sixteenth; a stride that divides the width would miss that."""
    monkeypatch.setattr(drift, "SAMPLE_VALUES", 4096)
    shapes = {"w": (512, 128)}
    common = update(0, shapes)["w"] * (torch.arange(128) % 16 != 0)
    updates = {
        node: {"w": common + 0.7 * update(seed, shapes)["w"]}
        for seed, node in enumerate(("ada", "bob", "cyd"), start=1)
    }
    taken = samples(updates)
    assert all(len(sample) <= 2 * 4096 for sample in taken.values())
    aligned = {node: tensors["w"].flatten()[::16] for node, tensors in updates.items()}  # the mutant

    def error(cosines: list[list[float]]) -> float:
        return float(np.abs(np.array(cosines) - exact(updates)).max())

    assert error(pairwise_cosine(taken)) < 0.08
    assert error(pairwise_cosine(aligned)) > 0.3


def test_shared_optimizer_state_is_no_part_of_the_sample() -> None:
    weights, state = {"w": torch.ones(3)}, {"w/exp_avg": torch.full((3,), -1.0)}
    assert torch.equal(sample_update((weights | state).items(), weights | state), torch.ones(3))
    assert sample_update(state.items(), state).numel() == 0


def test_the_mean_cosine_is_over_pairs() -> None:
    east, north, west = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0]), torch.tensor([-1.0, 0.0])
    assert mean_cosine(pairwise_cosine({"a": east})) is None
    assert mean_cosine(pairwise_cosine({"a": east, "b": west})) == -1
    assert mean_cosine(pairwise_cosine({"a": east, "b": north, "c": west})) == pytest.approx(-1 / 3)


def test_the_sample_of_every_node_is_of_the_same_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "SAMPLE_VALUES", 100)
    places = {"w": torch.arange(1000.0).reshape(10, 100), "v": torch.arange(1000.0, 1500.0)}
    first, second = sample_update(places.items(), places), sample_update(places.items(), places)
    assert torch.equal(first, second)
    assert len(set(first.tolist())) == len(first)
