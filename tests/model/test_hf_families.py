"""Every shape that we train exists in transformers, with the same logits, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import photon.model.decoder as decoder_module
from photon.config import ModelConfig
from photon.errors import ConfigError
from photon.model.build import build_model, named_weights
from photon.model.decoder import Decoder, alibi_slopes
from photon.model.hf import decoder_from_hf, export
from photon.model.hf_families import FAMILIES, check_exportable, from_hf, to_hf

VOCAB, LENGTH = 61, 24
TOLERANCE = 1e-5


def shape(layers: int = 2, width: int = 32, heads: int = 4, **options: object) -> ModelConfig:
    return ModelConfig.model_validate({"layers": layers, "width": width, "heads": heads, **options})


ROPE = {"positions": "rope"}
SHAPES = {
    "mpt": shape(positions="alibi"),
    "mpt-6-heads": shape(width=48, heads=6, positions="alibi"),
    "mpt-untied": shape(positions="alibi", tied=False),
    "gpt2": shape(positions="learned", hidden=80),
    "llama": shape(norm="rmsnorm", activation="swiglu", tied=False, rope_theta=500.0),
    "llama-grouped": shape(norm="rmsnorm", activation="swiglu", kv_heads=2),
    "qwen3": shape(norm="rmsnorm", activation="swiglu", qk_norm=True, kv_heads=2),
    "arcee": shape(norm="rmsnorm", kv_heads=1, hidden=72),
    "apertus": shape(norm="rmsnorm", qk_norm=True, rope_theta=300.0),
    "starcoder2": shape(kv_heads=2, rope_theta=700.0),
    "persimmon": shape(qk_norm=True, rope_theta=300.0),
    "persimmon-untied": shape(qk_norm=True, tied=False, heads=8),
    "stablelm": shape(activation="swiglu", rope_theta=900.0),
    "stablelm-qk": shape(activation="swiglu", qk_norm=True, kv_heads=2, tied=False),
}


def perturbed(config: ModelConfig) -> Decoder:
    """A decoder far from its initial weights: at those, norms are one, and much can be wrong unnoticed."""
    model = build_model(config, VOCAB, LENGTH, seed=3)
    assert isinstance(model, Decoder)
    generator = torch.Generator().manual_seed(4)
    for weight in named_weights(model).values():
        weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.3)
    return model


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCAB, (3, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def difference(model: Decoder, folder: Path) -> float:
    """Largest distance between our logits and transformers' of the exported folder."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return float((model.logits(tokens()) - network(input_ids=tokens()).logits).abs().max())


def test_every_family_is_tried() -> None:
    tried = {(c.positions, c.norm, c.activation, c.qk_norm) for c in SHAPES.values()}
    assert tried == set(FAMILIES)


