"""A plan in words and numbers: rows for the terminal and the page alike, and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from photon.plan_units import bandwidth_text, time_text
from photon.readable import byte_size, count, significant

if TYPE_CHECKING:
    from rich.console import RenderableType

    from photon.plan_answer import Plan
    from photon.plan_sweep import Sweep
    from photon.planner import BreakEven

CAUTION = (
    "A plan is a formula. Measured rounds elsewhere took 1.1 to 1.9 times what such formulas say; "
    "a finished run shows its own beside these."
)
_PHASE_WORDS = {
    "control": "control: messages, waiting for each other",
    "download": "download of the model",
    "decode": "node: hash, decode, load",
    "evaluate": "node: score held-out text (mean over rounds)",
    "train": "node: train",
    "encode": "node: encode the update",
    "save": "node: own state to disk",
    "upload": "upload of the updates, past saving",
    "merge": "Aggregator: verify, merge",
    "outer": "Aggregator: outer step",
    "commit": "Aggregator: commit to disk",
}
_PARTS = "the base, or differences of shared state"
_TOPOLOGY_WORDS = {"ps": "through the Aggregator", "allreduce": "all-reduce", "ring": "ring all-reduce"}


@dataclass(frozen=True)
class Row:
    """A line of a table: what, how much, and a remark."""

    what: str
    value: str
    remark: str = ""


def lede(plan: Plan) -> str:
    """One sentence: what is planned."""
    return (
        f"{plan.recipe}: {count(plan.parameters)} parameters, {plan.nodes} node{'s' if plan.nodes != 1 else ''}, "
        f"{plan.rounds} rounds of {_taus(plan)} local steps, {count(plan.tokens)} tokens"
    )


def memory_rows(plan: Plan) -> list[Row]:
    """Memory by part; of tensors alone."""
    memory = plan.memory
    verdict = ""
    if memory.fits is not None and memory.device_memory_bytes is not None:
        room = byte_size(memory.device_memory_bytes)
        verdict = f"a device has {room}" if memory.fits else f"DOES NOT FIT: a device has {room}"
        if memory.fits and memory.node_device_bytes > memory.device_memory_bytes:
            verdict = f"fits: shared by devices that have {room} each"
    return [
        Row("node, device: weights", byte_size(memory.weights_bytes)),
        Row("node, device: gradients", byte_size(memory.gradients_bytes)),
        Row("node, device: optimizer", byte_size(memory.optimizer_bytes)),
        Row("node, device: activations", byte_size(memory.activations_bytes), "of the least micro-batch, if auto"),
        *([Row("node, device: parts", byte_size(memory.method_bytes), _PARTS)] if memory.method_bytes else []),
        Row("node, device, together", byte_size(memory.node_device_bytes), verdict),
        Row("node, main memory", byte_size(memory.node_main_memory_bytes), "base, update, and what codecs keep"),
        Row("node, disk", byte_size(memory.node_disk_bytes), "what it keeps of one round"),
        Row("Aggregator", byte_size(memory.aggregator_bytes), "whatever the number of nodes"),
    ]


def bytes_rows(plan: Plan) -> list[Row]:
    """What crosses the network; `at most` where a lossless stage decides."""
    size = plan.bytes
    most, down_most, up_most = (
        "" if is_exact else "at most " for is_exact in (size.is_exact, size.node_down_is_exact, size.node_up_is_exact)
    )
    envelopes = f"and headers of at most {byte_size(size.run_envelope_at_most_bytes)}"
    down = _node_row("a node's round, down", down_most, size.node_down_bytes, size.node_largest_down_bytes)
    up = "a node's round, up" if plan.topology == "ps" else "an update"
    rows = [
        *([down] if plan.topology == "ps" else []),
        _node_row(up, up_most, size.node_up_bytes, size.node_largest_up_bytes),
    ]
    for way, stages in size.stage_bytes.items():
        rows += [Row(f"  {way}, after {stage}", byte_size(left)) for stage, left in stages.items()]
    together = f"{byte_size(size.round_down_bytes)} down, {byte_size(size.round_up_bytes)} up"
    return [
        *rows,
        Row("a round, all nodes", most + byte_size(size.round_down_bytes + size.round_up_bytes), together),
        Row("a day", most + byte_size(size.day_bytes)),
        Row(
            "the run",
            most + byte_size(size.run_down_bytes + size.run_up_bytes),
            envelopes if size.run_envelope_at_most_bytes else "",
        ),
        Row("a trained token", f"{most}{significant(size.per_token_bytes)} B"),
    ]


def phase_rows(plan: Plan) -> list[Row]:
    """A round by phase, phases that take no time left out, and its end."""
    words = dict(_PHASE_WORDS)
    if plan.topology != "ps":
        words["upload"] = _TOPOLOGY_WORDS[plan.topology]
    rows = [
        Row(words[phase], time_text(seconds), f"{100 * seconds / plan.round_s:.1f} %")
        for phase, seconds in plan.phases_s.items()
        if seconds > 0
    ]
    if plan.hidden_s > 0:
        rows.append(Row("beside each other", f"-{time_text(plan.hidden_s)}", "nodes train on while updates travel"))
    return [*rows, Row("a round", time_text(plan.round_s), f"nodes train {100 * plan.utilisation:.1f} % of it")]


def verdict_rows(plan: Plan) -> list[Row]:
    """Time, the comparison with per-step training, what would change it, and money."""
    base, way = plan.baseline, _TOPOLOGY_WORDS[plan.topology]
    split = f"{time_text(plan.train_s)} training, {time_text(plan.exchange_s)} transfer"
    steps = f"{base.steps:.0f}" if float(base.steps).is_integer() else significant(base.steps, 5)
    base_split = f"{time_text(base.compute_s)} training in {steps} steps"
    rows = [
        Row("the run", time_text(plan.total_s), split),
        Row(
            "per-step training, same links",
            time_text(base.total_s),
            f"{base_split}, {time_text(base.exchange_s)} exchange ({way})",
        ),
        Row("the same, exchange hidden", time_text(base.overlapped_total_s), "perfect overlap: at best"),
        Row("this run / per-step", f"{plan.total_s / base.total_s:.3f}", _hidden_ratio(plan)),
        Row("training time / per-step's", significant(base.compute_ratio), "at the same loss, as given or inferred"),
        Row(*_pays(plan.break_even, ""), "a node's link, up; against per-step training without overlap"),
        Row(*_pays(plan.break_even_overlapped, ", exchange hidden"), "against perfect overlap"),
        Row(
            f"tau for {100 * plan.wanted_utilisation:g} % training",
            f"{plan.tau_for_utilisation:,}",
            f"it is {_taus(plan)} now, and {100 * plan.utilisation:.1f} %",
        ),
    ]
    money = plan.money
    if money is not None:
        parts = f"devices {money.devices:,.2f}, traffic {money.traffic:,.2f}"
        base_parts = f"devices {money.baseline_devices:,.2f}, traffic {money.baseline_traffic:,.2f}"
        rows += [
            Row("money", f"{money.total:,.2f}", parts),
            Row("per-step", f"{money.baseline_total:,.2f}", base_parts),
        ]
    return rows


def sections(plan: Plan) -> list[tuple[str, list[Row]]]:
    """All tables of a plan with their headings."""
    return [
        ("Memory", memory_rows(plan)),
        ("Bytes", bytes_rows(plan)),
        ("A round", phase_rows(plan)),
        ("The run", verdict_rows(plan)),
    ]


def notes(plan: Plan) -> list[str]:
    """What the numbers rest on."""
    beside = (
        "nothing overlaps in a round" if plan.hidden_s <= 0 else "a round's updates travel beside the next training"
    )
    return [*plan.assumptions, f"{beside}; replies arrive together", CAUTION]


def plan_tables(plan: Plan) -> list[RenderableType]:
    """For the terminal."""
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = [Text(lede(plan), style="bold")]
    for title, rows in sections(plan):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column("what", min_width=30)
        table.add_column("value", justify="right", no_wrap=True, style="bold", min_width=16)
        table.add_column("remark", style="dim", overflow="fold")
        for row in rows:
            table.add_row(row.what, row.value, row.remark)
        parts.append(table)
    return [*parts, *(Text(f"- {note}", style="dim") for note in notes(plan))]


def plan_json(plan: Plan, sweep: Sweep | None = None) -> str:
    """The plan, and the plans of a sweep, as JSON; a number without bound is null."""
    content = asdict(plan)
    if sweep is not None:
        content["sweep"] = {
            "key": sweep.asked.key,
            "points": [{"value": point.value, **asdict(point.plan)} for point in sweep.points],
        }
    return json.dumps(_finite(content), indent=1, allow_nan=False)


def _taus(plan: Plan) -> str:
    """The local steps of a round, or of the rounds if they vary."""
    if plan.least_tau == plan.most_tau:
        return f"{plan.tau}"
    return f"{plan.least_tau} to {plan.most_tau} (mean {significant(plan.mean_tau)})"


def _node_row(what: str, most: str, mean_bytes: float, largest_bytes: float) -> Row:
    """A node's bytes in a round; where rounds differ, the mean and the largest."""
    if mean_bytes == largest_bytes:
        return Row(what, most + byte_size(mean_bytes), f"{mean_bytes:,} bytes")
    remark = f"mean over the run; in the largest round {byte_size(largest_bytes)}"
    return Row(what, most + byte_size(mean_bytes), remark)


def _pays(even: BreakEven, against: str) -> tuple[str, str]:
    """Where the federation is the faster one: up to a bandwidth, from one on, or both with a gap between them."""
    if even.from_bits_per_s is None:
        up_to = "any bandwidth" if even.always else "none: never"
        return f"pays up to{against}", up_to if even.bits_per_s is None else bandwidth_text(even.bits_per_s)
    from_on = f"from {bandwidth_text(even.from_bits_per_s)} on"
    return f"pays{against}", from_on if even.bits_per_s is None else f"to {bandwidth_text(even.bits_per_s)}, {from_on}"


def _hidden_ratio(plan: Plan) -> str:
    return f"{plan.total_s / plan.baseline.overlapped_total_s:.3f} of it with the exchange hidden"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
