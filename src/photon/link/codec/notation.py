"""Which stages there are, and a codec from how it is written: `["topk(density=0.02)", "int4", "zstd(level=3)"]`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from photon.errors import ConfigError
from photon.link.codec.base import Stage
from photon.link.codec.blockwise import Int2, Int4, Int8
from photon.link.codec.cast import Bfloat16, Float16
from photon.link.codec.lossless import Lz4, Zstd
from photon.link.codec.lowrank import LowRank
from photon.link.codec.pipeline import Pipeline, pipeline
from photon.link.codec.sign import Sign
from photon.link.codec.svd import Svd
from photon.link.codec.topk import TopK
from photon.notation import call_text, parse_call

STAGES: Mapping[str, type] = MappingProxyType(
    {
        "topk": TopK,
        "lowrank": LowRank,
        "svd": Svd,
        "bf16": Bfloat16,
        "fp16": Float16,
        "int8": Int8,
        "int4": Int4,
        "int2": Int2,
        "sign": Sign,
        "zstd": Zstd,
        "lz4": Lz4,
    }
)


def parse_pipeline(stages: Sequence[str], place: str = "link", exact_tensors: Iterable[str] = ()) -> Pipeline:
    """The codec that a list of stages describes (see `Pipeline`). Raises ConfigError, beginning with `place`."""
    try:
        built = [parse_stage(text) for text in stages]
        return pipeline(((stage_text(stage), stage) for stage in built), exact_tensors)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None


def parse_stage(text: str) -> Stage:
    """One stage. Raises ValueError with a sentence that says what is wrong with it."""
    stage: Stage = parse_call(text, STAGES, "stage", "topk(density=0.02, chunk=4096)")
    return stage


def stage_text(stage: Stage) -> str:
    """The stage as it is written, with the parameters that are not the default."""
    return call_text(stage, STAGES)
