"""Codecs by intent: what `link.preset` fills in. docs/results.md says what each costs in loss and saves in bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from photon.config import LinkConfig
from photon.errors import ConfigError

CodecOptions = Mapping[str, list[str] | str | float]

_EXACT = ["*/*_sq*"]  # second moments, where federation.parts share them: they bear no rounding (see `check_moments`)

PRESETS: Mapping[str, CodecOptions] = MappingProxyType(
    {
        "exact": {"up": [], "down": []},
        "balanced": {"up": ["int4(block=128)", "zstd"], "down": ["int4(block=128)", "zstd"], "exact_tensors": _EXACT},
        # One in thirteen of the values, by sign: the bitmap of where they stand packs to less than half a bit a value.
        # In chunks of 4096, so few values would be told by their indices, which do not pack.
        # What is left out does not come back: it is mostly noise, and would come when learning rates are lower.
        "tiny": {
            "up": ["topk(density=0.075, chunk=65536)", "sign", "zstd"],
            "up_feedback": "rescale",
            "down": ["int4(block=128)", "zstd"],
            "exact_tensors": _EXACT,
        },
    }
)


def codec_fields() -> frozenset[str]:
    """The `[link]` options that a preset may set."""
    return frozenset({"up", "down", "of", "exact_tensors", "up_feedback", "down_feedback"})


def apply_link(link: Mapping[str, object]) -> dict[str, object]:
    """Fill a raw `[link]` table from the preset it names; what the table gives itself wins.

    A name that is none is left for validation to refuse.
    """
    name = link.get("preset")
    preset = PRESETS.get(name, {}) if isinstance(name, str) else {}
    return {**preset, **link}


def check_codecs(link: LinkConfig) -> None:
    """Raises ConfigError that names the first stage, or the first parameter of one, that there is not, or what does not
    go together."""
    if link.up_rescales and link.of == "weights":
        raise ConfigError(
            "link.up_feedback = rescale makes up for what lossy stages leave out of differences: "
            "with link.of = weights the model itself would grow"
        )
    if not link.up and not link.down and link.of == "difference":
        return
    from photon.link.codec.notation import parse_pipeline  # here, because it brings torch: exact recipes need none

    up, down = parse_pipeline(link.up, "link.up"), parse_pipeline(link.down, "link.down")
    if link.up_rescales and up.survey(tuple) is not None:
        raise ConfigError(
            "link.up_feedback = rescale scales each tensor by itself, which moves the one threshold that "
            "topk(scope=global) has for all: use topk with scope chunk or tensor, or an up_feedback from 0 to 1"
        )
    if link.of == "weights" and up.is_lossless and down.is_lossless:
        raise ConfigError("link.of = weights is for lossy stages: exact codecs carry the same either way")
    if link.of == "weights" and link.max_update_norm is not None:
        raise ConfigError("link.max_update_norm bounds differences: with link.of = weights no node could keep it")


def check_moments(link: LinkConfig, shared_state: Collection[str]) -> None:
    """Raises ConfigError if moments of the optimizer would be shared through a codec that they do not bear.

    Steps are divided by the root of a second moment: where rounding takes it to zero, training diverges. A first moment
    bears rounding, but not to be told by a few large values or by signs: the demo with `tiny` lost 8 nats at once.
    """
    from photon.link.codec.notation import parse_pipeline
    from photon.link.codec.sign import Sign

    for way, stages in (("up", link.up), ("down", link.down)):
        codec = parse_pipeline(stages, f"link.{way}", link.exact_tensors)
        for kind in sorted(shared_state):
            own = codec.of(f"weight/{kind}")
            if "_sq" not in kind and (own.transforms or isinstance(own.quantiser, Sign)):
                raise ConfigError(
                    f"link.{way} picks values or sends signs, and federation.parts share the first moment {kind}, "
                    f'which does not bear that. Share second moments alone (federation.parts = ["share(first=0, '
                    'factored=true)"]), or set link.exact_tensors = ["*/*"]'
                )
            if "_sq" in kind and not own.is_lossless:
                raise ConfigError(
                    f"link.{way} is lossy, and federation.parts share the second moment {kind}, by whose root steps "
                    'are divided: training would diverge. Set link.exact_tensors = ["*/*_sq*"], or do not share it'
                )
