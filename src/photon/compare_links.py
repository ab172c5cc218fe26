"""Predicted hours of each method on chosen links, by the planner's formulas as `photon plan` asks them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from photon.config import Recipe
from photon.devices import MEASURED, device_named
from photon.durable import write_atomic
from photon.plan_units import bandwidth_bits_per_s, bandwidth_text
from photon.recipe import dump_recipe

if TYPE_CHECKING:
    from photon.plan_answer import Question

_HOUR_S = 3600.0


def link_labels(links: Sequence[str]) -> list[str]:
    """`100Mbps` as `100 Mbit/s`. Raises InputError for what is no bandwidth."""
    return [bandwidth_text(bandwidth_bits_per_s(link, "--links")) for link in links]


def check_prediction(links: Sequence[str], device: str) -> None:
    """Raises InputError for a bandwidth or a device that `predicted_hours` would refuse once all runs are done."""
    link_labels(links)
    if links and device != MEASURED:
        device_named(device, "--plan-device")


def predicted_hours(recipe: Recipe, links: Sequence[str], device: str, scratch: Path) -> tuple[dict[str, float], str]:
    """Hours of the whole run by link, and what the numbers rest on; `scratch` is where the recipe is put for the plan.

    Every node has one `device`. A recipe with `federation.outer = none` is planned as what it computes: its K nodes
    exchange bfloat16 gradients through the Aggregator at every step, and one node alone exchanges nothing.
    Raises InputError for an unknown device or link.
    """
    if not links:
        return {}, ""
    question = _question(recipe, links[0], device, scratch)
    from photon.plan_answer import answer, with_bandwidth

    hours = {}
    for link, label in zip(links, link_labels(links), strict=True):
        plan = answer(with_bandwidth(question, bandwidth_bits_per_s(link, "--links")))
        total_s = plan.baseline.total_s if recipe.federation.outer == "none" else plan.total_s
        hours[label] = total_s / _HOUR_S
    return hours, question.assumptions[0]


def _question(recipe: Recipe, link: str, device: str, scratch: Path) -> Question:
    from photon.cli_plan import PlanOptions, ask

    write_atomic(scratch, dump_recipe(recipe))
    # Absolute, so that a `=` in a folder's name is not taken for an option.
    return ask(PlanOptions(words=[str(scratch.absolute())], bandwidth=link, device=device))
