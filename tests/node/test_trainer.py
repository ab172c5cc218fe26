"""The local loop: equalities between ways of doing the same steps, and what happens when something goes wrong."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from photon.config import NodeConfig
from photon.model.base import LanguageModel
from photon.node import trainer as trainer_module
from photon.node.schedule import learning_rate_scale
from photon.node.trainer import LocalRun, Trainer, TrainingError

CPU = torch.device("cpu")
VOCAB, LENGTH = 13, 6


class Tiny(LanguageModel):
    """One hidden layer; counts its forward passes, and can run out of memory or blow up on demand."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vocab_size, self.sequence_length = VOCAB, LENGTH
        self.embed = nn.Embedding(VOCAB, 8)
        self.hidden = nn.Linear(8, 8)
        self.dropout = nn.Dropout(dropout)
        self.batches: list[int] = []
        self.largest_fitting: int | None = None
        self.infinite_at: int | None = None

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.batches.append(len(inputs))
        logits = self.logits(inputs)
        if self.largest_fitting is not None and len(inputs) > self.largest_fitting:
            raise torch.OutOfMemoryError("injected")
        if self.infinite_at == len(self.batches):
            logits = logits / 0.0
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def logits(self, inputs: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.hidden(self.embed(inputs)))) @ self.embed.weight.T

    def flops_per_token(self, sequence_length: int) -> int:
        return 6 * (64 + VOCAB * 8)


class Stream:
    """Every sequence is a pure function of its position; remembers what was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def batch(self, position: int, size: int) -> np.ndarray:
        self.asked.append((position, size))
        rows = [np.random.default_rng(p).integers(0, VOCAB, LENGTH + 1) for p in range(position, position + size)]
        return np.stack(rows).astype(np.int64)


def always(step: int, loss: float) -> bool:
    return True


def recipe(**options: Any) -> NodeConfig:
    return NodeConfig.model_validate({"micro_batch_size": 100, "lr": 0.01, "warmup_steps": 2} | options)


def trained(
    node: NodeConfig, calls: list[tuple[int, int, int]], double: bool = False, batch_size: int = 6
) -> tuple[Trainer, list[LocalRun]]:
    """A fresh trainer after `train` was called for each (position, tau, sequential step)."""
    trainer = Trainer(Tiny().double() if double else Tiny(), node, CPU, total_steps=20)
    runs = [trainer.train(Stream(), position, batch_size, tau, step, always) for position, tau, step in calls]
    return trainer, runs


def weights(trainer: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def equal(a: Trainer, b: Trainer) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_equals_a_plain_loop_written_out(optimizer: str) -> None:
    """Clip, schedule, optimizer and batches, in the usual order, without any of the trainer's machinery."""
    node = recipe(optimizer=optimizer, clip_norm=0.05)
    trainer, (run,) = trained(node, [(12, 5, 3)])

    model, stream = Tiny(), Stream()
    optimizer_by_hand = trainer_module.build_optimizer(model, node, CPU)
    losses, norms = [], []
    for i in range(5):
        for group in optimizer_by_hand.param_groups:
            group["lr"] = group["initial_lr"] * learning_rate_scale(3 + i, node, 20)
        batch = torch.from_numpy(stream.batch(12 + 6 * i, 6))
        loss = model.loss(batch[:, :-1], batch[:, 1:])
        optimizer_by_hand.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.05).item())
        optimizer_by_hand.step()
        losses.append(loss.item())
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer), model.parameters(), strict=True))
    assert (run.steps, run.tokens, run.stopped_early) == (5, 5 * 6 * LENGTH, False)
    assert (run.loss_first, run.loss_last) == (losses[0], losses[-1])
    assert run.loss_mean == pytest.approx(sum(losses) / 5, rel=1e-6)
    assert run.gradient_norm_mean == pytest.approx(sum(norms) / 5, rel=1e-6)
    assert run.gradient_norm_max == max(norms)
    assert run.clipped_steps == sum(n > 0.05 for n in norms) > 0
    assert run.learning_rate_last == pytest.approx(0.01 * learning_rate_scale(7, node, 20))
    assert run.seconds > 0


def test_no_clipping_still_reports_the_norm() -> None:
    _, (run,) = trained(recipe(clip_norm=0.0), [(0, 3, 0)])
    _, (tight,) = trained(recipe(clip_norm=1e-3, lr=0.0), [(0, 3, 0)])
    assert run.clipped_steps == 0
    assert run.gradient_norm_max > 0.01
    assert tight.clipped_steps == 3
    assert tight.gradient_norm_max > 0.01  # the norm before clipping, not after


