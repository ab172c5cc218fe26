"""Predicted hours are those of `photon plan`."""

from __future__ import annotations

from pathlib import Path

import pytest

from photon.cli_plan import PlanOptions, ask
from photon.compare_links import check_prediction, link_labels, predicted_hours
from photon.errors import InputError
from photon.method import apply_method, load_method
from photon.plan_answer import answer
from photon.recipe import load_recipe


def test_bandwidths_are_refused_early() -> None:
    assert link_labels(["100Mbps", "1Gbps"]) == ["100 Mbit/s", "1.00 Gbit/s"]
    with pytest.raises(InputError, match="--links"):
        link_labels(["fast"])


def test_devices_are_refused_early() -> None:
    for device in ("H100", "cpu", "measured"):
        check_prediction(["1Gbps"], device)
    check_prediction([], "h1000")  # nothing is predicted
    with pytest.raises(InputError, match="--plan-device 'h1000' is not known"):
        check_prediction(["1Gbps"], "h1000")


def test_predicted_hours_are_those_of_photon_plan(tmp_path: Path) -> None:
    def asked(recipe: str, bandwidth: str) -> float:
        return answer(ask(PlanOptions(words=[recipe], bandwidth=bandwidth, device="cpu"))).total_s / 3600

    scratch = tmp_path / "plan.toml"
    hours, rest_on = predicted_hours(load_recipe("demo"), ["10Mbps", "1Gbps"], "cpu", scratch)
    assert hours["10.0 Mbit/s"] == pytest.approx(asked(str(scratch), "10Mbps"))
    assert hours["1.00 Gbit/s"] == pytest.approx(asked(str(scratch), "1Gbps"))
    assert "CPU" in rest_on
    per_step = apply_method(load_method("per-step"), "demo")
    central = apply_method(load_method("central-small"), "demo")
    slow, _ = predicted_hours(per_step, ["10Mbps", "1Gbps"], "cpu", scratch)
    alone, _ = predicted_hours(central, ["10Mbps", "1Gbps"], "cpu", scratch)
    assert slow["10.0 Mbit/s"] > slow["1.00 Gbit/s"]  # it waits for gradients at every step
    assert alone["10.0 Mbit/s"] == pytest.approx(alone["1.00 Gbit/s"])  # nothing to wait for
    assert predicted_hours(per_step, [], "cpu", scratch) == ({}, "")


def test_a_folder_with_an_equals_sign_is_no_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("lr=0.1")
    folder.mkdir()
    hours, _ = predicted_hours(load_recipe("demo"), ["1Gbps"], "cpu", folder / "plan.toml")
    assert hours["1.00 Gbit/s"] > 0
