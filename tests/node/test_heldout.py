"""Held-out scores: sums over sources, each with its own bytes and unigrams, however they are batched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.support import CPU, LENGTH, Text, new_model, tiny_recipe

from photon.node.heldout import HeldOut, score
from photon.node.trainer import Trainer, TrainingError


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_sources_are_summed_with_their_own_bytes_and_unigrams(batch_size: int) -> None:
    """Two sources of different size: sums over tokens, so that no source weighs more than it is long."""
    trainer = Trainer(new_model(tiny_recipe()), tiny_recipe().node, CPU, 1)
    small = HeldOut(Text("s").batch(0, 2), bytes_per_token=2.0, unigram_loss=1.0)
    large = HeldOut(Text("l").batch(0, 5), bytes_per_token=4.0, unigram_loss=3.0)
    whole = np.concatenate([small.sequences, large.sequences])
    report = score(trainer, [small, large], batch_size)
    assert report.tokens == 7 * LENGTH
    assert report.text_bytes == 2 * LENGTH * 2.0 + 5 * LENGTH * 4.0
    assert report.unigram_nats == 2 * LENGTH * 1.0 + 5 * LENGTH * 3.0
    assert report.nats == pytest.approx(trainer.evaluate(whole, 7)[0], rel=1e-6)


def test_a_model_that_has_diverged_is_told_in_a_sentence() -> None:
    """It was a ValidationError of the report, and a traceback of `photon evaluate`."""
    trainer = Trainer(new_model(tiny_recipe()), tiny_recipe().node, CPU, 1)
    with torch.no_grad():
        next(iter(trainer.model.parameters())).fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"has diverged: its held-out loss is nan\. Go back to an earlier round"):
        score(trainer, [HeldOut(Text("s").batch(0, 2), bytes_per_token=2.0, unigram_loss=1.0)], 2)