def test_the_same_call_gives_bit_identical_weights() -> None:
    a, (first,) = trained(recipe(optimizer="muon"), [(0, 4, 0)])
    b, (second,) = trained(recipe(optimizer="muon"), [(0, 4, 0)])
    assert equal(a, b)
    assert all(p.grad is None for p in a.model.parameters())  # nothing stays for the next node
    assert dataclasses.replace(first, seconds=0) == dataclasses.replace(second, seconds=0)


def test_rounds_continue_the_schedule_and_the_stream() -> None:
    whole, _ = trained(recipe(), [(0, 8, 0)])
    rounds, _ = trained(recipe(), [(0, 4, 0), (24, 4, 4)])
    restarted, _ = trained(recipe(), [(0, 4, 0), (24, 4, 0)])
    assert equal(whole, rounds)
    assert not equal(whole, restarted)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 5, 7])
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro_batch_size: int) -> None:
    whole, (run,) = trained(recipe(), [(0, 3, 0)], double=True, batch_size=7)
    parts, (in_parts,) = trained(recipe(micro_batch_size=micro_batch_size), [(0, 3, 0)], double=True, batch_size=7)
    for a, b in zip(weights(whole), weights(parts), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert in_parts.loss_mean == pytest.approx(run.loss_mean, rel=1e-6)
    assert max(parts.model.batches) <= micro_batch_size
    assert sum(parts.model.batches) == 21


def test_rejects_micro_batches_that_weigh_alike_whatever_their_size() -> None:
    """The mutant: a plain mean over micro-batches of 4 and 3 sequences."""
    trainer = Trainer(Tiny().double(), recipe(micro_batch_size=4), CPU, total_steps=20)
    batch = torch.from_numpy(Stream().batch(0, 7))
    trainer._compute_gradients(batch)
    right = trainer.model.hidden.weight.grad
    trainer.optimizer.zero_grad()
    whole = trainer.model.loss(batch[:, :-1], batch[:, 1:])
    (expected,) = torch.autograd.grad(whole, [trainer.model.hidden.weight])
    plain_mean = sum(trainer.model.loss(part[:, :-1], part[:, 1:]) for part in batch.split(4)) / 2
    assert isinstance(plain_mean, Tensor)
    (wrong,) = torch.autograd.grad(plain_mean, [trainer.model.hidden.weight])
    assert right is not None
    torch.testing.assert_close(right, expected, atol=1e-14, rtol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong, expected, atol=1e-6, rtol=0)


def test_the_stream_is_read_one_batch_a_step_whatever_the_micro_batch() -> None:
    for micro_batch_size in (2, 6):
        stream = Stream()
        Trainer(Tiny(), recipe(micro_batch_size=micro_batch_size), CPU, 20).train(stream, 30, 6, 3, 0, always)
        assert stream.asked == [(30, 6), (36, 6), (42, 6)]


def test_equal_parts_where_possible() -> None:
    trainer, _ = trained(recipe(micro_batch_size=4), [(0, 1, 0)])
    assert trainer.model.batches == [3, 3]


def test_auto_finds_what_fits_and_remembers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_estimate_micro_batch", lambda self, batch: len(batch))
    model = Tiny().double()
    model.largest_fitting = 3
    trainer = Trainer(model, recipe(micro_batch_size="auto"), CPU, total_steps=20)
    stream = Stream()
    trainer.train(stream, 0, 8, 2, 0, always)
    assert model.batches == [8, 4, 2, 2, 2, 2] + [2] * 4
    assert stream.asked == [(0, 8), (8, 8)]
    assert trainer.micro_batch_limit == 2
    # Nothing of the failed attempts is left in the weights.
    plain, _ = trained(recipe(), [(0, 2, 0)], double=True, batch_size=8)
    for a, b in zip(weights(trainer), weights(plain), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_out_of_memory_in_the_middle_of_a_batch_leaves_no_gradient_behind() -> None:
    class ThirdPassFails(Tiny):
        def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
            loss = super().loss(inputs, targets)
            if len(self.batches) == 3:
                raise torch.OutOfMemoryError("injected")
            return loss

    trainer = Trainer(ThirdPassFails().double(), recipe(micro_batch_size="auto"), CPU, total_steps=20)
    trainer.micro_batch_limit = 2
    trainer.train(Stream(), 0, 6, 1, 0, always)
    assert trainer.model.batches == [2, 2, 2] + [1] * 6
    plain, _ = trained(recipe(), [(0, 1, 0)], double=True)
    for a, b in zip(weights(trainer), weights(plain), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("micro_batch_size", "advice"), [("auto", "sequence_length"), (4, "micro_batch_size = 3")])
def test_out_of_memory_that_cannot_be_helped_says_what_to_do(micro_batch_size: Any, advice: str) -> None:
    model = Tiny()
    model.largest_fitting = 0
    trainer = Trainer(model, recipe(micro_batch_size=micro_batch_size), CPU, total_steps=20)
    trainer.micro_batch_limit = 4
    with pytest.raises(TrainingError, match=advice):
        trainer.train(Stream(), 0, 6, 1, 0, always)


def test_auto_on_a_cpu_fits_the_measured_activations_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(Tiny(), recipe(micro_batch_size="auto"), CPU, total_steps=20)
    one, three = (torch.from_numpy(Stream().batch(0, size)) for size in (1, 3))
    per_sequence = trainer._activation_bytes(one)
    # At least tanh's output and the log-probabilities; and it grows with the batch, so weights are not counted.
    assert per_sequence >= 4 * LENGTH * (8 + VOCAB)
    assert trainer._activation_bytes(three) == pytest.approx(3 * per_sequence, rel=0.1)

    monkeypatch.setattr(trainer_module, "available_memory", lambda: 2 * 5 * per_sequence + 1)
    monkeypatch.setattr(trainer_module, "available_cores", torch.get_num_threads)
    assert trainer._estimate_micro_batch(three) == 5
    monkeypatch.setattr(trainer_module, "available_cores", lambda: 5 * torch.get_num_threads())
    assert trainer._estimate_micro_batch(three) == 1


def test_measuring_memory_does_not_change_what_dropout_draws() -> None:
    results = []
    for micro_batch_size in (100, "auto"):
        trainer = Trainer(Tiny(dropout=0.5), recipe(micro_batch_size=micro_batch_size), CPU, total_steps=20)
        torch.manual_seed(5)
        trainer.train(Stream(), 0, 6, 2, 0, always)
        results.append(trainer)
    assert equal(*results)


def test_stops_when_told_and_counts_what_was_done() -> None:
    seen: list[tuple[int, float]] = []

    def stop_at_two(step: int, loss: float) -> bool:
        seen.append((step, loss))
        return step < 2

    trainer = Trainer(Tiny(), recipe(), CPU, total_steps=20)
    run = trainer.train(Stream(), 0, 6, 5, 0, stop_at_two)
    assert (run.steps, run.tokens, run.stopped_early) == (2, 2 * 6 * LENGTH, True)
    assert [step for step, _ in seen] == [1, 2]
    assert [loss for _, loss in seen] == [run.loss_first, run.loss_last]
    two, _ = trained(recipe(), [(0, 2, 0)])
    assert equal(trainer, two)


def test_stopping_at_the_last_step_is_not_early() -> None:
    trainer = Trainer(Tiny(), recipe(), CPU, total_steps=20)
    run = trainer.train(Stream(), 0, 6, 3, 0, lambda step, loss: step < 3)
    assert (run.steps, run.stopped_early) == (3, False)


def test_reading_losses_one_step_late_changes_nothing_but_the_time_of_the_report() -> None:
    """What happens on CUDA, on a CPU: one step is in flight while the previous one's loss is reported."""
    at_once, (run,) = trained(recipe(), [(0, 5, 0)])
    late = Trainer(Tiny(), recipe(), CPU, total_steps=20)
    late._steps_in_flight = 1
    seen: list[int] = []
    late_run = late.train(Stream(), 0, 6, 5, 0, lambda step, loss: seen.append(step) is None)
    assert equal(at_once, late)
    assert seen == [1, 2, 3, 4, 5]
    assert dataclasses.replace(late_run, seconds=0) == dataclasses.replace(run, seconds=0)

    stopped = late.train(Stream(), 0, 6, 5, 5, lambda step, loss: step < 2)
    assert (stopped.steps, stopped.tokens, stopped.stopped_early) == (3, 3 * 6 * LENGTH, True)


@pytest.mark.parametrize("in_flight", [0, 1])
def test_a_loss_that_is_not_finite_is_a_typed_error(in_flight: int) -> None:
    model = Tiny()
    model.infinite_at = 3
    trainer = Trainer(model, recipe(), CPU, total_steps=20)
    trainer._steps_in_flight = in_flight
    with pytest.raises(TrainingError, match=r"sequential step 12 \(local step 3\).*learning rate 0\.0.*lower node.lr"):
        trainer.train(Stream(), 0, 6, 5, 10, always)
    if in_flight == 0:  # before the step was taken: the weights are those after two good ones
        two, _ = trained(recipe(), [(0, 2, 10)])
        assert equal(trainer, two)


def test_a_gradient_that_is_not_finite_is_a_typed_error_too() -> None:
    trainer = Trainer(Tiny(), recipe(), CPU, total_steps=20)
    before = weights(trainer)
    trainer.model.hidden.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match="gradient norm"):
        trainer.train(Stream(), 0, 6, 5, 0, always)
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer), before, strict=True))


