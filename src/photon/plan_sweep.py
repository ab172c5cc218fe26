"""A plan over a range of tau or bandwidth: a table, and a picture that needs no network."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from xml.etree.ElementTree import Element, SubElement, tostring

from photon.errors import ConfigError, InputError
from photon.plan_answer import Plan, Question, answer, with_bandwidth, with_tau
from photon.plan_text import lede, notes, sections
from photon.plan_units import bandwidth_bits_per_s, bandwidth_text, time_text
from photon.readable import byte_size, one_line, printable

if TYPE_CHECKING:
    from rich.table import Table

# Round times, ten or so apart: a second, ten, a minute ... a hundred days, a thousand.
_TIMES_S = (1e-3, 1e-2, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 36e3, 864e3, 864e4, 864e5)

Key = Literal["tau", "bandwidth"]
_POINTS = 25  # of a bandwidth sweep at most; a tau sweep doubles
_PER_DECADE = 4
_MOST_TAU = 10**9
_WHOLE = re.compile("[0-9]{1,10}")  # Python reads no number of thousands of digits
_WIDTH, _HEIGHT = 560.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 84.0, 18.0, 14.0, 34.0


@dataclass(frozen=True)
class Asked:
    """`tau=16..512` or `bandwidth=10Mbps..10Gbps`: what is swept and the values, ascending."""

    key: Key
    values: tuple[float, ...]


@dataclass(frozen=True)
class Point:
    """One value and its plan."""

    value: float
    plan: Plan


@dataclass(frozen=True)
class Sweep:
    """What was asked and the plans."""

    asked: Asked
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Line:
    """A line of a chart: its name, class of colour, and a value per point."""

    name: str
    style: str
    values: Sequence[float]


@dataclass(frozen=True)
class Picture:
    """A chart with its words. `is_share`: from 0 to 1, else logarithmic."""

    title: str
    caption: str
    lines: tuple[Line, ...]
    is_share: bool
    label: Callable[[float], str]


DEFAULTS = ("tau=8..1024", "bandwidth=10Mbps..10Gbps")


def parse_sweep(text: str) -> Asked:
    """Raises InputError for anything but the two forms."""
    key, equals, span = text.partition("=")
    low, dots, high = span.partition("..")
    if not (equals and dots):
        raise InputError(f"--sweep is tau=16..512 or bandwidth=10Mbps..10Gbps, not {text!r}")
    if key == "tau":
        if not (_WHOLE.fullmatch(low) and _WHOLE.fullmatch(high) and 0 < int(low) < int(high) <= _MOST_TAU):
            raise InputError(
                f"--sweep tau=A..B takes whole numbers of local steps, A below B, at most {_MOST_TAU:,}, "
                f"not {one_line(span, 60)!r}"
            )
        values = [int(low) * 2**i for i in range(40) if int(low) * 2**i < int(high)]
        return Asked("tau", (*map(float, values), float(high)))
    if key == "bandwidth":
        first, last = bandwidth_bits_per_s(low, "--sweep bandwidth"), bandwidth_bits_per_s(high, "--sweep bandwidth")
        if first >= last:
            raise InputError(f"--sweep bandwidth=A..B goes upwards, not {span!r}")
        steps = min(_POINTS - 1, max(1, math.ceil(_PER_DECADE * math.log10(last / first))))
        return Asked("bandwidth", tuple(first * (last / first) ** (i / steps) for i in range(steps + 1)))
    raise InputError(f"--sweep goes over tau or bandwidth, not {key!r}")


def swept(question: Question, asked: Asked) -> Sweep:
    """The plan at every value; tokens stay the same as tau changes.

    Left out is a tau beyond the whole run, or one that the recipe's parts do not allow. Raises InputError, or the
    parts' ConfigError, if none is left.
    """
    steps = question.sequential_steps
    values = [value for value in asked.values if asked.key != "tau" or value <= steps]
    refusal: InputError = InputError(
        f"tau={asked.values[0]:.0f}..{asked.values[-1]:.0f} lies beyond the run: it is over after {steps} local steps"
    )
    points = list[Point]()
    for value in values:
        try:
            changed = with_tau(question, round(value)) if asked.key == "tau" else with_bandwidth(question, value)
        except ConfigError as error:
            refusal = error
        else:
            points.append(Point(value, answer(changed)))
    if not points:
        raise refusal
    return Sweep(asked, tuple(points))


def value_text(key: Key, value: float) -> str:
    """A value of the sweep for people."""
    return f"{value:g}" if key == "tau" else bandwidth_text(value)


def sweep_table(sweep: Sweep) -> Table:
    """For the terminal: one row a value."""
    from rich.table import Table

    title = f"By {sweep.asked.key}; hidden: per-step training that hides its exchange"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in (sweep.asked.key, "round", "training", "the run", "per-step", "hidden", "a day"):
        table.add_column(heading, justify="right", no_wrap=True)
    for point in sweep.points:
        plan = point.plan
        table.add_row(
            value_text(sweep.asked.key, point.value),
            time_text(plan.round_s),
            f"{100 * plan.utilisation:.1f} %",
            time_text(plan.total_s),
            time_text(plan.baseline.total_s),
            time_text(plan.baseline.overlapped_total_s),
            byte_size(plan.bytes.day_bytes),
        )
    return table


def pictures(sweep: Sweep) -> list[Picture]:
    """Time against per-step training, and how much of it is training."""
    plans = [point.plan for point in sweep.points]
    by = "local steps between exchanges" if sweep.asked.key == "tau" else "bandwidth of a node's link"
    return [
        Picture(
            f"Time of the whole run, by {sweep.asked.key}",
            f"Against per-step training on the same links; {by} to the right.",
            (
                Line("this run", "s1", [plan.total_s for plan in plans]),
                Line("per-step training", "s2", [plan.baseline.total_s for plan in plans]),
                Line("per-step, exchange hidden", "s3", [plan.baseline.overlapped_total_s for plan in plans]),
            ),
            is_share=False,
            label=time_text,
        ),
        Picture(
            f"Share of the time in which nodes train, by {sweep.asked.key}",
            f"Of the whole round; {by} to the right.",
            (Line("training", "s1", [plan.utilisation for plan in plans]),),
            is_share=True,
            label=lambda share: f"{100 * share:.0f} %",
        ),
    ]


def write_picture(path: Path, question: Question, plan: Plan, sweep: Sweep | None) -> None:
    """A page with the plan and its pictures (.html), or the time chart alone (.svg). Without a sweep: the usual two.

    A usual one that this run is too short for, or that its parts refuse, has nothing to show: the page goes without it,
    and a chart alone raises InputError.
    """
    from photon.durable import write_atomic

    if path.suffix == ".svg":
        drawn = sweep or swept(question, parse_sweep(DEFAULTS[0]))
        write_atomic(path, _standalone(draw(pictures(drawn)[0], drawn)))
        return
    sweeps = [sweep] if sweep else []
    for text in () if sweep else DEFAULTS:
        with suppress(InputError):
            sweeps.append(swept(question, parse_sweep(text)))
    write_atomic(path, page(plan, sweeps))


def page(plan: Plan, sweeps: Sequence[Sweep]) -> str:
    """The whole page; its style is the report's, and it asks the network for nothing."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    from photon.report import asset

    drawn = [
        (picture, Markup(tostring(draw(picture, sweep), encoding="unicode")))  # noqa: S704 - ElementTree escaped it
        for sweep in sweeps
        for picture in pictures(sweep)
    ]
    environment = Environment(
        loader=PackageLoader("photon", "assets"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("plan.html.jinja").render(
        title=printable(plan.recipe),
        lede=printable(lede(plan)),
        sections=sections(plan),
        notes=notes(plan),
        pictures=drawn,
        style=Markup(asset("report.css")),  # noqa: S704 - a file of this package
    )


def draw(picture: Picture, sweep: Sweep) -> Element:
    """The chart as SVG; both axes logarithmic, or the upright one from 0 to 1. Every dot says its numbers on hover."""
    xs = [math.log10(point.value) for point in sweep.points]
    ys = [[_height(value, picture) for value in line.values] for line in picture.lines]
    low, high = (0.0, 1.0) if picture.is_share else (min(map(min, ys)), max(map(max, ys)))
    x_of = _scale(xs[0], xs[-1], _LEFT, _WIDTH - _RIGHT)
    y_of = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    svg = Element("svg", {"class": "chart", "viewBox": f"0 0 {_WIDTH:g} {_HEIGHT:g}", "role": "img"})
    svg.set("aria-label", f"{picture.title}. {picture.caption} {_spoken(picture)}")
    for y in _heights(low, high, picture.is_share):
        place = {"x1": f"{_LEFT:g}", "y1": f"{y_of(y):.1f}", "x2": f"{_WIDTH - _RIGHT:g}", "y2": f"{y_of(y):.1f}"}
        SubElement(svg, "line", {"class": "grid", **place})
        _text(svg, "tick end", _LEFT - 8, y_of(y) + 4, picture.label(y if picture.is_share else 10**y))
    named = (
        range(len(xs))
        if sweep.asked.key == "tau" and len(xs) <= 9
        else {round(i * (len(xs) - 1) / 4) for i in range(5)}
    )
    for index in sorted(named):
        label = value_text(sweep.asked.key, sweep.points[index].value)
        _text(svg, "tick middle", min(x_of(xs[index]), _WIDTH - 40), _HEIGHT - _BOTTOM + 20, label)
    for line, heights in zip(picture.lines, ys, strict=True):
        places = [(x_of(x), y_of(y)) for x, y in zip(xs, heights, strict=True)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        SubElement(svg, "path", {"class": f"line {line.style}", "d": path})
        for (x, y), value, point in zip(places, line.values, sweep.points, strict=True):
            dot = SubElement(
                svg, "circle", {"class": f"dot {line.style}", "cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "3"}
            )
            where = value_text(sweep.asked.key, point.value)
            SubElement(dot, "title").text = f"{line.name}, {where}: {picture.label(value)}"
    return svg


def _standalone(svg: Element) -> str:
    """The drawing as a file of its own, with the few styles that the page's sheet would give it."""
    svg.set("xmlns", "http://www.w3.org/2000/svg")
    style = Element("style")
    style.text = (
        "text{fill:#6d675f;font:13.5px system-ui,sans-serif}.end{text-anchor:end}.middle{text-anchor:middle}"
        ".grid{stroke:#e4e0d8}.line{fill:none;stroke-width:2}.line.s1{stroke:#2f55d4}.line.s2{stroke:#c77700}"
        ".line.s3{stroke:#0b8a5f}.dot.s1{fill:#2f55d4}.dot.s2{fill:#c77700}.dot.s3{fill:#0b8a5f}"
    )
    svg.insert(0, style)
    return tostring(svg, encoding="unicode") + "\n"


def _heights(low: float, high: float, is_share: bool) -> list[float]:
    """Where the grid lies: at round times if the picture spans enough of them, else evenly."""
    rounded = [math.log10(seconds) for seconds in _TIMES_S if low <= math.log10(seconds) <= high]
    return rounded if len(rounded) >= 3 and not is_share else [low + (high - low) * i / 4 for i in range(5)]


def _height(value: float, picture: Picture) -> float:
    return value if picture.is_share else math.log10(max(value, 1e-9))


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _spoken(picture: Picture) -> str:
    told = [
        f"{line.name}: from {picture.label(line.values[0])} to {picture.label(line.values[-1])}"
        for line in picture.lines
    ]
    return "; ".join(told) + "."


def _text(parent: Element, style: str, x: float, y: float, text: str) -> None:
    SubElement(parent, "text", {"class": style, "x": f"{x:.1f}", "y": f"{y:.1f}"}).text = text
