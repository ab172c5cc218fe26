"""The options as data: what each expects, its default and its meaning, read off the models of `photon.config`.

Error messages, resolved recipes and `docs/configuration.md` are all written from here, so none can disagree.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import tomli_w
from pydantic.fields import FieldInfo

from photon.config import Recipe, Section

TOP = ""  # The section name of the options that stand before the first section: name, about, seed.
_WORDS: dict[object, str] = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
_PLURALS: dict[object, str] = {int: "integers", float: "numbers", str: "texts"}


@dataclass(frozen=True)
class Option:
    """One option. `expected` completes the sentence "must be ..." with type and allowed range."""

    section: str
    key: str
    expected: str
    required: bool
    default: object
    description: str

    @property
    def address(self) -> str:
        """How an override names it: `federation.tau`, `seed`, `silo.NAME.batch_size`."""
        return self.key if self.section == TOP else f"{section_address(self.section)}.{self.key}"

    @property
    def default_text(self) -> str:
        """The default as TOML; `required` or `unset` where there is none."""
        if self.required:
            return "required"
        return "unset" if self.default is None else toml_text(self.default)


def section_types() -> dict[str, type[Section]]:
    """Every section by its name, the top of the recipe first; `silo` is the one that repeats."""
    found: dict[str, type[Section]] = {TOP: Recipe}
    for name, field in Recipe.model_fields.items():
        nested = _section_type(field.annotation)
        if nested is not None:
            found[name] = nested
    return found


def options_of(section: str) -> dict[str, Option]:
    """The options of a section by key, in the order of `photon.config`. Raises KeyError for no such section."""
    return {
        key: Option(
            section=section,
            key=key,
            expected=_expected(field.annotation, field.metadata),
            required=field.is_required(),
            default=field.default,
            description=field.description or "",
        )
        for key, field in section_types()[section].model_fields.items()
        if _section_type(field.annotation) is None
    }


def section_address(section: str) -> str:
    """The first part of an override's address: `node`, `silo.NAME`."""
    return "silo.NAME" if section == "silo" else section


def section_header(section: str) -> str:
    """The section as its header is written in a recipe: `[node]`, `[[silo]]`."""
    return f"[[{section}]]" if section == "silo" else f"[{section}]"


def toml_text(value: object) -> str:
    """The value as it is written in TOML, on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_text(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_toml_key(key)} = {toml_text(item)}' for key, item in value.items())}}}"
    return tomli_w.dumps({"_": value}).removeprefix("_ = ").rstrip("\n")


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `word` was probably meant to be, or None; blind to case and to `-` against `_`."""
    by_plain = {_plain(candidate): candidate for candidate in candidates}
    close = difflib.get_close_matches(_plain(word), by_plain, n=1, cutoff=0.6)
    return by_plain[close[0]] if close else None


def hint(word: str, candidates: Iterable[str]) -> str:
    """The end of a sentence that refuses `word`: the nearest candidate, or else all of them."""
    known = list(candidates)
    close = nearest(word, known)
    return f"did you mean `{close}`?" if close else f"there are: {', '.join(known) or 'none'}"


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")


def _toml_key(key: str) -> str:
    return tomli_w.dumps({key: 0}).removesuffix(" = 0\n")


def _section_type(annotation: object) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return _section_type(get_args(annotation)[0]) if get_origin(annotation) is list else None


def _expected(annotation: Any, metadata: list[Any]) -> str:
    """Type and range in words. `metadata` is what pydantic collected beside the annotation."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _expected(arguments[0], [*_flatten(arguments[1:]), *metadata])
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(part, metadata) for part in arguments if part is not type(None))
    if origin is Literal:
        return f"one of {', '.join(arguments)}" if len(arguments) > 1 else f"`{arguments[0]}`"
    if origin in (list, tuple):
        count = f"{len(arguments)} " if origin is tuple else ""
        inner, inner_metadata = _unwrap(arguments[0])
        each = _range(inner_metadata)
        words = f"a list of {count}{_PLURALS[inner]}{f', each {each}' if each else ''}"
        return " ".join(filter(None, [words, _range(metadata)]))
    return " ".join(filter(None, [_WORDS[annotation], _range(metadata)]))


def _unwrap(annotation: Any) -> tuple[Any, list[Any]]:
    if get_origin(annotation) is Annotated:
        base, *rest = get_args(annotation)
        return base, _flatten(rest)
    return annotation, []


def _flatten(metadata: Iterable[Any]) -> list[Any]:
    """`Annotated[int, Field(ge=1)]` keeps its bound inside the FieldInfo."""
    return [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]


def _range(metadata: Iterable[Any]) -> str:
    """`>= 1`, `from 0 to 1`, `> 0 and < 0.5`; empty without a bound. TypeError for a constraint it has no words for."""
    bounds: list[str] = []
    for part in metadata:
        match part:
            case annotated_types.Ge():
                bounds.append(f">= {part.ge:g}")
            case annotated_types.Gt():
                bounds.append(f"> {part.gt:g}")
            case annotated_types.Le():
                bounds.append(f"<= {part.le:g}" if isinstance(part.le, float) else f"<= {part.le}")
            case annotated_types.Lt():
                bounds.append(f"< {part.lt}")
            case annotated_types.MinLen():
                bounds.append(f"(at least {part.min_length})")
            case _ if getattr(part, "pattern", None):
                bounds.append(f"that matches `{part.pattern}`")
            case _:
                raise TypeError(f"no words for the constraint {part!r}; add them to photon.options")
    match bounds:
        case [low, high] if low.startswith(">= ") and high.startswith("<= "):
            return f"from {low[3:]} to {high[3:]}"
        case _:
            return " and ".join(bounds)
