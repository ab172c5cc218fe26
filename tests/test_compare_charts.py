"""The drawings of a comparison."""

from __future__ import annotations

import re

import pytest
from tests.made_up_comparison import FEDAVG, made_up

from photon.compare_charts import BYTES, TOKENS, lines_of, loss_chart
from photon.compare_curve import Moment


def test_the_lines_leave_out_the_untrained_model_and_what_cost_nothing() -> None:
    (line,) = lines_of([FEDAVG], TOKENS)
    assert line.mean == [(1000, 6.0), (2000, 4.25)]
    assert [len(seed) for seed in line.seeds] == [2, 2]
    free = FEDAVG.model_copy(
        update={"runs": [made_up(7, 8.0, 4.0).model_copy(update={"curve": [
            Moment(tokens=1, sequential_steps=1, bytes_up=0, bytes_down=0, loss=4.0)]})]}
    )  # fmt: skip
    assert lines_of([free], BYTES) == []
    assert loss_chart([free], BYTES, None) is None


def test_a_cost_of_ten_times_as_much_is_as_far_everywhere_on_a_logarithmic_axis() -> None:
    """Places of the dots: 30, 300 and 3000 bytes stand evenly; linearly they would not."""
    moments = [
        Moment(tokens=10**i, sequential_steps=i, bytes_up=10**i, bytes_down=2 * 10**i, loss=5 - i) for i in (1, 2, 3)
    ]
    run = made_up(7, 8.0, 4.0).model_copy(update={"curve": moments})
    svg = str(loss_chart([FEDAVG.model_copy(update={"runs": [run]})], BYTES, 3.0))
    xs = [float(x) for x in re.findall(r'cx="([\d.]+)"', svg)]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    linear = str(loss_chart([FEDAVG.model_copy(update={"runs": [run]})], TOKENS, None))
    xs = [float(x) for x in re.findall(r'cx="([\d.]+)"', linear)]
    assert xs[2] - xs[1] == pytest.approx(10 * (xs[1] - xs[0]), rel=0.05)
    assert "stroke-dasharray" in svg
    assert "stroke-dasharray" not in linear
    assert "3.00 kB" in svg
