"""What a recipe needs: tokens of a round, and memory of a node and of the Aggregator, before anything is built.

Bytes are of tensors; the runtime's own use (CUDA context, allocator, Python) comes on top. The sums are those of one
model instance: devices that shard a node's model share them, virtual nodes on one device use them in turn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from photon.config import Recipe

if TYPE_CHECKING:
    from photon.parts.method import Method

_FLOAT32_BYTES = 4
_BFLOAT16_BYTES = 2
_ACCUMULATOR_BYTES = 8  # the merge adds in 64-bit fixed point, so that the order of replies cannot matter
_ADAM_STATE_BYTES = 8  # two float32 moments
_MOMENTUM_BYTES = 4  # one float32 buffer
_OUTER_STATE_BYTES = {"momentum": 4, "nesterov": 4, "adam": 8, "yogi": 8, "fedavg": 0, "none": 0}


@dataclass(frozen=True)
class Shared:
    """How many numbers a federation shares: the weights and, with some parts, optimizer state (`photon.parts.base`).

    `values` are all of them, `most_exchanged` those of the round that exchanges most. `optimizer_bytes` is the state of
    a part's own local optimizer; None: the recipe's is used. `photon.plan_sizes.model_facts` counts them.
    """

    values: int
    most_exchanged: int
    optimizer_bytes: int | None = None


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. A node's first five are on its device; `update_bytes`, `codec_bytes` in main memory.

    `disk_bytes` is what a node keeps there from one round to the next: one state, of which `checkpoint` says how many
    are kept, and where messages build on it the base.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    method_bytes: int
    update_bytes: int
    codec_bytes: int
    disk_bytes: int
    aggregator_bytes: int

    @property
    def node_bytes(self) -> int:
        """What training needs on a node's device."""
        held = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes
        return held + self.activations_bytes + self.method_bytes


