"""The ways between Photon and Hugging Face: any causal LM in as the trained model, every trained model out.

transformers takes seconds to import, so every function imports what it uses when it runs.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from photon.config import ModelConfig
from photon.errors import ConfigError, InputError
from photon.model.base import LanguageModel
from photon.model.decoder import Decoder
from photon.model.hf_families import FAMILIES, Family, Setting, check_exportable, from_hf, to_hf
from photon.model.hf_settings import LENGTHS, fitted_settings, read_settings
from photon.model.loss import linear_cross_entropy

_CAUSAL = "photon_causal"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


class HuggingFaceModel(LanguageModel):
    """A transformers causal LM behind our interface, in float32 and without dropout.

    Attention is causal SDPA without a mask, also when compiled, for every architecture that lets its attention be
    chosen and attends to all earlier tokens. The loss never holds all logits if they are the output embedding's
    plain product (established by `_head_is_last`); otherwise (soft caps, scales, biases) it takes the model's own.
    """

    def __init__(self, network: Any, sequence_length: int) -> None:
        """Wrap `network`, a `transformers.PreTrainedModel` with a language-modelling head."""
        super().__init__()
        self.network: nn.Module = network
        self.vocab_size = int(network.get_input_embeddings().weight.shape[0])
        self.sequence_length = sequence_length
        _attend_without_mask(network, sequence_length)
        self._head_is_last = _head_is_last(network)

    @classmethod
    def load(
        cls, source: str, weights: Literal["scratch", "pretrained"], vocab_size: int, sequence_length: int
    ) -> HuggingFaceModel:
        """The model at `source`, a folder or hub id: its weights, or fresh ones from torch's global generator.

        Fresh weights take the tokenizer's vocabulary and, where the model's positions end earlier, the run's
        sequence length. Raises ConfigError if there is no such model, if it is not causal, or if pretrained weights fit
        neither.
        """
        settings = fitted_settings(source, weights, vocab_size, sequence_length)
        network = (_pretrained if weights == "pretrained" else fresh_network)(source, settings)
        try:
            model, sees_ahead = cls(network, sequence_length), _sees_ahead(network)
        except Exception as error:  # whatever the numbers in config.json lead to once tokens pass
            raise _unloadable(source, error) from error
        if sees_ahead:
            raise ConfigError(
                f"model.hf = {source!r} is not causal: a {type(network).__name__} with this config sees the tokens it "
                "has to predict; where its architecture has that, set is_decoder = true in its config.json"
            )
        return model

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Mean loss if `targets` are given, else logits; one entry point, so that FSDP's and DDP's hooks see both."""
        network: Any = self.network
        if targets is not None and self._head_is_last:
            hidden = network.base_model(input_ids=inputs, use_cache=False).last_hidden_state
            return linear_cross_entropy(hidden.flatten(0, 1), network.get_output_embeddings().weight, targets.flatten())
        logits: Tensor = network(input_ids=inputs, use_cache=False).logits
        return logits if targets is None else functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """See `LanguageModel.loss`; auxiliary losses (experts) are left out."""
        loss: Tensor = self(inputs, targets)
        return loss

    def logits(self, inputs: Tensor) -> Tensor:
        """See `LanguageModel.logits`."""
        logits: Tensor = self(inputs)
        return logits

    def flops_per_token(self, sequence_length: int) -> int:
        """See `LanguageModel.flops_per_token`; every linear map counts, so experts count as if all were used."""
        from transformers.pytorch_utils import Conv1D

        settings: Any = self.network.config
        head_width = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
        attention = settings.num_hidden_layers * settings.num_attention_heads * head_width
        matrices = sum(m.weight.numel() for m in self.network.modules() if isinstance(m, (nn.Linear, Conv1D)))
        return int(6 * matrices + 12 * attention * sequence_length)


