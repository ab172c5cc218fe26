"""Tuning: as many points for everyone, the same ones every time, spread over the grid; the winner and its edges."""

from __future__ import annotations

import math

import pytest

from photon.compare_tune import Point, axes_of, edges_of, points_of, winner_of
from photon.errors import ConfigError, InputError
from photon.method import Method, apply_method, load_method, method_names, parse_method
from photon.parts.method import Method as PartsOf
from photon.recipe import load_recipe

HEAD = 'title = "T"\nabout = "A."\ncites = "C."\n'


def mine(tune: str) -> Method:
    return parse_method(f"{HEAD}[tune]\n{tune}", "mine", "mine.toml")


def test_axes_are_ordered_and_hold_the_method_as_it_stands() -> None:
    method = load_method("diloco")
    lr, momentum, inner = axes_of(method, apply_method(method, "demo"))
    assert [choice.value for choice in lr.choices] == [0.3, 0.5, 0.7, 1.0]
    assert lr.default == 2
    assert [choice.value for choice in momentum.choices] == [0.5, 0.9]
    assert [choice.value for choice in inner.choices] == [0.005, 0.01, 0.02]


@pytest.mark.parametrize("name", method_names())
def test_every_method_gets_as_many_points_the_first_of_them_as_it_stands(name: str) -> None:
    method = load_method(name)
    default = apply_method(method, "demo")
    points = points_of(method, default, 5)
    assert len({point.place for point in points}) == 5
    assert dict(points[0].settings) == {}
    assert points == points_of(method, default, 5)
    assert points[:3] == points_of(method, default, 3)  # more points add to fewer, so their runs are used again
    applied = {apply_method(method, "demo", point=point.settings).model_dump_json() for point in points}
    assert len(applied) == 5


def test_all_of_a_grid_is_reached_and_no_more_can_be_asked() -> None:
    method, default = load_method("diloco"), apply_method(load_method("diloco"), "demo")
    assert len({point.place for point in points_of(method, default, 24)}) == 24
    with pytest.raises(InputError, match="method diloco has 24 points"):
        points_of(method, default, 25)


def test_few_points_are_spread() -> None:
    """Of 24 points six touch every value of every axis; the first six in the grid's own order have one rate alone."""
    method, default = load_method("diloco"), apply_method(load_method("diloco"), "demo")
    places = [point.place for point in points_of(method, default, 7)]
    assert [len({place[axis] for place in places}) for axis in range(3)] == [4, 2, 3]


def test_options_that_move_together_do() -> None:
    method = load_method("muloco")
    default = apply_method(method, "demo")
    for point in points_of(method, default, 24):
        recipe = apply_method(method, "demo", point=point.settings)
        assert recipe.node.muon_lr == pytest.approx(2 * recipe.node.lr)
    assert "node.lr = 0.005, node.muon_lr = 0.01" in {
        point.label(default)
        for point in points_of(method, default, 24)
        if set(point.settings) == {"node.lr", "node.muon_lr"}
    }


def test_the_winner_is_the_lowest_loss_that_is_a_number() -> None:
    assert winner_of([4.0, math.nan, 3.9, None, 3.9]) == 2
    assert winner_of([math.nan, None]) == 0


def test_an_edge_is_told_where_an_axis_has_an_inside() -> None:
    method = load_method("diloco")
    default = apply_method(method, "demo")
    axes = axes_of(method, default)
    by_place = {point.place: point for point in points_of(method, default, 24)}
    assert edges_of(axes, by_place[2, 1, 1]) == []
    assert edges_of(axes, by_place[3, 0, 1]) == ["federation.outer_lr"]
    assert edges_of(axes, by_place[0, 0, 2]) == ["federation.outer_lr", "node.lr"]


def test_parts_and_words_have_no_edge() -> None:
    """They stand in the order of the file, the method's own first: fedprox's mu of 0.01 lies within 0.001 to 1."""
    method = load_method("fedprox")
    axes = axes_of(method, apply_method(method, "demo"))
    assert [axis.addresses for axis in axes] == [("federation.parts",), ("node.lr", "node.muon_lr")]
    for place in range(len(axes[0].choices)):
        assert edges_of(axes, Point({}, (place, 1))) == []


@pytest.mark.parametrize("name", method_names())
def test_no_point_of_a_grid_is_tried_twice_in_other_words(name: str) -> None:
    """A default that is written out is another recipe, and the same run."""
    method = load_method(name)
    default = apply_method(method, "demo")
    size = math.prod(len(axis.choices) for axis in axes_of(method, default))
    runs = set()
    for point in points_of(method, default, size):
        recipe = apply_method(method, "demo", point=point.settings)
        federation = recipe.federation.model_copy(update={"parts": []})
        plain = recipe.model_copy(update={"federation": federation})
        runs.add((plain.model_dump_json(), PartsOf.of(recipe).parts))
    assert len(runs) == size


@pytest.mark.parametrize(
    ("tune", "expected"),
    [
        ('"node.total_steps" = ["x2"]', "node.total_steps: the recipe leaves it unset"),
        ('"node.schedule" = ["x2"]', "is no number"),
    ],
)
def test_what_cannot_be_scaled_is_refused_with_the_files_name(tune: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as refused:
        axes_of(mine(tune), load_recipe("demo"))
    assert str(refused.value).startswith("mine.toml: ")


def test_words_can_be_tried() -> None:
    axis = axes_of(mine('"node.schedule" = ["cosine", "wsd"]'), load_recipe("demo"))[0]
    assert [(choice.value, choice.setting) for choice in axis.choices] == [("wsd", None), ("cosine", "cosine")]
