"""What the commands print: tables of results, presets and data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from photon.config import Recipe
from photon.data.build import Prepared, describe, shard_folders
from photon.data.shards import ShardReader
from photon.display import final_table
from photon.estimate import memory_estimate, tokens_per_round
from photon.events import Sampled, Scores
from photon.model.build import ParameterCount, count_parameters
from photon.readable import byte_size, count, printable, significant
from photon.recipe import load_recipe, preset_names
from photon.runfolder import RunFolder
from photon.summary import Summary
from photon.track import read_events


def show_results(folder: RunFolder, summary: Summary, console: Console) -> None:
    """The end of a run: quality, bytes, samples, paths."""
    samples = [event for event in read_events(folder.metrics) if isinstance(event, Sampled)]
    before = next((sample for sample in samples if sample.round == 0), None)
    after = next((sample for sample in reversed(samples) if sample.round > 0), None)
    model = folder.model if folder.model.is_dir() else None
    final_table(summary, before, after, folder.report, model, console)


def presets_table() -> list[Table]:
    """Every preset with its size and what it needs, and what it is for."""
    table = Table(title="Presets: photon presets NAME prints one as TOML", title_justify="left")
    about = Table(show_header=False, box=None)
    about.add_column("name", no_wrap=True, style="bold")
    about.add_column("about")
    for heading in (
        "name",
        "parameters",
        "nodes",
        "rounds\nx tau",
        "tokens/\nround",
        "memory:\nnode",
        "memory:\nAggregator",
    ):
        is_name = heading == "name"
        table.add_column(heading, justify="left" if is_name else "right", no_wrap=is_name, overflow="fold")
    for name in preset_names():
        recipe = load_recipe(name)
        parameters = _parameters(recipe).total
        memory = memory_estimate(recipe, parameters)
        nodes, sampled = len(recipe.silo), recipe.nodes_per_round
        table.add_row(
            name,
            count(parameters),
            str(nodes) if sampled == nodes else f"{sampled} of {nodes}",
            f"{recipe.federation.rounds} x {recipe.federation.tau}",
            count(tokens_per_round(recipe)),
            byte_size(memory.node_bytes),
            byte_size(memory.aggregator_bytes),
        )
        about.add_row(name, recipe.about)
    return [table, about]


def silos_table(prepared: Prepared) -> Table:
    """What `photon data build` made."""
    table = Table(title=Text(f"Tokenizer: {prepared.tokenizer_folder}"), title_justify="left")
    for heading in ("silo", "source", "documents", "train tokens", "held-out tokens", "bytes/token", "folder"):
        is_text = heading in ("silo", "source", "folder")
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold")
    for silo in prepared.silos.values():
        for source in silo.sources:
            reader = ShardReader(source)
            manifest = reader.manifest
            table.add_row(
                silo.name,
                Text(printable(manifest.origin.source)),
                count(manifest.train.documents + manifest.heldout.documents),
                count(manifest.train.tokens),
                count(manifest.heldout.tokens),
                f"{reader.bytes_per_token:.2f}",
                Text(str(source)),
            )
    return table


def description_tables(folder: Path) -> Iterator[Table]:
    """What `photon data show` finds at or under `folder`. Raises DataError if there is nothing, or it is damaged."""
    for shards in shard_folders(folder):
        ShardReader(shards).verify()
        table = Table(show_header=False)
        table.add_column("what", style="bold")
        table.add_column("value", overflow="fold")
        for key, value in describe(shards).items():
            table.add_row(key, Text(printable(str(value))))
        yield table


def scores_table(scores: tuple[Scores, Mapping[str, Scores]]) -> Table:
    """Held-out scores by silo and pooled."""
    pooled, silos = scores
    table = Table(title="Held-out quality", title_justify="left")
    table.add_column("text", overflow="fold")
    for heading in ("loss (nats/token)", "perplexity", "bits per byte", "nats below unigram", "tokens"):
        table.add_column(heading, justify="right")

    def cells(row: Scores) -> list[str]:
        return [
            f"{row.loss:.4f}",
            significant(row.perplexity),
            f"{row.bits_per_byte:.4f}",
            f"{-row.unigram_excess:.3f}",
            count(row.tokens),
        ]

    for name, row in silos.items():
        table.add_row(Text(printable(name)), *cells(row))  # a pattern may have [a-z] in it, which is no markup
    if len(silos) > 1:
        table.add_section()
        table.add_row("pooled", *cells(pooled), style="bold")
    return table


def _parameters(recipe: Recipe) -> ParameterCount:
    return count_parameters(recipe.model, recipe.data.vocab_size, recipe.data.sequence_length)
