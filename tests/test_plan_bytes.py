"""Planned bytes against the ledger of whole federations, and means over draws against all draws there can be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests import support
from tests.support import CPU, LENGTH, RUN, Federation, new_model, tiny_recipe, untrained, weights

import photon.parts
from photon.config import Recipe
from photon.estimate import node_state_bytes
from photon.link.ledger import Traffic
from photon.method import apply_method, load_method, method_names
from photon.node.optimizers import build_optimizer
from photon.parts.method import Method
from photon.plan_bytes import RoundBytes, Turn, round_bytes, run_down_bytes, run_up_bytes
from photon.plan_sizes import ModelFacts, exchanged_bytes, link_codecs, model_facts, scaled_codecs, stage_bytes
from photon.recipe import dump_recipe

HALVES = '''"""For a test: in turn the attention's weights, with their state, and all others."""

from collections.abc import Iterable
from dataclasses import dataclass

from photon.parts.base import Part, Shapes


@dataclass(frozen=True)
class Halves(Part):
    moments: bool = False

    def shared_state(self) -> frozenset[str]:
        return frozenset({"exp_avg"} if self.moments else ())

    def exchanged(self, shapes: Shapes, round_index: int) -> Iterable[str]:
        return [name for name in shapes if ("attention" in name) == (round_index % 2 == 0)]

    def period(self) -> int:
        return 2

    def is_partial(self) -> bool:
        return True

    def keeps_weights(self) -> bool:
        return True


