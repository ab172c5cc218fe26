"""The command `photon plan`: its options, and how they become a question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from photon.cli_options import command
from photon.errors import ConfigError, InputError

if TYPE_CHECKING:
    from photon.config import Recipe
    from photon.plan_answer import Question
    from photon.plan_bytes import RoundBytes
    from photon.plan_exchange import LinkSpeed
    from photon.plan_sizes import ModelFacts
    from photon.planner import MachineSpeed

EPILOG = """Examples:\n
photon plan demo --device measured --bandwidth 100Mbps --latency 40ms\n
photon plan paper-1.3b link=balanced --device h100 --devices-per-node 8 --bandwidth 1Gbps --compute-ratio 2.75\n
photon plan paper-7b --paper   (the paper's own comparison: 95.6 hours against 148)\n
photon plan paper-1.3b --method eager-diloco --bandwidth 100Mbps   (a method laid over the recipe: photon methods)\n
photon plan paper-125m --sweep bandwidth=10Mbps..10Gbps --out plan.html"""

# From least to most: beyond these no site, model or training is, and formulas leave the range of numbers.
_BOUNDS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "mfu": (1e-6, 1.0),
        "tokens_per_second": (1e-3, 1e15),
        "steps_per_second": (1e-9, 1e9),
        "bytes_per_parameter": (1e-6, 1e3),
        "compute_ratio": (1e-3, 1e3),
        "baseline_steps": (1.0, 1e15),
        "baseline_steps_per_second": (1e-9, 1e9),
        "baseline_bytes_per_parameter": (1e-6, 1e3),
    }
)
_MOST_MONEY = 1e12
_MOST = 10**6  # nodes, devices of a node


@dataclass(frozen=True)
class PlanOptions:
    """Every option of the command, once. None: not given."""

    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [section.key=value ...]", help="Preset or TOML file (default demo); options."),
    ] = None
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="Lay this method over the recipe: a name, or a .toml file.")
    ] = None
    nodes: Annotated[int | None, typer.Option(help="Nodes of a round; default: the recipe's.", min=1, max=_MOST)] = None
    bandwidth: Annotated[str | None, typer.Option(help="Of a node's link, up (1Gbps, 20MB/s); default 1Gbps.")] = None
    bandwidth_down: Annotated[str | None, typer.Option(help="The same, down; default: as up.")] = None
    aggregator_bandwidth: Annotated[
        str | None, typer.Option(help="Of the Aggregator's link, each way, shared by all nodes; default: as a node's.")
    ] = None
    latency: Annotated[str | None, typer.Option(help="There and back; default 50ms.")] = None
    device: Annotated[
        str | None,
        typer.Option(help="h100, a100, 4090, cpu ... (default h100), or measured: time this machine first."),
    ] = None
    devices_per_node: Annotated[int, typer.Option(help="Devices that share a node's work.", min=1, max=_MOST)] = 1
    mfu: Annotated[float | None, typer.Option(help="Share of the device's peak that training reaches.")] = None
    tokens_per_second: Annotated[float | None, typer.Option(help="Of one node, instead of a device.")] = None
    steps_per_second: Annotated[float | None, typer.Option(help="Local steps of one node, instead of tokens.")] = None
    at_once: Annotated[
        int | None, typer.Option(help="Nodes that work at once, the others queue; default: all.", min=1, max=_MOST)
    ] = None
    control: Annotated[
        str | None, typer.Option(help="A round's messages and waiting, without latency; default 3s.")
    ] = None
    ideal: Annotated[
        bool, typer.Option("--ideal", help="Training and transfer alone: no handshake, codec, disk or control.")
    ] = False
    topology: Annotated[
        Literal["ps", "allreduce", "ring"] | None,
        typer.Option(help="ps = through the Aggregator, as Photon runs it; the others to compare."),
    ] = None
    parameters: Annotated[int | None, typer.Option(help="Plan for a model of so many instead.", min=1, max=10**15)] = (
        None
    )
    bytes_per_parameter: Annotated[
        float | None, typer.Option(help="Sizes of updates and models sent, instead of the codecs'.")
    ] = None
    compute_ratio: Annotated[
        float, typer.Option(help="Federated over per-step training time at the same loss (the paper: 1.56 to 2.75).")
    ] = 1.0
    baseline_steps: Annotated[float | None, typer.Option(help="Steps of per-step data-parallel training.")] = None
    baseline_steps_per_second: Annotated[float | None, typer.Option(help="Its speed without exchange.")] = None
    baseline_bytes_per_parameter: Annotated[float, typer.Option(help="Its gradients as sent.")] = 2.0
    utilisation: Annotated[float, typer.Option(help="Share of the time to train: which tau reaches it?")] = 0.9
    price_device: Annotated[float | None, typer.Option(help="Per device and hour.", min=0.0)] = None
    price_traffic: Annotated[float | None, typer.Option(help="Per GB sent.", min=0.0)] = None
    paper: Annotated[
        bool, typer.Option("--paper", help="The paper's inputs, for paper-1.3b, paper-3b and paper-7b.")
    ] = False
    sweep: Annotated[
        str | None, typer.Option(metavar="KEY=A..B", help="tau=16..512 or bandwidth=10Mbps..10Gbps: a table.")
    ] = None
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="A page (.html), or the picture alone (.svg).")] = (
        None
    )
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False


def add_plan(app: typer.Typer) -> None:
    """Add the command to `photon`."""
    app.command(name="plan", epilog=EPILOG)(command(PlanOptions, run_plan))


def run_plan(options: PlanOptions) -> None:
    """Say what a run will take before it runs: memory, bytes, time, utilisation, money; and whether it pays."""
    from rich.console import Console

    from photon.plan_answer import answer
    from photon.plan_sweep import parse_sweep, sweep_table, swept, write_picture
    from photon.plan_text import plan_json, plan_tables

    asked = parse_sweep(options.sweep) if options.sweep else None
    question = ask(options)
    if question.recipe.federation.outer == "none":
        raise ConfigError(
            "federation.outer = none trains in one place and exchanges nothing: there is no federation to plan. Leave "
            "it out: what per-step training takes on the same devices and links stands beside the federation's"
        )
    plan = answer(question)
    sweep = swept(question, asked) if asked else None
    if options.out is not None:
        try:
            write_picture(options.out, question, plan, sweep)
        except OSError as error:
            raise InputError(f"--out {options.out} cannot be written: {error.strerror}") from error
    if options.as_json:
        typer.echo(plan_json(plan, sweep))
        return
    console = Console()
    for part in [*plan_tables(plan), *([sweep_table(sweep)] if sweep else [])]:
        console.print(part)
    if options.out is not None:
        console.print(str(options.out), markup=False, highlight=False, soft_wrap=True)


def ask(options: PlanOptions) -> Question:
    """The question that the options put. Raises InputError for what makes no sense together."""
    from photon.cli import split_words
    from photon.method import apply_method, load_method
    from photon.plan_answer import Baseline, Prices, Question
    from photon.plan_sizes import flat_model, model_facts
    from photon.recipe import load_recipe

    recipe_name, overrides = split_words(options.words or [])
    method = load_method(options.method) if options.method else None
    recipe = apply_method(method, recipe_name, overrides) if method else load_recipe(recipe_name, overrides)
    if options.paper:
        options = _as_in_the_paper(options, recipe.name)
    _check(options)
    if options.nodes is not None:
        recipe = with_nodes(recipe, options.nodes)
    facts = model_facts(recipe)
    if options.parameters is not None:
        facts = flat_model(options.parameters, facts, recipe)
    node_bytes, stages = _bodies(options, recipe, facts)
    machine, memory_bytes, told = _machine(options, recipe, facts)
    link = _link(options)
    return Question(
        recipe=recipe,
        parameters=facts.parameters,
        node_bytes=node_bytes,
        machine=machine,
        link=link,
        topology=options.topology or "ps",
        baseline=Baseline(
            options.compute_ratio,
            options.baseline_steps,
            options.baseline_steps_per_second,
            options.baseline_bytes_per_parameter,
        ),
        prices=Prices(options.price_device, options.price_traffic),
        wanted_utilisation=options.utilisation,
        devices_per_node=options.devices_per_node,
        device_memory_bytes=memory_bytes,
        stage_bytes=stages,
        assumptions=(told, *_told_of_link(options, link), *_told_of_run(options, recipe, node_bytes)),
    )


def with_nodes(recipe: Recipe, nodes: int) -> Recipe:
    """The recipe with so many owners, all of them in every round; new ones are like the last."""
    silos = recipe.silo[:nodes]
    new = [recipe.silo[-1].model_copy(update={"name": f"more-{index}"}) for index in range(len(silos), nodes)]
    federation = recipe.federation.model_copy(update={"nodes_per_round": None})
    return recipe.model_copy(update={"silo": [*silos, *new], "federation": federation})


def _as_in_the_paper(options: PlanOptions, recipe: str) -> PlanOptions:
    """The paper's inputs wherever nothing else was asked for."""
    from photon.plan_paper import BANDWIDTH, BYTES_PER_PARAMETER, paper_row

    row = paper_row(recipe)
    has_speed = options.steps_per_second or options.tokens_per_second or options.device
    return replace(
        options,
        ideal=True,
        bandwidth=options.bandwidth or BANDWIDTH,
        latency=options.latency or "0s",
        topology=options.topology or "ring",
        parameters=options.parameters or row.parameters,
        bytes_per_parameter=options.bytes_per_parameter or BYTES_PER_PARAMETER,
        steps_per_second=options.steps_per_second if has_speed else row.steps_per_s,
        baseline_steps=options.baseline_steps or row.baseline_steps,
        baseline_steps_per_second=options.baseline_steps_per_second or row.baseline_steps_per_s,
    )


def _check(options: PlanOptions) -> None:
    """Raises InputError for what typer cannot see."""
    if not 0 <= options.utilisation < 1:
        raise InputError(f"--utilisation is at least 0 and below 1, not {options.utilisation:g}")
    for name, (least, most) in _BOUNDS.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} must be above 0, from {least:g} to {most:g}, not {value:g}")
    for option, price in {"--price-device": options.price_device, "--price-traffic": options.price_traffic}.items():
        if price is not None and not price <= _MOST_MONEY:
            raise InputError(f"{option} is at most {_MOST_MONEY:g}, not {price:g}")
    if options.tokens_per_second and options.steps_per_second:
        raise InputError("--tokens-per-second and --steps-per-second say the same: give one")
    if options.device and (options.tokens_per_second or options.steps_per_second):
        raise InputError("--device goes without --tokens-per-second and --steps-per-second: they stand for it")
    if options.out is not None and options.out.suffix not in (".html", ".svg"):
        raise InputError(f"--out ends in .html or .svg, not {options.out.name!r}")
    if options.out is not None and not options.out.parent.is_dir():
        raise InputError(f"--out {options.out}: there is no folder {options.out.parent}; make it first")


