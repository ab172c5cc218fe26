"""Hugging Face models in, every model out: loss, vocabulary, attention without a mask, files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import photon.model.hf as hf_module
from photon.config import ModelConfig
from photon.errors import ConfigError, InputError
from photon.model.build import ParameterCount, build_model, count_parameters, named_weights
from photon.model.decoder import Decoder
from photon.model.generate import generate
from photon.model.hf import HuggingFaceModel, decoder_from_hf, export

VOCAB, LENGTH = 300, 16
TINY = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": LENGTH,
}


def checkpoint(folder: Path, model_type: str, **options: Any) -> str:
    """A tiny checkpoint of a transformers architecture, as someone else would have saved it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("llama"), "llama", **TINY)


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def build(source: str, **options: Any) -> HuggingFaceModel:
    model = build_model(ModelConfig(hf=source, **options), VOCAB, LENGTH, seed=5)
    assert isinstance(model, HuggingFaceModel)
    return model


def test_pretrained_weights_give_transformers_loss_and_logits(llama: str) -> None:
    from transformers import AutoModelForCausalLM

    model = build(llama, hf_weights="pretrained")
    reference = AutoModelForCausalLM.from_pretrained(llama)
    batch = torch.cat((tokens(), tokens()[:, :1]), dim=1)  # transformers shifts the labels itself
    loss = model.loss(batch[:, :-1], batch[:, 1:])
    expected = reference(input_ids=batch, labels=batch).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.logits(tokens()), reference(input_ids=tokens()).logits, atol=1e-5, rtol=0)
    unshifted = model.loss(batch[:, :-1], batch[:, :-1])
    assert float((loss - unshifted).detach().abs()) > 1e-4


def test_scratch_takes_the_tokenizer_s_vocabulary_and_the_seed(llama: str) -> None:
    model, again = build(llama), build(llama)
    assert (model.vocab_size, model.sequence_length) == (VOCAB, LENGTH)
    weights, pretrained = named_weights(model), named_weights(build(llama, hf_weights="pretrained"))
    assert all(torch.equal(weight, named_weights(again)[name]) for name, weight in weights.items())
    name = "network.model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(weights[name], pretrained[name])
    count = count_parameters(ModelConfig(hf=llama), VOCAB, LENGTH)
    total = sum(weight.numel() for weight in weights.values())
    assert count == ParameterCount(total, total - 2 * VOCAB * 32)
    # Twice as long as the checkpoint's positions is fine for fresh weights.
    long = build_model(ModelConfig(hf=llama), VOCAB, 2 * LENGTH, seed=0)
    assert long.logits(torch.zeros(1, 2 * LENGTH, dtype=torch.int64)).shape == (1, 2 * LENGTH, VOCAB)


