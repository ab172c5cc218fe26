"""report.html: one run told in one self-contained page, made from its recipe.toml and metrics.jsonl alone.

The page asks the network for nothing, and its content security policy forbids it to. Everything of the run is escaped
by the template; should anything slip through, the policy still lets the browser run no script but the page's own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from photon import report_content as content
from photon.durable import write_atomic
from photon.errors import StateError
from photon.events import Event
from photon.readable import byte_size, count, duration, printable, significant
from photon.report_charts import COLOURS
from photon.report_link import link_rows, times_fewer
from photon.report_plan import predicted_and_measured
from photon.track import METRICS_FILE, read_events

RECIPE_FILE = "recipe.toml"
REPORT_FILE = "report.html"


def write_report(run_folder: Path) -> Path:
    """Write RUN/report.html atomically and return its path; the run may still be going on.

    Raises StateError if recipe.toml or metrics.jsonl cannot be read, or if no run has started in that folder.
    """
    recipe_path = run_folder / RECIPE_FILE
    try:
        recipe = recipe_path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(f"cannot read {recipe_path}: {error}. Is {run_folder} the folder of a run?") from error
    path = run_folder / REPORT_FILE
    write_atomic(path, render_report(read_events(run_folder / METRICS_FILE), recipe))
    return path


def render_report(events: Sequence[Event], recipe: str) -> str:
    """The page, from the events of a run in order and the text of its recipe.

    Raises StateError if `events` hold no run_started event.
    """
    run = content.Run.of(events, recipe)
    script = asset("report.js")
    page = {
        "run": run,
        "summary": run.summary,
        "lede": content.lede(run),
        "local_steps": content.local_steps(run),
        "axes": run.axes(),
        "colours": COLOURS,
        "learning": content.learning_figures(run),
        "silos": content.silo_rows(run),
        "round_rows": content.round_rows(run),
        "drift": content.drift_figures(run),
        "heat": content.heat_maps(run),
        "heat_scale": content.heat_scale(run),
        "phases": content.phase_rows(run),
        "plan": predicted_and_measured(run.start, run.rounds, recipe),
        "speed": content.speed_figures(run),
        "nodes": content.node_rows(run),
        "missing": content.missing_rows(run),
        "link": link_rows(run.summary, recipe),
        "fewer_up": times_fewer(run.summary.link.up),
        "fewer_down": times_fewer(run.summary.link.down),
        "samples": content.shown_samples(run),
        "style": Markup(asset("report.css")),  # noqa: S704 - a file of this package
        "script": Markup(script),  # noqa: S704 - a file of this package
        "script_sha256": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return _environment().get_template("report.html.jinja").render(page)


def asset(name: str) -> str:
    """A text file of photon/assets; line ends are \\n, so that the hash of the script holds on every system."""
    return resources.files("photon").joinpath("assets", name).read_text("utf-8").replace("\r\n", "\n")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("photon", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": byte_size,
        "count": count,
        "duration": duration,
        "number": significant,
        "printable": printable,
    }
    return environment
