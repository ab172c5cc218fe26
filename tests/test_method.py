"""Methods: every file loads and applies, mistakes are told with the file's name, and the order of what wins holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from photon.errors import ConfigError
from photon.estimate import tokens_per_round
from photon.method import apply_method, is_factor, load_method, method_names, option_value, parse_method, setting_value
from photon.options import toml_text
from photon.recipe import load_recipe, preset_names

HEAD = 'title = "T"\nabout = "A."\ncites = "C."\n'
BUILT_IN = [
    "central-small", "diloco", "fedavg", "fedavg-reset", "muloco", "per-step", "photon", "sparseloco",
]  # fmt: skip


def test_the_built_in_methods_are_frozen_and_are_no_presets() -> None:
    assert set(method_names()) >= set(BUILT_IN)
    assert not set(method_names()) & set(preset_names())


@pytest.mark.parametrize("name", method_names())
def test_every_method_applies_to_the_demo_and_sets_what_it_says(name: str) -> None:
    found = load_method(name)
    recipe = apply_method(found, "demo")
    for address, value in found.settings.items():
        if not is_factor(value):
            assert toml_text(option_value(recipe, address)) == toml_text(value), address
    assert found.title
    assert found.about.endswith(".")
    assert "arXiv" in found.cites
    assert found.tune, "every method can be tuned"


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("overrides", [[], ["federation.rounds=7", "federation.nodes_per_round=2"]])
def test_every_method_trains_the_recipes_tokens(name: str, overrides: list[str]) -> None:
    base, recipe = load_recipe("demo", overrides), apply_method(load_method(name), "demo", overrides)
    assert recipe.federation.rounds * tokens_per_round(recipe) == base.federation.rounds * tokens_per_round(base)


def test_central_small_takes_k_times_the_steps_with_the_batch_of_one_node() -> None:
    base, recipe = load_recipe("demo"), apply_method(load_method("central-small"), "demo")
    assert recipe.nodes_per_round == 1
    assert recipe.total_steps == 4 * base.total_steps
    assert recipe.node.warmup_steps == 4 * base.node.warmup_steps
    assert recipe.evaluation.every == 4 * base.evaluation.every
    assert tokens_per_round(recipe) == base.node.batch_size * base.federation.tau * base.data.sequence_length


@pytest.mark.parametrize("name", method_names())
def test_laid_over_a_recipe_by_itself_a_method_keeps_the_share_of_its_run_that_the_schedule_covers(name: str) -> None:
    overrides = ["node.total_steps=480", "node.warmup_steps=40"]  # as `photon train --method` has it
    recipe = apply_method(load_method(name), "demo", overrides)
    assert recipe.node.total_steps == recipe.federation.sequential_steps
    assert recipe.node.warmup_steps * 12 == recipe.node.total_steps


def test_an_override_wins_over_a_value_and_a_factor_multiplies_an_override() -> None:
    mine = parse_method(
        HEAD + '[set]\n"federation.outer_lr" = 0.7\n"node.lr" = "x0.5"\n"federation.rounds" = "xK"', "mine", "mine.toml"
    )
    recipe = apply_method(mine, "demo", ["federation.outer_lr=0.3", "node.lr=0.01", "federation.rounds=6"])
    assert recipe.federation.outer_lr == 0.3
    assert recipe.node.lr == 0.005
    assert recipe.federation.rounds == 24
    # A mutant that multiplies what the recipe says, and lets the override overwrite the product, has 6 rounds.
    mutant = load_recipe("demo", ["federation.rounds=120", "federation.rounds=6"])
    assert mutant.federation.rounds != recipe.federation.rounds


def test_a_point_is_laid_over_the_method() -> None:
    diloco = load_method("diloco")
    recipe = apply_method(diloco, "demo", ["node.lr=0.02"], {"federation.outer_lr": 0.3, "node.lr": "x0.5"})
    assert recipe.federation.outer_lr == 0.3
    assert recipe.federation.outer_momentum == 0.9
    assert recipe.node.lr == 0.01


@pytest.mark.parametrize(
    ("address", "setting", "value"),
    [
        ("node.lr", "x0.3", 0.003),  # not 0.0030000000000000005
        ("federation.tau", "x0.5", 8),
        ("federation.tau", "x0.01", 1),
        ("node.warmup_steps", "xK", 64),
        ("federation.nodes_per_round", "/K", 1),
        ("node.total_steps", "x2", None),
        ("federation.tau", 5, 5),
        ("node.schedule", "cosine", "cosine"),
    ],
)
def test_factors(address: str, setting: object, value: object) -> None:
    assert setting_value(load_recipe("demo"), address, setting, nodes=4) == value


def test_a_factor_of_zero_stays_zero() -> None:
    assert setting_value(load_recipe("demo", ["node.warmup_steps=0"]), "node.warmup_steps", "x4", nodes=4) == 0


MISTAKES = {
    "no TOML": ("[set", "not valid TOML"),
    "unknown table": ("[sets]\n", "did you mean `set`?"),
    "no title": (None, "`title` must be given"),
    "unknown option": ('[set]\n"federation.outer_rate" = 1', "outer_lr"),
    "unknown section": ('[set]\n"federatoin.outer" = "none"', "[federation]"),
    "no address": ('[set]\nouter = "none"', "outer"),
    "unknown option to tune": ('[tune]\n"node.lr, node.muonlr" = ["x2"]', "muon_lr"),
    "nested table": ("[set]\nnode.lr = 1.0", 'addresses stand in quotes, such as "node.OPTION"'),
    "text": ('[set]\n"data.vocab_size" = 300', "is no part of a method"),
    "seed": ('[set]\n"seed" = 1', "seed"),
    "scores": ('[set]\n"evaluation.sequences" = 1', "is no part of a method"),
    "nothing to try": ('[tune]\n"node.lr" = []', "must be a list of what to try"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_with_the_files_name(mistake: str) -> None:
    text, expected = MISTAKES[mistake]
    with pytest.raises(ConfigError) as refused:
        parse_method('about = ""\ncites = ""' if text is None else HEAD + text, "mine", "here/mine.toml")
    assert expected in str(refused.value)
    assert all(line.startswith("here/mine.toml: ") for line in str(refused.value).splitlines())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[set]\n"federation.outer_momentum" = 1.5', "federation.outer_momentum"),
        ('[set]\n"link.up" = ["topkk"]', "topk"),
        ('[set]\n"node.schedule" = "x2"', "is no number"),
    ],
)
def test_a_wrong_value_is_refused_with_the_files_name(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(HEAD + text)
    mine = load_method(str(path))
    assert mine.name == "mine"
    with pytest.raises(ConfigError, match=r"mine\.toml: ") as refused:
        apply_method(mine, "demo")
    assert expected in str(refused.value)


def test_what_is_wrong_in_the_recipe_is_not_the_methods_fault() -> None:
    with pytest.raises(ConfigError) as refused:
        apply_method(load_method("diloco"), "demo", ["node.lrr=1"])
    assert "method" not in str(refused.value)


@pytest.mark.parametrize(("name", "expected"), [("dilocco", "diloco"), ("missing.toml", "missing.toml: no such file")])
def test_a_method_that_there_is_not(name: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_method(name)