def test_what_does_not_fit_is_refused(llama: str, tmp_path: Path) -> None:
    def refusal(vocab_size: int, length: int, **options: Any) -> str:
        with pytest.raises(ConfigError) as error:
            build_model(ModelConfig(hf_weights="pretrained", **{"hf": llama, **options}), vocab_size, length, seed=0)
        return str(error.value)

    assert "320 token embeddings, the tokenizer 321 tokens" in refusal(321, LENGTH)
    assert "positions up to 16" in refusal(VOCAB, LENGTH + 1)
    assert "neither a folder" in refusal(VOCAB, LENGTH, hf=str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "causal language model" in refusal(30522, LENGTH, hf=str(tmp_path))


def test_pretrained_weights_are_all_there_or_refused(llama: str, tmp_path: Path) -> None:
    """transformers makes up what a checkpoint lacks, and training would go on from that."""
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())

    def refused(match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            build(str(folder), hf_weights="pretrained")
        with pytest.raises(ConfigError, match=match):
            decoder_from_hf(folder)

    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused(r"no weights for model\.layers\.2\..* and 8 other tensors of its LlamaForCausalLM")
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "big"}))
    refused("hidden_size")
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("cannot be loaded as a causal language model: SafetensorError")


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("bert", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "is_decoder": True}),
        ("opt", {"hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 4, "num_attention_heads": 2}),
        ("gpt2", {"n_embd": 16, "n_layer": 1, "n_head": 2}),
    ],
)
def test_nothing_is_dropped_in_training(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Whatever an architecture calls its dropout: bert's is `hidden_dropout_prob`, opt drops layers too."""
    more = {"layerdrop": 0.5} if model_type == "opt" else {}
    model = build(checkpoint(tmp_path, model_type, vocab_size=320, **options, **more)).train()
    with torch.no_grad():
        losses = [float(model.loss(tokens(), tokens())) for _ in range(6)]
    assert len(set(losses)) == 1


def attention_calls(model: nn.Module) -> list[dict[str, Any]]:
    """Mask and causal flag of every SDPA call in the graph that torch.compile captures of one loss."""
    calls: list[dict[str, Any]] = []

    def capture(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        calls.extend(n.kwargs for n in graph.graph.nodes if n.target is functional.scaled_dot_product_attention)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(model.loss, backend=capture, dynamic=False)(tokens(), tokens())
    return calls


def test_compiled_llama_keeps_causal_attention_without_a_mask(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = attention_calls(build(llama))
    assert len(calls) == 2
    assert all(call["attn_mask"] is None and call["is_causal"] is True for call in calls)
    monkeypatch.setattr(hf_module, "_attend_without_mask", lambda network, length: None)
    assert all(call["attn_mask"] is not None for call in attention_calls(build(llama))), (
        "transformers no longer builds a mask under torch.compile: our attention function can go"
    )


def test_a_sliding_window_is_respected(tmp_path: Path) -> None:
    """Unlike a full causal attention, which the shortcut would make of it."""
    from transformers import AutoModelForCausalLM

    source = checkpoint(tmp_path, "mistral", **TINY, sliding_window=4)
    model = build(source, hf_weights="pretrained")
    expected = AutoModelForCausalLM.from_pretrained(source)(input_ids=tokens()).logits
    torch.testing.assert_close(model.logits(tokens()), expected, atol=1e-5, rtol=0)
    hf_module._attend_without_mask(model.network, sequence_length=4)  # as if the window were never left
    assert float((model.logits(tokens()) - expected).detach().abs().max()) > 1e-4


def test_a_soft_cap_on_the_logits_is_part_of_the_loss(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, "gemma2", **TINY, final_logit_softcapping=0.5, pad_token_id=0)
    model = build(source)
    for weight in named_weights(model).values():
        weight.mul_(3)
    expected = functional.cross_entropy(model.logits(tokens()).flatten(0, 1), tokens().flatten())
    loss = model.loss(tokens(), tokens())
    torch.testing.assert_close(loss, expected)
    model._head_is_last = True
    assert float((model.loss(tokens(), tokens()) - loss).detach().abs()) > 1e-2


SMALL = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("model_type", ["bert", "electra"])
def test_what_sees_the_tokens_that_it_has_to_predict_is_refused(model_type: str, tmp_path: Path) -> None:
    """Encoders are causal language models only as decoders; their loss falls to nothing otherwise."""
    config = {"model_type": model_type, **SMALL}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"is not causal: a .* sees the tokens it has to predict"):
        build(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"is_decoder": True}))
    build(str(tmp_path))


def test_what_no_token_passes_is_refused(tmp_path: Path) -> None:
    """A roberta counts positions from its padding token, of which a run from scratch has none."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta", "is_decoder": True, **SMALL}))
    with pytest.raises(ConfigError, match="cannot be loaded as a causal language model: TypeError"):
        build(str(tmp_path))


def test_noise_in_training_does_not_hide_that_the_head_is_last(tmp_path: Path) -> None:
    """A node seeds what an expert's router draws; the loss that never holds all logits stays."""
    model = build(checkpoint(tmp_path, "mixtral", **TINY, num_local_experts=2, router_jitter_noise=0.1))
    assert model._head_is_last


def test_no_dropout_and_no_frozen_token(tmp_path: Path) -> None:
    gpt2 = checkpoint(tmp_path / "a", "gpt2", vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=LENGTH)
    model = build(gpt2).train()
    assert torch.equal(model.logits(tokens()), model.logits(tokens()))
    padded = checkpoint(tmp_path / "b", "llama", **TINY, pad_token_id=319)
    build(padded)  # a padding token beyond the run's vocabulary
    model = build(checkpoint(tmp_path / "c", "llama", **TINY, pad_token_id=3))
    batch = torch.full((1, LENGTH), 3)
    model.loss(batch, batch).backward()
    embedding: Any = model.network.get_input_embeddings()  # type: ignore[operator]
    assert embedding.weight.grad[3].abs().max() > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_flops_are_those_that_torch_counts(family: str, llama: str, tmp_path: Path) -> None:
    if family == "gpt2":
        llama = checkpoint(tmp_path, "gpt2", vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=LENGTH)
    model = build(llama)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        functional.cross_entropy(model.logits(tokens()).flatten(0, 1), tokens().flatten()).backward()
    assert model.flops_per_token(LENGTH) * tokens().numel() == counter.get_total_flops()


