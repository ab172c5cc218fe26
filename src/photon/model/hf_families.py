"""Which Hugging Face architecture holds which shape of our decoder, and how the weights are renamed.

Every family is native in transformers: an exported folder loads with `AutoModelForCausalLM`, no remote code. Biases
that a family insists on are exported as zeros, and a checkpoint with other biases is refused on the way in. This
module does not import transformers, so that a configuration can be checked at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from photon.config import ModelConfig
from photon.errors import ConfigError
from photon.model.decoder import mlp_width

Setting = int | float | str | bool | None | dict[str, "Setting"]
Settings = dict[str, Setting]

# Our tensor names, of one block and around the blocks. Families list only what they call otherwise.
_BLOCK = (
    "input_layernorm",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture, limited to the settings under which it equals our decoder."""

    model_type: str
    architecture: str
    eps: str  # what it calls the epsilon of its norms
    sizes: Callable[[ModelConfig, int, int], Settings]  # (config, vocab_size, sequence_length), in its own words
    fixed: Settings  # what makes this architecture our decoder: activation, no biases
    blocks: str = "model.layers"
    names: Mapping[str, str] = field(default_factory=dict)  # ours -> theirs, where they differ
    fused_qkv: str = ""  # their one matrix for q, k and v: stacked, unless `qkv_by_head`
    qkv_by_head: bool = False  # rows ordered head by head: q, k, v of head 0, then of head 1, ...
    transposed: bool = False  # block matrices stored [in, out]
    norm_per_head: bool = False  # a copy of the query/key norm for each head
    grouped: bool = True  # allows fewer key/value heads than heads
    mlp_ratio: int | None = None  # MLP width fixed at so many times the width

    def settings(self, config: ModelConfig, vocab_size: int, sequence_length: int, norm_eps: float) -> Settings:
        """The content of config.json, less the token ids."""
        return {
            self.eps: norm_eps,
            **self.sizes(config, vocab_size, sequence_length),
            **self.fixed,
            "tie_word_embeddings": config.tied,
            "initializer_range": config.init_std,
        }


def _usual_sizes(config: ModelConfig, vocab_size: int, sequence_length: int) -> Settings:
    return {
        "vocab_size": vocab_size,
        "hidden_size": config.width,
        "intermediate_size": mlp_width(config),
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "head_dim": config.width // config.heads,
        "max_position_embeddings": sequence_length,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": 1.0,
        },
    }


def _mpt_sizes(config: ModelConfig, vocab_size: int, sequence_length: int) -> Settings:
    return {
        "vocab_size": vocab_size,
        "d_model": config.width,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "expansion_ratio": 4,
        "max_seq_len": sequence_length,
    }


def _gpt2_sizes(config: ModelConfig, vocab_size: int, sequence_length: int) -> Settings:
    return {
        "vocab_size": vocab_size,
        "n_embd": config.width,
        "n_inner": mlp_width(config),
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_positions": sequence_length,
    }


_RMS: Settings = {"attention_bias": False}
_STABLELM: Settings = {
    "hidden_act": "silu",
    "use_qkv_bias": False,
    "use_parallel_residual": False,
}
_HEAD_NORMS = {"self_attn.q_norm": "self_attn.q_layernorm", "self_attn.k_norm": "self_attn.k_layernorm"}

