"""Writes docs/configuration.md from the options themselves: `python -m photon.docgen > docs/configuration.md`."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable

from photon.options import TOP, Option, options_of, section_header, section_types
from photon.recipe import preset_names, preset_text
from photon.shapes import SHAPES

_INTRODUCTION = """\
<!-- Written by `python -m photon.docgen > docs/configuration.md`; edit src/photon/config.py instead. -->
# Configuration

A recipe describes one run completely. It is a preset (`photon train demo`) or a TOML file (`photon train my-run.toml`),
and single options can be overridden behind it:

```
photon train demo federation.tau=64 node.lr=1e-3 silo.core.batch_size=4
```

- Values are TOML; a word without quotes is text. Lists need quotes in most shells: `'node.betas=[0.9, 0.99]'`.
- `silo.NAME.option=...` changes one owner; `'silo=[{name = "a", text = "text/a"}]'` replaces all owners.
- An override of `model.preset` replaces the whole shape in the recipe. In a recipe, options beside `preset` change
  parts of the named shape.
- Unknown options, values of the wrong type and values out of range are refused, all of a file at once, before anything
  starts.
- Every run keeps its resolved recipe: all options with their values. It is a recipe too, and starts the same run again.
"""


def configuration_markdown() -> str:
    """The whole page: every option with its type, range, default and meaning, then the presets and the shapes."""
    parts = [_INTRODUCTION]
    for name, kind in section_types().items():
        heading = "Top, before the first section" if name == TOP else f"`{section_header(name)}`"
        purpose = (kind.__doc__ or "").strip() if name != TOP else "The run as a whole."
        rows = (_option_row(option) for option in options_of(name).values())
        parts.append(f"## {heading}\n\n{purpose}\n\n{_table(('Option', 'Value', 'Default', 'Meaning'), rows)}")
    presets = ((f"`{name}`", str(tomllib.loads(preset_text(name))["about"])) for name in preset_names())
    parts.append(
        "## Presets\n\n`photon presets` adds parameters, tokens per round and memory; `photon presets NAME` prints one "
        f"to start from.\n\n{_table(('Preset', 'What it is'), presets)}"
    )
    parts.append(f"## Shapes\n\nNames for `model.preset`, and what they fill in.\n\n{_shapes_table()}")
    return "\n".join(parts)


def _option_row(option: Option) -> tuple[str, ...]:
    default = option.default_text if option.required or option.default is None else f"`{option.default_text}`"
    return f"`{option.key}`", option.expected, default, option.description


def _shapes_table() -> str:
    keys = [key for key in options_of("model") if any(key in shape for shape in SHAPES.values())]
    rows = ((f"`{name}`", *(_cell(shape.get(key)) for key in keys)) for name, shape in SHAPES.items())
    return _table(("Shape", *(f"`{key}`" for key in keys)), rows)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(configuration_markdown())