def nano(**options: Any) -> tuple[Decoder, ModelConfig]:
    config = ModelConfig(layers=1, width=16, heads=2, **options)
    model = build_model(config, VOCAB, LENGTH, seed=1)
    assert isinstance(model, Decoder)
    return model, config


EXPORTED = {
    "mpt": {"positions": "alibi"},
    "gpt2": {"positions": "learned"},
    "llama": {"norm": "rmsnorm", "activation": "swiglu"},
    "qwen3": {"norm": "rmsnorm", "activation": "swiglu", "qk_norm": True},
    "arcee": {"norm": "rmsnorm"},
    "apertus": {"norm": "rmsnorm", "qk_norm": True},
    "starcoder2": {},
    "persimmon": {"qk_norm": True},
    "stablelm": {"activation": "swiglu"},
}


@pytest.mark.parametrize("family", EXPORTED)
def test_an_export_tokenizes_and_continues_as_we_do(family: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    """transformers picks a tokenizer class by the architecture, with pre-tokenizers of its own: it must keep ours."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, config = nano(**EXPORTED[family])
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    out = tmp_path / "out"
    export(model, config, tokenizer_folder, out)
    assert json.loads((out / "config.json").read_text())["model_type"] == family
    text = "def  name(self):\n\treturn 'é' + 1234 <|endoftext|>"
    tokenizer = AutoTokenizer.from_pretrained(out)
    expected = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")).encode(text).ids
    assert tokenizer(text)["input_ids"] == expected
    assert tokenizer.decode(expected) == text
    network = AutoModelForCausalLM.from_pretrained(out)
    assert network.generation_config.eos_token_id == tokenizer.eos_token_id == expected[-1]
    prompt = expected[:4]
    theirs = network.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert generate(model, prompt, 8, 0.0, 0, seed=0, stop=None) == theirs[0, 4:].tolist()


def test_a_trained_hugging_face_model_goes_out_again(llama: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = build(llama)
    export(model, ModelConfig(hf=llama), tokenizer_folder, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(again(input_ids=tokens()).logits, model.logits(tokens()), atol=1e-5, rtol=0)
    assert again.config.vocab_size == VOCAB
    assert again.config._attn_implementation == "sdpa", "our attention function must not leak into the files"
    assert again.generation_config.eos_token_id == again.config.eos_token_id is not None
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    ours = decoder_from_hf(tmp_path / "out")
    torch.testing.assert_close(ours.logits(tokens()), model.logits(tokens()), atol=1e-5, rtol=0)


def test_an_export_is_whole_or_absent(tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = nano()
    out = tmp_path / "out"
    export(model, config, tokenizer_folder, out)
    (out / "stale").touch()
    export(model, config, tokenizer_folder, out)
    assert not (out / "stale").exists(), "an earlier export is replaced as a whole"
    before = (out / "model.safetensors").read_bytes()

    def full_disk(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_module, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        export(model, config, tokenizer_folder, out)
    assert (out / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing half-made is left"


def test_an_export_never_replaces_something_else(tokenizer_folder: Path, tmp_path: Path) -> None:
    model, config = nano()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="no exported model"):
        export(model, config, tokenizer_folder, tmp_path)
    with pytest.raises(InputError, match="no tokenizer"):
        export(model, config, tmp_path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match=r"thesis\.tex/out cannot be made \(.*thesis\.tex: .*\)"):
        export(model, config, tokenizer_folder, tmp_path / "thesis.tex" / "out")


def test_an_export_takes_the_place_of_an_empty_folder(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = nano()
    for name in ("empty", "here"):
        (tmp_path / name).mkdir()
    export(model, config, tokenizer_folder, tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "here")
    export(model, config, tokenizer_folder, Path())
    assert all((tmp_path / name / "model.safetensors").is_file() for name in ("empty", "here"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "here"]


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"head_dim": 16}, "head_dim"),
    ],
)
def test_an_import_refuses_what_our_decoder_does_not_have(options: dict[str, Any], place: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, "llama", **{**TINY, **options})
    with pytest.raises(ConfigError, match=rf"{place} = .* our decoder has .* use model.hf"):
        decoder_from_hf(tmp_path)


def test_an_import_refuses_other_families(tmp_path: Path) -> None:
    checkpoint(tmp_path, "opt", vocab_size=20, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ConfigError, match=r"'opt' model has no place.*llama, mpt"):
        decoder_from_hf(tmp_path)
