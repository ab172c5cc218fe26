"""The yardstick: what a person would write by hand, without Photon. A small GPT and a plain training step.

The model has nanoGPT's architecture (GPT-2 without biases: learned positions, LayerNorm, exact GELU, one matrix for
queries, keys and values, tied embeddings, whole logits) and its loop's habits (random windows of one token array,
two weight-decay groups, fused AdamW, clipping at 1). Written for this comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from photon.config import ModelConfig
from photon.model.decoder import Decoder

Batches = Callable[[], tuple[Tensor, Tensor]]


class SmallGPT(nn.Module):
    """GPT-2's Transformer without biases. `forward` gives the mean loss of `targets`, both int64 [B, T]."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, sequence_length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(sequence_length, width)
        self.blocks = nn.ModuleList(SmallBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_residual = name.endswith(("leave.weight", "shrink.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if into_residual else 0.02)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.norm(x), self.tokens.weight)
        return functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


class SmallBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.enter, self.leave = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.grow, self.shrink = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        fused = self.enter(self.norm_1(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = fused.permute(2, 0, 3, 1, 4)  # each [B, h, T, c]
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.leave(y.transpose(1, 2).reshape(batch, length, width))
        out: Tensor = x + self.shrink(functional.gelu(self.grow(self.norm_2(x))))
        return out


def gpt_config(layers: int, width: int, heads: int) -> ModelConfig:
    """The same architecture as options of Photon's decoder."""
    return ModelConfig(layers=layers, width=width, heads=heads, positions="learned")


@torch.no_grad()
def copy_weights(source: Decoder, target: SmallGPT) -> None:
    """Give the small GPT the decoder's weights, so that equal losses prove equal work. Counts must agree."""
    if sum(p.numel() for p in source.parameters()) != sum(p.numel() for p in target.parameters()):
        raise ValueError("the two models differ in size: they are not the same architecture")
    weights = dict(source.named_parameters())
    target.tokens.weight.copy_(weights["embed_tokens.weight"])
    target.positions.weight.copy_(weights["embed_positions.weight"])
    target.norm.weight.copy_(weights["norm.weight"])
    for index, block in enumerate(target.blocks):
        of = {name.removeprefix(f"layers.{index}."): w for name, w in weights.items() if f"layers.{index}." in name}
        parts = tuple(of[f"self_attn.{part}_proj.weight"] for part in "qkv")
        pairs = {
            "norm_1": of["input_layernorm.weight"],
            "norm_2": of["post_attention_layernorm.weight"],
            "enter": torch.cat(parts),
            "leave": of["self_attn.o_proj.weight"],
            "grow": of["mlp.up_proj.weight"],
            "shrink": of["mlp.down_proj.weight"],
        }
        for name, weight in pairs.items():
            block.get_submodule(name).get_parameter("weight").copy_(weight)


def adamw(model: nn.Module, lr: float = 3e-3) -> torch.optim.Optimizer:
    """Fused AdamW that decays matrices and nothing else."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def random_windows(
    tokens: NDArray[np.unsignedinteger], batch_size: int, length: int, device: torch.device, seed: int
) -> Batches:
    """Batches as nanoGPT draws them: random windows of one array, anew at each call."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(tokens) - length - 1, (batch_size,), generator=generator).tolist()
        windows = torch.stack([torch.from_numpy(tokens[s : s + length + 1].astype(np.int64)) for s in starts])
        if device.type == "cuda":
            windows = windows.pin_memory().to(device, non_blocking=True)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    return draw


def train_bare(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[nn.Parameter],
    batches: Batches,
    learning_rates: Iterable[float],
) -> list[Tensor]:
    """One step per learning-rate factor: the plain loop. Returns each step's loss, still on the device.

    Each group's peak rate is its `initial_lr`. Precision is the caller's: wrap `loss_of` in autocast for bfloat16.
    """
    parameters = list(parameters)
    losses: list[Tensor] = []
    for factor in learning_rates:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        loss = loss_of(*batches())
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return losses
