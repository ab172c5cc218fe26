"""The `photon` command: parse, call, print. No logic."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from photon import __version__
from photon.cli_compare import add_compare
from photon.cli_keys import keys_app
from photon.cli_plan import add_plan
from photon.cli_sites import add_commands
from photon.errors import InputError, PhotonError

app = typer.Typer(
    name="photon",
    help="Federated LLM pre-training: several owners of text train one language model; text stays home.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Exit codes: 0 done, 2 wrong input, 1 failed. Start with: photon train",
)
data_app = typer.Typer(help="Tokenise and shard each silo; look at the result.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(keys_app, name="keys")
add_commands(app)
add_plan(app)
add_compare(app)

_FULL = {errno.ENOSPC, errno.EDQUOT}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A preset's name or a TOML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value ...]", help="Options to change.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
RoundOption = Annotated[
    int | None, typer.Option("--round", help="The model of this committed round; default: the newest.", min=0)
]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command(
    epilog="""Examples:\n
photon train   (the preset demo: four owners, this machine, about 4 minutes)\n
photon train demo federation.rounds=40 node.lr=4e-3 --run runs/longer\n
photon train demo federation.outer=none   (the same tokens, centralised: the baseline)\n
photon train demo --method diloco   (a method laid over the recipe: photon methods)\n
photon train my-recipe.toml\n
photon train --fabric flower   (the same federation, each node a process of its own)\n
photon train --resume runs/longer"""
)
def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [section.key=value ...]", help="Preset or TOML file (default demo); options."),
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder; default runs/<recipe>-<time>.")] = None,
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="Lay this method over the recipe: a name, or a .toml file.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on exactly where this run was.")] = None,
    fabric: Annotated[
        str | None, typer.Option(help="local, or flower: every node a process of its own, joined over the network.")
    ] = None,
    round_index: Annotated[
        int | None, typer.Option("--round", help="With --resume: go back to this committed round.", min=0)
    ] = None,
) -> None:
    """Train one model across all silos of a recipe, on this machine."""
    from photon import run as runs
    from photon.display import open_display
    from photon.method import apply_method, load_method
    from photon.recipe import load_recipe
    from photon.results import show_results
    from photon.runfolder import RunFolder, new_run_folder
    from photon.stopsignals import sigterm_as_ctrl_c

    words = words or []
    if resume is not None:
        if words or run is not None or fabric is not None or method is not None:
            raise InputError("--resume takes no recipe, options, --method or --run: the run folder has its own recipe")
        folder = RunFolder(resume)
        with sigterm_as_ctrl_c(), open_display(sys.stdout) as display:
            summary = runs.resume(folder, display, round_index)
    else:
        if round_index is not None:
            raise InputError("--round goes with --resume")
        recipe_name, overrides = split_words(words)
        overrides += [f"link.fabric={fabric}"] if fabric else []
        recipe = (
            apply_method(load_method(method), recipe_name, overrides) if method else load_recipe(recipe_name, overrides)
        )
        folder = new_run_folder(recipe.name, run)
        with sigterm_as_ctrl_c(), open_display(sys.stdout) as display:
            summary = runs.train(recipe, folder, display)
    show_results(folder, summary, Console())


@app.command(epilog="Examples:\n\nphoton presets\n\nphoton presets demo > my-recipe.toml")
def presets(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this preset as TOML.")] = None,
) -> None:
    """List the presets, or print one."""
    from photon.recipe import preset_text
    from photon.results import presets_table

    if name is None:
        for part in presets_table():
            Console().print(part)
    else:
        typer.echo(preset_text(name), nl=False)


@data_app.command("build", epilog="Example: photon data build demo data.vocab_size=8192")
def data_build(recipe: RecipeArgument, options: Overrides = None) -> None:
    """Train or load the tokenizer, tokenise and shard each silo. Reused by training when nothing changed."""
    from photon.display import open_display
    from photon.recipe import load_recipe
    from photon.results import silos_table
    from photon.run import prepare_data

    with open_display(sys.stdout) as display:
        prepared = prepare_data(load_recipe(recipe, options or []), display)
    Console().print(silos_table(prepared))


@data_app.command("show", epilog="Examples:\n\nphoton data show data\n\nphoton data show data/silos/core")
def data_show(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A data folder, or a part of one.")]) -> None:
    """What is in each folder of shards at or under DIR; every file is checked against its hash."""
    from photon.results import description_tables

    for table in description_tables(folder):
        Console().print(table)


@app.command(epilog="Examples:\n\nphoton evaluate runs/demo\n\nphoton evaluate runs/demo --data notes/ --data book.txt")
def evaluate(
    run: RunArgument,
    data: Annotated[
        list[str] | None, typer.Option(help="Text to score instead of the silos' held-out documents; repeatable.")
    ] = None,
    field: Annotated[
        str | None, typer.Option(help="Field with the text in .jsonl and .parquet files of --data; default: text.")
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(help="Sequences of each source of a silo; default: the recipe's.", min=1)
    ] = None,
    round_index: RoundOption = None,
) -> None:
    """Held-out loss, perplexity and bits per byte of a run's newest model."""
    from photon.evaluate import evaluate_run
    from photon.results import scores_table
    from photon.runfolder import RunFolder

    if data and sequences:
        raise InputError("--sequences is for the silos' held-out documents; with --data all of the text is scored")
    if field is not None and not data:
        raise InputError("--field is for --data; the silos' own fields stand in the recipe")
    scores = evaluate_run(RunFolder(run), data or [], sequences, round_index, field or "text")
    Console().print(scores_table(scores))


