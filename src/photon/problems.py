"""What is wrong with a recipe, a sentence for each problem: the place, the mistake, the nearest name or the range."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pydantic_core import ErrorDetails

from photon.options import TOP, Option, hint, nearest, options_of, section_header, section_types, toml_text

Location = tuple[int | str, ...]  # ("node", "lr"), ("silo", 0, "tau"), ("seed",)
_SHOWN_CHARACTERS = 60


@dataclass
class Origin:
    """Where the values of a recipe were written: `place`, unless an override (as typed) set the location."""

    place: str
    overrides: dict[Location, str] = field(default_factory=dict)

    def override_of(self, location: Location) -> str | None:
        """The override that wrote this location, directly or as part of a larger value."""
        prefixes = (location[:length] for length in range(len(location), 0, -1))
        return next((self.overrides[prefix] for prefix in prefixes if prefix in self.overrides), None)

    def label(self, location: Location) -> str:
        """The beginning of a message about the value at this location."""
        override = self.override_of(location)
        return self.place if override is None else f"override {shorten(override)}"


def explain(errors: Iterable[ErrorDetails], table: Mapping[str, object], origin: Origin) -> list[str]:
    """Turn pydantic's complaints about `table` into sentences, each said once, in pydantic's order."""
    # An option with two accepted types complains once for each; the sentence is the same.
    return list(dict.fromkeys(_sentence(error, table, origin) for error in errors))


def unknown_option(section: str, key: str) -> str:
    """What to say of a key that its section does not have. A key of another section is sent there."""
    own = options_of(section)
    where = f"{section_header(section)} has" if section != TOP else "there is"
    homes = [name for name in section_types() if name != section and key in options_of(name)]
    if homes and (section == TOP or not nearest(key, own)):
        if homes[0] == TOP:
            return f"{where} no option `{shorten(key)}`; it belongs at the top, before the first section"
        places = " or ".join(section_header(name) for name in homes)
        return f"{where} no option `{shorten(key)}`; it belongs in {places}"
    known = [*own, *filter(None, section_types())] if section == TOP else list(own)
    return f"{where} no option `{shorten(key)}`; {hint(key, known)}"


def unknown_section(name: str) -> str:
    """What to say of a table that is no section of a recipe."""
    headers = {section: section_header(section) for section in section_types() if section != TOP}
    close = nearest(name, headers)
    return f"there is no section `{shorten(name)}`; " + (
        f"did you mean {headers[close]}?" if close else f"there are: {', '.join(headers.values())}"
    )


def shorten(text: str) -> str:
    """The text on one line, cut where it is longer than a message should be."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[: _SHOWN_CHARACTERS - 1]}…"


def _sentence(error: ErrorDetails, table: Mapping[str, object], origin: Origin) -> str:
    location: Location = tuple(error["loc"])
    place = origin.label(location)
    if error["type"] == "value_error":  # A rule of photon.config between several options; it names them itself.
        return f"{place}: {error['msg'].removeprefix('Value error, ')}"
    if not location or location[0] not in {*section_types(), *options_of(TOP)}:
        return f"{place}: {_unknown_at_top(str(location[0]), error['input'])}"
    section, label, key = _address(location, table)
    if error["type"] == "missing" and not isinstance(location[-1], int):
        return f"{place}: {_missing(label, key)}"
    if key is None:
        return f"{place}: {_misshapen_section(section)}, not {shorten(toml_text(error['input']))}"
    known = options_of(section)
    if key not in known:
        return f"{place}: {unknown_option(section, key)}"
    value = _value_at(table, location, key)
    # An override of exactly this option already shows its name and value.
    is_overridden = location[: location.index(key) + 1] in origin.overrides
    what = "" if is_overridden else f"{label} {key} = {shorten(toml_text(value))}: ".lstrip()
    return f"{place}: {what}must be {_expectation(known[key], value)}"


def _unknown_at_top(name: str, value: object) -> str:
    is_table = isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict))
    return unknown_section(name) if is_table else unknown_option(TOP, name)


def _address(location: Location, table: Mapping[str, object]) -> tuple[str, str, str | None]:
    """Section, the section as a reader knows it (`[node]`, `silo core`), and the option's key if it has one."""
    first = str(location[0])
    if first not in section_types():
        return TOP, "", first
    if first != "silo":
        return first, section_header(first), str(location[1]) if len(location) > 1 else None
    if len(location) == 1:
        return first, section_header(first), None
    silos = table["silo"]
    index = int(location[1])
    silo = silos[index] if isinstance(silos, list) else None
    name = silo.get("name") if isinstance(silo, dict) else None
    label = f"silo {name}" if isinstance(name, str) else f"[[silo]] number {index + 1}"
    return first, label, str(location[2]) if len(location) > 2 else None


def _missing(label: str, key: str | None) -> str:
    if key is None:
        return "there is no [[silo]]; every owner of text needs one, with a `name` and its `text`"
    return f"{label} has no `{key}` ({_in_sentence(options_of('silo')[key].description)})"


def _misshapen_section(section: str) -> str:
    if section == "silo":
        return "[[silo]] must be written with double brackets, at least once, one for each owner"
    return f"{section_header(section)} must be one section with options below it"


def _value_at(table: Mapping[str, object], location: Location, key: str) -> object:
    """The whole value of the option, as written, where pydantic may point at one item of its list."""
    holder: object = table
    for step in location[: location.index(key)]:
        holder = holder[step]  # type: ignore[index]  # pydantic walked the same path
    return holder[key]  # type: ignore[index]  # as above


def _expectation(option: Option, value: object) -> str:
    choices = option.expected.removeprefix("one of ").split(", ") if option.expected.startswith("one of ") else []
    close = nearest(value, choices) if isinstance(value, str) else None
    meaning = _in_sentence(option.description)
    return f"{option.expected}{f'; did you mean `{close}`?' if close else ''} ({meaning})"


def _in_sentence(description: str) -> str:
    text = description.rstrip(".")
    plain = text.split(maxsplit=1)[0][1:].islower()  # `Local` may lose its capital, `AdamW` and `RoPE` may not
    return text[:1].lower() + text[1:] if plain else text
