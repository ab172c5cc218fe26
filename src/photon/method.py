"""Methods: what one paper or one idea sets in a recipe, as a TOML file, so that it can be laid over any recipe.

A method's file has a `title`, `about` (one sentence) and `cites`, and two tables. `[set]` gives options by their dotted
address. `[tune]` gives, for an address or for several that move together (`"node.lr, node.muon_lr"`), what else to try.

A number may be told as a factor. In `[set]` it is one of what the recipe and its overrides say: "x2", "x0.5", or with
K, the nodes of a round, "xK" and "/K". In `[tune]` it is one of what the method comes to without tuning.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType

from photon.config import Recipe
from photon.errors import ConfigError
from photon.options import hint, options_of, section_types, toml_text
from photon.problems import unknown_option, unknown_section
from photon.recipe import load_recipe

_SUFFIX = ".toml"
_WORDS = ("title", "about", "cites")
_TABLES = ("set", "tune")
_FACTOR = re.compile(r"x(K|\d+(?:\.\d+)?)|/K")
# Everything else is the setting: methods are compared on the same text, model, seeds and scores.
_SECTIONS = ("node", "federation", "link")
_ALSO = "evaluation.every"

Settings = Mapping[str, object]  # by dotted address; a text such as "x2" is a factor
NO_SETTINGS: Settings = MappingProxyType({})


@dataclass(frozen=True)
class Method:
    """One method. `tune` has for each group of addresses what else to try; `text` is the file as it is written."""

    name: str
    title: str
    about: str
    cites: str
    settings: Settings
    tune: Mapping[tuple[str, ...], tuple[object, ...]]
    text: str
    place: str


def method_names() -> list[str]:
    """Names of the built-in methods, sorted."""
    names = (entry.name for entry in _folder().iterdir())
    return sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))


def load_method(source: str) -> Method:
    """A built-in method by its name, or else one from a TOML file (UTF-8), which its file's name gives a name to.

    Raises ConfigError if there is none, or for everything `parse_method` refuses.
    """
    if source in method_names():
        return parse_method((_folder() / f"{source}{_SUFFIX}").read_text(encoding="utf-8"), source, f"method {source}")
    path = Path(source)
    if path.suffix != _SUFFIX:
        raise ConfigError(f"there is no method `{source}`; {hint(source, method_names())} (or give a .toml file)")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `photon methods` lists the built-in methods") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a method (UTF-8 TOML): {error}") from error
    return parse_method(text, path.stem, str(path))


def parse_method(text: str, name: str, place: str) -> Method:
    """Validate a method's TOML text; `place` names it in messages. Its values meet their ranges when it is applied.

    Raises ConfigError that lists every problem found, one line each.
    """
    try:
        table = tomllib.loads(text)
    except ValueError as error:
        raise ConfigError(f"{place}: not valid TOML: {error}") from error
    known = [*_WORDS, *_TABLES]
    problems = [f"a method has no `{key}`; {hint(key, known)}" for key in table if key not in known]
    problems += [f"`{word}` must be given, as text" for word in _WORDS if not isinstance(table.get(word), str)]
    settings, tune = _table(table, "set", problems), _table(table, "tune", problems)
    groups = {tuple(part.strip() for part in addresses.split(",")): values for addresses, values in tune.items()}
    for address in [*settings, *(address for group in groups for address in group)]:
        problems += _unknown(address)
    for group, values in groups.items():
        if not isinstance(values, list) or not values:
            problems.append(f"[tune] {', '.join(group)} must be a list of what to try")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        problems.append(f"`{name}` cannot be a method's name: letters, digits, `_`, `.`, `-`, at most 64")
    if problems:
        raise ConfigError("\n".join(f"{place}: {problem}" for problem in problems))
    return Method(
        name=name,
        title=table["title"],
        about=table["about"],
        cites=table["cites"],
        settings=MappingProxyType(settings),
        tune=MappingProxyType({group: tuple(values) for group, values in groups.items() if isinstance(values, list)}),
        text=text,
        place=place,
    )


def apply_method(
    method: Method, source: str | Path, overrides: Sequence[str] = (), point: Settings = NO_SETTINGS
) -> Recipe:
    """The recipe with the method laid over it: recipe, then the method's values, then `overrides`, then its factors.

    So an override wins over a value of the method, and a factor multiplies what the override says. `point` is what is
    tried beside that (see `photon.compare_tune`): factors in it are of the recipe that comes out without it.

    Raises ConfigError for a recipe or an override that is wrong, and with the method's place for what is wrong in it.
    """
    base = load_recipe(source, overrides)
    values = [_override(address, value) for address, value in method.settings.items() if not is_factor(value)]
    factors = {address: value for address, value in method.settings.items() if is_factor(value)}
    try:
        every = [*values, *overrides, *resolved(base, factors, base.nodes_per_round)]
        recipe = load_recipe(source, every)
        if point:
            recipe = load_recipe(source, [*every, *resolved(recipe, point, recipe.nodes_per_round)])
    except ConfigError as error:
        lines = str(error).splitlines()
        raise ConfigError("\n".join(f"{method.place}: {line}" for line in lines)) from error
    return recipe


def is_factor(value: object) -> bool:
    """Whether it is written as a factor: "x2", "x0.5", "xK", "/K"."""
    return isinstance(value, str) and _FACTOR.fullmatch(value) is not None


def resolved(recipe: Recipe, settings: Settings, nodes: int) -> list[str]:
    """`settings` as overrides, factors multiplied out with K = `nodes`; an option that is unset stays so."""
    found = {address: setting_value(recipe, address, value, nodes) for address, value in settings.items()}
    return [_override(address, value) for address, value in found.items() if value is not None]


def setting_value(recipe: Recipe, address: str, setting: object, nodes: int) -> object:
    """What a setting comes to; None for a factor of an option that is unset.

    Whole numbers stay whole: they are rounded, and what was above 0 stays so. Raises ConfigError for a factor of what
    is no number.
    """
    if not is_factor(setting):
        return setting
    value, text = option_value(recipe, address), str(setting)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{address} = {text} is a factor, but {toml_text(value)} is no number")
    number = float(nodes) if text.endswith("K") else float(text[1:])
    result = value / number if text.startswith("/") else value * number
    if isinstance(value, int):
        return max(min(value, 1), round(result))
    return float(f"{result:.12g}")  # 0.1 x 3 is 0.3 to people


def option_value(recipe: Recipe, address: str) -> object:
    """The option at `section.option`. `federation.nodes_per_round` is a number, also where the recipe leaves it out."""
    if address == "federation.nodes_per_round":
        return recipe.nodes_per_round
    section, _, key = address.rpartition(".")
    value: object = getattr(getattr(recipe, section), key)
    return value


def _override(address: str, value: object) -> str:
    return f"{address}={toml_text(value)}"


def _folder() -> Traversable:
    return resources.files("photon") / "presets" / "methods"


def _table(table: Mapping[str, object], name: str, problems: list[str]) -> dict[str, object]:
    found = table.get(name, {})
    if not isinstance(found, dict):
        problems.append(f"[{name}] must be a table of options")
        return {}
    nested = [key for key, value in found.items() if isinstance(value, dict)]
    problems += [f'[{name}] {key}: addresses stand in quotes, such as "{key}.OPTION"' for key in nested]
    return {key: value for key, value in found.items() if key not in nested}


def _unknown(address: str) -> list[str]:
    """Why a method may not set the option, if it may not."""
    section, _, key = address.rpartition(".")
    if section not in section_types() or section == "":
        return [unknown_section(section or key)]
    if key not in options_of(section):
        return [unknown_option(section, key)]
    if section not in _SECTIONS and address != _ALSO:
        sections = ", ".join(f"[{name}]" for name in _SECTIONS)
        return [
            f"{address} is no part of a method: methods are compared on the same text, model and scores; "
            f"one may set {sections} and {_ALSO}"
        ]
    return []
