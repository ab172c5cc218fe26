"""The sizes that a plan starts from: the model's tensors, of which none is allocated, and what codecs make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from photon.errors import ConfigError, InputError
from photon.estimate import Shared
from photon.plan_bytes import FLOAT32_BYTES, LinkCodecs, RoundBytes, Shape, round_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

    from photon.config import Recipe

_WEIGHTS = "weights"  # the one tensor of a model that is given by its parameters alone


@dataclass(frozen=True)
class ModelFacts:
    """A model as far as a plan needs it; `flops_per_token` is of training, forward and backward.

    `shapes` are those of the weights, `shared_shapes` of all that the federation shares (`photon.parts.base`), and
    `turns` says for each round of a period which of these it exchanges. `optimizer_bytes` is the state of a part's own
    local optimizer; None: the recipe's is used.
    """

    parameters: int
    shapes: dict[str, Shape]
    flops_per_token: float
    shared_shapes: dict[str, Shape]
    turns: tuple[tuple[str, ...], ...]
    optimizer_bytes: int | None = None

    @property
    def shared(self) -> Shared:
        """The same as numbers of values."""
        sizes = {name: prod(shape) for name, shape in self.shared_shapes.items()}
        most = max(sum(sizes[name] for name in names) for names in self.turns)
        return Shared(sum(sizes.values()), most, self.optimizer_bytes)


def model_facts(recipe: Recipe) -> ModelFacts:
    """Names, shapes and arithmetic of the recipe's model, on torch's meta device: 7B takes no longer than 7M.

    The rows of the embedding are `data.vocab_size`; a given tokenizer that is larger only shows when a run begins.
    """
    import torch

    from photon.model.build import build_model, named_weights

    length = recipe.data.sequence_length
    if recipe.model.hf:
        return _hugging_face_facts(recipe)
    with torch.device("meta"):
        model = build_model(recipe.model, recipe.data.vocab_size, length, recipe.seed)
    shapes = {name: tuple(weight.shape) for name, weight in named_weights(model).items()}
    return _facts(recipe, model, shapes, model.flops_per_token(length))


def _hugging_face_facts(recipe: Recipe) -> ModelFacts:
    """The same of a Hugging Face model, whose wrapper looks at its weights when made and cannot do without them."""
    import torch

    from photon.model.hf import HuggingFaceModel, fresh_network
    from photon.model.hf_settings import fitted_settings

    model, length = recipe.model, recipe.data.sequence_length
    settings = fitted_settings(model.hf, model.hf_weights, recipe.data.vocab_size, length)
    with torch.device("meta"):
        network = fresh_network(model.hf, settings)
    unmade = cast(HuggingFaceModel, SimpleNamespace(network=network))
    wrapper = torch.nn.Module()
    wrapper.network = network
    shapes = {name: tuple(weight.shape) for name, weight in wrapper.named_parameters()}
    return _facts(recipe, wrapper, shapes, HuggingFaceModel.flops_per_token(unmade, length))


def _facts(recipe: Recipe, model: nn.Module, shapes: dict[str, Shape], flops_per_token: float) -> ModelFacts:
    """With what the recipe's parts share of a model on the meta device: by the functions that a run asks too."""
    import torch

    from photon.node.optimizers import build_optimizer
    from photon.node.shared import shared_tensors
    from photon.parts.method import Method

    method, meta = Method.of(recipe), torch.device("meta")
    given = build_optimizer(model, recipe.node, meta)
    optimizer = method.optimizer(given)
    shared = shared_tensors(model, optimizer, method.shared_state, device="meta")
    shared_shapes = {name: tuple(tensor.shape) for name, tensor in shared.items()}
    return ModelFacts(
        sum(map(prod, shapes.values())),
        shapes,
        flops_per_token,
        shared_shapes,
        _turns(recipe, shared_shapes),
        None if optimizer is given else _state_bytes(optimizer),
    )


def _turns(recipe: Recipe, shared_shapes: dict[str, Shape]) -> tuple[tuple[str, ...], ...]:
    """The tensors that are exchanged in each round of a period; of a run that is shorter, in each of its rounds."""
    from photon.parts.method import Method

    method = Method.of(recipe)
    rounds = min(method.period, recipe.federation.sequential_steps)
    return tuple(tuple(method.exchanged(shared_shapes, index)) for index in range(rounds))


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What a part's own optimizer keeps: tensors like their parameters, but for the count of steps."""
    names_of: Callable[[Mapping[str, Any]], list[str]] = optimizer.state_names  # type: ignore[attr-defined]  # see Part.optimizer
    values: int = sum(
        len(set(names_of(group)) - {"step"}) * sum(parameter.numel() for parameter in group["params"])
        for group in optimizer.param_groups
    )
    return FLOAT32_BYTES * values


