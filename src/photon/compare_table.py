"""A comparison as rows of words, the same on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from photon.compare_content import Comparison, MethodResult, loss_text
from photon.plan_units import time_text
from photon.readable import byte_size, count, significant

_HOUR_S = 3600.0
_FIRST_OF_BYTES = 5  # the columns before it say what was reached


@dataclass(frozen=True)
class Columns:
    """Headings and, for each method, cells; the first column is the method's name."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def result_columns(comparison: Comparison) -> Columns:
    """What each method reached, and what it took."""
    first = comparison.methods[0].name
    headings = [
        "method", "held-out loss", f"against {first}", "tokens", "sequential steps", "bytes up", "bytes down",
        "bytes/token",
    ]  # fmt: skip
    return Columns("At equal tokens", headings, [_result_row(method) for method in comparison.methods])


def target_columns(comparison: Comparison) -> Columns:
    """What it took to reach the target loss."""
    target = comparison.target_loss
    worst = "" if comparison.target_was_given else " (the worst final loss of any run, rounded up)"
    title = f"To a held-out loss of {target:g}{worst}" if target is not None else "No run finished"
    headings = ["method", "tokens", "sequential steps", "bytes up", "bytes down"]
    return Columns(title, headings, [_target_row(method) for method in comparison.methods])


def time_columns(comparison: Comparison) -> Columns:
    """Predicted time of the whole run on each link."""
    links = list(dict.fromkeys(link for method in comparison.methods for link in method.hours))
    rows = [[method.name, *(_time(method.hours.get(link)) for link in links)] for method in comparison.methods]
    return Columns("Predicted time of the whole run, by a node's link", ["method", *links], rows)


def tables(comparison: Comparison) -> list[Table]:
    """For the terminal, in 80 columns: quality, cost, and what it took to reach the target."""
    results = result_columns(comparison)
    cost = [0, *range(_FIRST_OF_BYTES, len(results.headings))]
    quality = Columns(
        results.title, results.headings[:_FIRST_OF_BYTES], [row[:_FIRST_OF_BYTES] for row in results.rows]
    )
    costs = Columns(
        "What crossed", [results.headings[i] for i in cost], [[row[i] for i in cost] for row in results.rows]
    )
    parts = [quality, costs, target_columns(comparison)]
    if comparison.hours_rest_on:
        parts.append(time_columns(comparison))
    return [_table(part) for part in parts]


def _table(columns: Columns) -> Table:
    table = Table(title=columns.title, title_justify="left")
    for index, heading in enumerate(columns.headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=not index)
    for row in columns.rows:
        table.add_row(*row)
    return table


def _result_row(method: MethodResult) -> list[str]:
    if method.loss is None:
        return [method.name, "failed", *["–"] * 6]
    failed = len(method.runs) - len(method.loss.values)
    loss = loss_text(method.loss) + (f" ({failed} failed)" if failed else "")
    difference = method.difference_percent
    return [
        method.name,
        loss,
        f"{difference:+.2f} %" if difference is not None else "–",
        count(method.tokens),
        f"{method.sequential_steps:,.0f}",
        *_both_ways(method, method.bytes_up, method.bytes_down),
        significant(method.bytes_per_token) if method.bytes_per_token is not None else "–",
    ]


def _target_row(method: MethodResult) -> list[str]:
    at = method.to_target
    if at is None:
        some = (
            f" by {len(method.runs) - method.runs_that_reached} of {len(method.runs)}" if len(method.runs) > 1 else ""
        )
        return [method.name, f"not reached{some}", "–", "–", "–"]
    both = _both_ways(method, at.bytes_up, at.bytes_down)
    return [method.name, count(at.tokens), f"{at.sequential_steps:,.0f}", *both]


def _both_ways(method: MethodResult, up: float, down: float) -> list[str]:
    mark = "*" if method.bytes_are_computed else ""
    return [byte_size(up) + mark, byte_size(down) + mark]


def _time(hours: float | None) -> str:
    return time_text(hours * _HOUR_S) if hours is not None else "–"
