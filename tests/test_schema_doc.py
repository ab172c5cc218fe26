"""docs/metrics.md is what the schema says, and says all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from photon.events import Evaluated, Event, NodeRound, RoundDone, Scores
from photon.schema_doc import event_kind, event_types, metrics_markdown
from photon.sinks import scalars
from photon.summary import Quality, Standing, Summary

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


def section(page: str, heading: str) -> str:
    """The text under a heading, up to the next one."""
    _, found, rest = page.partition(f"# {heading}\n")
    assert found, heading
    return rest.partition("\n#")[0]


def undocumented(page: str) -> Iterator[str]:
    """Fields of the schema that the page has no line for."""
    shared = section(page, "Events of metrics.jsonl")
    headings: list[tuple[str, type[BaseModel]]] = [(f"`{event_kind(event)}`", event) for event in event_types()]
    headings += [(model.__name__, model) for model in (Scores, NodeRound, Standing, Quality)]
    for heading, model in [*headings, ("summary.json", Summary)]:
        text = section(page, heading) + (shared if heading.startswith("`") else "")
        for name, field in model.model_fields.items():
            lines = [line for line in text.splitlines() if line.startswith(f"- `{name}` (")]
            if len(lines) != 1 or (field.description and not lines[0].endswith(f": {field.description}")):
                yield f"{heading}: {name}"


def test_the_committed_page_is_the_generated_one() -> None:
    if not PAGE.parent.is_dir():
        pytest.skip("docs/ is not part of an installed package")
    assert PAGE.read_text(encoding="utf-8") == metrics_markdown(), "run: python -m photon.schema_doc > docs/metrics.md"


def test_every_field_of_events_and_summary_has_a_line() -> None:
    page = metrics_markdown()
    assert not list(undocumented(page))
    # The check can fail: a page that lost one line is caught.
    shorter = page.replace("- `update_norm` (number)", "", 1)
    assert list(undocumented(shorter)) == ["NodeRound: update_norm"]


def test_links_lead_to_sections() -> None:
    page = metrics_markdown()
    for name in ("Scores", "NodeRound", "Standing", "Quality"):
        assert f"[{name}](#{name.lower()})" in page
        assert f"\n### {name}\n" in page


def test_the_page_names_the_groups_that_trackers_see(make_events: Callable[..., list[Event]]) -> None:
    introduction = metrics_markdown().partition("\n## ")[0]
    events = [event for event in make_events() if isinstance(event, Evaluated | RoundDone)]
    groups = {name.partition("/")[0].partition("_")[0] for event in events for name in scalars(event)}
    assert groups == {"heldout", "train", "total", "phase", "round", "node"}
    for group in ("heldout/*", "heldout_SILO/*", "train/*", "total/*", "phase_s/*", "round/missing", "node_NAME/*"):
        assert f"`{group}`" in introduction