def flat_model(parameters: int, like: ModelFacts, recipe: Recipe) -> ModelFacts:
    """A model of so many parameters in one tensor, with arithmetic and shared state per parameter as in `like`.

    Raises InputError if the recipe has a part that needs to know the model's tensors.
    """
    from photon.parts.method import STATE_MARK, is_state

    ratio = parameters / like.parameters
    shared: dict[str, Shape] = {_WEIGHTS: (parameters,)}
    for name, shape in like.shared_shapes.items():
        if is_state(name):
            flat = f"{_WEIGHTS}{STATE_MARK}{name.rpartition(STATE_MARK)[2]}"
            shared[flat] = (shared.get(flat, (0,))[0] + prod(shape),)
    shared |= {name: (round(shape[0] * ratio),) for name, shape in shared.items() if is_state(name)}
    try:
        turns = _turns(recipe, shared)
    except ConfigError as error:
        raise InputError(f"a model that is given by its parameters alone has one tensor: {error}") from None
    own = None if like.optimizer_bytes is None else round(like.optimizer_bytes * ratio)
    return ModelFacts(parameters, {_WEIGHTS: (parameters,)}, like.flops_per_token * ratio, shared, turns, own)


def link_codecs(recipe: Recipe) -> LinkCodecs:
    """The codecs of `recipe.link`. Raises ConfigError for one that there is not."""
    from photon.link.codec.notation import parse_pipeline
    from photon.link.codec.pipeline import EXACT
    from photon.parts.method import Method

    down, method = parse_pipeline(recipe.link.down, "link.down", recipe.link.exact_tensors), Method.of(recipe)
    return LinkCodecs(
        up=parse_pipeline(recipe.link.up, "link.up", recipe.link.exact_tensors),
        down=down,
        whole=EXACT,
        sends_differences=method.is_partial or (recipe.link.of == "difference" and not down.is_lossless),
        down_is_lossy=not down.is_lossless,
        holds_back=method.holds_back,
    )


@dataclass(frozen=True)
class _Scaled:
    """Stands for a codec of which only the bytes per value are known."""

    bytes_per_value: float

    @dataclass(frozen=True)
    class Size:
        """A body's."""

        body_bytes: int
        stage_bytes: dict[str, int]
        is_exact: bool = True

    def body_size(self, shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype]) -> Size:
        """Without any header."""
        return self.Size(round(self.bytes_per_value * sum(map(prod, shapes.values()))), {})


def scaled_codecs(recipe: Recipe, bytes_per_value: float) -> LinkCodecs:
    """As if all that travels took so many bytes a value, both ways, also where it is sent whole."""
    from photon.parts.method import Method

    codec = _Scaled(bytes_per_value)
    return LinkCodecs(up=codec, down=codec, whole=codec, sends_differences=Method.of(recipe).is_partial)


def exchanged_bytes(facts: ModelFacts, codecs: LinkCodecs) -> RoundBytes:
    """Bodies of a node's rounds, with what the recipe's parts share."""
    return replace(round_bytes(facts.shared_shapes, codecs, facts.turns), shared=facts.shared)


def stage_bytes(codecs: LinkCodecs, facts: ModelFacts) -> dict[str, dict[str, int]]:
    """For "up" and "down" the tensors' bytes after each stage of the codec; nothing where it has none.

    Of the round that exchanges most values.
    """
    import torch

    shapes = facts.shared_shapes
    largest = max(facts.turns, key=lambda names: sum(prod(shapes[name]) for name in names))
    exchanged = {name: shapes[name] for name in largest}
    told = exchanged if codecs.sends_differences else shapes
    both = {
        "up": codecs.up.body_size(exchanged, dict.fromkeys(exchanged, torch.float32)),
        "down": codecs.down.body_size(told, dict.fromkeys(told, torch.float32)),
    }
    return {way: dict(body.stage_bytes) for way, body in both.items() if body.stage_bytes}
