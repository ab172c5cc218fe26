"""Estimates against sums done by hand, and against what torch really allocates."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from photon.config import Recipe
from photon.estimate import Shared, expected_nodes, memory_estimate, tokens_per_round
from photon.model.decoder import Decoder
from photon.recipe import load_recipe, parse_recipe

SILO = '[[silo]]\nname = "core"\ntext = "x"\n'


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(SILO, "test", ["data.vocab_size=1000", *overrides])


@pytest.mark.parametrize(
    ("overrides", "weights", "optimizer", "aggregator"),
    [
        (["node.precision=float32"], 4, 8, 16),
        (["node.precision=bfloat16"], 6, 8, 16),
        (["node.device=cpu"], 4, 8, 16),
        (["node.device=cuda:0", "link.fabric=flower"], 6, 8, 12),
        (["node.optimizer=sgd", "federation.outer=nesterov"], 6, 0, 20),
        (["node.optimizer=sgd", "node.momentum=0.9", "federation.outer=yogi"], 6, 4, 24),
        (["federation.parts=share"], 6, 8, 16),
    ],
)
def test_bytes_per_parameter(overrides: list[str], weights: int, optimizer: int, aggregator: int) -> None:
    estimate = memory_estimate(recipe(*overrides), parameters=1_000_000)
    assert estimate.weights_bytes == weights * 1_000_000
    assert estimate.gradients_bytes == 4_000_000
    assert estimate.optimizer_bytes == optimizer * 1_000_000
    assert estimate.update_bytes == 8_000_000
    assert estimate.aggregator_bytes == aggregator * 1_000_000
    parts = (estimate.weights_bytes, estimate.gradients_bytes, estimate.optimizer_bytes, estimate.activations_bytes)
    assert estimate.node_bytes == sum(parts)


@pytest.mark.parametrize("part", ["median", "trimmed_mean(share=0.34)", "geometric_median", "norm_clipped_mean"])
def test_a_merge_of_gathered_updates_has_no_accumulator(part: str) -> None:
    silos = "".join(SILO.replace("core", name) for name in ("a", "b", "c"))
    overrides = ["data.vocab_size=1000", "federation.outer=nesterov"]
    plain = memory_estimate(parse_recipe(silos, "test", overrides), 1_000_000)
    robust = memory_estimate(parse_recipe(silos, "test", [*overrides, f"federation.parts={part}"]), 1_000_000)
    assert (plain.aggregator_bytes, robust.aggregator_bytes) == (20_000_000, 12_000_000)
    assert plain.node_bytes == robust.node_bytes


def test_what_a_lossy_codec_leaves_out_is_kept_twice_while_the_next_update_is_encoded() -> None:
    def codec_bytes(*overrides: str) -> int:
        return memory_estimate(recipe(*overrides), parameters=1000).codec_bytes

    assert codec_bytes() == codec_bytes("link.up=zstd") == codec_bytes("link.up=int8", "link.up_feedback=0") == 0
    assert codec_bytes("link.up=int8", "link.up_feedback=rescale") == codec_bytes("link=tiny") == 0
    assert codec_bytes("link=balanced") == codec_bytes('link.up=["int8", "zstd"]') == 8000


def test_muon_keeps_one_buffer_for_matrices_and_two_for_embeddings() -> None:
    muon = "node.optimizer=muon"
    assert memory_estimate(recipe(muon), 1_000_000).optimizer_bytes == 128_000 * 8 + 872_000 * 4
    assert memory_estimate(recipe(muon, "model.tied=false"), 1_000_000).optimizer_bytes == 256_000 * 8 + 744_000 * 4
    assert memory_estimate(recipe(muon, "model.hf=some/model"), 1_000_000).optimizer_bytes == 8_000_000


def test_activations_of_gpt2_proportions_are_the_published_count() -> None:
    """Korthikanti et al. 2022: 34 s b h bytes per layer, two of them dropout masks that we do not have."""
    shape = ["model.preset=mpt-125m", "data.sequence_length=1024", "node.micro_batch_size=3"]
    assert memory_estimate(recipe(*shape), 1).activations_bytes == 32 * 1024 * 3 * 768 * 12
    assert memory_estimate(recipe(*shape, "node.precision=float32"), 1).activations_bytes == 64 * 1024 * 3 * 768 * 12
    assert memory_estimate(recipe(*shape, "node.micro_batch_size=auto"), 1).activations_bytes == 32 * 1024 * 768 * 12
    assert memory_estimate(recipe("model.preset=''", "model.hf=some/model"), 1).activations_bytes == 0


@pytest.mark.parametrize("preset", ["mpt-125m", "llama-125m", "llama-3b"])
def test_activations_are_about_what_autograd_keeps(preset: str) -> None:
    shape = ["model.layers=4", "model.width=320", "model.heads=20", "model.hidden=1024", "data.sequence_length=64"]
    small = recipe(f"model.preset={preset}", *shape, "node.precision=float32")
    model = Decoder(small.model, small.data.vocab_size, small.data.sequence_length)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = torch.zeros(1, 64, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.loss(inputs, inputs)
    assert loss.isfinite()
    ratio = sum(kept.values()) / memory_estimate(small, 1).activations_bytes
    assert 0.8 < ratio < 1.8  # unfused norms and rotations keep more, and there are the loss and the biases


def test_tokens_per_round() -> None:
    assert tokens_per_round(load_recipe("paper-125m")) == 8 * 32 * 128 * 2048
    two = SILO + '[[silo]]\nname = "b"\ntext = "x"\nbatch_size = 2\ntau = 5\n'
    overrides = ["node.batch_size=8", "federation.tau=10", "data.sequence_length=100"]
    assert tokens_per_round(parse_recipe(two, "t", overrides)) == (80 + 10) * 100
    assert tokens_per_round(parse_recipe(two, "t", [*overrides, "federation.nodes_per_round=1"])) == 45 * 100


def test_what_is_shared_beside_the_weights_is_in_base_update_and_merge() -> None:
    """Per parameter: three values are shared, two of them exchanged in the largest round."""
    shared = Shared(values=3000, most_exchanged=2000)
    spared = 'link.exact_tensors=["*/*_sq*"]'
    share = recipe("federation.parts=share(first=2, second=3)", "node.optimizer_state=keep", "link.down=int8", spared)
    plain, more = memory_estimate(share, 1000), memory_estimate(share, 1000, shared)
    assert (plain.update_bytes, more.update_bytes) == (8000, 12000 + 8000)
    assert (plain.disk_bytes, more.disk_bytes) == (8000 + 4000, 8000 + 12000)  # the state of AdamW, and the base
    assert more.aggregator_bytes == 4 * 3000 + 8 * 2000 + 4 * 2000
    assert more.method_bytes == max(0, 8000 - more.activations_bytes)
    lossy = recipe("federation.parts=share", "link.up=int8", spared)
    assert memory_estimate(lossy, 1000, shared).codec_bytes == 12000 + 8000
    one_buffer = memory_estimate(lossy, 1000, Shared(3000, 3000, optimizer_bytes=12000))
    assert one_buffer.optimizer_bytes == 12000


@pytest.mark.parametrize(("outer", "remembered"), [("fedavg", 4), ("momentum", 8), ("nesterov", 8)])
def test_what_is_held_back_and_what_a_node_remembers_of_its_round(outer: str, remembered: int) -> None:
    def estimate(*parts: str) -> tuple[int, int, int]:
        overrides = [f"federation.outer={outer}", f"federation.parts={','.join(parts)}"] if parts else []
        found = memory_estimate(recipe(f"federation.outer={outer}", *overrides), 1000)
        return found.update_bytes, found.disk_bytes, found.aggregator_bytes

    update, disk, aggregator = estimate()
    assert estimate("eager") == (update + 1000 * remembered, disk + 1000 * remembered, aggregator + 4000)
    assert estimate("eager(own=false)") == (update, disk, aggregator + 4000)


def test_what_parts_keep_at_a_node() -> None:
    def estimate(*overrides: str) -> tuple[int, int, int]:
        found = memory_estimate(recipe(*overrides), 1000)
        return found.update_bytes, found.method_bytes, found.disk_bytes

    assert estimate("node.optimizer_state=keep") == (8000, 0, 8000)
    assert estimate("node.optimizer_state=reset") == (8000, 0, 0)
    # A copy of the weights in memory, and on disk beside the base.
    assert estimate("node.optimizer_state=reset", "federation.parts=fragments") == (12000, 0, 8000)
    # The base on the device, where it is not in main memory anyway.
    assert estimate("node.optimizer_state=reset", "federation.parts=fedprox", "node.device=cuda:0") == (8000, 4000, 0)
    assert estimate("node.optimizer_state=reset", "federation.parts=fedprox", "node.device=cpu") == (8000, 0, 0)


def test_expected_nodes_are_the_mean_over_all_draws() -> None:
    def nodes(silos: int, *overrides: str) -> float:
        text = "".join(SILO.replace("core", f"n{index}") for index in range(silos))
        return expected_nodes(parse_recipe(text, "test", list(overrides)))

    assert nodes(5) == 5
    assert nodes(5, "federation.nodes_per_round=2") == 2
    assert nodes(4, "federation.dropout=0.25") == pytest.approx(4 * 0.75 + 0.25**4)
    assert nodes(1, "federation.dropout=0.9") == pytest.approx(1)
    # One of two, with the other as its spare: somebody always stays.
    assert nodes(2, "federation.dropout=0.9", "federation.nodes_per_round=1", "federation.oversample=1") == 1
    # Two of three, one a spare: two count unless two or three drop out.
    spare = ("federation.dropout=0.5", "federation.nodes_per_round=2", "federation.oversample=0.5")
    assert nodes(3, *spare) == pytest.approx(2 - 4 / 8)


@pytest.mark.parametrize(
    ("silos", "chosen", "oversample", "dropout"),
    [
        (5, 2, "0.5", "0.25"),
        (8, 4, "1", "0.9"),
        (60, 20, "2", "0.5"),
        (3000, 1000, "0.5", "0.375"),
        (1100, 1100, "0", "0.1"),
    ],
)
def test_expected_nodes_are_the_exact_sum_however_many_there_are(
    silos: int, chosen: int, oversample: str, dropout: str
) -> None:
    text = "".join(SILO.replace("core", f"n{index}") for index in range(silos))
    overrides = [f"federation.nodes_per_round={chosen}", f"federation.oversample={oversample}"]
    found = expected_nodes(parse_recipe(text, "test", [*overrides, f"federation.dropout={dropout}"]))
    asked, p = min(silos, math.ceil((1 + Fraction(oversample)) * chosen)), Fraction(dropout)
    gone, there = p.numerator, p.denominator - p.numerator
    ways, exact = 1, 0
    for stay in range(asked + 1):
        exact += ways * there**stay * gone ** (asked - stay) * min(chosen, max(1, stay))
        ways = ways * (asked - stay) // (stay + 1)
    assert found == pytest.approx(float(Fraction(exact, p.denominator**asked)), rel=1e-10)


def test_tokens_with_drop_outs_are_the_mean() -> None:
    two = SILO + SILO.replace("core", "b")
    overrides = ["node.batch_size=8", "federation.tau=10", "data.sequence_length=100", "federation.dropout=0.5"]
    assert tokens_per_round(parse_recipe(two, "t", overrides)) == 80 * 100 * 5 / 4