@app.command(name="generate", epilog='Example: photon generate runs/demo "def read(" --tokens 60 --seed 7')
def generate_text(
    run: RunArgument,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    tokens: Annotated[int, typer.Option(help="Most tokens to write.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 = always the likeliest token.", min=0.0)] = 0.7,
    top_k: Annotated[int, typer.Option(help="Choose among the k likeliest; 0 = all.", min=0)] = 40,
    seed: Annotated[int, typer.Option(help="Of the sampling.", min=0, max=2**64 - 1)] = 0,
    round_index: RoundOption = None,
) -> None:
    """Let a run's newest model write."""
    from photon.evaluate import continue_text
    from photon.runfolder import RunFolder

    typer.echo(prompt + continue_text(RunFolder(run), prompt, tokens, temperature, top_k, seed, round_index))


@app.command(epilog="Example: photon export runs/demo my-model")
def export(
    run: RunArgument,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to.")],
    round_index: RoundOption = None,
) -> None:
    """Write a folder that transformers' AutoModelForCausalLM and AutoTokenizer load."""
    from photon.evaluate import export_run
    from photon.runfolder import RunFolder

    export_run(RunFolder(run), folder, round_index)
    typer.echo(f"{folder}: load it with transformers' AutoModelForCausalLM and AutoTokenizer")


@app.command(epilog="Example: photon report runs/demo")
def report(run: RunArgument) -> None:
    """Rewrite report.html and summary.json from what a run recorded, finished or not."""
    from photon.run import write_results
    from photon.runfolder import RunFolder

    folder = RunFolder(run)
    write_results(folder)
    typer.echo(str(folder.report))


def split_words(words: list[str]) -> tuple[str, list[str]]:
    """`[RECIPE] [key=value ...]` -> (recipe, overrides). An override may come first: the recipe is then demo.

    A path may have a `=` in it: a word that is a file, or begins as a path does, is the recipe.
    """
    overrides = [word for word in words if "=" in word and not _is_path(word)]
    recipes = [word for word in words if word not in overrides]
    if len(recipes) > 1:
        raise InputError(f"one recipe at a time, not {', '.join(recipes)}; options are written section.key=value")
    return (recipes[0] if recipes else "demo"), overrides


def _is_path(word: str) -> bool:
    # Not Path.is_file, which raises OSError for a long override: no file's name is as long.
    return word.startswith(("/", "./", "../")) or os.path.isfile(word)  # noqa: PTH113 - see above


def main() -> None:
    """Run the command; errors made for people, and those of the disk, are printed without a traceback."""
    try:
        app()
    except PhotonError as error:
        typer.echo(f"photon: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in _FULL and not (error.errno in _CLOSED and error.filename):
            raise
        place = f"{error.filename}: " if error.filename else ""
        typer.echo(f"photon: {place}{error.strerror}; make room or mend the permissions, then try again", err=True)
        sys.exit(PhotonError.exit_code)