def _bodies(options: PlanOptions, recipe: Recipe, facts: ModelFacts) -> tuple[RoundBytes, dict[str, dict[str, int]]]:
    from photon.plan_sizes import exchanged_bytes, link_codecs, scaled_codecs, stage_bytes

    if options.bytes_per_parameter is not None:
        return exchanged_bytes(facts, scaled_codecs(recipe, options.bytes_per_parameter)), {}
    codecs = link_codecs(recipe)
    return exchanged_bytes(facts, codecs), stage_bytes(codecs, facts)


def _machine(options: PlanOptions, recipe: Recipe, facts: ModelFacts) -> tuple[MachineSpeed, int | None, str]:
    """How fast a node is, its devices' memory where that is known, and how we know."""
    from photon import devices
    from photon.plan_units import time_s

    memory_bytes: int | None = None
    tokens_per_step = max(recipe.batch_size_of(silo) for silo in recipe.silo) * recipe.data.sequence_length
    if options.tokens_per_second or options.steps_per_second:
        tokens_per_s = options.tokens_per_second or (options.steps_per_second or 0.0) * tokens_per_step
        speed, told = devices.assumed_speed(tokens_per_s), f"a node trains {tokens_per_s:,.0f} tokens/s, as given"
    elif options.device == devices.MEASURED:
        from photon.plan_measured import measure

        measured = measure(recipe, lambda what: typer.echo(f"  timing {what}", err=True))
        speed, told, memory_bytes = measured.speed, measured.told, measured.memory_bytes
    else:
        device = devices.device_named(options.device or "h100")
        speed = devices.device_speed(device, options.devices_per_node, options.mfu, facts.flops_per_token)
        share = f"{device.mfu:g} (assumed: {device.source})" if options.mfu is None else f"{options.mfu:g} (given)"
        told, memory_bytes = f"a node is {options.devices_per_node} x {device.name}, MFU {share}", device.memory_bytes
    if options.ideal:
        speed, told = devices.ideal_speed(speed.tokens_per_s), f"{told}; nothing but training and transfer takes time"
    elif recipe.link.fabric == "local":
        told += "; over a network, as with link.fabric = flower"
    if options.control is not None:
        speed = replace(speed, control_s=time_s(options.control, "--control"))
    return replace(speed, at_once=options.at_once), memory_bytes, told


