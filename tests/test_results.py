"""What the commands print: names and folders as they are, whatever brackets they have."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from photon.data.build import prepare
from photon.events import Scores
from photon.recipe import parse_recipe
from photon.results import scores_table, silos_table

SCORES = Scores(loss=4.0, perplexity=54.6, bits_per_byte=1.5, unigram_excess=-2.0, tokens=1000)


def printed(table: Table) -> str:
    console = Console(file=io.StringIO(), width=300, color_system=None)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("name", ["text/[a-m]*.txt", "text[/x]", "[bold]notes[/bold]"])
def test_a_text_that_is_scored_is_named_as_it_was_given(name: str) -> None:
    assert f" {name} " in printed(scores_table((SCORES, {name: SCORES, "b.txt": SCORES})))


@pytest.mark.parametrize("folder", ["data[bold]", "data[/x]"])
def test_folders_of_data_are_named_as_they_are(folder: str, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for index in range(40):
        (tmp_path / "text" / f"{index}.txt").write_text(f"Document {index} has a few words of its own. " * 20)
    recipe = parse_recipe(
        f'[data]\ndir = "{folder}"\nvocab_size = 300\nsequence_length = 16\n[[silo]]\nname = "a"\ntext = ["text"]\n',
        "recipe.toml",
    )
    prepared = prepare(recipe, tmp_path)
    table = printed(silos_table(prepared))
    assert str(prepared.tokenizer_folder) in table
    assert str(tmp_path / folder / "silos" / "a") in table
