"""Our decoder: a pre-norm Transformer, small enough to read in one sitting and exportable to Hugging Face.

Shapes in the comments: B sequences, T tokens, d width, h query heads, g key/value heads, c = d / h head width,
m MLP hidden width, V vocabulary. Parameters are float32 masters; the trainer may run the forward pass under
bfloat16 autocast, where norms, rotations and the loss stay in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from photon.config import ModelConfig
from photon.errors import ConfigError
from photon.model.base import LanguageModel
from photon.model.loss import linear_cross_entropy

if TYPE_CHECKING:  # flex_attention takes longer to import than the rest of torch, and only CUDA uses it
    from torch.nn.attention.flex_attention import BlockMask

NORM_EPS = 1e-5  # of every norm; only a model loaded from elsewhere has another


def mlp_width(config: ModelConfig) -> int:
    """MLP hidden width m: as given, else 4 d (GELU) or 8/3 d rounded up to 64 (SwiGLU: as many weights as GELU's)."""
    if config.hidden is not None:
        return config.hidden
    return 4 * config.width if config.activation == "gelu" else math.ceil(8 * config.width / 3 / 64) * 64


def alibi_slopes(heads: int) -> Tensor:
    """ALiBi slopes, float32 [h], of MPT (Press et al. 2022): 2^(-8 i / n), n = h rounded up to a power of two.

    When h is not a power of two, every second slope of the n comes first, then the others, cut to h.
    """
    n = 2 ** math.ceil(math.log2(heads))
    slopes = 2.0 ** (-8.0 / n * torch.arange(1, n + 1, dtype=torch.float32))
    return slopes if n == heads else torch.cat((slopes[1::2], slopes[::2]))[:heads]


def alibi_bias(slopes: Tensor, length: int) -> Tensor:
    """What is added to the scores, [1, h, T, T]: slope x (key - query), and -inf where the key lies in the future.

    Four dimensions, because with three torch's fused CPU kernel is not chosen.
    """
    place = torch.arange(length, device=slopes.device)
    distance = place[None, :] - place[:, None]  # [T, T], key minus query
    return (slopes[:, None, None] * distance).masked_fill(distance > 0, -math.inf)[None]


def rope_tables(length: int, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE's angles, float32 [T, c/2] each (Su et al. 2021)."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + c/2) of `x` [B, heads, T, c]: Hugging Face's layout, not the interleaved one."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """flex_attention is a fused kernel only when compiled; built at its first use, and only on CUDA."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention)
    return compiled


class Positions(NamedTuple):
    """What attention needs to know of positions, computed once per forward pass and shared by all blocks."""

    rotation: tuple[Tensor, Tensor] | None = None  # RoPE: cos, sin [T, c/2]
    bias: Tensor | None = None  # ALiBi where SDPA runs: [1, h, T, T]
    slopes: Tensor | None = None  # ALiBi where flex_attention runs (CUDA): [h] and the causal blocks
    blocks: BlockMask | None = None


def attend(q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
    """Causal attention of q [B, h, T, c] over k, v [B, g, T, c]; returns [B, h, T, c].

    Without ALiBi it is SDPA with `is_causal` and no mask: any mask would rule out the flash kernel on CUDA.
    With ALiBi it is flex_attention on CUDA, for the same reason, and SDPA with a bias elsewhere (flex_attention
    has no backward pass on CPU).
    """
    grouped = q.shape[1] != k.shape[1]
    slopes = positions.slopes
    if slopes is not None:
        from torch.nn.attention.flex_attention import flex_attention

        def alibi(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + slopes[head] * (key - query)

        fused: Callable[..., Tensor] = flex_attention
        if not torch.compiler.is_compiling():
            fused = _compiled_flex_attention()
        return fused(q, k, v, score_mod=alibi, block_mask=positions.blocks, enable_gqa=grouped)
    bias = positions.bias
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=None if bias is None else bias.to(q.dtype), is_causal=bias is None, enable_gqa=grouped
    )


class Norm(nn.Module):
    """LayerNorm without bias, or RMSNorm, over the last dimension, in the weight's own precision (float32)."""

    def __init__(self, width: int, kind: str, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.kind = kind
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., width]; the result has the weight's dtype, also under autocast."""
        x = x.to(self.weight.dtype)
        if self.kind == "rmsnorm":
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return functional.layer_norm(x, self.weight.shape, self.weight, None, self.eps)


class Attention(nn.Module):
    """Multi-head attention, with fewer key/value heads if grouped; four separate matrices (Muon needs them so)."""

    def __init__(self, config: ModelConfig, norm_eps: float) -> None:
        super().__init__()
        self.head_width = config.width // config.heads
        kv_width = self.head_width * (config.kv_heads or config.heads)
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, kv_width, bias=False)
        self.v_proj = nn.Linear(config.width, kv_width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)
        self.q_norm = Norm(self.head_width, config.norm, norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = Norm(self.head_width, config.norm, norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """Attend within `x` [B, T, d]; returns [B, T, d], to be added to the residual stream."""
        batch, length, width = x.shape
        heads = (batch, length, -1, self.head_width)
        q = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)  # [B, h, T, c]
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)  # [B, g, T, c]
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if positions.rotation is not None:
            q, k = rotate(q, *positions.rotation), rotate(k, *positions.rotation)
        y = attend(q.to(v.dtype), k.to(v.dtype), v, positions)  # under autocast norms and rotation gave float32
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, length, width))
        return out


