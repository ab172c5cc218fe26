"""The report's drawings as inline SVG. Text reaches the page through ElementTree alone, which escapes it.

Sizes are in SVG units of a drawing 560 wide; the style sheet scales it. Colours are classes (`s1` ... `s8`, `calm`),
so that light, dark and print choose their own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup

from photon.readable import count, duration, printable, significant

COLOURS = 8
_WIDTH, _HEIGHT = 560.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 18.0, 14.0, 34.0
_MOST_DOTS = 30
_FLAT = 1e-9
_HEAT_SIZE = 340.0
_HEAT_NAMES_UP_TO = 14
_HEAT_NAME_ROOM = 70.0
_HEAT_NUMBERS_UP_TO = 8
_TIME_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400)

Values = Sequence[float | None]


@dataclass(frozen=True)
class Axis:
    """One meaning of the x axis: where each round stands on it."""

    key: str
    label: str
    moment: str  # completes a value to a phrase: "352 MB" + "moved"
    format: Callable[[float], str]
    position: Mapping[int, float]

    def ticks(self, low: float, high: float) -> list[float]:
        """About five round positions; times fall on whole seconds, minutes, hours."""
        if self.format is not duration:
            return nice_ticks(low, high)
        wanted = (high - low) / 5
        step = next((s for s in _TIME_STEPS_S if s >= wanted), 86400 * math.ceil(wanted / 86400))
        return [tick for i in range(7) if (tick := float(math.ceil(low / step) * step + i * step)) <= high]


@dataclass(frozen=True)
class Series:
    """One line: a value (or None) per round of its chart. `style` is a class name of the style sheet."""

    name: str
    values: Values
    style: str


@dataclass(frozen=True)
class Chart:
    """Lines over the same rounds, with the words a reader needs."""

    title: str
    caption: str
    unit: str
    rounds: Sequence[int]
    series: Sequence[Series]
    from_zero: bool = False  # zero is in the picture, whatever the values


def line_chart(chart: Chart, axis: Axis) -> Markup:
    """Draw `chart` over `axis`. Values that are None or not finite leave no mark; lines join the values around them.

    The numbers behind the drawing are in its `data-chart` attribute, for the hover script.
    """
    xs = [axis.position[number] for number in chart.rounds]
    ys = [v for series in chart.series for v in series.values if v is not None and math.isfinite(v)]
    x_low, x_high = (min(xs), max(xs)) if xs else (0.0, 1.0)
    anchors = [0.0] if chart.from_zero or not ys else []
    y_ticks = nice_ticks(min([*ys, *anchors]), max([*ys, *anchors]), outside=True)
    x_of = _scale(x_low, x_high, _LEFT, _WIDTH - _RIGHT)
    y_of = _scale(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)

    svg = Element("svg", {"class": "chart", "viewBox": f"0 0 {_WIDTH:g} {_HEIGHT:g}", "role": "img", "tabindex": "0"})
    svg.set("aria-label", printable(f"{chart.title}, by {axis.label}. {chart.caption} {_spoken(chart)}"))
    svg.set("data-chart", _hover_data(chart, axis, [x_of(x) for x in xs]))
    for tick in y_ticks:
        y = y_of(tick)
        _line(svg, "grid", _LEFT, y, _WIDTH - _RIGHT, y)
        _text(svg, "tick end", _LEFT - 8, y + 4, tick_label(tick, y_ticks))
    for tick in axis.ticks(x_low, x_high):
        _text(svg, "tick middle", x_of(tick), _HEIGHT - _BOTTOM + 20, _trimmed(axis.format(tick)))
    for series in chart.series:
        points = [
            (x_of(x), y_of(v)) for x, v in zip(xs, series.values, strict=True) if v is not None and math.isfinite(v)
        ]
        if points:
            _draw_series(svg, series.style, points)
    return _markup(svg)


def _draw_series(svg: Element, style: str, points: Sequence[tuple[float, float]]) -> None:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    SubElement(svg, "path", {"class": f"line {style}", "d": path})
    dots = points if len(points) <= _MOST_DOTS and "calm" not in style else points[-1:]
    for x, y in dots:
        SubElement(svg, "circle", {"class": f"dot {style}", "cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "2.5"})


def heat_map(names: Sequence[str], cosine: Sequence[Sequence[float]], strongest: float, title: str) -> Markup:
    """The lower triangle of a symmetric matrix; colour runs from 0 to `strongest` in either sign.

    `cosine` is [n, n] with rows and columns as `names`. Every cell names its pair and value on hover.
    """
    n = len(names)
    cell = _HEAT_SIZE / max(n, 2)
    width = _HEAT_SIZE + (_HEAT_NAME_ROOM if n <= _HEAT_NAMES_UP_TO else 0.0)
    svg = Element("svg", {"class": "heat", "viewBox": f"0 0 {width:g} {_HEAT_SIZE:g}", "role": "img"})
    svg.set("aria-label", title)
    size = f"{cell * 0.97:.2f}"
    for row in range(n):
        for column in range(row):
            value = cosine[row][column]
            strength = min(1.0, abs(value) / strongest) if math.isfinite(value) and strongest > 0 else 0.0
            x, y = column * cell, row * cell
            place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": size, "height": size, "fill-opacity": f"{strength:.2f}"}
            group = SubElement(svg, "g")
            SubElement(group, "rect", {"class": "cell against" if value < 0 else "cell", **place})
            SubElement(group, "title").text = printable(f"{names[row]} and {names[column]}: {value:.3f}")
            if n <= _HEAT_NUMBERS_UP_TO:
                ink = "cell-number strong" if strength > 0.6 else "cell-number"
                _text(group, ink, x + cell / 2, y + cell / 2 + 5, f"{value:.2f}")
        if n <= _HEAT_NAMES_UP_TO:
            _text(svg, "cell-name", row * cell + 5, row * cell + cell / 2 + 5, _short(names[row], width - row * cell))
    return _markup(svg)


def sparkline(values: Values) -> Markup:
    """A small line for a table row, 100 x 24, from the first value to the last."""
    finite = [(i, v) for i, v in enumerate(values) if v is not None and math.isfinite(v)]
    svg = Element("svg", {"class": "spark", "viewBox": "0 0 100 24", "aria-hidden": "true"})
    if len(finite) > 1:
        low, high = min(v for _, v in finite), max(v for _, v in finite)
        x_of, y_of = _scale(0, len(values) - 1, 3, 97), _scale(low, high, 21, 3)
        _draw_series(svg, "s1 calm", [(x_of(i), y_of(v)) for i, v in finite])
    return _markup(svg)


def nice_ticks(low: float, high: float, outside: bool = False) -> list[float]:
    """Four to seven multiples of 1, 2 or 5 x 10^k within [low, high]; `outside` adds one beyond each end."""
    size = max(abs(low), abs(high))
    span = high - low if high - low > _FLAT * size else size  # noise around one value is that value
    raw = (span if span > _FLAT else 1.0) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9) if outside else math.ceil(low / step - 1e-9)
    last = math.ceil(high / step - 1e-9) if outside else math.floor(high / step + 1e-9)
    if outside and last == first:
        last += 1
    decimals = 3 - math.floor(math.log10(step))
    return [round(i * step, decimals) for i in range(first, last + 1)]


def tick_label(tick: float, ticks: Sequence[float]) -> str:
    """A tick with as many decimals as the distance between ticks needs, scaled from ten thousand on."""
    if max(abs(t) for t in ticks) >= 10_000 and len({count(t) for t in ticks}) == len(ticks):
        return _trimmed(count(tick))
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else 1.0
    return f"{tick:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _trimmed(label: str) -> str:
    """1.50k as 1.5k, 20.0 MB as 20 MB: a tick is exact, so its zeros say nothing."""
    return re.sub(r"\.(?!\d)", "", re.sub(r"(\.\d*?)0+(?!\d)", r"\1", label))


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _spoken(chart: Chart) -> str:
    """First and last value of the first few lines, for those who do not see the drawing."""
    told = []
    for series in chart.series[:COLOURS]:
        values = [v for v in series.values if v is not None]
        if values:
            told.append(f"{series.name}: from {significant(values[0])} to {significant(values[-1])}")
    return "; ".join(told) + "."


def _hover_data(chart: Chart, axis: Axis, xs: Sequence[float]) -> str:
    labels = [f"round {r}, {axis.format(axis.position[r])} {axis.moment}" for r in chart.rounds]
    series = [
        {
            "name": printable(s.name),
            "style": s.style,
            "values": [None if v is None else significant(v, 4) for v in s.values],
        }
        for s in chart.series
    ]
    data = {"x": [round(x, 1) for x in xs], "labels": labels, "series": series}
    return json.dumps(data, separators=(",", ":"))


def _short(name: str, room: float) -> str:
    """A name cut to `room` SVG units."""
    letters = max(2, int((room - 5) / 8))
    shown = printable(name)
    return shown if len(shown) <= letters else shown[: letters - 1] + "…"


def _line(parent: Element, style: str, x1: float, y1: float, x2: float, y2: float) -> None:
    SubElement(
        parent, "line", {"class": style, "x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    )


def _text(parent: Element, style: str, x: float, y: float, text: str) -> None:
    SubElement(parent, "text", {"class": style, "x": f"{x:.1f}", "y": f"{y:.1f}"}).text = text


def _markup(svg: Element) -> Markup:
    return Markup(tostring(svg, encoding="unicode"))  # noqa: S704 - ElementTree escaped every text and attribute