def _link(options: PlanOptions) -> LinkSpeed:
    from photon.plan_exchange import LinkSpeed
    from photon.plan_units import bandwidth_bits_per_s, time_s

    up = bandwidth_bits_per_s(options.bandwidth or "1Gbps", "--bandwidth")
    down = bandwidth_bits_per_s(options.bandwidth_down, "--bandwidth-down") if options.bandwidth_down else up
    shared = options.aggregator_bandwidth
    aggregator = bandwidth_bits_per_s(shared, "--aggregator-bandwidth") if shared else max(up, down)
    link = LinkSpeed(up, down, aggregator, time_s(options.latency or "50ms", "--latency"))
    return replace(link, handshakes=0.0, control_round_trips=0.0) if options.ideal else link


def _told_of_link(options: PlanOptions, link: LinkSpeed) -> tuple[str, ...]:
    from photon.plan_units import bandwidth_text, time_text

    up, down = bandwidth_text(link.node_up_bits_per_s), bandwidth_text(link.node_down_bits_per_s)
    shared = bandwidth_text(link.aggregator_bits_per_s)
    given = "" if options.bandwidth else " (assumed)"
    server = f", the Aggregator {shared} each way for all of them" if (options.topology or "ps") == "ps" else ""
    return (
        f"a node's link has {up} up and {down} down{given}{server}; {time_text(link.round_trip_s)} there and back; "
        "full duplex, nobody else on it",
    )


