"""What a recipe needs: tokens of a round, and memory of a node and of the Aggregator, before anything is built.

Bytes are of tensors; the runtime's own use (CUDA context, allocator, Python) comes on top. The sums are those of one
model instance: devices that shard a node's model share them, virtual nodes on one device use them in turn.
"""

from __future__ import annotations

from dataclasses import dataclass

from photon.config import Recipe

_FLOAT32_BYTES = 4
_BFLOAT16_BYTES = 2
_ACCUMULATOR_BYTES = 8  # the merge adds in 64-bit fixed point, so that the order of replies cannot matter
_ADAM_STATE_BYTES = 8  # two float32 moments
_MOMENTUM_BYTES = 4  # one float32 buffer
_OUTER_STATE_BYTES = {"momentum": 4, "nesterov": 4, "adam": 8, "yogi": 8, "fedavg": 0, "none": 0}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. A node's first four are on its device while it trains; `update_bytes`, `codec_bytes` in main memory."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    update_bytes: int
    codec_bytes: int
    aggregator_bytes: int

    @property
    def node_bytes(self) -> int:
        """What training needs on a node's device."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes


def memory_estimate(recipe: Recipe, parameters: int) -> MemoryEstimate:
    """Estimate the memory of `recipe` with a model of `parameters` parameters (tied ones counted once).

    Per parameter, a node holds float32 weights and gradients (4 + 4 bytes), with mixed precision a bfloat16 copy (2),
    and the optimizer's state: AdamW 8, SGD 4 if it has momentum, Muon 4 for matrices and 8 for the rest.
    Beside the device it keeps the round's base and its update in float32 (4 + 4). With a lossy `link.up` whose error
    is fed back, what the codec left out of the last update is kept (4), and while it encodes what it leaves out of this
    one (4). What a stage remembers (the factors of `lowrank`) is small. With a lossy downlink the base is on disk too.
    The Aggregator holds the model (4), the merge accumulator (8), whose place the merged update takes, and the outer
    optimizer's state (0, 4 or 8): the number of nodes does not enter. The model as it is sent, and with a lossy
    downlink the base that nodes rebuild, lie in a file. On the local fabric one reply is in memory (4 at most); over a
    network it lies in a file too, and of what is in a file one tensor at a time is read.
    Activations are those of `node.micro_batch_size` sequences, or of one, the least that works, if that is `auto`.
    """
    outer_bytes = _OUTER_STATE_BYTES[recipe.federation.outer]
    reply_bytes = _FLOAT32_BYTES if recipe.link.fabric == "local" else 0
    return MemoryEstimate(
        weights_bytes=parameters * (_FLOAT32_BYTES + (_BFLOAT16_BYTES if _is_mixed(recipe) else 0)),
        gradients_bytes=parameters * _FLOAT32_BYTES,
        optimizer_bytes=optimizer_bytes(recipe, parameters),
        activations_bytes=_activations_bytes(recipe),
        update_bytes=parameters * 2 * _FLOAT32_BYTES,
        codec_bytes=2 * residual_bytes(recipe, parameters),
        aggregator_bytes=parameters * (_FLOAT32_BYTES + _ACCUMULATOR_BYTES + outer_bytes + reply_bytes),
    )


def tokens_per_round(recipe: Recipe) -> int:
    """Tokens that one round trains on, over all its nodes; with K of P nodes sampled, the mean over the draws.

    With `federation.balance = "time"` slower nodes take fewer steps: then a round trains on no more than this.
    """
    steps = [recipe.batch_size_of(silo) * recipe.tau_of(silo) for silo in recipe.silo]
    return round(sum(steps) * recipe.nodes_per_round / len(recipe.silo)) * recipe.data.sequence_length


def residual_bytes(recipe: Recipe, parameters: int) -> int:
    """What a node keeps of what a lossy `link.up` left out. Raises ConfigError on an unknown codec."""
    if not recipe.link.up or not recipe.link.up_feedback:
        return 0
    from photon.link.codec.notation import parse_pipeline  # here, because it brings torch

    return 0 if parse_pipeline(recipe.link.up, "link.up").is_lossless else parameters * _FLOAT32_BYTES


def optimizer_bytes(recipe: Recipe, parameters: int) -> int:
    """The state of a node's optimizer."""
    match recipe.node.optimizer:
        case "adamw":
            return parameters * _ADAM_STATE_BYTES
        case "sgd":
            return parameters * _MOMENTUM_BYTES if recipe.node.momentum else 0
        case "muon":
            # AdamW keeps the embeddings; the norms' few weights are left out. The width of an `hf` model is not known
            # here, so all of it counts as AdamW's: an upper bound.
            tables = 1 if recipe.model.tied else 2
            embedded = tables * recipe.data.vocab_size * recipe.model.width if not recipe.model.hf else parameters
            embedded = min(embedded, parameters)
            return embedded * _ADAM_STATE_BYTES + (parameters - embedded) * _MOMENTUM_BYTES


def _activations_bytes(recipe: Recipe) -> int:
    """What the backward pass keeps of the blocks, with fused attention (Korthikanti et al. 2022, section 4.1).

    Per token and block, in numbers: the inputs of both norms, of the attention and of the MLP, the queries and the
    attention's output (six times the width), the keys and values, and the MLP's inner values (GELU: before and after;
    SwiGLU: gate, its activation, the other half, their product). For GPT-2's proportions these are the 32 bytes
    per unit of width that the paper counts in 16-bit precision without dropout. 0 for an `hf` model, whose shape is
    not known here. The loss is computed in slices and adds little.
    """
    model, node = recipe.model, recipe.node
    if model.hf:
        return 0
    from photon.model.decoder import mlp_width  # here, because it brings torch: seconds for those who only ask tokens

    keys_and_values = 2 * (model.kv_heads or model.heads) * (model.width // model.heads)
    inner = mlp_width(model) * (2 if model.activation == "gelu" else 4)
    numbers = 6 * model.width + keys_and_values + inner
    sequences = 1 if node.micro_batch_size == "auto" else node.micro_batch_size
    number_bytes = _BFLOAT16_BYTES if _is_mixed(recipe) else _FLOAT32_BYTES
    return sequences * recipe.data.sequence_length * model.layers * numbers * number_bytes


def _is_mixed(recipe: Recipe) -> bool:
    """bfloat16 arithmetic on float32 weights. `auto` on an `auto` device is taken to meet CUDA."""
    node = recipe.node
    if node.precision == "auto":
        return node.device == "auto" or node.device.startswith("cuda")
    return node.precision == "bfloat16"
