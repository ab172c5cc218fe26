"""Sizes in a plan are those of the bytes that are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig

from photon.aggregator.downlink import Downlink
from photon.config import Recipe
from photon.errors import ConfigError
from photon.link.codec.feedback import encode_update
from photon.link.codec.notation import parse_pipeline
from photon.link.tensors import encode_tensors, sha256_hex
from photon.link.update import EvaluationReport, Reply, Task, TrainingReport, seal
from photon.model.build import build_model, count_parameters, named_weights
from photon.plan_bytes import ENVELOPE_BYTES, BodyBytes, LinkCodecs, Shape, round_bytes, run_down_bytes, run_tasks
from photon.plan_sizes import flat_model, link_codecs, model_facts, stage_bytes
from photon.recipe import load_recipe

EXACT_SIZES: list[list[str]] = [
    [],
    ["bf16"],
    ["fp16"],
    ["int8"],
    ["int4(block=64)"],
    ["topk(density=0.02)", "int4"],
    ["sign"],
]
BOUNDED_SIZES: list[list[str]] = [["zstd"], ["bf16", "zstd"], ["topk(density=0.02)", "int4", "zstd"]]
shapes_of_models = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12),
    st.lists(st.integers(0, 7), max_size=3).map(tuple),
    max_size=6,
)


def recipe_of(nodes: int = 3, **sections: object) -> Recipe:
    base: dict[str, object] = {
        "model": {"layers": 1, "width": 16, "heads": 2},
        "data": {"vocab_size": 300, "sequence_length": 8},
        "silo": [{"name": f"n{i}"} for i in range(nodes)],
    }
    return Recipe.model_validate(base | sections)


@dataclass(frozen=True)
class Raw:
    """A codec written for this test: so many bytes a number, in one tensor, without any other byte."""

    number_bytes: int

    @dataclass(frozen=True)
    class Size:
        body_bytes: int
        stage_bytes: Mapping[str, int]
        is_exact: bool = True

    def body_size(self, shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype]) -> BodyBytes:
        return self.Size(self.number_bytes * sum(map(prod, shapes.values())), {})


def test_any_codec_with_a_size_will_do() -> None:
    codecs = LinkCodecs(up=Raw(2), down=Raw(4), whole=Raw(4), sends_differences=False)
    node_bytes = round_bytes({"a": (3, 5), "b": ()}, codecs)
    assert (node_bytes.up_bytes, node_bytes.down_bytes, node_bytes.is_exact) == (32, 64, True)


@settings(deadline=None)
@given(shapes_of_models)
def test_an_exact_body_is_as_long_as_the_encoder_makes_it(shapes: dict[str, Shape]) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    assert round_bytes(shapes, link_codecs(recipe_of())).up_bytes == len(encode_tensors(tensors))


def written(stages: Sequence[str], tensors: Mapping[str, Tensor]) -> int:
    return len(encode_tensors(encode_update(parse_pipeline(stages), dict(tensors), {}, 1.0, "seed").wire))


@pytest.mark.parametrize("stages", EXACT_SIZES + BOUNDED_SIZES, ids=" ".join)
def test_bodies_are_as_long_as_planned(stages: list[str]) -> None:
    recipe = recipe_of(link={"up": stages, "down": stages})
    weights = named_weights(build_model(recipe.model, recipe.data.vocab_size, recipe.data.sequence_length, 0))
    facts = model_facts(recipe)
    codecs = link_codecs(recipe)
    planned = round_bytes(facts.shapes, codecs)
    real = written(stages, weights)
    assert planned.whole_bytes == written([], weights)
    assert planned.up_bytes == planned.down_bytes
    assert planned.is_exact == (stages in EXACT_SIZES)
    assert real == planned.up_bytes if planned.is_exact else real <= planned.up_bytes
    assert set(stage_bytes(codecs, facts)) == ({"up", "down"} if stages else set())


@pytest.mark.parametrize("preset", ["demo", "paper-125m", "llama-3b", "paper-7b"])
def test_facts_of_presets(preset: str) -> None:
    recipe = load_recipe(preset)
    facts = model_facts(recipe)
    assert facts.parameters == count_parameters(recipe.model, recipe.data.vocab_size, recipe.data.sequence_length).total
    assert facts.flops_per_token > 5 * facts.parameters
    flat = flat_model(2 * facts.parameters, facts, recipe)
    assert flat.parameters == sum(map(prod, flat.shapes.values())) == 2 * facts.parameters
    assert flat.flops_per_token == pytest.approx(2 * facts.flops_per_token)


def test_a_hugging_face_model_needs_no_weights_either(tmp_path: Path) -> None:
    LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=300,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    recipe = recipe_of(model={"hf": str(tmp_path)})
    facts = model_facts(recipe)
    model = build_model(recipe.model, recipe.data.vocab_size, recipe.data.sequence_length, 0)
    assert facts.shapes == {name: tuple(weight.shape) for name, weight in named_weights(model).items()}
    assert facts.flops_per_token == model.flops_per_token(recipe.data.sequence_length)


@settings(max_examples=40, deadline=None)
@given(
    stages=st.sampled_from([[], ["int8"], ["zstd"], ["int4(block=64)"]]),
    of=st.sampled_from(["difference", "weights"]),
    rounds=st.integers(1, 7),
    every=st.integers(1, 4),
)
def test_bytes_down_in_a_run_are_those_of_the_downlink(stages: list[str], of: str, rounds: int, every: int) -> None:
    """The Aggregator's own code decides what each node gets; here all nodes answer, and all take part."""
    recipe = recipe_of(
        link={"down": stages, "of": of}, federation={"rounds": rounds}, evaluation={"every": every, "sequences": 1}
    )
    weights = {"a": torch.randn(33, 3), "b": torch.randn(5)}
    base = encode_tensors(weights)
    downlink = Downlink(recipe.link)
    total = 0
    for index in range(rounds + 1):
        sha256 = sha256_hex(base)
        for silo in recipe.silo:
            total += len(downlink.tell(silo.name, base, sha256, is_untrained=index == 0).body)
            downlink.heard(silo.name, sha256)
        weights = {name: tensor + 0.01 for name, tensor in weights.items()}
        if downlink.is_exact:
            base = encode_tensors(weights)
        else:
            base = encode_tensors(dict(downlink.advance(weights, base, sha256, str(index))))
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    node_bytes = round_bytes(shapes, link_codecs(recipe))
    planned = run_down_bytes(recipe, node_bytes)
    assert planned == total if node_bytes.down_is_exact else planned >= total


