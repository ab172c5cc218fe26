"""The sizes that a plan starts from: the model's tensors, of which none is allocated, and what codecs make of them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from photon.planner import LinkCodecs, Shape

if TYPE_CHECKING:
    from photon.config import Recipe


@dataclass(frozen=True)
class ModelFacts:
    """A model as far as a plan needs it; `flops_per_token` is of training, forward and backward."""

    parameters: int
    shapes: dict[str, Shape]
    flops_per_token: float


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
    return ModelFacts(sum(map(prod, shapes.values())), shapes, model.flops_per_token(length))


def _hugging_face_facts(recipe: Recipe) -> ModelFacts:
    """The same of a Hugging Face model, whose wrapper looks at its weights when made and cannot do without them."""
    import torch
    from transformers import AutoModelForCausalLM

    from photon.model.hf import HuggingFaceModel, _settings

    model, length = recipe.model, recipe.data.sequence_length
    settings = _settings(model.hf, model.hf_weights, recipe.data.vocab_size, length)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(settings)
    unmade = cast(HuggingFaceModel, SimpleNamespace(network=network))
    shapes = {f"network.{name}": tuple(weight.shape) for name, weight in network.named_parameters()}
    return ModelFacts(sum(map(prod, shapes.values())), shapes, HuggingFaceModel.flops_per_token(unmade, length))


def flat_model(parameters: int, like: ModelFacts) -> ModelFacts:
    """A model of so many parameters in one tensor, with arithmetic per parameter as in `like`."""
    return ModelFacts(parameters, {"weights": (parameters,)}, like.flops_per_token * parameters / like.parameters)


def link_codecs(recipe: Recipe) -> LinkCodecs:
    """The codecs of `recipe.link`. Raises ConfigError for one that there is not."""
    from photon.link.codec.notation import parse_pipeline
    from photon.link.codec.pipeline import EXACT

    down = parse_pipeline(recipe.link.down, "link.down", recipe.link.exact_tensors)
    return LinkCodecs(
        up=parse_pipeline(recipe.link.up, "link.up", recipe.link.exact_tensors),
        down=down,
        whole=EXACT,
        sends_differences=recipe.link.of == "difference" and not down.is_lossless,
    )


def stage_bytes(codecs: LinkCodecs, facts: ModelFacts) -> dict[str, dict[str, int]]:
    """For "up" and "down" the tensors' bytes after each stage of the codec; nothing where it has none."""
    import torch

    dtypes = dict.fromkeys(facts.shapes, torch.float32)
    both = {"up": codecs.up.body_size(facts.shapes, dtypes), "down": codecs.down.body_size(facts.shapes, dtypes)}
    return {way: dict(body.stage_bytes) for way, body in both.items() if body.stage_bytes}
