"""The commands `photon compare` and `photon methods`: their options, and how they become a request."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer

from photon.cli_options import command
from photon.errors import InputError

EPILOG = """Examples:\n
photon compare demo --methods per-step,fedavg,diloco\n
photon compare demo --methods fedavg,diloco,muloco --seeds 3 --budget tokens=4M --tune 5\n
photon compare my-recipe.toml --methods fedavg,mine.toml data.partition=iid federation.nodes_per_round=2 --out iid\n
photon compare demo --methods fedavg,sparseloco --target-loss 4.2 --links 10Mbps,1Gbps --plan-device cpu"""


@dataclass(frozen=True)
class CompareOptions:
    """Every option of the command, once. None: not given."""

    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [section.key=value ...]", help="Preset or TOML file (default demo); options."),
    ] = None
    methods: Annotated[
        str, typer.Option(metavar="A,B,...", help="Names (photon methods) or .toml files; the first is compared with.")
    ] = "per-step,fedavg,diloco"
    budget: Annotated[
        str | None, typer.Option(metavar="tokens=N", help="Tokens of each run, such as 8M; default: the recipe's.")
    ] = None
    seeds: Annotated[int, typer.Option(help="Runs of each method: the recipe's seed, the next one, ...", min=1)] = 1
    target_loss: Annotated[
        float | None, typer.Option(help="Tell what it took to get there; default: the worst final loss.")
    ] = None
    links: Annotated[
        str, typer.Option(metavar="A,B,...", help="Predict the time on these bandwidths of a node's link.")
    ] = "100Mbps,1Gbps"
    plan_device: Annotated[str, typer.Option(help="Of a node, for that prediction (see photon plan --device).")] = (
        "h100"
    )
    tune: Annotated[
        int, typer.Option(metavar="N", help="Try N points of each method's grid with one seed first.", min=1)
    ] = 1
    jobs: Annotated[int | None, typer.Option(help="Runs at once; default: one for each CUDA device.", min=1)] = None
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder; default compare/<recipe>-<key of all runs>.")
    ] = None


def add_compare(app: typer.Typer) -> None:
    """Add the commands to `photon`."""
    app.command(name="compare", epilog=EPILOG)(command(CompareOptions, run_compare))
    app.command(name="methods", epilog="Examples:\n\nphoton methods\n\nphoton methods diloco > mine.toml")(show_methods)


def show_methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this method as TOML.")] = None,
) -> None:
    """List the methods that can be compared, or print one."""
    from rich.console import Console
    from rich.table import Table

    from photon.method import load_method, method_names

    if name is not None:
        typer.echo(load_method(name).text, nl=False)
        return
    table = Table(title="Methods: photon methods NAME prints one as TOML", title_justify="left", show_lines=True)
    table.add_column("name", no_wrap=True, style="bold")
    table.add_column("what it is")
    for method in map(load_method, method_names()):
        table.add_row(method.name, f"{method.title}. {method.about}\n{method.cites}")
    Console().print(table)


def run_compare(options: CompareOptions) -> None:
    """Compare methods on the same text, tokenizer, initial weights and tokens: a table and one page."""
    from rich.console import Console

    from photon.cli import split_words
    from photon.compare import PAGE_FILE, Asked, compare
    from photon.compare_plan import Request, parse_budget
    from photon.compare_table import tables
    from photon.method import load_method

    if options.target_loss is not None and not (math.isfinite(options.target_loss) and options.target_loss > 0):
        raise InputError(f"--target-loss must be above 0, not {options.target_loss:g}")
    source, overrides = split_words(options.words or [])
    request = Request(
        source=source,
        overrides=tuple(overrides),
        methods=tuple(load_method(name) for name in _listed(options.methods, "--methods")),
        budget_tokens=parse_budget(options.budget) if options.budget is not None else None,
        seeds=options.seeds,
        tune=options.tune,
    )
    asked = Asked(
        out=options.out,
        jobs=options.jobs,
        target_loss=options.target_loss,
        links=tuple(_listed(options.links, "--links")) if options.links else (),
        device=options.plan_device,
        command=command_line(options),
    )
    console = Console()
    comparison, out = compare(request, asked, console)
    for table in tables(comparison):
        console.print(table)
    console.print(comparison.headline, markup=False, highlight=False)
    for note in comparison.notes:
        console.print(f"- {note}", markup=False, highlight=False)
    console.print(str(out / PAGE_FILE), markup=False, highlight=False, soft_wrap=True)


def command_line(options: CompareOptions) -> str:
    """The command as a person would type it, without what is the default."""
    words = ["photon", "compare", *(options.words or [])]
    for option in fields(CompareOptions):
        value = getattr(options, option.name)
        if option.name != "words" and value != option.default:
            words += [f"--{option.name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _listed(text: str, option: str) -> list[str]:
    """`a, b` as two words. Raises InputError for none."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise InputError(f"{option} names none")
    return words
