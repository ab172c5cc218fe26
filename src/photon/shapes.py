"""Named shapes of our decoder: what `model.preset` fills in.

The `mpt-*` shapes are the paper's models (MPT: ALiBi, LayerNorm without bias, GELU, MLP four times the width, tied
embeddings); sizes from the configurations released with it. Each `llama-*` shape is the modern twin of the same size:
same layers and width, RMSNorm, SwiGLU, RoPE, from 3B on four queries per key/value head. The twins' MLP widths give a
block as many weights as the MPT's, rounded up to 128.

A shape leaves unset what then follows from its other fields (`hidden`, `kv_heads`), so that an overridden width or
number of heads carries them along.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from photon.config import ModelConfig
from photon.errors import ConfigError
from photon.options import hint

ShapeValue = int | float | str | bool
Shape = Mapping[str, ShapeValue]


def _mpt(layers: int, width: int, heads: int) -> Shape:
    return {
        "layers": layers,
        "width": width,
        "heads": heads,
        "positions": "alibi",
        "norm": "layernorm",
        "activation": "gelu",
        "qk_norm": False,
        "tied": True,
    }


def _llama(layers: int, width: int, heads: int) -> Shape:
    return {
        "layers": layers,
        "width": width,
        "heads": heads,
        "positions": "rope",
        "rope_theta": 10_000.0,
        "norm": "rmsnorm",
        "activation": "swiglu",
        "qk_norm": False,
        "tied": True,
    }


def _grouped(shape: Shape, kv_heads: int, hidden: int) -> Shape:
    """Grouped queries; a wider MLP takes up the weights that the keys and values give back."""
    return {**shape, "kv_heads": kv_heads, "hidden": hidden}


def _small(layers: int, width: int, heads: int) -> Shape:
    """For a CPU: LayerNorm and GELU are fused there; normalised queries and keys allow high learning rates."""
    return {
        "layers": layers,
        "width": width,
        "heads": heads,
        "positions": "rope",
        "rope_theta": 10_000.0,
        "norm": "layernorm",
        "activation": "gelu",
        "qk_norm": True,
        "tied": True,
    }


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "nano": _small(4, 128, 4),
        "micro": _small(6, 384, 6),
        "mpt-125m": _mpt(12, 768, 12),
        "mpt-1.3b": _mpt(24, 2048, 16),
        "mpt-3b": _mpt(32, 2560, 20),
        "mpt-7b": _mpt(32, 4096, 32),
        "llama-125m": _llama(12, 768, 12),
        "llama-1b": _llama(24, 2048, 16),
        "llama-3b": _grouped(_llama(32, 2560, 20), kv_heads=5, hidden=8192),
        "llama-7b": _grouped(_llama(32, 4096, 32), kv_heads=8, hidden=13056),
    }
)


def shape_fields() -> frozenset[str]:
    """The `[model]` options that describe a shape, as opposed to naming one."""
    return frozenset(ModelConfig.model_fields) - {"preset", "hf", "hf_weights"}


def apply_shape(model: Mapping[str, object]) -> dict[str, object]:
    """Fill a raw `[model]` table from the shape its `preset` names; what the table gives itself wins.

    Raises ConfigError for a name that is no shape. A `preset` that is not text is left for validation to refuse.
    """
    name = model.get("preset", "")
    if not isinstance(name, str) or not name:
        return dict(model)
    if name not in SHAPES:
        raise ConfigError(f"there is no shape `{name}`; {hint(name, SHAPES)}")
    return {**SHAPES[name], **model}