def count_hf_parameters(
    source: str, weights: Literal["scratch", "pretrained"], vocab_size: int, sequence_length: int
) -> tuple[int, int]:
    """(all, those outside the embeddings and the head) of the model at `source`, without allocating a weight."""
    settings = fitted_settings(source, weights, vocab_size, sequence_length)
    with torch.device("meta"):
        network = fresh_network(source, settings)
    total = sum(p.numel() for p in network.parameters())
    outer = {id(p): p.numel() for m in network.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    outer |= {id(p): p.numel() for p in network.get_output_embeddings().parameters()}
    return total, total - sum(outer.values())


def export(model: LanguageModel, config: ModelConfig, tokenizer_folder: Path, out: Path) -> None:
    """Write `model` and its tokenizer to `out`, a folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    config.json, generation_config.json, model.safetensors (float32) and the tokenizer's files appear together or
    not at all; an earlier export at `out` and an empty folder are replaced, anything else there raises InputError.
    """
    if out.exists() and not (out / "config.json").is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists and is no exported model: choose another folder, or remove it")
    out = out.absolute()  # so that it has a name, as `.` has not
    pending = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        pending.mkdir()
    except OSError as error:
        raise InputError(f"{out} cannot be made ({error.filename}: {error.strerror}): choose another place") from error
    try:
        tokens = _copy_tokenizer(tokenizer_folder, pending)
        if isinstance(model, HuggingFaceModel):
            _write_network(model, tokens, pending)
        elif isinstance(model, Decoder):
            _write_decoder(model, check_exportable(config), tokens, pending)
        else:
            raise InputError(f"a {type(model).__name__} cannot be exported: neither our decoder nor Hugging Face's")
        _sync(pending)
        previous = pending.with_suffix(".old")
        if out.exists():
            out.rename(previous)
        pending.rename(out)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(pending, ignore_errors=True)


def decoder_from_hf(folder: Path) -> Decoder:
    """Our decoder with the weights and the shape of the Hugging Face checkpoint in `folder`, and equal logits.

    Raises ConfigError, naming the setting or the tensor, when the checkpoint is not of a family of
    `photon.model.hf_families` or uses what our decoder does not have; `model.hf` still takes it then.
    """
    settings = read_settings(str(folder))
    config, vocab_size, sequence_length = _shape_of(settings, folder)
    family = check_exportable(config)
    norm_eps = float(getattr(settings, family.eps))
    wanted = family.settings(config, vocab_size, sequence_length, norm_eps)
    _require_equal(wanted, settings.to_dict(), f"{folder}/config.json")
    network = _pretrained(str(folder), None)
    tensors = from_hf(family, config, network.state_dict())
    with torch.random.fork_rng(devices=[]):  # the fresh weights are overwritten: leave the caller's generator alone
        decoder = Decoder(config, vocab_size, sequence_length, norm_eps)
    decoder.load_state_dict(tensors)
    return decoder


def fresh_network(source: str, settings: Any) -> Any:
    """A network of these settings; ConfigError if there can be none."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    except Exception as error:  # whatever a number or a name in config.json leads to
        raise _unloadable(source, error) from error


def _pretrained(source: str, settings: Any | None) -> Any:
    """The network at `source` with its weights; ConfigError if they cannot be read, or are not all there."""
    from transformers import AutoModelForCausalLM

    try:
        network, report = AutoModelForCausalLM.from_pretrained(
            source, config=settings, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # as above, and of a damaged file
        raise _unloadable(source, error) from error
    if missing := sorted(report["missing_keys"]):  # transformers would make them up, and say so in a log
        lacks = f"no weights for {missing[0]} and {len(missing) - 1} other tensors of its {type(network).__name__}"
        raise ConfigError(f"model.hf = {source!r} has {lacks}: is it complete, and a causal language model?")
    return network


def _unloadable(source: str, error: Exception) -> ConfigError:
    said = f"{type(error).__name__}: {error}"  # of a KeyError the text is nothing but the key
    return ConfigError(f"model.hf = {source!r} cannot be loaded as a causal language model: {said}")


def _attend_without_mask(network: Any, sequence_length: int) -> None:
    """Give `network` causal SDPA without a mask, where that is what its attention means.

    transformers' own choice builds a mask tensor as soon as the model is compiled (it cannot see that positions
    are consecutive), and any mask rules out the flash kernel. For an attention function that it has no mask maker
    for, it makes none, and SDPA is then called with `is_causal`.
    """
    from transformers import AttentionInterface

    settings = network.config
    window = getattr(settings, "sliding_window", None)
    kinds = set(getattr(settings, "layer_types", None) or ["full_attention"])
    everything = (window is None or window >= sequence_length) and kinds == {"full_attention"}
    if everything and network._supports_sdpa and network._supports_attention_backend:
        AttentionInterface.register(_CAUSAL, _causal_sdpa)
        network.set_attn_implementation(_CAUSAL)


def _causal_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The signature is that of transformers' AttentionInterface."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, None, dropout=dropout, scaling=scaling, **kwargs
    )
    return out


@torch.no_grad()
def _head_is_last(network: Any) -> bool:
    """Whether the logits are the output embedding's product with the last hidden state and nothing else.

    Found out by trying: the head's output is replaced by known numbers, large enough for a soft cap to bend, which
    must come out untouched; and what goes into the head must be what the model without head returns.
    """
    head = network.get_output_embeddings()
    if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
        return False
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    known = torch.linspace(-100.0, 100.0, head.weight.shape[0]).expand(1, 2, -1)
    seen: list[Tensor] = []

    def replace(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(args[0])
        return known

    handle = head.register_forward_hook(replace)
    network.eval()  # in training some draw numbers, and two passes would differ
    try:
        logits = network(input_ids=tokens, use_cache=False).logits
    finally:
        handle.remove()
    hidden = getattr(network.base_model(input_ids=tokens, use_cache=False), "last_hidden_state", None)
    return torch.equal(logits, known) and hidden is not None and len(seen) == 1 and torch.equal(seen[0], hidden)


@torch.no_grad()
def _sees_ahead(network: Any) -> bool:
    """Whether what a network says of the first token depends on the second: its loss would be no held-out loss."""
    network.eval()  # and the first ids are often those of padding
    logits = network(input_ids=torch.tensor([[7, 8], [7, 9]]), use_cache=False).logits[:, 0]
    return float((logits[0] - logits[1]).abs().max()) > 1e-4 * float(logits.abs().max())


def _copy_tokenizer(source: Path, target: Path) -> dict[str, int | None]:
    """Copy the tokenizer's files; returns the ids of its special tokens under config.json's names."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{source} holds no tokenizer that transformers can load: {error}") from error
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    return {"bos_token_id": eos if bos is None else bos, "eos_token_id": eos, "pad_token_id": None}


