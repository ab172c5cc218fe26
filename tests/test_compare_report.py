"""The page of a comparison: whole in itself, complete, and harmless whatever it is told."""

from __future__ import annotations

import re

from tests.made_up_comparison import DILOCO, FEDAVG, comparison, row
from tests.test_report import HOSTILE, Page

from photon.compare_content import (
    TunedPoint,
)
from photon.compare_report import compare_page


def test_the_page_is_self_contained_and_holds_every_recipe_and_setting() -> None:
    recipes = {name: f"# recipe of {name}\n" for name in ("fedavg", "diloco")}
    whole = comparison(
        row("fedavg", *FEDAVG.runs, recipe=recipes["fedavg"]), row("diloco", *DILOCO.runs, recipe=recipes["diloco"])
    )
    html = compare_page(whole)
    page = Page(html)
    assert not re.search(r"https?://|//[a-z]", html)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "iframe", "link", "a", "form", "object"})
    for _, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("src", "href") for name in attributes)
    assert all(recipe.strip() in html for recipe in recipes.values())
    figures, sections = len(page.all("figure")), html.count("<section>")
    assert figures == 2
    assert html.count(whole.setting.label) >= figures + sections - 2  # not under the notes, nor beside the two charts
    assert whole.headline in html
    assert "No method was tuned" in html


def test_nothing_told_becomes_markup() -> None:
    hostile = FEDAVG.model_copy(
        update={"name": HOSTILE, "about": HOSTILE, "recipe": HOSTILE, "settings": HOSTILE, "edges": [HOSTILE],
                "tuned": [TunedPoint(settings=HOSTILE, loss=None, failure=HOSTILE, won=True)]}
    )  # fmt: skip
    page = Page(compare_page(comparison(hostile, recipe=HOSTILE, notes=[HOSTILE], points_per_method=2)))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img"})


def test_tuning_is_shown_with_its_winner_and_edge() -> None:
    points = [
        TunedPoint(settings="", loss=4.1, failure="", won=False),
        TunedPoint(settings="node.lr = 0.02", loss=4.0, failure="", won=True),
    ]
    html = compare_page(
        comparison(FEDAVG.model_copy(update={"tuned": points, "edges": ["node.lr"]}), points_per_method=2)
    )
    assert "at the edge of the grid in node.lr" in html
    assert re.search(r"node\.lr = 0\.02</th><td>4\.0000</td><td>won", html)
    assert "No method was tuned" not in html
