"""The paper's questions: every recipe loads, budgets are what they say, the rule judges, nothing runs twice."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal
from unittest import mock

import pytest
from benchmarks.paper import __main__ as paper
from benchmarks.paper.questions import QUESTIONS, Pair, Question, Row
from benchmarks.paper.report import Answer, cells, markdown
from benchmarks.paper.sizes import SIZES, Size, expected_tokens, job_of, overrides_of, seconds_of, write_texts
from benchmarks.paper.verdict import FAILS, HOLDS, MORE_TOKENS, UNKNOWN, judge
from rich.console import Console
from tests.faults.federations import write_recipe

from photon.compare_content import MethodResult, method_result
from photon.compare_curve import Moment, RunResult, is_finished
from photon.compare_jobs import Runner
from photon.compare_plan import run_tokens
from photon.config import Recipe
from photon.data.builtin import builtin_documents
from photon.errors import InputError
from photon.method import load_method
from photon.recipe import dump_recipe, parse_recipe

HOME = Path("/nowhere/home")
EVERY = [(question, size) for question in QUESTIONS for size in SIZES.values()]
NAMES = [f"{question.name}-{size.name}" for question, size in EVERY]


def recipes(question: Question, size: Size) -> dict[str, Recipe]:
    return {row.label: job_of(row, size, 1337, HOME).recipe for row in question.rows}


# --- recipes and budgets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("question", "size"), EVERY, ids=NAMES)
def test_every_recipe_loads_and_has_the_steps_its_row_says(question: Question, size: Size) -> None:
    assert len({row.label for row in question.rows}) == len(question.rows)
    for row in question.rows:
        recipe = job_of(row, size, 1337, HOME).recipe
        assert parse_recipe(dump_recipe(recipe), "written and read") == recipe
        owners = row.owners or size.owners
        steps = recipe.federation.rounds * recipe.federation.tau
        # One node's batch on as many tokens takes K times the steps, whatever K is.
        assert steps == size.steps * row.steps * (owners if row.method == "central-small" else 1)
        assert recipe.federation.rounds >= 2
        assert len(recipe.silo) == owners
        assert recipe.node.total_steps in (None, steps), "the schedule ends with the run"


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("owners", [1, 2, 4, 8])
def test_all_texts_are_shared_out_whatever_the_owners(size: Size, owners: int) -> None:
    silos = job_of(Row("x", owners=owners), size, 1337, HOME).recipe.silo
    texts = [text for silo in silos for text in silo.text]
    known = [str(HOME / text) if size.needs_built_in_text else text for text in size.texts]
    assert texts == known
    assert {len(silo.text) for silo in silos} == {8 // owners}


@pytest.mark.parametrize(("question", "size"), EVERY, ids=NAMES)
def test_as_many_sequences_are_scored_in_every_run(question: Question, size: Size) -> None:
    for recipe in recipes(question, size).values():
        sources = 8 if recipe.data.partition == "owner" else len(recipe.silo)
        if size.scored_sequences is None:
            assert recipe.evaluation.sequences >= 100_000, "all there are"
        else:
            assert recipe.evaluation.sequences * sources == size.scored_sequences


@pytest.mark.parametrize(("question", "size"), EVERY, ids=NAMES)
def test_pairs_are_of_rows_and_have_the_budgets_that_make_them_fair_or_generous(question: Question, size: Size) -> None:
    known = recipes(question, size)
    assert question.fair
    for pair in (*question.fair, *question.generous):
        for ours in pair.ours:
            for other in pair.other:
                mine, theirs = expected_tokens(known[ours]), expected_tokens(known[other])
                if pair in question.fair:
                    assert mine <= 1.001 * theirs
                else:
                    assert mine > 1.5 * theirs


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_what_is_said_to_have_equal_tokens_has(size: Size) -> None:
    by_name = {question.name: recipes(question, size) for question in QUESTIONS}
    for name in ("tau", "diloco", "diloco-weak"):
        assert len({run_tokens(recipe) for recipe in by_name[name].values()}) == 1
    scaling = {run_tokens(recipe) for label, recipe in by_name["scaling"].items() if "equal tokens" in label}
    assert scaling == {run_tokens(by_name["scaling"]["K = 4, equal steps"])}
    steps = {
        recipe.federation.rounds * recipe.federation.tau
        for label, recipe in by_name["scaling"].items()
        if "equal steps" in label
    }
    assert steps == {size.steps}
    central = by_name["central"]
    equal = [recipe for label, recipe in central.items() if "half the steps" not in label]
    assert len({run_tokens(recipe) for recipe in equal}) == 1
    # The central batch at every node: K times the tokens of a central run of as many steps.
    whole = central["federated, half the steps, central batch at every node"]
    assert run_tokens(whole) == size.owners * run_tokens(central["central, half the steps"])


def test_a_cpu_does_it_in_an_hour_by_the_estimate() -> None:
    size = SIZES["cpu"]
    jobs = {job.key: job for question in QUESTIONS for row in question.rows for job in [job_of(row, size, 1337, HOME)]}
    rows = sum(len(question.rows) for question in QUESTIONS)
    assert len(jobs) < rows, "questions share runs"
    assert sum(seconds_of(job, size) for job in jobs.values()) < 3600


def test_a_rows_own_settings_win_and_rates_are_factors_of_the_recipes() -> None:
    size = SIZES["cpu"]
    recipe = job_of(Row("x", "diloco", lr=0.5, settings=("federation.outer_lr=0.1",)), size, 7, HOME).recipe
    assert (recipe.federation.outer, recipe.federation.outer_lr, recipe.seed) == ("nesterov", 0.1, 7)
    assert recipe.node.lr == pytest.approx(2e-3)


def test_steps_that_are_no_whole_rounds_and_owners_that_share_unevenly_are_refused() -> None:
    size = SIZES["cpu"]
    with pytest.raises(InputError, match="no whole rounds of tau = 48"):
        overrides_of(Row("x", tau=48), size, 1, HOME)
    with pytest.raises(InputError, match="evenly among 3 owners"):
        overrides_of(Row("x", owners=3), size, 1, HOME)


def test_the_texts_are_all_of_the_built_in_text_and_share_none_of_it(tmp_path: Path) -> None:
    size = SIZES["cpu"]
    with mock.patch("benchmarks.paper.sizes._AREAS", ("core",)):
        write_texts(size, tmp_path)
    halves = [
        [json.loads(line)["text"] for line in (tmp_path / f"text/core-{half}.jsonl").read_text().splitlines()]
        for half in (1, 2)
    ]
    assert sorted(halves[0] + halves[1]) == sorted(document.text for document in builtin_documents("core"))
    assert not set(halves[0]) & set(halves[1])
    share = len(halves[0]) / (len(halves[0]) + len(halves[1]))
    assert 0.3 < share < 0.7


# --- the rule --------------------------------------------------------------------------------------------------------


def result(*seeds: Sequence[float]) -> MethodResult:
    """A row of runs with these held-out curves, 100 steps between scores; none: the run failed."""
    runs = [
        RunResult(seed=index, folder="x", failure="it broke")
        if not losses
        else RunResult(
            seed=index,
            folder="x",
            loss=losses[-1],
            curve=[
                Moment(tokens=1000.0 * i, sequential_steps=100.0 * i, bytes_up=i, bytes_down=i, loss=loss)
                for i, loss in enumerate(losses)
            ],
        )
        for index, losses in enumerate(seeds)
    ]
    return method_result(load_method("photon"), "", runs, None, computed=False)


FAIR, GENEROUS = Pair(("a",), ("b",)), Pair(("c",), ("b",))


def asked(fair: tuple[Pair, ...] = (FAIR,), generous: tuple[Pair, ...] = (GENEROUS,)) -> Question:
    rows = tuple(Row(label) for label in "abc")
    return Question("made-up", "Made up", "a claim", "a paper", rows, fair, generous)


def told(a: float, b: float, c: float, question: Question | None = None) -> str:
    return judge(question or asked(), {"a": result([9, a]), "b": result([9, b]), "c": result([9, c])}).word


def test_the_verdict_follows_the_rule() -> None:
    assert told(4.0, 5.0, 9.0) == HOLDS
    assert told(5.0, 5.0, 9.0) == HOLDS, "at most"
    assert told(5.1, 5.0, 4.0) == MORE_TOKENS
    assert told(5.1, 5.0, 5.2) == FAILS
    assert told(5.1, 5.0, 4.0, asked(generous=())) == FAILS
    assert told(5.1, 5.0, 4.0, asked(fair=(Pair(("a",), ("b",), at_most=1.05),))) == HOLDS
    assert told(float("nan"), 5.0, 4.0) == MORE_TOKENS, "a run that diverged is no better"
    assert told(4.0, float("nan"), 4.0) == UNKNOWN, "nor is one worse than a run that diverged"


def test_of_several_pairs_every_one_must_hold() -> None:
    both = asked(fair=(FAIR, Pair(("c",), ("b",))), generous=())
    assert told(4.0, 5.0, 4.0, both) == HOLDS
    assert told(4.0, 5.0, 6.0, both) == FAILS


def test_a_run_that_failed_makes_its_pair_unknown() -> None:
    good = {"a": result([9, 4]), "b": result([9, 5]), "c": result([9, 4])}
    assert judge(asked(), good | {"a": result([9, 4], [])}).word == UNKNOWN
    assert judge(asked(), good | {"a": result([9, 6]), "c": result([])}).word == UNKNOWN
    assert judge(asked(), good | {"c": result([])}).word == HOLDS


def test_the_best_of_several_settings_is_compared_and_an_untuned_opponent_is_not_enough() -> None:
    tuned = asked(fair=(Pair(("a",), ("b", "c")),), generous=())
    assert told(4.5, 5.0, 4.0, tuned) == FAILS
    assert told(4.5, 5.0, 4.6, tuned) == HOLDS

    def first_of_other(labels: Sequence[str], results: object) -> str:
        return labels[0]

    with mock.patch("benchmarks.paper.verdict._best", first_of_other):  # the mutant that compares with any opponent
        assert told(4.5, 5.0, 4.0, tuned) == HOLDS


@pytest.mark.parametrize("mutant", ["spread", "fair only"])
def test_the_rule_rejects_wrong_ones(mutant: Literal["spread", "fair only"]) -> None:
    """One that calls what holds at more tokens alone a success, and one that ignores all seeds but the best."""
    rows = {"a": result([9, 3.9], [9, 5.5]), "b": result([9, 4.5], [9, 4.5]), "c": result([9, 4], [9, 4])}
    right = judge(asked(), rows).word
    best = {label: min(run.loss for run in row.runs if run.loss is not None) for label, row in rows.items()}
    mean = {label: fmean(run.loss for run in row.runs if run.loss is not None) for label, row in rows.items()}
    wrong = {
        "spread": HOLDS if best["a"] <= best["b"] else FAILS,
        "fair only": HOLDS if min(mean["a"], mean["c"]) <= mean["b"] else FAILS,
    }[mutant]
    assert right == MORE_TOKENS
    assert wrong != right


def test_a_difference_smaller_than_the_spread_is_said() -> None:
    rows = {"a": result([9, 3.9], [9, 5.0]), "b": result([9, 4.5], [9, 4.6]), "c": result([9, 4])}
    fair = judge(asked(), rows).reasons[0]
    assert "within the spread" in fair
    assert fair.startswith("a against b: loss 4.4500 / 4.5500 = 0.978, at most 1")
    rows["a"] = result([9, 3.0], [9, 3.1])
    assert "within the spread" not in judge(asked(), rows).reasons[0]


def test_steps_are_those_to_the_worst_final_loss_of_the_two_on_a_straight_line() -> None:
    half = asked(fair=(Pair(("a",), ("b",), at_most=0.5, measure="steps"),), generous=())
    # b ends at 4.0 after 200 steps; a is there after 50, half way from 5 to 3.
    rows = {"a": result([5, 3, 3]), "b": result([9, 5, 4]), "c": result([9, 4])}
    verdict = judge(half, rows)
    assert verdict.word == HOLDS
    assert verdict.reasons == ("a against b: steps to a loss of 4.00: 50 / 200 = 0.250, at most 0.5",)
    assert judge(half, rows | {"a": result([9, 7, 4])}).word == FAILS


def test_the_table_has_every_row_with_its_numbers_and_the_papers() -> None:
    question = dataclasses.replace(asked(), rows=(Row("a", paper="42"), Row("b")))
    results = {"a": result([9, 4.0], [9, 4.2]), "b": result([])}
    answer = Answer(question, results, 4.2, judge(question, results))
    first, second = cells(answer)
    assert first[0] == "a"
    assert first[3] == "4.1000 ± 0.1414"
    assert first[4] == "60.34"  # e ** 4.1
    assert first[-1] == "42"
    assert second[:2] == ("b", "failed")
    assert len(first) == len(second)
    conditions = {
        "command": "python -m benchmarks.paper", "commit": "abc", "date": "today", "cores": 2, "cpu": "x",
        "torch": "2", "load_average": 0.1, "seeds": [1337],
    }  # fmt: skip
    page = markdown([answer], conditions)
    assert "**not known**" in page
    assert "- b: seed 0 it broke" in page
    assert "one seed" in page


# --- a question from end to end --------------------------------------------------------------------------------------


@pytest.fixture
def micro(tmp_path: Path) -> Size:
    """Two owners of eight small texts, eight steps."""
    recipe = write_recipe(tmp_path / "recipe", extra="")
    texts = []
    for index in range(8):
        path = tmp_path / "text" / f"{index}"
        path.mkdir(parents=True)
        for number in range(3):
            words = [f"owner {(index + 2) * number * k % 97} of {k % 13} things;" for k in range(220)]
            (path / f"{number}.txt").write_text(" ".join(words))
        texts.append(str(path))
    return Size(
        name="micro", source=str(recipe), owners=2, steps=8, tau=4, warmup=0.0, scores=2, texts=tuple(texts),
        mixed_texts=tuple(texts), scored_sequences=None, overrides=("node.workers=1",), tokens_per_s=1.0,
        overhead_s=0.0, needs_built_in_text=False,
    )  # fmt: skip


def test_a_question_is_answered_and_nothing_runs_twice(micro: Size, tmp_path: Path) -> None:
    question = dataclasses.replace(
        asked(generous=()), rows=(Row("a"), Row("b", method="per-step")), fair=(FAIR,), name="smoke"
    )
    same = dataclasses.replace(question, name="same", rows=(Row("b", method="per-step"), Row("a")))
    home, console = tmp_path / "out", Console(quiet=True)
    assert paper.ask([question, same], micro, 1, home, console) == 0
    runs = sorted((home / "runs").iterdir())
    assert len(runs) == 2, "two questions share their runs"
    assert all(is_finished(run) for run in runs)
    first = json.loads((home / paper.JSON_FILE).read_text())
    rows = {row["label"]: row["result"] for row in first["questions"][0]["rows"]}
    assert {row["tokens"] for row in rows.values()} == {8 * 2 * 2 * 32}
    assert {row["sequential_steps"] for row in rows.values()} == {8}
    ours, other = rows["a"]["loss"]["mean"], rows["b"]["loss"]["mean"]
    assert first["questions"][0]["verdict"] == (HOLDS if ours <= other else FAILS)
    assert rows["b"]["bytes_are_computed"]
    assert not rows["a"]["bytes_are_computed"]

    def refuse(*_: object) -> None:
        raise AssertionError("a finished run was started again")

    with mock.patch.object(Runner, "_start", refuse):
        assert paper.ask([question, same], micro, 1, home, console) == 0
    again = json.loads((home / paper.JSON_FILE).read_text())
    assert again["questions"] == first["questions"]


def test_the_listing_counts_shared_runs_once(micro: Size, tmp_path: Path) -> None:
    question = dataclasses.replace(asked(), rows=(Row("a"), Row("b", method="per-step")))
    table = paper.listing([question, question], micro, 2, tmp_path)
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["runs"] == ["4", "4", ""]
    assert columns["new"] == ["4", "0", "4"]
    assert columns["new tokens"] == ["4,096", "0", "4,096"]
