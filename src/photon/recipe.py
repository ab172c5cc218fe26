"""Recipes: from a preset or a TOML file plus overrides to a validated `Recipe`, and back to TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from pydantic import ValidationError

from photon.config import Recipe, Section
from photon.errors import ConfigError
from photon.linkpresets import apply_link, check_codecs, check_moments, codec_fields
from photon.options import TOP, Option, hint, options_of, section_header, section_types, toml_text
from photon.problems import Location, Origin, explain, shorten, unknown_option, unknown_section
from photon.shapes import apply_shape, shape_fields

Table = dict[str, object]
_PRESET_SUFFIX = ".toml"
_TOML_INTEGERS = range(-(2**63), 2**63)  # TOML 1.0 promises 64 bits, tomllib reads any size


def load_recipe(source: str | Path, overrides: Sequence[str] = (), *, of_node: bool = False) -> Recipe:
    """Read a recipe: a preset by its name, or else a TOML file (UTF-8). The rest as in `parse_recipe`.

    Raises ConfigError if there is no such preset or file, or for everything `parse_recipe` refuses.
    """
    if isinstance(source, str) and source in preset_names():
        return parse_recipe(preset_text(source), f"preset {source}", overrides, of_node=of_node)
    path = Path(source)
    if isinstance(source, str) and path.suffix != _PRESET_SUFFIX and path.name == source and not path.is_file():
        raise ConfigError(f"there is no preset and no file `{source}`; {hint(source, preset_names())}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: some editors begin a UTF-8 file with a byte-order mark
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `photon presets` lists the built-in recipes") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a recipe (UTF-8 TOML): {error}") from error
    return parse_recipe(text, str(path), overrides, of_node=of_node)


def parse_recipe(text: str, place: str, overrides: Sequence[str] = (), *, of_node: bool = False) -> Recipe:
    """Validate a recipe's TOML text; `place` names it in messages.

    An override is `section.option=value`, `option=value` for those at the top, `silo.NAME.option=value` for one
    owner, or `silo=[...]` for all owners anew. Values are TOML; a bare word is text. Later overrides win. An override
    of `model.preset` replaces the whole shape that `text` describes, except for the parts overridden beside it;
    `link.preset`, also written `link=tiny`, likewise. A recipe `of_node` is that of one site, which has taken the other
    owners out: what needs several nodes is not refused then.

    Raises ConfigError that lists every problem found, one line each.
    """
    table = _read_toml(text, place)
    if isinstance(table.get("link"), str):  # `link = "tiny"`
        table["link"] = {"preset": table["link"]}
    origin = Origin(place)
    problems: list[str] = []
    for override in overrides:
        try:
            _apply_override(table, override, origin)
        except ConfigError as error:
            problems.append(f"override {shorten(override)}: {error}")
    problems += _integers_too_wide(table, place)
    if problems:  # Half-applied overrides would only bring follow-on complaints.
        raise ConfigError("\n".join(problems))
    for section, fields, apply in (("model", shape_fields(), apply_shape), ("link", codec_fields(), apply_link)):
        raw = table.get(section)
        if not isinstance(raw, dict):
            continue
        if raw.get("preset") and (section, "preset") in origin.overrides:
            raw = {k: v for k, v in raw.items() if k not in fields or (section, k) in origin.overrides}
        try:
            table[section] = apply(raw)
        except ConfigError as error:
            problems.append(f"{origin.label((section, 'preset'))}: {error}")
    try:
        recipe = Recipe.model_validate(table)
    except ValidationError as error:
        problems += explain(error.errors(include_url=False), table, origin)
    if problems:
        raise ConfigError("\n".join(problems))
    check_codecs(recipe.link)
    if recipe.federation.parts:
        from photon.parts.method import Method  # here, because it brings torch: plain recipes need none

        method = Method.of(recipe)
        check_moments(recipe.link, method.shared_state)
        if not of_node:
            method.check_nodes(recipe.nodes_per_round)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as TOML with every option, its value and its meaning; an unset option is commented out.

    For a recipe that `parse_recipe` made, `parse_recipe(dump_recipe(recipe), ...)` returns an equal one.
    """
    blocks = [_dump_section(TOP, recipe)]
    for name in section_types():
        if name != TOP:
            value = getattr(recipe, name)
            blocks += [_dump_section(name, part) for part in (value if isinstance(value, list) else [value])]
    return "\n".join(blocks)