def memory_estimate(recipe: Recipe, parameters: int, shared: Shared | None = None) -> MemoryEstimate:
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
    A merge of `federation.parts` that is not the mean has no accumulator: updates lie in files then, each as large as
    the exact model (4 bytes of disk per parameter and node of a round). All of them together take 8 MiB of memory, and
    the merged update is made a tensor at a time.
    Activations are those of `node.micro_batch_size` sequences, or of one, the least that works, if that is `auto`.
    `shared` says what parts share beside the weights; None: nothing. Of all that is shared the base is made (at the
    node, on its disk, in the Aggregator's model), of what a round exchanges the update, the reply and the merge. A node
    takes the differences of shared state on its device, where activations were. A part that corrects gradients needs
    the base there (4); one by which nodes keep weights of their own, a copy of them beside the update and on disk (4).
    What a node remembers of a round for the start of the next is on disk (4 for each kind of it), and in memory while
    it works: in the place of the update it remembers there are first the weights that it began from. A pseudo-gradient
    that is held back for a round is in the Aggregator's memory (4), beside the merge that follows it; over a network
    with a downlink that is not exact so is what the next step will move (4), until nodes were told of it.
    Where a round exchanges only some tensors, the base is on disk, and the message that tells it in the Aggregator's
    memory, in the place of the last reply, until it is committed.
    """
    method = _method(recipe)
    shared = shared or Shared(parameters, parameters)
    exchanged_bytes = shared.most_exchanged * _FLOAT32_BYTES
    activations_bytes = _activations_bytes(recipe)
    differences_bytes = (shared.values - parameters) * _FLOAT32_BYTES
    base_there_bytes = parameters * _FLOAT32_BYTES if _corrects(method) and recipe.node.device != "cpu" else 0
    is_partial = method is not None and method.is_partial
    has_message = recipe.link.fabric == "local" or is_partial
    foresees = recipe.link.fabric != "local" and knows_next(recipe) and (is_partial or bool(recipe.link.down))
    merge_bytes = 0 if method is not None and method.merged else _ACCUMULATOR_BYTES
    aggregator_bytes = shared.values * _FLOAT32_BYTES + shared.most_exchanged * merge_bytes
    return MemoryEstimate(
        weights_bytes=parameters * (_FLOAT32_BYTES + (_BFLOAT16_BYTES if _is_mixed(recipe) else 0)),
        gradients_bytes=parameters * _FLOAT32_BYTES,
        optimizer_bytes=optimizer_bytes(recipe, parameters, shared),
        activations_bytes=activations_bytes,
        method_bytes=base_there_bytes + max(0, differences_bytes - activations_bytes),
        update_bytes=shared.values * _FLOAT32_BYTES + exchanged_bytes + _own_bytes(recipe, parameters),
        codec_bytes=residual_bytes(recipe, shared.values) + residual_bytes(recipe, shared.most_exchanged),
        disk_bytes=node_state_bytes(recipe, parameters, shared)
        + (shared.values * _FLOAT32_BYTES if _keeps_base(recipe, method) else 0),
        aggregator_bytes=aggregator_bytes
        + outer_state_bytes(recipe, parameters, shared)
        + (exchanged_bytes if has_message else 0)
        + (exchanged_bytes if foresees else 0),
    )


def _method(recipe: Recipe) -> Method | None:
    """The recipe's parts, if it has any. Raises ConfigError for a part that there is not."""
    if not recipe.federation.parts:
        return None
    from photon.parts.method import Method  # here, because it brings torch

    return Method.of(recipe)


def _corrects(method: Method | None) -> bool:
    if method is None:
        return False
    from photon.parts.base import changes

    return any(changes(part, "correct") for part in method.parts)


def knows_next(recipe: Recipe) -> bool:
    """Whether nodes on other machines can be told what comes next before a round is merged, and train on meanwhile."""
    method = _method(recipe)
    return method is not None and method.knows_next(recipe.federation)


def expected_nodes(recipe: Recipe) -> float:
    """Nodes of a round whose updates count: K, and with `federation.dropout` the mean over the draws.

    Each of the n that are drawn drops out with probability p, but one stays if all would: that leaves n (1 - p) + p^n.
    With spares (`federation.oversample`) n is larger than K, and no more than K count: K less what is missing where
    fewer stay.
    """
    nodes, p = recipe.nodes_per_round, recipe.federation.dropout
    if not p:
        return float(nodes)
    n = min(len(recipe.silo), math.ceil((1 + Fraction(str(recipe.federation.oversample))) * nodes))
    if n == nodes:
        return n * (1 - p) + p**n
    return nodes - math.fsum(_binomial(n, stay, p) * (nodes - max(1, stay)) for stay in range(nodes))


def _binomial(n: int, stay: int, p: float) -> float:
    """The probability that `stay` of n stay; by logarithms, for above n = 1029 the coefficient is no float."""
    ways = math.lgamma(n + 1) - math.lgamma(stay + 1) - math.lgamma(n - stay + 1)
    return math.exp(ways + stay * math.log1p(-p) + (n - stay) * math.log(p))


def evaluation_tokens(recipe: Recipe) -> int:
    """Tokens that one node scores at most, its sources together: the owner's with most of them, who is waited for."""
    sources = max(len(silo.text) for silo in recipe.silo) or 1  # of owners elsewhere nobody knows
    return recipe.evaluation.sequences * recipe.data.sequence_length * sources


def tokens_per_round(recipe: Recipe) -> int:
    """Tokens that one round trains on, over all its nodes.

    With K of P nodes sampled, and with nodes that drop out, this is the mean over the draws. With
    `federation.balance = "time"` slower nodes take fewer steps: then a round trains on no more than this.
    """
    steps = [recipe.batch_size_of(silo) * recipe.tau_of(silo) for silo in recipe.silo]
    return round(sum(steps) * expected_nodes(recipe) / len(recipe.silo)) * recipe.data.sequence_length


def residual_bytes(recipe: Recipe, values: int) -> int:
    """What a node keeps of what a lossy `link.up` left out of so many. Raises ConfigError on an unknown codec."""
    if not recipe.link.up or not recipe.link.up_decay:
        return 0
    return 0 if _is_lossless(recipe.link.up, "link.up") else values * _FLOAT32_BYTES


def node_state_bytes(recipe: Recipe, parameters: int, shared: Shared | None = None) -> int:
    """What a node reads from its own disk as a round begins, and writes as it ends: what its codec left out, its
    optimizer's state if that is kept, and where parts say so weights of its own, or what it remembers of the round.

    After the run's last round it remembers nothing.
    """
    kept = optimizer_bytes(recipe, parameters, shared) if recipe.node.optimizer_state == "keep" else 0
    return kept + _own_bytes(recipe, parameters) + residual_bytes(recipe, shared.values if shared else parameters)


def outer_state_bytes(recipe: Recipe, parameters: int, shared: Shared | None = None) -> int:
    """The state of the outer optimizer, and what is held back for its next step: at most what a round exchanges."""
    method = _method(recipe)
    held = (shared.most_exchanged if shared else parameters) if method is not None and method.holds_back else 0
    return parameters * _OUTER_STATE_BYTES[recipe.federation.outer] + held * _FLOAT32_BYTES


def _own_bytes(recipe: Recipe, parameters: int) -> int:
    """Weights of a node's own, and what it remembers of a round, where parts say so."""
    if (method := _method(recipe)) is None:
        return 0
    return parameters * _FLOAT32_BYTES * (method.keeps_weights + len(method.remembers(recipe.federation)))


def _keeps_base(recipe: Recipe, method: Method | None) -> bool:
    """Whether messages down tell what a base differs by from the one that the node holds."""
    if method is not None and method.is_partial:
        return True
    return bool(recipe.link.down) and recipe.link.of == "difference" and not _is_lossless(recipe.link.down, "link.down")


def _is_lossless(stages: list[str], option: str) -> bool:
    from photon.link.codec.notation import parse_pipeline  # here, because it brings torch

    return parse_pipeline(stages, option).is_lossless


def optimizer_bytes(recipe: Recipe, parameters: int, shared: Shared | None = None) -> int:
    """The state of a node's optimizer."""
    if shared is not None and shared.optimizer_bytes is not None:
        return shared.optimizer_bytes
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