# (positions, norm, activation, qk_norm) -> family
FAMILIES: Mapping[tuple[str, str, str, bool], Family] = {
    ("alibi", "layernorm", "gelu", False): Family(
        "mpt",
        "MptForCausalLM",
        "layer_norm_epsilon",
        _mpt_sizes,
        {
            "no_bias": True,
            "logit_scale": None,
            "attn_config": {"alibi": True, "alibi_bias_max": 8, "softmax_scale": None, "clip_qkv": None},
        },
        blocks="transformer.blocks",
        names={
            "embed_tokens": "transformer.wte",
            "norm": "transformer.norm_f",
            "input_layernorm": "norm_1",
            "post_attention_layernorm": "norm_2",
            "self_attn.o_proj": "attn.out_proj",
            "mlp.up_proj": "ffn.up_proj",
            "mlp.down_proj": "ffn.down_proj",
        },
        fused_qkv="attn.Wqkv",
        grouped=False,
        mlp_ratio=4,
    ),
    ("learned", "layernorm", "gelu", False): Family(
        "gpt2",
        "GPT2LMHeadModel",
        "layer_norm_epsilon",
        _gpt2_sizes,
        {
            "activation_function": "gelu",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
        blocks="transformer.h",
        names={
            "embed_tokens": "transformer.wte",
            "embed_positions": "transformer.wpe",
            "norm": "transformer.ln_f",
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
            "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        },
        fused_qkv="attn.c_attn",
        transposed=True,
        grouped=False,
    ),
    ("rope", "rmsnorm", "swiglu", False): Family(
        "llama", "LlamaForCausalLM", "rms_norm_eps", _usual_sizes, {**_RMS, "hidden_act": "silu", "mlp_bias": False}
    ),
    ("rope", "rmsnorm", "swiglu", True): Family(
        "qwen3",
        "Qwen3ForCausalLM",
        "rms_norm_eps",
        _usual_sizes,
        {**_RMS, "hidden_act": "silu", "use_sliding_window": False},
    ),
    ("rope", "rmsnorm", "gelu", False): Family(
        "arcee", "ArceeForCausalLM", "rms_norm_eps", _usual_sizes, {**_RMS, "hidden_act": "gelu", "mlp_bias": False}
    ),
    ("rope", "rmsnorm", "gelu", True): Family(
        "apertus",
        "ApertusForCausalLM",
        "rms_norm_eps",
        _usual_sizes,
        {**_RMS, "hidden_act": "gelu"},
        names={"input_layernorm": "attention_layernorm", "post_attention_layernorm": "feedforward_layernorm"},
    ),
    ("rope", "layernorm", "gelu", False): Family(
        "starcoder2",
        "Starcoder2ForCausalLM",
        "norm_epsilon",
        _usual_sizes,
        {"hidden_act": "gelu", "use_bias": False, "sliding_window": None},
        names={"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"},
    ),
    ("rope", "layernorm", "gelu", True): Family(
        "persimmon",
        "PersimmonForCausalLM",
        "layer_norm_eps",
        _usual_sizes,
        {"hidden_act": "gelu", "qk_layernorm": True},
        names={
            "norm": "model.final_layernorm",
            "self_attn.o_proj": "self_attn.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
            **_HEAD_NORMS,
        },
        fused_qkv="self_attn.query_key_value",
        qkv_by_head=True,
        grouped=False,
    ),
    ("rope", "layernorm", "swiglu", False): Family(
        "stablelm", "StableLmForCausalLM", "layer_norm_eps", _usual_sizes, {**_STABLELM, "qk_layernorm": False}
    ),
    ("rope", "layernorm", "swiglu", True): Family(
        "stablelm",
        "StableLmForCausalLM",
        "layer_norm_eps",
        _usual_sizes,
        {**_STABLELM, "qk_layernorm": True},
        names=_HEAD_NORMS,
        norm_per_head=True,
    ),
}


def check_exportable(config: ModelConfig) -> Family:
    """The family that holds `config`'s shape.

    Raises ConfigError, naming the nearest shape that has one: nothing is trained that cannot leave.
    """
    wanted = (config.positions, config.norm, config.activation, config.qk_norm)
    family = FAMILIES.get(wanted)
    if family is None:
        # Positions weigh most: another norm or activation is the smaller change to a model.
        weights = (3, 1, 1, 1)
        nearest = max(
            FAMILIES, key=lambda shape: sum(w for w, a, b in zip(weights, shape, wanted, strict=True) if a == b)
        )
        raise ConfigError(
            f"no Hugging Face architecture has model.{_shape(wanted)}; "
            f"nearest: {_shape(nearest)} ({FAMILIES[nearest].architecture})"
        )
    if not family.grouped and (config.kv_heads or config.heads) != config.heads:
        raise ConfigError(
            f"{family.architecture}, the Hugging Face architecture for {_shape(wanted)}, has no grouped queries: "
            f"leave out model.kv_heads = {config.kv_heads}, or take norm = rmsnorm with positions = rope"
        )
    if family.mlp_ratio is not None and mlp_width(config) != family.mlp_ratio * config.width:
        raise ConfigError(
            f"{family.architecture}, the Hugging Face architecture for {_shape(wanted)}, fixes model.hidden at "
            f"{family.mlp_ratio} x model.width = {family.mlp_ratio * config.width}, not {mlp_width(config)}"
        )
    return family


def _shape(shape: tuple[str, str, str, bool]) -> str:
    positions, norm, activation, qk_norm = shape
    return f"positions = {positions}, norm = {norm}, activation = {activation}, qk_norm = {str(qk_norm).lower()}"


def to_hf(family: Family, config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our named weights under the family's names and in its layout; biases are left to the caller."""
    out = {f"{theirs}.weight": tensors[f"{ours}.weight"] for ours, theirs in _outer_names(family, config)}
    for layer in range(config.layers):
        block = {name: tensors[f"layers.{layer}.{name}.weight"] for name in _block_names(config)}
        if family.fused_qkv:
            qkv = [block.pop(name) for name in _QKV]
            heads = [part.reshape(config.heads, -1, config.width) for part in qkv]  # [h, c, d] each
            block[family.fused_qkv] = torch.stack(heads, 1).flatten(0, 2) if family.qkv_by_head else torch.cat(qkv)
        for name, tensor in block.items():
            theirs = f"{family.blocks}.{layer}.{family.names.get(name, name)}"
            if family.norm_per_head and name in _HEAD_NORMS:
                for head in range(_norm_copies(config, name)):
                    out[f"{theirs}.norms.{head}.weight"] = tensor.clone()  # files hold no shared tensors
            else:
                out[f"{theirs}.weight"] = tensor.T if family.transposed and tensor.dim() == 2 else tensor
    return out


def from_hf(family: Family, config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_hf`: our named weights out of a checkpoint of the family.

    Raises ConfigError for a tensor that is missing, or that our decoder has no room for (a bias that is not zero).
    """
    rest = dict(tensors)

    def take(name: str) -> Tensor:
        if name not in rest:
            raise ConfigError(f"the {family.architecture} checkpoint has no tensor {name}: is it complete?")
        return rest.pop(name)

    out = {f"{ours}.weight": take(f"{theirs}.weight") for ours, theirs in _outer_names(family, config)}
    for layer in range(config.layers):
        for name in _block_names(config):
            if family.fused_qkv and name in _QKV:
                continue
            theirs = f"{family.blocks}.{layer}.{family.names.get(name, name)}"
            if family.norm_per_head and name in _HEAD_NORMS:
                copies = [take(f"{theirs}.norms.{head}.weight") for head in range(_norm_copies(config, name))]
                if any(not torch.equal(copy, copies[0]) for copy in copies):
                    raise ConfigError(f"{theirs} differs between heads, ours does not: load it through model.hf")
                tensor = copies[0]
            else:
                tensor = take(f"{theirs}.weight")
            out[f"layers.{layer}.{name}.weight"] = tensor.T if family.transposed and tensor.dim() == 2 else tensor
        if family.fused_qkv:
            fused = take(f"{family.blocks}.{layer}.{family.fused_qkv}.weight")
            fused = fused.T if family.transposed else fused
            if family.qkv_by_head:
                parts = [part.flatten(0, 1) for part in fused.reshape(config.heads, 3, -1, config.width).unbind(1)]
            else:
                parts = list(fused.chunk(3))
            for name, part in zip(_QKV, parts, strict=True):
                out[f"layers.{layer}.{name}.weight"] = part
    if config.tied:
        rest.pop("lm_head.weight", None)  # some checkpoints store the tied head twice
    for name, tensor in rest.items():
        if not name.endswith(".bias") or tensor.any():
            raise ConfigError(f"our decoder has no place for {name} of this {family.architecture}: use model.hf")
    return out


def _outer_names(family: Family, config: ModelConfig) -> list[tuple[str, str]]:
    """(ours, theirs) of the tensors around the blocks."""
    ours = ["embed_tokens", "norm"] + (["embed_positions"] if config.positions == "learned" else [])
    head = [] if config.tied else [("lm_head", "lm_head")]
    return [(name, family.names.get(name, f"model.{name}")) for name in ours] + head


def _block_names(config: ModelConfig) -> list[str]:
    absent = set() if config.qk_norm else {"self_attn.q_norm", "self_attn.k_norm"}
    absent |= set() if config.activation == "swiglu" else {"mlp.gate_proj"}
    return [name for name in _BLOCK if name not in absent]


def _norm_copies(config: ModelConfig, name: str) -> int:
    return config.heads if name == "self_attn.q_norm" else (config.kv_heads or config.heads)