class MLP(nn.Module):
    """GELU (exact, as MPT's) or SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = mlp_width(config)
        self.gate_proj = nn.Linear(config.width, hidden, bias=False) if config.activation == "swiglu" else None
        self.up_proj = nn.Linear(config.width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d], to be added to the residual stream."""
        up = self.up_proj(x)  # [B, T, m]
        inner = functional.gelu(up) if self.gate_proj is None else functional.silu(self.gate_proj(x)) * up
        out: Tensor = self.down_proj(inner)
        return out


class Block(nn.Module):
    """One pre-norm Transformer block."""

    def __init__(self, config: ModelConfig, norm_eps: float) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.width, config.norm, norm_eps)
        self.self_attn = Attention(config, norm_eps)
        self.post_attention_layernorm = Norm(config.width, config.norm, norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """The residual stream [B, T, d] after this block."""
        x = x + self.self_attn(self.input_layernorm(x), positions)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(LanguageModel):
    """The decoder of `config`, with fresh weights drawn from torch's global generator (`build_model` seeds it).

    Every matrix starts as N(0, init_std^2), those that write to the residual stream with init_std / sqrt(2 layers)
    (GPT-2), every norm at one. RoPE and learned positions reach `sequence_length` tokens, ALiBi any number.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, sequence_length: int, norm_eps: float = NORM_EPS) -> None:
        super().__init__()
        self.config = config
        self.norm_eps = norm_eps
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.embed_tokens = nn.Embedding(vocab_size, config.width)
        self.embed_positions = nn.Embedding(sequence_length, config.width) if config.positions == "learned" else None
        self.layers = nn.ModuleList(Block(config, norm_eps) for _ in range(config.layers))
        self.norm = Norm(config.width, config.norm, norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.width, vocab_size, bias=False)
        # Tables follow from the config, so they are neither saved nor sent.
        if config.positions == "rope":
            cos, sin = rope_tables(sequence_length, config.width // config.heads, config.rope_theta)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        elif config.positions == "alibi":
            self.register_buffer("slopes", alibi_slopes(config.heads), persistent=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = self.config.init_std / (math.sqrt(2 * self.config.layers) if writes_residual else 1.0)
                parameter.normal_(0.0, std)

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Mean loss if `targets` are given, else logits; one entry point, so that FSDP's and DDP's hooks see both."""
        hidden = self._hidden(inputs)
        head = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight  # [V, d]
        if targets is None:
            return functional.linear(hidden, head)
        return linear_cross_entropy(hidden.flatten(0, 1), head, targets.flatten())

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """See `LanguageModel.loss`; large vocabularies go through in pieces (`photon.model.loss`)."""
        loss: Tensor = self(inputs, targets)
        return loss

    def logits(self, inputs: Tensor) -> Tensor:
        """See `LanguageModel.logits`; raises ConfigError when RoPE or learned positions end before the input."""
        logits: Tensor = self(inputs)
        return logits

    def flops_per_token(self, sequence_length: int) -> int:
        """See `LanguageModel.flops_per_token`; the head counts as a matrix product, the embedding look-up does not."""
        matrices = sum(m.weight.numel() for m in self.layers.modules() if isinstance(m, nn.Linear))
        head = self.vocab_size * self.config.width
        return 6 * (matrices + head) + 12 * self.config.layers * sequence_length * self.config.width

    def _hidden(self, inputs: Tensor) -> Tensor:
        """The final normalised hidden states [B, T, d] of `inputs` [B, T]."""
        length = inputs.shape[1]
        if length > self.sequence_length and self.config.positions != "alibi":
            raise ConfigError(
                f"an input of {length} tokens for a model whose {self.config.positions} positions end at "
                f"data.sequence_length = {self.sequence_length}: shorten the input, or build the model longer"
            )
        x = self.embed_tokens(inputs)
        if self.embed_positions is not None:
            x = x + self.embed_positions.weight[:length]
        positions = self._positions(length)
        for block in self.layers:
            x = block(x, positions)
        out: Tensor = self.norm(x)
        return out

    def _positions(self, length: int) -> Positions:
        if self.config.positions == "rope":
            return Positions(rotation=(self.get_buffer("rope_cos")[:length], self.get_buffer("rope_sin")[:length]))
        if self.config.positions == "learned":
            return Positions()
        slopes = self.get_buffer("slopes")
        if not slopes.is_cuda:
            return Positions(bias=alibi_bias(slopes, length))
        from torch.nn.attention.flex_attention import create_block_mask

        def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return query >= key

        blocks = create_block_mask(causal, B=None, H=None, Q_LEN=length, KV_LEN=length, device=slopes.device)
        return Positions(slopes=slopes, blocks=blocks)