def test_who_missed_a_round_gets_the_whole_model() -> None:
    """Two of four nodes, scored after every third round: by hand, the share that holds the base is 1, 1/2, 1/2, 1."""
    recipe = recipe_of(
        4, link={"down": ["int8"]}, federation={"rounds": 4, "nodes_per_round": 2}, evaluation={"every": 3}
    )
    node_bytes = round_bytes({"a": (100, 10)}, link_codecs(recipe))
    some, all_of_it = node_bytes.down_bytes, node_bytes.whole_bytes
    mixed = (some + all_of_it) / 2
    assert some < all_of_it / 3
    # Round 0 scores everywhere and sends nothing; 1 follows it; 2 and 3 follow rounds of two nodes; the end follows 3.
    assert run_down_bytes(recipe, node_bytes) == pytest.approx(2 * some + 2 * mixed + 4 * mixed + 4 * some)
    assert run_tasks(recipe) == 4 + 2 + 2 + 4 + 4


def test_a_message_without_its_body_is_within_what_is_planned() -> None:
    numbers = dict.fromkeys(TrainingReport.model_fields, 0.1234567890123456)
    training = TrainingReport.model_validate(numbers | dict.fromkeys(("tokens", "steps", "clipped_steps"), 10**12))
    evaluation = EvaluationReport(
        nats=1e11 / 3, tokens=10**12, text_bytes=1e12 / 3, unigram_nats=1e11 / 7, seconds=1 / 3
    )
    common = {
        "run": "r" * 24, "round": 10**5, "node": "n" * 24, "nonce": "f" * 16, "base_sha256": "0" * 64,
        "codec": "topk(density=0.02, chunk=4096) | int4(block=64) | zstd", "body_sha256": "0" * 64,
    }  # fmt: skip
    reply = Reply.model_validate(common | {"status": "ok", "training": training, "evaluation": evaluation})
    task = Task.model_validate(
        common | {"form": "difference", "held_sha256": "0" * 64, "evaluate": True, "sequential_step": 10**7, "tau": 500,
                  "nodes": 10**3, "deadline_s": 21600.0},
    )  # fmt: skip
    assert len(seal(reply)) <= ENVELOPE_BYTES
    assert len(seal(task)) <= ENVELOPE_BYTES


def test_a_hugging_face_model_that_cannot_be_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 300, "hidden_act": "none"}')
    with pytest.raises(ConfigError, match="cannot be loaded as a causal language model: KeyError"):
        model_facts(recipe_of(model={"hf": str(tmp_path)}))