@pytest.mark.parametrize("batch_size", [1, 4, 10, 64])
def test_evaluation_sums_over_all_predictions_and_trains_nothing(batch_size: int) -> None:
    trainer = Trainer(Tiny(dropout=0.5).double(), recipe(), CPU, total_steps=20)
    before = weights(trainer)
    sequences = Stream().batch(0, 10)
    nats, tokens = trainer.evaluate(sequences, batch_size)
    trainer.model.eval()
    log_probabilities = trainer.model.logits(torch.from_numpy(sequences[:, :-1])).log_softmax(-1)
    targets = torch.from_numpy(sequences[:, 1:])
    expected = -log_probabilities.gather(-1, targets.unsqueeze(-1)).sum().item()
    assert nats == pytest.approx(expected, rel=1e-12)
    assert tokens == 10 * LENGTH
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer), before, strict=True))
    assert all(p.grad is None for p in trainer.model.parameters())
    assert trainer.evaluate(sequences[:0], batch_size) == (0.0, 0)


def test_training_after_an_evaluation_is_training_again() -> None:
    """Evaluation switches dropout off; the next round must have it back."""
    results = []
    for evaluate_between in (False, True):
        trainer = Trainer(Tiny(dropout=0.5), recipe(), CPU, total_steps=20)
        if evaluate_between:
            trainer.evaluate(Stream().batch(0, 4), 4)
        torch.manual_seed(5)
        trainer.train(Stream(), 0, 6, 2, 0, always)
        results.append(trainer)
    assert equal(*results)


