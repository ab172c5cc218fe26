"""The drawings of a comparison as inline SVG: held-out loss of every method over what it cost.

Text reaches the page through ElementTree alone, which escapes it. Sizes are in SVG units of a drawing 560 wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup

from photon.compare_content import MethodResult
from photon.compare_curve import Moment
from photon.readable import byte_size, count, printable, significant
from photon.report_charts import COLOURS, nice_ticks, tick_label

_WIDTH, _HEIGHT = 560.0, 340.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 18.0, 14.0, 34.0
_TICKS = 5

Point = tuple[float, float]


@dataclass(frozen=True)
class Cost:
    """What the x axis measures."""

    title: str
    label: str
    of: Callable[[Moment], float]
    format: Callable[[float], str]
    is_logarithmic: bool


TOKENS = Cost("Loss over tokens", "tokens", lambda moment: moment.tokens, count, is_logarithmic=False)
BYTES = Cost(
    "Loss over bytes", "bytes moved, up and down", lambda moment: moment.bytes_moved, byte_size, is_logarithmic=True
)


@dataclass(frozen=True)
class Line:
    """One method: a line for each seed, and their mean."""

    name: str
    style: str
    seeds: Sequence[Sequence[Point]]
    mean: Sequence[Point]


def style_of(index: int) -> str:
    """The class of the index-th method's colour."""
    return f"s{index % COLOURS + 1}"


def lines_of(methods: Sequence[MethodResult], cost: Cost) -> list[Line]:
    """What is drawn. The untrained model is left out: it is the same for all, and far above everything else.

    On a logarithmic axis what cost nothing has no place either.
    """
    lines = []
    for index, method in enumerate(methods):
        seeds = [
            [(cost.of(m), m.loss) for m in run.curve if m.sequential_steps > 0 and math.isfinite(m.loss)]
            for run in method.runs
        ]
        if cost.is_logarithmic:
            seeds = [[(x, y) for x, y in points if x > 0] for points in seeds]
        seeds = [points for points in seeds if points]
        if seeds:
            columns = zip(*seeds, strict=False)  # a run that failed is shorter: the mean ends with it
            mean = [(fmean(x for x, _ in column), fmean(y for _, y in column)) for column in columns]
            lines.append(Line(method.name, style_of(index), seeds, mean))
    return lines


def loss_chart(methods: Sequence[MethodResult], cost: Cost, target_loss: float | None) -> Markup | None:
    """The drawing, with a dashed line at the target; None if no method has anything to draw."""
    lines = lines_of(methods, cost)
    points = [point for line in lines for seed in line.seeds for point in seed]
    if not points:
        return None
    xs = [_across(x, cost) for x, _ in points]
    losses = [y for _, y in points] + ([target_loss] if target_loss is not None else [])
    ticks = nice_ticks(min(losses), max(losses), outside=True)
    x_of = _scale(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    y_of = _scale(ticks[0], ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    svg = Element("svg", {"class": "chart", "viewBox": f"0 0 {_WIDTH:g} {_HEIGHT:g}", "role": "img"})
    svg.set("aria-label", printable(f"{cost.title}. {_spoken(lines, cost)}"))
    for tick in ticks:
        _line(svg, "grid", y_of(tick))
        _text(svg, "tick end", _LEFT - 8, y_of(tick) + 4, tick_label(tick, ticks))
    for at in _x_ticks(min(xs), max(xs), cost):
        value = 10**at if cost.is_logarithmic else at
        x = min(max(x_of(at), _LEFT + 12), _WIDTH - _RIGHT - 22)
        _text(svg, "tick middle", x, _HEIGHT - _BOTTOM + 20, cost.format(value))
    if target_loss is not None:
        _line(svg, "grid target", y_of(target_loss))
    for line in lines:
        for seed in line.seeds if len(line.seeds) > 1 else []:
            _draw(svg, f"{line.style} calm", [(x_of(_across(x, cost)), y_of(y)) for x, y in seed], opacity="0.35")
        _draw(svg, f"{line.style} strong", [(x_of(_across(x, cost)), y_of(y)) for x, y in line.mean])
        for x, y in line.mean:
            place = {"cx": f"{x_of(_across(x, cost)):.1f}", "cy": f"{y_of(y):.1f}", "r": "3"}
            dot = SubElement(svg, "circle", {"class": f"dot {line.style}", **place})
            SubElement(dot, "title").text = printable(f"{line.name}, {cost.format(x)}: {significant(y, 4)}")
    return Markup(tostring(svg, encoding="unicode"))  # noqa: S704 - ElementTree escaped every text and attribute


def _across(x: float, cost: Cost) -> float:
    return math.log10(x) if cost.is_logarithmic else x


def _x_ticks(low: float, high: float, cost: Cost) -> list[float]:
    """Round numbers of tokens; powers of ten of bytes if they are enough, else evenly on the logarithm."""
    if not cost.is_logarithmic:
        return nice_ticks(low, high)
    powers = [float(power) for power in range(math.ceil(low), math.floor(high) + 1)]
    return powers if len(powers) >= 3 else [low + (high - low) * i / (_TICKS - 1) for i in range(_TICKS)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _spoken(lines: Sequence[Line], cost: Cost) -> str:
    """The last point of each line, for those who do not see the drawing."""
    told = [f"{line.name}: {significant(line.mean[-1][1], 4)} at {cost.format(line.mean[-1][0])}" for line in lines]
    return "; ".join(told) + "."


def _draw(svg: Element, style: str, places: Sequence[Point], opacity: str | None = None) -> None:
    path = {"class": f"line {style}", "d": "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)}
    SubElement(svg, "path", path if opacity is None else {**path, "stroke-opacity": opacity})


def _line(svg: Element, style: str, y: float) -> None:
    place = {"x1": f"{_LEFT:g}", "y1": f"{y:.1f}", "x2": f"{_WIDTH - _RIGHT:g}", "y2": f"{y:.1f}"}
    SubElement(svg, "line", {"class": style, **place, **({"stroke-dasharray": "6 4"} if "target" in style else {})})


def _text(svg: Element, style: str, x: float, y: float, text: str) -> None:
    SubElement(svg, "text", {"class": style, "x": f"{x:.1f}", "y": f"{y:.1f}"}).text = text