def preset_names() -> list[str]:
    """Names of the built-in recipes, sorted."""
    names = (entry.name for entry in _presets().iterdir())
    return sorted(name.removesuffix(_PRESET_SUFFIX) for name in names if name.endswith(_PRESET_SUFFIX))


def preset_text(name: str) -> str:
    """The TOML text of a preset, with its comments. Raises ConfigError if there is no such preset."""
    names = preset_names()
    if name not in names:
        raise ConfigError(f"there is no preset `{name}`; {hint(name, names)}")
    return (_presets() / f"{name}{_PRESET_SUFFIX}").read_text(encoding="utf-8")


def _presets() -> Traversable:
    return resources.files("photon") / "presets"


def _read_toml(text: str, place: str) -> Table:
    try:
        return tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, or Python's own limit on the digits of an integer
        raise ConfigError(f"{place}: not valid TOML: {error}") from error


def _dump_section(name: str, values: Section) -> str:
    lines = [] if name == TOP else [section_header(name)]
    lines += [_dump_option(option, getattr(values, key)) for key, option in options_of(name).items()]
    return "\n".join(lines) + "\n"


def _dump_option(option: Option, value: object) -> str:
    assignment = f"# {option.key} =" if value is None else f"{option.key} = {toml_text(value)}"
    return f"{assignment}  # {option.description}"


def _apply_override(table: Table, override: str, origin: Origin) -> None:
    """Write one override into the raw table and note it in `origin`. Raises ConfigError without the place."""
    address, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not address:
        raise ConfigError("must have the form option=value, for example federation.tau=64")
    section, _, key = address.rpartition(".")
    sections = section_types()
    if section.startswith("silo."):
        section, owner = "silo", section.removeprefix("silo.")
    elif section == "silo":
        raise ConfigError(f"must name the owner: silo.NAME.{shorten(key)}=...")
    if address == "link":
        section, key = "link", "preset"
    if section not in sections:
        raise ConfigError(unknown_section(section))
    if section == TOP and key in sections and key != "silo":
        raise ConfigError(f"names a whole section; name one option of it: {key}.OPTION=...")
    if address != "silo" and key not in options_of(section):
        raise ConfigError(unknown_option(section, key))

    value = _override_value(text)
    holder: Table
    location: Location
    if section == TOP:
        holder, location = table, (key,)
    elif section == "silo":
        holder, location = _silo_table(table, owner, key)
    else:
        holder, location = _section_table(table, section), (section, key)
    holder[key] = value
    # A new list of owners does away with what was set inside the old one.
    origin.overrides = {at: text for at, text in origin.overrides.items() if at[: len(location)] != location}
    origin.overrides[location] = override.strip()


def _section_table(table: Table, section: str) -> Table:
    found = table.setdefault(section, {})
    if not isinstance(found, dict):
        raise ConfigError(f"cannot be applied, because `{section}` is not a section of options in the recipe")
    return found


def _silo_table(table: Table, owner: str, key: str) -> tuple[Table, Location]:
    listed = table.get("silo")
    silos = [silo for silo in listed if isinstance(silo, dict)] if isinstance(listed, list) else []
    names = [str(silo.get("name")) for silo in silos]
    if owner not in names:
        raise ConfigError(f"there is no silo `{shorten(owner)}`; {hint(owner, names)}")
    index = names.index(owner)
    return silos[index], ("silo", index, key)


def _override_value(text: str) -> object:
    """TOML if it is, else the text itself; what opens a quote, list or table must close it."""
    if not text:
        raise ConfigError('has no value; empty text is written ""')
    if not text.isprintable():
        raise ConfigError('holds a character that cannot be printed; write it as an escape in quotes, like "\\n"')
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError as error:
        if text[0] in "\"'[{":
            raise ConfigError(f"the value is not valid TOML: {error}") from error
        return text


def _integers_too_wide(table: Mapping[str, object], place: str) -> list[str]:
    """Refuse what no float can hold before validation tries to convert it."""
    found: list[str] = []

    def visit(value: object, path: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                visit(item, f"{path}.{key}" if path else key)
        elif isinstance(value, list):
            for item in value:
                visit(item, path)
        elif isinstance(value, int) and value not in _TOML_INTEGERS:
            found.append(f"{place}: {path}: an integer must fit into 64 bits")

    visit(table, "")
    return found
