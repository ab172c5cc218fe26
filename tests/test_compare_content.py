"""What follows from the runs: targets, means, differences, headline, setting."""

from __future__ import annotations

import math

import pytest
from tests.made_up_comparison import DILOCO, FAILED, FEDAVG, made_up, row

from photon.compare_content import (
    default_target,
    headline,
    setting_of,
    with_differences,
)
from photon.method import apply_method, load_method
from photon.recipe import load_recipe


def test_the_default_target_is_reached_by_every_run() -> None:
    runs = [made_up(7, 8.0, 4.001), made_up(8, 8.0, 3.2), made_up(9, 8.0, math.nan), FAILED]
    assert default_target(runs) == 4.01
    assert default_target([made_up(7, 8.0, 4.56)]) == 4.56  # not 4.57: what is round stays
    assert default_target([FAILED]) is None


def test_a_row_holds_means_over_seeds() -> None:
    assert FEDAVG.loss is not None
    assert FEDAVG.loss.values == [4.0, 4.5]
    assert FEDAVG.loss.deviation == pytest.approx(0.5 / math.sqrt(2))
    assert FEDAVG.bytes_per_token == 3000
    # 5.0 is half way from 6 to 4, and two thirds from 6 to 4.5
    assert FEDAVG.to_target is not None
    assert FEDAVG.to_target.tokens == pytest.approx((1500 + 1000 + 2000 / 3) / 2)
    first, second = with_differences([FEDAVG, DILOCO])
    assert first.difference_percent == 0
    assert second.difference_percent == pytest.approx(100 * (3.2 - 4.25) / 4.25)


def test_the_headline_weighs_the_difference_against_the_spread() -> None:
    setting = setting_of(load_recipe("demo"), {}, 2000, [7, 8])
    assert "diloco has the lowest held-out loss, 3.2000" in headline([FEDAVG, DILOCO], setting)
    assert headline([FEDAVG, DILOCO], setting).endswith("more than the spread over seeds.")
    close = row("muloco", made_up(7, 8.0, 3.1), made_up(8, 8.0, 3.5))
    assert headline([close, DILOCO], setting).endswith("less than the spread over seeds.")
    one = row("muloco", made_up(7, 8.0, 3.1))
    assert headline([one, DILOCO], setting).endswith("one seed, so the spread is not known.")
    assert headline([row("muloco", FAILED)], setting) == "No method finished a run."


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        ([], "4 silos, by owner; 4 of 4 a round; no drop-out; tau 16; 2.00k tokens; 2 seeds (7 to 8)"),
        (
            ["data.partition=iid", "federation.nodes_per_round=2", "federation.dropout=0.1"],
            "4 silos, IID; 2 of 4 a round; drop-out 0.1; tau 16; 2.00k tokens; 2 seeds (7 to 8)",
        ),
    ],
)
def test_the_setting_in_a_line(overrides: list[str], label: str) -> None:
    assert setting_of(load_recipe("demo", overrides), {}, 2000, [7, 8]).label == label


def test_the_setting_names_methods_that_change_batch_or_tau() -> None:
    names = ["per-step", "fedavg", "local-muon", "streaming-diloco", "central-small"]
    recipes = {name: apply_method(load_method(name), "demo") for name in names}
    label = setting_of(load_recipe("demo"), recipes, 2000, [7]).label
    assert label.endswith("; tau 16; local-muon tau 8 and batch 8; streaming-diloco tau 4; 2.00k tokens; one seed (7)")
