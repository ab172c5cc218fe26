"""From a configuration to a model, and between a model and its named tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from photon.config import ModelConfig
from photon.errors import StateError
from photon.model.base import LanguageModel
from photon.model.decoder import Decoder
from photon.model.hf import HuggingFaceModel, count_hf_parameters
from photon.model.hf_families import check_exportable


class ParameterCount(NamedTuple):
    """Trained numbers of a model, tied weights once."""

    total: int
    non_embedding: int  # without token embedding, position embedding and output head


def build_model(config: ModelConfig, vocab_size: int, sequence_length: int, seed: int) -> LanguageModel:
    """The model of `config` on the CPU in float32; the same seed gives the same weights, bit for bit.

    torch's global generator is left as it was. Raises ConfigError for a shape that no Hugging Face architecture
    can hold (nothing is trained that cannot leave) or a Hugging Face model that does not fit the tokenizer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.hf:
            return HuggingFaceModel.load(config.hf, config.hf_weights, vocab_size, sequence_length)
        check_exportable(config)
        return Decoder(config, vocab_size, sequence_length)


def count_parameters(config: ModelConfig, vocab_size: int, sequence_length: int) -> ParameterCount:
    """Count without allocating a weight (torch's meta device): 7B takes no longer than 7M."""
    if config.hf:
        return ParameterCount(*count_hf_parameters(config.hf, config.hf_weights, vocab_size, sequence_length))
    with _Unallocated():
        model = Decoder(config, vocab_size, sequence_length)
    total = sum(p.numel() for p in model.parameters())
    outer = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("embed_", "lm_head")))
    return ParameterCount(total, total - outer)


def named_weights(model: LanguageModel) -> dict[str, Tensor]:
    """The federation's state: every parameter by name, tied weights once; views, not copies, without gradients."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@torch.no_grad()
def load_weights(model: LanguageModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the model in place, converting dtype and device; shared optimizer state is left out.

    Raises StateError, before anything is changed, when a name is missing or unknown or a shape differs.
    """
    own = named_weights(model)
    missing, unknown = own.keys() - tensors.keys(), {name for name in tensors if "/" not in name} - own.keys()
    if missing or unknown:
        raise StateError(
            f"the weights are not this model's: missing {_first(missing)}, unknown {_first(unknown)}; "
            "were they made with another [model] section?"
        )
    for name, weight in own.items():
        if tensors[name].shape != weight.shape:
            raise StateError(
                f"weight {name} has shape {list(tensors[name].shape)} where the model has {list(weight.shape)}; "
                "were they made with another [model] section or vocabulary?"
            )
    for name, weight in own.items():
        weight.copy_(tensors[name])


class _Unallocated(TorchFunctionMode):
    """Weights are made on the meta device and not filled; tables, which are small, as ever.

    Under `torch.device("meta")` alone, to draw a weight imports torch's compiler: four seconds and 80 MB.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty:
            options["device"] = "meta"
        elif func in (nn.init.normal_, nn.init.kaiming_uniform_, Tensor.normal_):
            return (*args, *options.values())[0]  # torch.nn.init names all arguments here, the tensor first
        return func(*args, **options)


def _first(names: set[str]) -> str:
    """The names, for people: the first three and how many more."""
    some = ", ".join(sorted(names)[:3])
    return f"{some} and {len(names) - 3} more" if len(names) > 3 else some or "none"