def test_bfloat16_keeps_float32_weights_and_computes_otherwise() -> None:
    exact, _ = trained(recipe(), [(0, 2, 0)])
    rounded, (run,) = trained(recipe(precision="bfloat16"), [(0, 2, 0)])
    assert all(p.dtype == torch.float32 for p in rounded.model.parameters())
    assert not equal(exact, rounded)
    for a, b in zip(weights(exact), weights(rounded), strict=True):
        torch.testing.assert_close(a, b, atol=0.03, rtol=0)
    assert math.isfinite(run.loss_last)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_cuda_follows_the_cpu(optimizer: str) -> None:
    """Compiled, prefetched and one step in flight, but in float32: the same losses as on the CPU."""
    node = recipe(optimizer=optimizer, precision="float32", micro_batch_size="auto")
    losses: dict[str, list[float]] = {"cpu": [], "cuda": []}
    for device, seen in losses.items():

        def keep(step: int, loss: float, seen: list[float] = seen) -> bool:
            seen.append(loss)
            return True

        trainer = Trainer(Tiny(), node, torch.device(device), total_steps=20)
        trainer.train(Stream(), 0, 6, 6, 0, keep)
    assert losses["cuda"] == pytest.approx(losses["cpu"], abs=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_auto_micro_batch_survives_real_exhaustion() -> None:
    class Hungry(Tiny):
        def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
            share = torch.cuda.get_device_properties(inputs.device).total_memory // 4
            ballast = torch.empty(len(inputs) * share, dtype=torch.uint8, device=inputs.device)
            return super().loss(inputs, targets) + 0 * ballast[:1].float().sum().nan_to_num()

    node = recipe(micro_batch_size="auto", compile="off")
    trainer = Trainer(Hungry(), node, torch.device("cuda"), total_steps=20)
    run = trainer.train(Stream(), 0, 8, 2, 0, always)
    assert run.steps == 2
    assert trainer.micro_batch_limit in (1, 2)


@pytest.mark.slow
def test_compiled_loss_trains_like_the_plain_one() -> None:
    """Needs a C++ compiler at run time."""
    plain, (run,) = trained(recipe(), [(0, 3, 0)])
    compiled, (compiled_run,) = trained(recipe(compile="on"), [(0, 3, 0)])
    assert compiled_run.loss_last == pytest.approx(run.loss_last, rel=1e-5)
    for a, b in zip(weights(plain), weights(compiled), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
