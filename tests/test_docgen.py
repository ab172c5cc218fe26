"""docs/configuration.md is what the options say, and says all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from photon.docgen import configuration_markdown
from photon.options import options_of, section_types
from photon.recipe import preset_names
from photon.shapes import SHAPES

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"


def test_the_committed_page_is_the_generated_one() -> None:
    if not PAGE.parent.is_dir():
        pytest.skip("docs/ is not part of an installed package")
    written = PAGE.read_text(encoding="utf-8").rstrip("\n")
    assert written == configuration_markdown().rstrip("\n"), "run: python -m photon.docgen > docs/configuration.md"


def test_every_option_preset_and_shape_has_a_row() -> None:
    lines = configuration_markdown().splitlines()
    for section in section_types():
        for option in options_of(section).values():
            (row,) = [
                line
                for line in lines
                if line.startswith(f"| `{option.key}` | ") and line.endswith(f" | {option.description} |")
            ]
            assert option.expected.replace("|", "\\|") in row
    for name in [*preset_names(), *SHAPES]:
        assert any(line.startswith(f"| `{name}` | ") for line in lines)


def test_tables_have_as_many_cells_as_their_header() -> None:
    """A `|` inside a cell would split it; GitHub then drops what is over."""
    columns = 0
    for line in configuration_markdown().splitlines():
        cells = line.replace("\\|", "").count("|") - 1
        if not line.startswith("|"):
            columns = 0
        elif not columns:
            columns = cells
        else:
            assert cells == columns, line
