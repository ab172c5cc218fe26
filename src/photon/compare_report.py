"""compare.html: a comparison as one self-contained page, made from compare.json alone.

Its style is the report's. The page asks the network for nothing, runs no script, and escapes everything it is told.
"""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from photon.compare_charts import BYTES, TOKENS, loss_chart, style_of
from photon.compare_content import Comparison
from photon.compare_table import result_columns, target_columns, time_columns
from photon.readable import printable, significant
from photon.report import asset


def compare_page(comparison: Comparison) -> str:
    """The whole page."""
    drawn = [(cost, loss_chart(comparison.methods, cost, comparison.target_loss)) for cost in (TOKENS, BYTES)]
    columns = [result_columns(comparison), target_columns(comparison)]
    if comparison.hours_rest_on:
        columns.append(time_columns(comparison))
    environment = Environment(
        loader=PackageLoader("photon", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"printable": printable, "number": significant}
    return environment.get_template("compare.html.jinja").render(
        comparison=comparison,
        columns=columns,
        figures=[(cost, drawing) for cost, drawing in drawn if drawing is not None],
        styles=[style_of(index) for index in range(len(comparison.methods))],
        style=Markup(asset("report.css")),  # noqa: S704 - a file of this package
    )
