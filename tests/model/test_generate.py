"""Samples: greedy, drawn, windowed; against a model whose logits are known."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from photon.config import ModelConfig
from photon.errors import InputError
from photon.model.base import LanguageModel
from photon.model.build import build_model
from photon.model.generate import generate

DRAWS = 600


class Counting(LanguageModel):
    """Expects the last token plus one; the odds of the others fall with their distance. Remembers its inputs."""

    def __init__(self, vocab_size: int, sequence_length: int) -> None:
        super().__init__()
        self.vocab_size, self.sequence_length = vocab_size, sequence_length
        self.place = torch.nn.Parameter(torch.zeros(()))
        self.windows: list[list[int]] = []

    def logits(self, inputs: Tensor) -> Tensor:
        self.windows.append(inputs[0].tolist())
        ids = torch.arange(self.vocab_size)
        return -((ids - inputs[..., None] - 1) % self.vocab_size).float()

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        raise AssertionError("not asked for")

    def flops_per_token(self, sequence_length: int) -> int:
        raise AssertionError("not asked for")


def test_greedy_sees_a_sliding_window_and_ends_before_stop() -> None:
    model = Counting(10, 3)
    assert generate(model, [4, 5], 4, 0.0, 0, seed=0, stop=None) == [6, 7, 8, 9]
    assert model.windows == [[4, 5], [4, 5, 6], [5, 6, 7], [6, 7, 8]]
    assert generate(model, [4, 5], 4, 0.0, 0, seed=0, stop=8) == [6, 7]
    assert generate(model, [4, 5], 0, 0.0, 0, seed=0, stop=None) == []


def test_draws_follow_temperature_and_top_k() -> None:
    def drawn(temperature: float, top_k: int) -> Counter[int]:
        return Counter(generate(Counting(5, 1), [0], 1, temperature, top_k, seed, None)[0] for seed in range(DRAWS))

    for temperature in (0.5, 2.0):
        odds = (-torch.arange(5).float() / temperature).softmax(0)
        counts = drawn(temperature, 0)
        for distance in range(5):
            share = float(odds[distance])
            assert abs(counts[(1 + distance) % 5] - DRAWS * share) < 5 * (DRAWS * share * (1 - share)) ** 0.5
    assert set(drawn(2.0, 2)) == {1, 2}
    assert set(drawn(2.0, 1)) == {1}


def test_the_seed_decides_and_nothing_else_is_touched() -> None:
    model = build_model(ModelConfig(layers=1, width=16, heads=2), 50, 8, seed=1)
    model.train()
    before = torch.random.get_rng_state()
    first = generate(model, [1, 2], 20, 1.0, 10, seed=3, stop=None)
    torch.manual_seed(99)
    assert generate(model, [1, 2], 20, 1.0, 10, seed=3, stop=None) == first
    assert generate(model, [1, 2], 20, 1.0, 10, seed=4, stop=None) != first
    torch.random.set_rng_state(before)
    generate(model, [1, 2], 5, 1.0, 10, seed=3, stop=None)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training


def test_an_impossible_prompt_is_refused() -> None:
    for prompt in ([], [3, 10], [-1]):
        with pytest.raises(InputError, match="vocabulary of 10"):
            generate(Counting(10, 3), prompt, 1, 0.0, 0, seed=0, stop=None)


def test_any_temperature_is_a_sample_or_a_sentence() -> None:
    for tiny in (1e-30, 1e-45, 1e-320):
        for scores in (Counting(10, 3), Shifted(10, 3)):
            assert generate(scores, [4, 5], 4, tiny, 0, seed=0, stop=None) == [6, 7, 8, 9]
    for wrong in (float("nan"), -0.5):
        with pytest.raises(InputError, match=f"a temperature of {wrong}"):
            generate(Counting(10, 3), [4], 1, wrong, 0, seed=0, stop=None)


class Shifted(Counting):
    """Its scores are all above zero."""

    def logits(self, inputs: Tensor) -> Tensor:
        return super().logits(inputs) + 100.0
