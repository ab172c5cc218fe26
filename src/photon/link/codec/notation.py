"""How stages are written in a recipe: `topk(density=0.02, chunk=4096)`, `int4`, `zstd(level=3)`."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

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
_CALL = re.compile(r"\s*([A-Za-z]\w*)\s*(?:\((.*)\))?\s*")
_ARGUMENT = re.compile(r"\s*([A-Za-z]\w*)\s*=\s*([^=,]+?)\s*")
_WORDS = {int: "an integer", float: "a number", bool: "true or false"}


def parse_pipeline(stages: Sequence[str], place: str = "link", exact_tensors: Iterable[str] = ()) -> Pipeline:
    """The codec that a list of stages describes (see `Pipeline`). Raises ConfigError, beginning with `place`."""
    try:
        built = [parse_stage(text) for text in stages]
        return pipeline(((stage_text(stage), stage) for stage in built), exact_tensors)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None


def parse_stage(text: str) -> Stage:
    """One stage. Raises ValueError with a sentence that says what is wrong with it."""
    call = _CALL.fullmatch(text)
    if call is None:
        raise ValueError(f"`{text}` is no stage; one is written like topk(density=0.02, chunk=4096)")
    kind = STAGES.get(call[1])
    if kind is None:
        raise ValueError(f"there is no stage `{call[1]}`; {_hint(call[1], STAGES)}")
    types = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    arguments: dict[str, Any] = {}
    for part in filter(str.strip, (call[2] or "").split(",")):
        argument = _ARGUMENT.fullmatch(part)
        if argument is None:
            raise ValueError(f"{call[1]}: `{part.strip()}` is no parameter; one is written name=value")
        name, word = argument[1], argument[2]
        if name not in names:
            raise ValueError(f"{call[1]} has no parameter `{name}`; {_hint(name, names)}")
        if name in arguments:
            raise ValueError(f"{call[1]}: `{name}` is given twice")
        arguments[name] = _value(f"{call[1]}: {name}", word.strip("\"'"), types[name])
    stage: Stage = kind(**arguments)
    return stage


def stage_text(stage: Stage) -> str:
    """The stage as it is written, with the parameters that are not the default."""
    name = next(name for name, kind in STAGES.items() if type(stage) is kind)
    fields = [field for field in dataclasses.fields(stage) if field.init]  # type: ignore[arg-type]  # each is one
    given = [
        f"{field.name}={_word(getattr(stage, field.name))}"
        for field in fields
        if getattr(stage, field.name) != field.default
    ]
    return f"{name}({', '.join(given)})" if given else name


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(place: str, word: str, kind: Any) -> object:
    if get_origin(kind) is Literal:
        if word not in get_args(kind):
            raise ValueError(f"{place} must be one of {', '.join(get_args(kind))}, not {word}")
        return word
    try:
        match kind:
            case _ if kind is bool:
                return {"true": True, "false": False}[word]
            case _ if kind is int:
                return int(word)
            case _:
                number = float(word)
                if not math.isfinite(number):
                    raise ValueError
                return number
    except (ValueError, KeyError):
        raise ValueError(f"{place} must be {_WORDS[kind]}, not {word}") from None


def _hint(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that refuses `word`: the nearest of what there is, or all of it."""
    names = list(known)
    close = difflib.get_close_matches(word.lower(), names, n=1)
    return f"did you mean `{close[0]}`?" if close else f"there are: {', '.join(names) or 'none'}"
