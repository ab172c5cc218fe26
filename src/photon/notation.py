"""How things with parameters are written in a recipe: `topk(density=0.02, chunk=4096)`, `fedprox(mu=0.01)`, `zstd`.

What may be written is a dataclass: its fields are the parameters, their types say what a value must be, and its
`__post_init__` refuses what is out of range with a ValueError.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

_CALL = re.compile(r"\s*([A-Za-z]\w*)\s*(?:\((.*)\))?\s*")
_ARGUMENT = re.compile(r"\s*([A-Za-z]\w*)\s*=\s*([^=,]+?)\s*")
_WORDS = {int: "an integer", float: "a number", bool: "true or false"}


def parse_call(text: str, kinds: Mapping[str, type], noun: str, example: str) -> Any:
    """What `text` describes, made from the class of that name. Raises ValueError with a sentence that says why not."""
    call = _CALL.fullmatch(text)
    if call is None:
        raise ValueError(f"`{text}` is no {noun}; one is written like {example}")
    kind = kinds.get(call[1])
    if kind is None:
        raise ValueError(f"there is no {noun} `{call[1]}`; {_hint(call[1], kinds)}")
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
    return kind(**arguments)


def call_text(value: Any, kinds: Mapping[str, type]) -> str:
    """`value` as it is written, with the parameters that are not the default."""
    name = next(name for name, kind in kinds.items() if type(value) is kind)
    fields = [field for field in dataclasses.fields(value) if field.init]
    given = [
        f"{field.name}={_word(getattr(value, field.name))}"
        for field in fields
        if getattr(value, field.name) != field.default
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
