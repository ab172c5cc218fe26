"""What a comparison runs: equal tokens, seeds, budgets, and keys that change with everything that changes a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from photon.compare_plan import Request, make_plan, notes_of, parse_budget, recipe_key, run_tokens
from photon.config import Recipe
from photon.errors import ConfigError, InputError
from photon.method import load_method, method_names, parse_method
from photon.options import TOP, options_of, section_types
from photon.recipe import load_recipe

HEAD = 'title = "T"\nabout = "A."\ncites = "C."\n'
ROUND_TOKENS = 4 * 4 * 16 * 256  # the demo: nodes, batch, tau, sequence


def request(*methods: str, overrides: tuple[str, ...] = (), tokens: int | None = None, **rest: int) -> Request:
    return Request("demo", overrides, tuple(map(load_method, methods)), tokens, **rest)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("tokens=8M", 8_000_000), ("500k", 500_000), ("tokens=2.5b", 2_500_000_000), ("1234", 1234), ("1.5K", 1500)],
)
def test_budgets(text: str, tokens: int) -> None:
    assert parse_budget(text) == tokens


@pytest.mark.parametrize("text", ["", "tokens=", "8MB", "-3", "0", "rounds=3", "tokens=8 M"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="tokens=8M"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["9" * 400, "tokens=2000000B"])
def test_a_budget_beyond_all_text_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"--budget is at most 1e\+15 tokens, not .{1,70}$"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("tokens", "rounds"),
    [(1, 1), (ROUND_TOKENS, 1), (10 * ROUND_TOKENS, 10), (10 * ROUND_TOKENS + ROUND_TOKENS // 2 - 1, 10)],
)
def test_a_budget_becomes_the_nearest_number_of_rounds(tokens: int, rounds: int) -> None:
    plan = make_plan(request("fedavg", overrides=("node.warmup_steps=0",), tokens=tokens))
    assert plan.base.federation.rounds == rounds
    assert plan.tokens == rounds * ROUND_TOKENS
    told = any("whole rounds make" in note for note in notes_of(plan))
    assert told == (tokens != plan.tokens)


def test_a_budget_that_warm_up_does_not_fit_into_is_refused() -> None:
    with pytest.raises(ConfigError, match="warmup_steps"):
        make_plan(request("fedavg", overrides=("node.warmup_steps=100",), tokens=ROUND_TOKENS))


@pytest.mark.parametrize("override", ["federation.rounds=3", " federation.rounds = 3"])
def test_a_budget_beside_rounds_is_refused(override: str) -> None:
    with pytest.raises(InputError, match="give one of them"):
        make_plan(request("fedavg", overrides=(override,), tokens=1000))


def test_all_methods_and_points_have_the_same_tokens_seeds_and_setting() -> None:
    plan = make_plan(request(*method_names(), seeds=2, tune=5, tokens=20 * ROUND_TOKENS))
    jobs = [*plan.tuning, *(job for one in plan.methods for job in plan.runs(one, one.points[-1]))]
    assert {run_tokens(job.recipe) for job in jobs} == {20 * ROUND_TOKENS}
    assert {job.recipe.seed for job in plan.tuning} == {1337}
    assert {job.recipe.seed for job in jobs} == {1337, 1338} == set(plan.seeds)
    for part in ("model", "data", "silo"):
        assert all(getattr(job.recipe, part) == getattr(plan.base, part) for job in jobs)


def test_a_method_with_another_batch_gets_other_rounds_and_a_schedule_of_their_length() -> None:
    half = parse_method(f'{HEAD}[set]\n"node.batch_size" = "x0.5"', "half", "half.toml")
    plan = make_plan(Request("demo", ("node.total_steps=480",), (half,)))
    recipe = plan.methods[0].default
    assert recipe.federation.rounds == 60
    assert recipe.node.total_steps == 960
    assert recipe.node.warmup_steps == 32
    assert run_tokens(recipe) == plan.tokens


SCHEDULE = ("node.warmup_steps=40", "node.total_steps=384", "federation.rounds=12", "federation.tau=32")


@pytest.mark.parametrize(
    ("said", "rounds", "tau", "warmup", "total"),
    [
        ('"federation.tau" = "x4"', 3, 128, 40, 384),  # as many steps in fewer rounds
        ('"federation.tau" = "x4"\n"federation.rounds" = "x0.25"', 3, 128, 40, 384),
        ('"federation.tau" = "x0.5"\n"node.batch_size" = "x2"', 12, 16, 20, 192),  # no other rounds, but fewer steps
        ('"federation.tau" = "x0.5"\n"node.batch_size" = "x2"\n"node.warmup_steps" = "x0.25"', 12, 16, 10, 192),
        ('"node.batch_size" = "x0.5"\n"node.warmup_steps" = "x0.5"', 24, 32, 40, 768),  # said of half the steps
        ('"federation.tau" = "x4"\n"node.warmup_steps" = 100', 3, 128, 40, 384),  # the command line's stands
        ('"federation.tau" = "x4"\n"node.total_steps" = "x2"', 3, 128, 40, 192),  # said of four times the steps
    ],
)
def test_the_schedule_keeps_its_shape_over_the_steps_of_the_run(
    said: str, rounds: int, tau: int, warmup: int, total: int
) -> None:
    plan = make_plan(Request("demo", SCHEDULE, (parse_method(f"{HEAD}[set]\n{said}", "one", "one.toml"),)))
    recipe = plan.methods[0].default
    assert run_tokens(recipe) == plan.tokens
    assert (recipe.federation.rounds, recipe.federation.tau) == (rounds, tau)
    assert (recipe.node.warmup_steps, recipe.node.total_steps) == (warmup, total)


@pytest.mark.parametrize(
    ("overrides", "tokens"),
    [
        (("node.total_steps=320",), 20 * ROUND_TOKENS),
        (("node.total_steps=100", "federation.tau=10", "federation.rounds=10", "node.batch_size=3"), None),
    ],
)
@pytest.mark.parametrize("name", method_names())
def test_the_schedule_of_every_method_is_as_long_as_its_run(
    name: str, overrides: tuple[str, ...], tokens: int | None
) -> None:
    plan = make_plan(request(name, overrides=overrides, tokens=tokens))
    recipe, base = plan.methods[0].default, plan.base
    assert base.total_steps == base.federation.sequential_steps
    assert recipe.total_steps == recipe.federation.sequential_steps
    share = recipe.node.warmup_steps / recipe.total_steps
    assert share == pytest.approx(base.node.warmup_steps / base.total_steps, abs=0.51 / recipe.total_steps)


def test_a_point_that_changes_tau_or_warm_up_keeps_the_schedules_shape_too() -> None:
    text = f"""{HEAD}
    [set]
    "federation.tau" = "x0.5"
    "node.warmup_steps" = "x0.5"
    [tune]
    "federation.tau" = ["x4"]
    "node.warmup_steps" = ["x2"]
    "node.total_steps" = [500]
    """
    plan = make_plan(Request("demo", SCHEDULE, (parse_method(text, "one", "one.toml"),), tune=8))
    found = {point.label(plan.methods[0].default): plan.job(plan.methods[0], point, 1).recipe
             for point in plan.methods[0].points}  # fmt: skip
    assert {recipe.federation.sequential_steps for recipe in found.values()} == {384}
    for told, recipe in found.items():
        assert recipe.node.warmup_steps == (80 if "warmup_steps" in told else 40)
        assert recipe.node.total_steps == (500 if "total_steps" in told else 384)
    assert len(found) == 8


def test_tokens_that_cannot_be_equal_are_told() -> None:
    odd = parse_method(f'{HEAD}[set]\n"federation.tau" = 7', "odd", "odd.toml")
    plan = make_plan(Request("demo", (), (odd,)))
    assert run_tokens(plan.methods[0].default) == 69 * 4 * 4 * 7 * 256
    assert any("odd trains on 1,978,368 tokens" in note for note in notes_of(plan))


def test_an_override_of_what_a_method_sets_is_told_and_so_are_equal_recipes() -> None:
    notes = notes_of(make_plan(request("fedavg", "fedavg-reset", overrides=("node.optimizer_state=keep",))))
    assert any("fedavg-reset would set node.optimizer_state" in note for note in notes)
    assert "fedavg and fedavg-reset are the same recipe here." in notes


def test_a_method_twice_is_refused() -> None:
    with pytest.raises(InputError, match="named twice"):
        make_plan(request("fedavg", "fedavg"))


def changed(recipe: Recipe, section: str, key: str) -> Recipe | None:
    """The recipe with another value of one option, if one of a few is allowed there."""
    holder = recipe if section == TOP else recipe.silo[0] if section == "silo" else getattr(recipe, section)
    value = getattr(holder, key)
    tries = [
        *([value + 1, value * 2, value / 2] if isinstance(value, int | float) and not isinstance(value, bool) else []),
        *([not value] if isinstance(value, bool) else []),
        *([[*value, *(value or [1.0])]] if isinstance(value, list) else []),
        *([tuple(reversed(value))] if isinstance(value, tuple) else []),
        "other", 2, 999, "cpu", 0.5, "float32", "off", "cosine", "uniform", "none", "keep", "reset", "learned", "gelu",
        "swiglu", "rmsnorm", "sgd", "iid", "time", "weights", "exact", "flower", "pretrained", ["x"], [2.0], True,
    ]  # fmt: skip
    for other in tries:
        if other == value:
            continue
        try:
            return _with(recipe, section, key, other)
        except ValidationError:
            continue
    return None


def _with(recipe: Recipe, section: str, key: str, value: object) -> Recipe:
    table = recipe.model_dump()
    holder = table if section == TOP else table["silo"][0] if section == "silo" else table[section]
    holder[key] = value
    return Recipe.model_validate(table)


OPTIONS = [(section, key) for section in section_types() for key in options_of(section)]


@pytest.mark.parametrize(("section", "key"), OPTIONS)
def test_the_key_changes_with_every_option_and_not_with_name_and_about(section: str, key: str) -> None:
    recipe = load_recipe("demo")
    other = changed(recipe, section, key)
    assert other is not None, "no other value was found: add one"
    assert other != recipe
    assert (recipe_key(other) == recipe_key(recipe)) == ((section, key) in {(TOP, "name"), (TOP, "about")})


def test_the_keys_change_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "texts" / "b.txt").write_text("two")
    (tmp_path / "mine.toml").write_text(
        f'[[silo]]\nname = "a"\ntext = "{tmp_path}/*.txt"\n[[silo]]\nname = "b"\ntext = ["texts", "builtin:core"]\n'
        '[data]\ndir = "texts"\n'
    )
    monkeypatch.chdir(tmp_path)

    def keys(*overrides: str) -> tuple[str, str]:
        plan = make_plan(Request(str(tmp_path / "mine.toml"), overrides, (load_method("fedavg"),)))
        (job,) = plan.runs(plan.methods[0], plan.methods[0].points[0])
        return plan.key, job.key

    first = keys()
    for folder in ("tokenizers", "silos"):  # what Photon builds there itself is no text
        (tmp_path / "texts" / folder).mkdir()
        (tmp_path / "texts" / folder / "built.json").write_text("{}")
    assert keys() == first
    seen = [first]
    for path, text in (("a.txt", "other"), ("texts/b.txt", "TWO"), ("texts/c.txt", "more"), ("c.txt", "more")):
        (tmp_path / path).write_text(text)
        seen.append(keys())
    (tmp_path / "tokens.md").write_text("for the tokenizer")
    seen += [keys("data.tokenizer_text=tokens.md"), keys("data.tokenizer_text=not-there.md")]
    assert len(set(seen)) == len({key for _, key in seen}) == 7
    # A text by its absolute path is the same text in another working folder.
    absolute = f'silo=[{{name="a", text="{tmp_path}/*.txt"}}]'
    here = keys(absolute)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert keys(absolute) == here


def test_built_in_text_is_known_by_its_name() -> None:
    plan = make_plan(request("fedavg"))
    (job,) = plan.runs(plan.methods[0], plan.methods[0].points[0])
    assert job.key == recipe_key(job.recipe)


def test_the_key_of_a_comparison_changes_with_what_is_compared() -> None:
    keys = {
        make_plan(asked).key
        for asked in (
            request("fedavg", "diloco"), request("diloco", "fedavg"), request("fedavg"), request("fedavg", seeds=2),
            request("fedavg", tune=2), request("fedavg", overrides=("node.lr=0.1",)),
        )
    }  # fmt: skip
    assert len(keys) == 6
    assert make_plan(request("fedavg")).key in keys
