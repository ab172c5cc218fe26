"""Named shapes: they are the published sizes, and what a recipe says itself wins."""

from __future__ import annotations

import pytest
import torch

from photon.config import ModelConfig
from photon.errors import ConfigError
from photon.model.decoder import Decoder, mlp_width
from photon.shapes import SHAPES, apply_shape, shape_fields

# Paper and released configurations: layers x width x heads.
MPT = {
    "mpt-125m": (12, 768, 12),
    "mpt-1.3b": (24, 2048, 16),
    "mpt-3b": (32, 2560, 20),
    "mpt-7b": (32, 4096, 32),
}
TWINS = {"mpt-125m": "llama-125m", "mpt-1.3b": "llama-1b", "mpt-3b": "llama-3b", "mpt-7b": "llama-7b"}


def shaped(**fields: object) -> ModelConfig:
    return ModelConfig.model_validate(apply_shape(fields))


def block_weights(model: ModelConfig) -> int:
    """Weights of one block's matrices, from the definition of the architecture."""
    head = model.width // model.heads
    attention = 2 * model.width**2 + 2 * model.width * head * (model.kv_heads or model.heads)
    return attention + (3 if model.activation == "swiglu" else 2) * model.width * mlp_width(model)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_a_valid_model(name: str) -> None:
    model = shaped(preset=name)
    assert model.preset == name
    assert set(SHAPES[name]) <= shape_fields()
    assert (model.width // model.heads) % 32 == 0  # head widths that fused attention takes
    assert mlp_width(model) % 128 == 0


@pytest.mark.parametrize(("name", "size"), MPT.items())
def test_mpt_shapes_are_the_papers(name: str, size: tuple[int, int, int]) -> None:
    model = shaped(preset=name)
    assert (model.layers, model.width, model.heads) == size
    assert (model.positions, model.norm, model.activation) == ("alibi", "layernorm", "gelu")
    assert model.tied and not model.qk_norm and model.kv_heads is None
    assert block_weights(model) == 12 * model.width**2


@pytest.mark.parametrize(("name", "twin"), TWINS.items())
def test_twins_have_the_same_size(name: str, twin: str) -> None:
    mpt, llama = shaped(preset=name), shaped(preset=twin)
    assert (llama.layers, llama.width, llama.heads) == (mpt.layers, mpt.width, mpt.heads)
    assert (llama.positions, llama.norm, llama.activation) == ("rope", "rmsnorm", "swiglu")
    assert 1.0 <= block_weights(llama) / block_weights(mpt) < 1.01
    # The narrowest such MLP in steps of 128: one step less has too few weights, or as many.
    narrower = llama.model_copy(update={"hidden": mlp_width(llama) - 128})
    assert block_weights(narrower) < block_weights(mpt)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("mpt-125m", 124), ("mpt-1.3b", 1311), ("mpt-3b", 2646), ("mpt-7b", 6649), ("llama-7b", 6683), ("nano", 7)],
)
def test_shapes_have_the_size_of_their_name(name: str, millions: int) -> None:
    """With the paper's vocabulary; the published MPT-7B has 6.65 B."""
    model, vocabulary = shaped(preset=name), 50_368
    with torch.device("meta"):
        decoder = Decoder(model, vocabulary, 2048)
    parameters = sum(parameter.numel() for parameter in decoder.parameters())
    assert round(parameters / 1e6) == millions
    # What the matrices do not account for are the norms: two in a block, one at the end, and those of queries and keys.
    norms = parameters - model.layers * block_weights(model) - vocabulary * model.width
    per_head = 2 * model.width // model.heads * model.layers if model.qk_norm else 0
    assert norms in {(2 * model.layers + 1) * model.width, (2 * model.layers + 1) * model.width + per_head}


def test_what_the_recipe_says_wins_and_the_order_does_not_matter() -> None:
    assert shaped(preset="mpt-7b", width=512, tied=False) == shaped(tied=False, width=512, preset="mpt-7b")
    model = shaped(preset="mpt-7b", width=512, tied=False)
    assert (model.width, model.tied, model.layers) == (512, False, 32)


def test_a_changed_width_carries_along_what_follows_from_it() -> None:
    for name in ("mpt-125m", "llama-125m"):
        model = shaped(preset=name, width=384, heads=6)
        assert mlp_width(model) == mlp_width(shaped(preset=name)) // 2
        assert model.kv_heads is None


def test_apply_shape_leaves_its_argument_and_shapeless_models_alone() -> None:
    given = {"preset": "nano"}
    apply_shape(given)
    assert given == {"preset": "nano"}
    assert apply_shape({"width": 64}) == {"width": 64}
    assert apply_shape({"preset": "", "width": 64}) == {"preset": "", "width": 64}
    assert apply_shape({"preset": 7}) == {"preset": 7}  # validation says what is wrong with it


def test_applying_twice_changes_nothing() -> None:
    once = apply_shape({"preset": "llama-3b", "layers": 2})
    assert apply_shape(once) == once


def test_unknown_shape_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no shape `lama-1b`; did you mean `llama-1b`\?"):
        apply_shape({"preset": "lama-1b"})