PART = Halves
'''
# Up and down, all with sizes that do not depend on what is sent.
LINKS: list[tuple[list[str], list[str]]] = [
    ([], []),
    (["topk(density=0.1)", "int4(block=32)"], []),
    (["bf16"], ["int8"]),
]
PARTS = [
    [],
    ["share"],
    ["share(first=2, second=3)"],
    ["share(first=0)", "fedprox"],
    ["share(first=2, second=3, factored=true)"],
    ["fragments(count=2)"],
    ["fragments(count=3)", "share(first=2, second=0)"],
    ["eager"],
    ["halves"],
    ["halves(moments=true)"],
]


@pytest.fixture(autouse=True)
def parts_of_this_test(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("parts")
    (folder / "halves.py").write_text(HALVES, "utf-8")
    monkeypatch.setattr(support, "VOCAB", 300)  # a recipe has no less than 257
    monkeypatch.setattr(photon.parts, "__path__", [*photon.parts.__path__, str(folder)])
    yield


def recipe_of(parts: Sequence[str], optimizer: str = "adamw", **sections: Any) -> Recipe:
    # An epsilon so large that second moments, which lossy codecs distort, hardly matter: only sizes do here.
    node = {"optimizer": optimizer, "lr": 0.01, "eps": 1.0, "momentum": 0.5, "batch_size": 1}
    federation = {"rounds": 5, "tau": 1, "parts": list(parts)} | sections.pop("federation", {})
    data = {"sequence_length": LENGTH, "vocab_size": 300}
    return tiny_recipe(node=node, federation=federation, data=data, **sections)


def planned(recipe: Recipe) -> RoundBytes:
    return exchanged_bytes(model_facts(recipe), link_codecs(recipe))


def ledger(folder: Path, recipe: Recipe) -> Traffic:
    return Federation(folder, recipe).run().progress.link


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("parts", [["share"], ["fedlalr"], ["share(second=0)"], ["share(factored=true)"]], ids=str)
def test_what_is_shared_is_what_the_run_shares(parts: list[str], optimizer: str) -> None:
    federation: dict[str, Any] = {}
    if parts == ["fedlalr"]:
        optimizer, federation = "adamw", {"weighting": "uniform"}
    facts = model_facts(recipe := recipe_of(parts, optimizer, federation=federation))
    shared = weights(untrained(recipe))
    assert facts.shared_shapes == {name: tuple(tensor.shape) for name, tensor in shared.items()}
    assert facts.shapes == {name: shape for name, shape in facts.shared_shapes.items() if "/" not in name}
    assert facts.shared.values == sum(tensor.numel() for tensor in shared.values())
    given = build_optimizer(new_model(recipe), recipe.node, CPU)
    has_own = Method.of(recipe).optimizer(given) is not given
    assert facts.shared.optimizer_bytes == (12 * facts.parameters if has_own else None)


# The baselines have one node, on all text.
FEDERATED = [name for name in method_names() if load_method(name).settings["federation.outer"] != "none"]


@pytest.mark.parametrize("name", FEDERATED)
def test_a_node_keeps_what_the_plan_says_of_its_method(tmp_path: Path, name: str) -> None:
    source = tmp_path / "recipe.toml"
    silos = [{"name": owner, "text": ["nowhere"]} for owner in ("ada", "bob", "cyd", "dan")]
    # What is kept has its size after the first step; of 4 steps a quarter is left for the method of four fragments.
    tau = 12 if name == "growing-tau" else 4  # which begins with 8
    small = recipe_of([], model={"layers": 4}, silo=silos, federation={"rounds": 4, "tau": tau})
    source.write_text(dump_recipe(small), "utf-8")
    recipe = apply_method(load_method(name), source, ["federation.norm_bound=false", "node.lr=1e-3"])
    federation = Federation(tmp_path / "run", recipe)
    end = federation.run().progress.round
    state = federation.nodes["ada"].site.store.load(RUN, "ada", end - 1)  # the last round leaves less with some
    assert state.ready_for == end - 1
    kept = [tensor for part in (state.optimizer, state.link, state.weights) for tensor in part.values()]
    kept_bytes = sum(4 * tensor.numel() for tensor in kept if tensor.dim())  # an optimizer's count of steps is a scalar
    facts = model_facts(recipe)
    norms = sum(math.prod(shape) for shape in facts.shapes.values() if len(shape) == 1)
    left_out = 4 * norms if recipe.node.optimizer == "muon" else 0  # the plan says so
    assert kept_bytes == node_state_bytes(recipe, facts.parameters, facts.shared) + left_out


@pytest.mark.parametrize(("up", "down"), LINKS, ids=str)
@pytest.mark.parametrize("parts", PARTS, ids=" ".join)
def test_bodies_of_a_run_are_those_on_the_ledger(
    tmp_path: Path, parts: list[str], up: list[str], down: list[str]
) -> None:
    recipe = recipe_of(parts, link={"up": up, "down": down}, evaluation={"every": 2})
    node_bytes, link = planned(recipe), ledger(tmp_path, recipe)
    assert node_bytes.is_exact
    assert run_up_bytes(recipe, node_bytes) == link.up.body
    assert run_down_bytes(recipe, node_bytes) == link.down.body
    if parts and down == up == []:  # the mutant that plans for the weights alone, or for all tensors in every round
        facts = model_facts(recipe)
        for wrong in (facts.shapes, facts.shared_shapes):
            same = round_bytes(wrong, link_codecs(recipe))
            differs = wrong != facts.shared_shapes or len(facts.turns) > 1
            assert (run_up_bytes(recipe, same) != link.up.body) == differs


@pytest.mark.parametrize("parts", PARTS, ids=" ".join)
def test_a_lossless_stage_makes_no_more_than_planned(tmp_path: Path, parts: list[str]) -> None:
    recipe = recipe_of(parts, link={"up": ["int8", "zstd"], "down": ["zstd"]})
    node_bytes, link = planned(recipe), ledger(tmp_path, recipe)
    assert not node_bytes.is_exact
    assert 0 < link.up.body <= run_up_bytes(recipe, node_bytes)
    assert 0 < link.down.body <= run_down_bytes(recipe, node_bytes)


@pytest.mark.parametrize("down", [[], ["int8"]], ids=str)
@pytest.mark.parametrize("parts", [[], ["share(first=2, second=3)"], ["halves"]], ids=str)
def test_raw_bytes_are_those_of_the_same_messages_without_a_codec(
    tmp_path: Path, parts: list[str], down: list[str]
) -> None:
    """Up what a round exchanges; down at first all that is shared, then, as a difference, what the round before did."""
    recipe = recipe_of(parts, link={"up": ["int8"], "down": down}, federation={"rounds": 3})
    facts = model_facts(recipe)
    sizes = [4 * sum(math.prod(facts.shared_shapes[name]) for name in names) for names in facts.turns]
    exchanged = [sizes[index % len(sizes)] for index in range(3)]
    link, whole = ledger(tmp_path, recipe), 4 * facts.shared.values
    assert link.up.raw == 3 * sum(exchanged)
    assert link.down.raw == 3 * (whole + sum(exchanged))
    assert (link.down.raw == 12 * whole) == (not parts)  # the mutant: the whole model each time


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_each_optimizer_shares_its_own_state(tmp_path: Path, optimizer: str) -> None:
    recipe = recipe_of(["share(first=2)"], optimizer, federation={"rounds": 3})
    node_bytes, link = planned(recipe), ledger(tmp_path, recipe)
    assert (run_up_bytes(recipe, node_bytes), run_down_bytes(recipe, node_bytes)) == (link.up.body, link.down.body)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("parts", [[], ["share"]], ids=str)
def test_with_some_of_the_nodes_what_is_sent_whole_is_known(tmp_path: Path, parts: list[str], every: int) -> None:
    recipe = recipe_of(parts, federation={"nodes_per_round": 2}, evaluation={"every": every})
    node_bytes, link = planned(recipe), ledger(tmp_path, recipe)
    assert (run_up_bytes(recipe, node_bytes), run_down_bytes(recipe, node_bytes)) == (link.up.body, link.down.body)


def test_where_all_are_scored_in_every_round_all_hold_the_base(tmp_path: Path) -> None:
    """So that differences are exact with K of P nodes too."""
    recipe = recipe_of(["share(first=2, second=3)"], federation={"nodes_per_round": 1}, evaluation={"every": 1})
    node_bytes, link = planned(recipe), ledger(tmp_path, recipe)
    assert (run_up_bytes(recipe, node_bytes), run_down_bytes(recipe, node_bytes)) == (link.up.body, link.down.body)


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_mean_over_draws_is_the_mean_over_all_of_them(dropout: float, every: int) -> None:
    """Two of three nodes in three rounds: every sample and every set of drop-outs, weighed by its probability."""
    recipe = recipe_of(
        [], federation={"nodes_per_round": 2, "rounds": 3, "dropout": dropout}, evaluation={"every": every}
    )
    turns = (Turn(10, 100), Turn(20, 300), Turn(40, 500))
    node_bytes = RoundBytes(0, 0, 1000, sends_differences=True, turns=turns)
    owners = frozenset({0, 1, 2})
    # Of two nodes: none drops out, one of them, or both would, of which the one with the larger draw stays.
    draws = []
    for pair in itertools.combinations(sorted(owners), 2):
        alone = (dropout * (1 - dropout) + dropout**2 / 2) / 3
        draws += [((1 - dropout) ** 2 / 3, frozenset(pair), frozenset[int]())]
        draws += [(alone, frozenset({stays}), frozenset(pair) - {stays}) for stays in pair]
    assert math.fsum(chance for chance, _, _ in draws) == pytest.approx(1)
    down = up = 0.0
    for course in itertools.product(draws, repeat=3):
        chance, held = math.prod(draw[0] for draw in course), owners
        for index, (_, trains, dropped) in enumerate(course):
            asked = owners - dropped if index % every == 0 else trains
            if index:
                told = turns[index - 1].down_bytes
                down += chance * sum(told if node in held else 1000 for node in asked)
            up += chance * len(trains) * turns[index].up_bytes
            held = asked
        down += chance * sum(turns[2].down_bytes if node in held else 1000 for node in owners)
    assert run_down_bytes(recipe, node_bytes) == pytest.approx(down)
    assert run_up_bytes(recipe, node_bytes) == pytest.approx(up)


def test_a_round_is_the_mean_over_the_run_and_the_largest() -> None:
    turns = (Turn(1, 10, 4), Turn(2, 20, 8), Turn(3, 60, 12))
    node_bytes = RoundBytes(2, 30, 100, turns=turns)
    assert [node_bytes.turn(index).up_bytes for index in range(4)] == [10, 20, 60, 10]
    four = node_bytes.over(4)
    assert (four.down_bytes, four.up_bytes) == (7 / 4, 25)
    assert replace(four, down_bytes=2, up_bytes=30) == node_bytes
    assert (node_bytes.largest.down_bytes, node_bytes.largest.up_bytes) == (3, 60)
    plain = RoundBytes(5, 7, 5)
    assert plain.over(9) == plain
    assert (plain.largest.down_bytes, plain.largest.up_bytes) == (5, 7)


def test_a_run_shorter_than_a_period_has_the_rounds_that_it_has() -> None:
    facts: ModelFacts = model_facts(recipe_of(["share(first=2, second=3)"], federation={"rounds": 2}))
    assert len(facts.turns) == 2
    assert facts.shared.values == 3 * facts.parameters
    assert facts.shared.most_exchanged == 2 * facts.parameters


def test_stages_are_those_of_the_round_with_most() -> None:
    recipe = recipe_of(["share(first=2, second=3)"], federation={"rounds": 6}, link={"up": ["bf16"], "down": ["bf16"]})
    facts = model_facts(recipe)
    assert stage_bytes(link_codecs(recipe), facts) == {way: {"bf16": 6 * facts.parameters} for way in ("up", "down")}


def test_given_bytes_a_value_hold_for_all_that_is_exchanged() -> None:
    recipe = recipe_of(["share(first=2, second=3)"], federation={"rounds": 6})
    facts = model_facts(recipe)
    node_bytes = exchanged_bytes(facts, scaled_codecs(recipe, 2.0))
    values = [1, 2, 2, 2, 1, 3]
    assert [turn.up_bytes for turn in node_bytes.turns] == [2 * facts.parameters * count for count in values]
    assert [turn.raw_bytes for turn in node_bytes.turns] == [4 * facts.parameters * count for count in values]
    assert node_bytes.whole_bytes == 6 * facts.parameters
