"""Parts together, and the part that docs/how-to/add-a-method.md adds, taken from that page."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.support import CPU, Federation, Text, largest_difference, new_model, tiny_recipe, weights
from torch import Tensor

import photon.parts
from photon.config import FederationConfig, Recipe
from photon.errors import ConfigError
from photon.node.optimizers import build_optimizer
from photon.parts.base import Moment
from photon.parts.method import Method, part_class, part_names

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "add-a-method.md"
SHAPES = {"a": (2, 3), "b": (4,), "a/exp_avg": (2, 3), "b/exp_avg": (4,)}


def recipe(*parts: str, **federation: object) -> Recipe:
    return tiny_recipe(federation={"rounds": 4, "parts": list(parts), **federation})


@pytest.fixture
def elastic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The part of the page, in a folder of its own, found as those of the package are."""
    (source,) = re.findall(r"```python\n(\"\"\"Elastic.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(source.splitlines()) < 60
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "elastic.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(photon.parts, "__path__", [*photon.parts.__path__, str(tmp_path / "parts")])
    yield
    sys.modules.pop("photon.parts.elastic", None)


def plain_loop(recipe: Recipe, pull: float) -> dict[str, Tensor]:
    """Elastic averaging with plain SGD: each node's weights are its own, the global model follows their mean."""
    names = [silo.name for silo in recipe.silo]
    models = {name: new_model(recipe, torch.float64) for name in names}
    center = [parameter.detach().clone() for parameter in models[names[0]].parameters()]
    tau, size = recipe.federation.tau, recipe.node.batch_size
    for index in range(recipe.federation.rounds):
        for name, model in models.items():
            for parameter, middle in zip(model.parameters(), center, strict=True):
                parameter.data += pull * (middle - parameter.data)
            for step in range(index * tau, (index + 1) * tau):
                batch = torch.from_numpy(Text(name).batch(step * size, size))
                model.zero_grad()
                model.loss(batch[:, :-1], batch[:, 1:]).backward()
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.data -= recipe.node.lr * parameter.grad
        center = [
            torch.stack([parameter.detach() for parameter in group]).mean(0)
            for group in zip(*(model.parameters() for model in models.values()), strict=True)
        ]
    return dict(zip((name for name, _ in models[names[0]].named_parameters()), center, strict=True))


@pytest.mark.usefixtures("elastic")
def test_the_part_of_the_page_is_elastic_averaging(tmp_path: Path) -> None:
    asked = recipe("elastic(pull=0.3)")
    ours = weights(Federation(tmp_path / "run", asked, dtype=torch.float64).run())
    assert largest_difference(ours, plain_loop(asked, pull=0.3)) < 1e-12
    assert largest_difference(ours, plain_loop(asked, pull=1.0)) > 1e-6  # the mutant: FedAvg
    assert largest_difference(ours, plain_loop(asked, pull=0.7)) > 1e-6  # the mutant: the other way round


@pytest.mark.usefixtures("elastic")
def test_weights_that_nodes_keep_survive_a_restart_of_everything(tmp_path: Path) -> None:
    whole = Federation(tmp_path / "whole", recipe("elastic(pull=0.3)")).run()
    short = recipe("elastic(pull=0.3)", rounds=2)
    Federation(tmp_path / "halves", short).run()
    again = Federation(tmp_path / "halves", recipe("elastic(pull=0.3)")).run()
    assert again.model_sha256 == whole.model_sha256


@pytest.mark.usefixtures("elastic")
def test_a_node_that_missed_a_round_begins_with_the_base(tmp_path: Path) -> None:
    """Where nobody is in two rounds in a row, nothing is elastic."""
    silos = {name: {} for name in ("ada", "bob", "cyd", "dan", "eve", "fay")}
    one = {"rounds": 4, "nodes_per_round": 1}
    plain = Federation(tmp_path / "plain", tiny_recipe(silos, federation=one))
    expected = plain.run()
    hands = [list(event.nodes) for event in plain.rounds()]
    assert all(one != other for one, other in itertools.pairwise(hands))  # as the seed has it
    pulled = tiny_recipe(silos, federation=one | {"parts": ["elastic(pull=0.3)"]})
    assert Federation(tmp_path / "pulled", pulled).run().model_sha256 == expected.model_sha256


@pytest.mark.parametrize("name", part_names())
def test_every_part_is_a_class_that_says_what_it_does(name: str) -> None:
    kind = part_class(name)
    assert kind.__doc__
    assert sys.modules[kind.__module__].__doc__


def test_what_several_parts_leave_is_exchanged() -> None:
    method = Method.of(
        tiny_recipe(node={"optimizer": "adamw"}, federation={"parts": ["share(second=0)", "share(first=2)"]})
    )
    assert method.shared_state == {"exp_avg", "exp_avg_sq", "momentum_buffer"}
    assert method.exchanged(SHAPES, 0) == ["a", "b"]  # the one sends moments, the other not yet
    assert method.exchanged(SHAPES, 1) == list(SHAPES)
    assert method.taken(SHAPES, 0) == list(SHAPES)
    assert method.taken(SHAPES, 1) == ["a", "b"]


def test_the_baseline_goes_without_parts() -> None:
    assert Method.of(recipe("fedprox", outer="none")) == Method()
    with pytest.raises(ConfigError, match="there is no part"):
        Method.of(recipe("fedprocs", outer="none"))


def test_a_plain_recipe_has_no_parts() -> None:
    method = Method.of(tiny_recipe())
    assert not method.parts
    assert (method.is_partial, method.keeps_weights, method.merged) == (False, False, None)
    assert method.corrector(new_model(tiny_recipe()), {}) is None
    given = build_optimizer(new_model(tiny_recipe()), tiny_recipe().node, CPU)
    assert method.optimizer(given) is given


def test_no_round_goes_beyond_the_end_of_the_run() -> None:
    federation = FederationConfig(rounds=10, tau=32)
    for done, left in ((0, 32), (288, 32), (300, 20), (319, 1)):
        assert Method().federation(federation, Moment(3, done, 320)).tau == left
    assert Moment(3, 80, 320).done == 0.25


def test_what_does_not_go_together_is_refused() -> None:
    weights_too = tiny_recipe(
        node={"optimizer": "adamw"},
        federation={"parts": ["share"]},
        link={"of": "weights", "up": ["svd"], "down": ["svd"]},
    )
    with pytest.raises(ConfigError, match="sends all weights each time"):
        Method.of(weights_too)
    with pytest.raises(ConfigError, match="share has no parameter `third`"):
        Method.of(recipe("share(third=3)"))
    with pytest.raises(ConfigError, match="must be an integer, not often"):
        Method.of(recipe("share(first=often)"))
