"""The configuration's public surface, its rules between options, and its derived values."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from photon.config import (
    DataConfig,
    FederationConfig,
    LinkConfig,
    ModelConfig,
    NodeConfig,
    Recipe,
    SiloConfig,
    TrackConfig,
)
from photon.errors import ConfigError
from photon.options import TOP, options_of, section_types
from photon.recipe import load_recipe

# Recipes on other people's disks hold these names. Removing or renaming one breaks them: say so in the change log,
# and then change this list.
FROZEN = [
    "name",
    "about",
    "seed",
    "model.preset",
    "model.hf",
    "model.hf_weights",
    "model.layers",
    "model.width",
    "model.heads",
    "model.kv_heads",
    "model.hidden",
    "model.positions",
    "model.rope_theta",
    "model.norm",
    "model.activation",
    "model.qk_norm",
    "model.tied",
    "model.init_std",
    "data.dir",
    "data.tokenizer",
    "data.tokenizer_text",
    "data.vocab_size",
    "data.tokenizer_bytes_per_silo",
    "data.sequence_length",
    "data.heldout_fraction",
    "data.max_bytes_per_silo",
    "data.partition",
    "data.build_workers",
    "node.batch_size",
    "node.micro_batch_size",
    "node.optimizer",
    "node.optimizer_state",
    "node.lr",
    "node.muon_lr",
    "node.muon_momentum",
    "node.momentum",
    "node.betas",
    "node.eps",
    "node.weight_decay",
    "node.clip_norm",
    "node.schedule",
    "node.warmup_steps",
    "node.total_steps",
    "node.final_lr_fraction",
    "node.decay_fraction",
    "node.device",
    "node.precision",
    "node.compile",
    "node.workers",
    "node.threads",
    "federation.rounds",
    "federation.tau",
    "federation.nodes_per_round",
    "federation.oversample",
    "federation.dropout",
    "federation.balance",
    "federation.weighting",
    "federation.outer",
    "federation.outer_lr",
    "federation.outer_momentum",
    "federation.outer_betas",
    "federation.outer_eps",
    "federation.parts",
    "federation.quorum",
    "federation.grace_s",
    "federation.deadline_s",
    "federation.assemble_s",
    "federation.norm_bound",
    "federation.suspend_after",
    "link.fabric",
    "link.store",
    "link.preset",
    "link.up",
    "link.down",
    "link.of",
    "link.exact_tensors",
    "link.up_feedback",
    "link.down_feedback",
    "link.max_update_norm",
    "evaluation.every",
    "evaluation.sequences",
    "evaluation.batch_size",
    "evaluation.prompt",
    "evaluation.sample_tokens",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
    "track.tensorboard",
    "track.wandb",
    "track.mlflow",
    "silo.name",
    "silo.text",
    "silo.weights",
    "silo.field",
    "silo.batch_size",
    "silo.tau",
    "silo.device",
]

SILOS: list[dict[str, Any]] = [{"name": "a", "text": "x"}, {"name": "b", "text": ["y", "z"]}]


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate({"silo": SILOS, **sections})


def test_the_option_names_are_frozen() -> None:
    names = [
        f"{section}.{key}" if section != TOP else key for section in section_types() for key in options_of(section)
    ]
    assert names == FROZEN


def test_every_option_is_described_by_one_sentence() -> None:
    for section in section_types():
        for option in options_of(section).values():
            assert option.description.endswith("."), option.address
            assert "\n" not in option.description, option.address


def test_sections_are_closed_and_immutable() -> None:
    for kind in section_types().values():
        assert kind.model_config.get("extra") == "forbid"
        assert kind.model_config.get("strict")
    with pytest.raises(ValidationError, match="frozen"):
        NodeConfig().lr = 1.0


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (NodeConfig, {"lr": True}),
        (NodeConfig, {"lr": "1e-3"}),
        (NodeConfig, {"lr": float("nan")}),
        (NodeConfig, {"lr": float("inf")}),
        (NodeConfig, {"lr": -1e-9}),
        (NodeConfig, {"muon_lr": 1.1e6}),
        (FederationConfig, {"outer_lr": 1e300}),  # torch could not multiply a float32 by it
        (NodeConfig, {"batch_size": 8.0}),
        (NodeConfig, {"batch_size": True}),
        (NodeConfig, {"betas": [0.9]}),
        (NodeConfig, {"betas": [True, 0.9]}),
        (NodeConfig, {"device": "cuda:x"}),
        (NodeConfig, {"device": "cpu\n"}),
        (TrackConfig, {"tensorboard": 1}),
        (DataConfig, {"vocab_size": 256}),
        (FederationConfig, {"quorum": 0}),
        (FederationConfig, {"tau": 0}),
        (FederationConfig, {"dropout": 1}),
        (SiloConfig, {"name": "a/b", "text": "x"}),
        (SiloConfig, {"name": ".hidden", "text": "x"}),
        (SiloConfig, {"name": "a\n", "text": "x"}),
    ],
)
def test_nothing_is_converted_silently(section: type[NodeConfig], values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        section.model_validate(values)


def test_integers_are_numbers() -> None:
    assert NodeConfig.model_validate({"lr": 1, "betas": [0, 0.5]}).betas == (0.0, 0.5)
    assert LinkConfig.model_validate({"max_update_norm": 1}).max_update_norm == 1.0
    assert isinstance(LinkConfig.model_validate({"max_update_norm": 1}).max_update_norm, float)
    assert SiloConfig.model_validate({"name": "a", "text": ["x", "y"], "weights": [1, 2.5]}).weights == [1.0, 2.5]


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"model": {"width": 100, "heads": 3}}, "model.heads = 3 must divide model.width = 100"),
        ({"model": {"kv_heads": 3}}, "model.kv_heads = 3 must divide model.heads = 4"),
        ({"model": {"width": 12, "heads": 4}}, "even head width"),
        ({"silo": [*SILOS, {"name": "A", "text": "x"}]}, "more than case"),
        ({"federation": {"nodes_per_round": 3}}, "nodes_per_round = 3 but there are 2 silos"),
        ({"silo": [{"name": "a", "text": "x", "weights": [1, 1]}]}, "2 weights for 1 sources"),
        ({"silo": [{"name": "a", "text": "x", "weights": [0]}]}, "not all zero"),
        ({"silo": [{"name": "a", "text": ["x", "y"], "weights": [2, -1]}]}, "must be >= 0"),
        (
            {"data": {"partition": "iid"}, "link": {"fabric": "flower"}},
            'must all be on one machine: .*fabric = "local"',
        ),
        ({"data": {"partition": "iid"}, "silo": [*SILOS, {"name": "c"}]}, "silo c has no text here: name it"),
        (
            {"data": {"partition": "iid"}, "silo": [*SILOS, {"name": "c", "text": ["x", "y"], "weights": [1, 2]}]},
            "one source then: leave out weights of silo c",
        ),
    ],
)
def test_rules_between_options(sections: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        recipe(**sections)


def test_a_pool_needs_one_machine_and_by_owner_nothing_of_that_is_asked() -> None:
    assert recipe(data={"partition": "iid"}).data.partition == "iid"
    elsewhere = [*SILOS, {"name": "c"}, {"name": "d", "text": "x", "weights": [1]}]
    assert recipe(link={"fabric": "flower"}, silo=elsewhere).data.partition == "owner"
    with pytest.raises(ConfigError, match="it must all be on one machine"):  # as `photon aggregator` loads it
        load_recipe("demo", ["data.partition=iid", "link.fabric=flower"])


def test_an_odd_head_width_is_fine_without_rope() -> None:
    assert ModelConfig(width=12, heads=4, positions="alibi").width == 12


def test_derived_values_follow_overrides_of_a_silo() -> None:
    plain = recipe(federation={"rounds": 7, "tau": 5})
    assert plain.total_steps == 35
    assert plain.nodes_per_round == 2
    assert [plain.batch_size_of(silo) for silo in plain.silo] == [8, 8]

    set_apart = recipe(
        federation={"rounds": 7, "tau": 5, "nodes_per_round": 1},
        node={"total_steps": 11, "batch_size": 4},
        silo=[{"name": "a", "text": "x", "batch_size": 2, "tau": 3}, SILOS[1]],
    )
    assert set_apart.total_steps == 11
    assert set_apart.nodes_per_round == 1
    assert [set_apart.batch_size_of(silo) for silo in set_apart.silo] == [2, 4]
    assert [set_apart.tau_of(silo) for silo in set_apart.silo] == [3, 5]