def _write_decoder(model: Decoder, family: Family, tokens: dict[str, int | None], folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    settings = family.settings(model.config, model.vocab_size, model.sequence_length, model.norm_eps)
    hf_config = AutoConfig.for_model(
        family.model_type, **settings, **tokens, architectures=[family.architecture], dtype="float32"
    )
    with torch.device("meta"):  # only names and shapes: which tensors the architecture expects
        expected = AutoModelForCausalLM.from_config(hf_config).state_dict()
    ours = to_hf(family, model.config, {name: p.detach().cpu() for name, p in model.named_parameters()})
    tensors: dict[str, Tensor] = {}
    for name, wanted in expected.items():
        if name in ours:
            tensors[name] = ours.pop(name).to(torch.float32).contiguous()
        elif name.endswith(".bias"):
            tensors[name] = torch.zeros(wanted.shape)
        elif not (model.config.tied and name == "lm_head.weight"):
            raise ConfigError(f"this version of transformers gives {family.architecture} a tensor {name} of its own")
    if ours:
        raise ConfigError(f"this version of transformers has no {', '.join(sorted(ours))} in {family.architecture}")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    hf_config.save_pretrained(folder)
    GenerationConfig(**tokens).save_pretrained(folder)


def _write_network(model: HuggingFaceModel, tokens: dict[str, int | None], folder: Path) -> None:
    network: Any = model.network
    for key, value in tokens.items():
        if getattr(network.config, key, None) is None:  # fresh weights: the run's own tokenizer
            setattr(network.config, key, value)
            setattr(network.generation_config, key, value)
    network.save_pretrained(folder)


def _sync(folder: Path) -> None:
    """Have every file of `folder` on the disk before it gets its name."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _shape_of(settings: Any, folder: Path) -> tuple[ModelConfig, int, int]:
    """(our config, vocabulary, sequence length) with the sizes of transformers' `settings`; options unchecked."""
    shapes = [
        shape
        for shape, family in FAMILIES.items()
        if family.model_type == settings.model_type and shape[3] == getattr(settings, "qk_layernorm", shape[3])
    ]
    if not shapes:
        known = ", ".join(sorted({family.model_type for family in FAMILIES.values()}))
        raise ConfigError(f"{folder}: a {settings.model_type!r} model has no place in our decoder ({known} have)")
    positions, norm, activation, qk_norm = shapes[0]
    hidden = getattr(settings, "intermediate_size", None) or getattr(settings, "n_inner", None)
    rope: dict[str, Any] = getattr(settings, "rope_parameters", None) or {}
    config = ModelConfig(
        layers=settings.num_hidden_layers,
        width=settings.hidden_size,
        heads=settings.num_attention_heads,
        kv_heads=getattr(settings, "num_key_value_heads", None),
        hidden=hidden or 4 * settings.hidden_size,
        positions=positions,  # type: ignore[arg-type]  # keys of FAMILIES are the options' own words
        rope_theta=float(rope.get("rope_theta", 10_000.0)),
        norm=norm,  # type: ignore[arg-type]
        activation=activation,  # type: ignore[arg-type]
        qk_norm=qk_norm,
        tied=settings.tie_word_embeddings,
        init_std=settings.initializer_range,
    )
    lengths = [n for key in LENGTHS if (n := getattr(settings, key, None)) is not None]
    return config, settings.vocab_size, lengths[0]


def _require_equal(wanted: dict[str, Setting], found: dict[str, Any], place: str) -> None:
    """Refuse a checkpoint with an option that our decoder does not have; absent keys have no say."""
    for key, value in wanted.items():
        actual = found.get(key, value)
        if isinstance(value, dict) and isinstance(actual, dict):
            _require_equal(value, actual, f"{place}: {key}")
        elif actual != value:
            raise ConfigError(f"{place}: {key} = {actual!r}, but our decoder has {value!r}: use model.hf instead")