def _told_of_run(options: PlanOptions, recipe: Recipe, node_bytes: RoundBytes) -> tuple[str, ...]:
    from photon.estimate import expected_nodes
    from photon.readable import significant

    told = []
    if (options.topology or "ps") != "ps":
        told.append("Photon runs through its Aggregator; an all-reduce between sites is here to compare")
    if options.devices_per_node > 1:
        told.append("a node of several devices is taken to scale perfectly; Photon trains a node on one device today")
    misses = recipe.nodes_per_round < len(recipe.silo) or recipe.federation.dropout > 0
    if node_bytes.sends_differences and misses:
        told.append("a node that missed a round gets the whole model; bytes of the run are the mean over the draws")
    if any(silo.tau for silo in recipe.silo):
        told.append("an owner with a tau of its own keeps its ratio to federation.tau where another tau is planned")
    if recipe.federation.dropout:
        told.append(
            f"of {recipe.nodes_per_round} nodes drawn, {significant(expected_nodes(recipe))} take part in the mean "
            "(federation.dropout): bytes and tokens are the mean over the draws"
        )
    if recipe.federation.oversample:
        told.append("spares (federation.oversample) are not counted: their bytes come on top")
    if node_bytes.turns:
        told.append("rounds exchange other tensors in turn: bytes and times of a round are the mean over the run")
    if options.parameters is not None:
        told.append("the model is given by its number of parameters alone")
    return tuple(told)