@pytest.mark.parametrize("name", SHAPES)
def test_out_and_in_with_equal_logits(name: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    model = perturbed(SHAPES[name])
    export(model, model.config, tokenizer_folder, tmp_path / "out")
    assert difference(model, tmp_path / "out") < TOLERANCE
    back = decoder_from_hf(tmp_path / "out")
    assert (back.vocab_size, back.sequence_length) == (VOCAB, LENGTH)
    ours, theirs = named_weights(model), named_weights(back)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(back.logits(tokens()), model.logits(tokens()))


def test_another_epsilon_goes_out_and_in(tokenizer_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Decoder(SHAPES["qwen3"], VOCAB, LENGTH, norm_eps=0.1)
    export(model, model.config, tokenizer_folder, tmp_path / "out")
    assert difference(model, tmp_path / "out") < TOLERANCE
    assert decoder_from_hf(tmp_path / "out").norm_eps == 0.1
    usual = Decoder(SHAPES["qwen3"], VOCAB, LENGTH)
    usual.load_state_dict(model.state_dict())
    assert difference(usual, tmp_path / "out") > 100 * TOLERANCE


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of neighbours (0, 1), (2, 3), ...: as good a RoPE, but another one."""
    left, right = x[..., ::2], x[..., 1::2]
    return torch.stack((left * cos - right * sin, right * cos + left * sin), dim=-1).flatten(-2)


def reversed_slopes(heads: int) -> Tensor:
    return alibi_slopes(heads).flip(0)


def slopes_of_eight(heads: int) -> Tensor:
    """The geometric sequence without the rule for heads that are no power of two."""
    return 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1))


MUTANTS = {
    "interleaved RoPE": ("persimmon", "rotate", interleaved),
    "ALiBi slopes reversed": ("mpt", "alibi_slopes", reversed_slopes),
    "ALiBi slopes of 6 heads without the rule": ("mpt-6-heads", "alibi_slopes", slopes_of_eight),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_check_rejects(name: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, attribute, wrong = MUTANTS[name]
    monkeypatch.setattr(decoder_module, attribute, wrong)
    model = perturbed(SHAPES[family])
    export(model, model.config, tokenizer_folder, tmp_path / "out")
    assert difference(model, tmp_path / "out") > 100 * TOLERANCE


def every_shape() -> st.SearchStrategy[ModelConfig]:
    return st.builds(
        ModelConfig,
        layers=st.integers(1, 2),
        width=st.sampled_from([24, 48]),
        heads=st.sampled_from([1, 2, 6]),
        kv_heads=st.sampled_from([None, 1]),
        hidden=st.sampled_from([None, 20]),
        positions=st.sampled_from(["rope", "alibi", "learned"]),
        norm=st.sampled_from(["layernorm", "rmsnorm"]),
        activation=st.sampled_from(["gelu", "swiglu"]),
        qk_norm=st.booleans(),
        tied=st.booleans(),
    )


@settings(deadline=None)
@given(every_shape())
def test_renaming_is_reversible_or_refused_with_a_way_out(config: ModelConfig) -> None:
    try:
        family = check_exportable(config)
    except ConfigError as error:
        assert "model." in str(error)
        assert "ForCausalLM" in str(error) or "GPT2LMHeadModel" in str(error)
        return
    ours = named_weights(Decoder(config, 11, 4))
    theirs = to_hf(family, config, ours)
    back = from_hf(family, config, theirs)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_the_nearest_shape_keeps_the_positions() -> None:
    with pytest.raises(ConfigError, match=r"positions = alibi, norm = rmsnorm.*nearest.*alibi.*MptForCausalLM"):
        check_exportable(shape(positions="alibi", norm="rmsnorm"))
    with pytest.raises(ConfigError, match=r"MptForCausalLM.*4 x model.width = 128, not 96"):
        check_exportable(shape(positions="alibi", hidden=96))
    with pytest.raises(ConfigError, match=r"PersimmonForCausalLM.*no grouped queries.*kv_heads = 2"):
        check_exportable(shape(qk_norm=True, kv_heads=2))


def weights_of(config: ModelConfig) -> dict[str, Tensor]:
    return to_hf(check_exportable(config), config, named_weights(Decoder(config, 11, 4)))


def refused(config: ModelConfig, theirs: Mapping[str, Tensor]) -> str:
    with pytest.raises(ConfigError) as error:
        from_hf(check_exportable(config), config, theirs)
    return str(error.value)


def test_a_checkpoint_with_more_or_less_than_ours_is_refused() -> None:
    config = shape(layers=1, positions="learned")
    theirs = weights_of(config)
    bias = "transformer.h.0.mlp.c_fc.bias"
    from_hf(check_exportable(config), config, theirs | {bias: torch.zeros(128)})
    assert bias in refused(config, theirs | {bias: torch.ones(128)})
    assert "extra.weight" in refused(config, theirs | {"extra.weight": torch.zeros(1)})
    del theirs["transformer.ln_f.weight"]
    assert "transformer.ln_f.weight" in refused(config, theirs)


def test_query_norms_that_differ_between_heads_are_refused() -> None:
    config = shape(layers=1, activation="swiglu", qk_norm=True)
    theirs = weights_of(config)
    name = "model.layers.0.self_attn.q_layernorm.norms.1.weight"
    assert "differs between heads" in refused(config, theirs | {name: theirs[name] + 1})
