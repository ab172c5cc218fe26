"""Ask the paper's questions of this code: `python -m benchmarks.paper --size cpu`.

Runs are kept by their content under `--out` and shared between questions, so the command can be killed at any instant
and repeated, and more seeds or questions cost only what is new.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import ROOT, machine, revision
from benchmarks.paper.questions import QUESTIONS, Question
from benchmarks.paper.report import HEADER, Answer, as_json, cells, markdown
from benchmarks.paper.sizes import FIRST_SEED, SIZES, Size, expected_tokens, job_of, seconds_of, write_texts
from benchmarks.paper.verdict import judge
from photon.compare_content import MethodResult, default_target, method_result
from photon.compare_curve import RunResult, computes_bytes, is_finished, read_run
from photon.compare_jobs import Runner
from photon.compare_plan import Job
from photon.durable import only_process, write_atomic
from photon.errors import InputError, PhotonError
from photon.method import load_method
from photon.options import hint
from photon.recipe import dump_recipe

JSON_FILE, PAGE_FILE = "paper.json", "paper.md"
Plan = Mapping[str, list[Job]]  # a question's rows by label: a run for each seed


def main(
    question: Annotated[list[str] | None, typer.Option(help="Only this one; repeatable.")] = None,
    size: Annotated[str, typer.Option(help="cpu: two cores, within an hour; 125m: a GPU, days.")] = "cpu",
    seeds: Annotated[int, typer.Option(min=1, help=f"Runs of each row: {FIRST_SEED}, the next one, ...")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of runs, tokens and reports; default runs/paper-SIZE.")] = Path(),
    show: Annotated[bool, typer.Option("--list", help="Only say what there is to run, and about how long.")] = False,
) -> None:
    """Run what is missing, print a table a question, and write paper.json and paper.md."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    try:
        chosen = _size(size)
        asked = [_question(name) for name in question] if question else list(QUESTIONS)
        home = (out if out != Path() else ROOT / "runs" / f"paper-{chosen.name}").resolve()
        if show:
            console.print(listing(asked, chosen, seeds, home))
            return
        failed = ask(asked, chosen, seeds, home, console)
    except PhotonError as error:
        print(f"paper: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    if failed:
        print(f"paper: {failed} run(s) failed; see {home / PAGE_FILE}", file=sys.stderr)
        raise typer.Exit(1)


def ask(questions: Sequence[Question], size: Size, seeds: int, home: Path, console: Console) -> int:
    """Run, print and write; after each question, so that what is done is told. Returns how many runs failed.

    Raises StoppedError on Ctrl-C, InputError or ConfigError for what cannot be run.
    """
    plans = {one.name: plan_of(one, size, seeds, home) for one in questions}
    home.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "benchmarks.paper", *sys.argv[1:]]).replace(f"{ROOT}/", "")
    listed = [FIRST_SEED + index for index in range(seeds)]
    conditions = machine() | revision() | {"command": command, "size": size.name, "seeds": listed}
    answers: list[Answer] = []
    with only_process(home / ".lock", f"{home} is being worked on by another benchmarks.paper"):
        write_texts(size, home)
        runner = Runner(home, [{}], console, command)
        for one in questions:
            plan = plans[one.name]
            # By seed: what is stopped half way has whole comparisons of the first seeds.
            runner.run([job for jobs in zip(*plan.values(), strict=True) for job in jobs], one.name)
            answers.append(answer_of(one, plan, runner))
            console.print(_table(answers[-1]))
            write_atomic(home / JSON_FILE, as_json(answers, conditions))
            write_atomic(home / PAGE_FILE, markdown(answers, conditions))
    console.print(str(home / PAGE_FILE), markup=False, highlight=False, soft_wrap=True)
    return len(runner.failures)


def plan_of(question: Question, size: Size, seeds: int, home: Path) -> Plan:
    """The runs of a question."""
    return {row.label: [job_of(row, size, FIRST_SEED + index, home) for index in range(seeds)] for row in question.rows}


def answer_of(question: Question, plan: Plan, runner: Runner) -> Answer:
    """Read the runs and judge."""
    runs = {label: [_read(job, runner) for job in jobs] for label, jobs in plan.items()}
    target = default_target([run for own in runs.values() for run in own])
    results: dict[str, MethodResult] = {}
    for label, jobs in plan.items():
        recipe = jobs[0].recipe
        results[label] = method_result(
            load_method(jobs[0].method), dump_recipe(recipe), runs[label], target, computes_bytes(recipe)
        )
    return Answer(question, results, target, judge(question, results))


def listing(questions: Sequence[Question], size: Size, seeds: int, home: Path) -> Table:
    """What there is to run: a question's runs, those that no question before it has, their tokens and minutes."""
    table = Table(title=f"--size {size.name} --seeds {seeds}", title_justify="left")
    table.add_column("question")
    for column in ("runs", "new", "new tokens", "minutes, estimated"):
        table.add_column(column, justify="right")
    known: dict[str, Job] = {}
    for one in questions:
        jobs = {job.key: job for own in plan_of(one, size, seeds, home).values() for job in own}
        new = [job for key, job in jobs.items() if key not in known]
        known |= jobs
        table.add_row(f"{one.name}: {one.title}", str(len(jobs)), *_cost(new, size))
    table.add_row("all", "", *_cost(list(known.values()), size))
    return table


def _cost(jobs: Sequence[Job], size: Size) -> tuple[str, str, str]:
    tokens = sum(expected_tokens(job.recipe) for job in jobs)
    return str(len(jobs)), f"{tokens:,.0f}", f"{sum(seconds_of(job, size) for job in jobs) / 60:,.1f}"


def _read(job: Job, runner: Runner) -> RunResult:
    folder = runner.folder(job)
    name = folder.relative_to(runner.out).as_posix()
    if not is_finished(folder):
        return RunResult(seed=job.seed, folder=name, failure=runner.failures.get(job.key, "did not finish"))
    return read_run(folder, job.recipe, job.seed, name)


def _table(answer: Answer) -> Table:
    verdict = answer.verdict
    table = Table(
        title=f"{answer.question.title}. {answer.question.claim}: {verdict.word}",
        title_justify="left",
        caption="\n".join(verdict.reasons),
        caption_justify="left",
    )
    for index, column in enumerate(HEADER):
        table.add_column(column, justify="left" if index in (0, len(HEADER) - 1) else "right")
    for line in cells(answer):
        table.add_row(*line)
    return table


def _size(name: str) -> Size:
    if name not in SIZES:
        raise InputError(f"--size {name}: {hint(name, list(SIZES))}")
    return SIZES[name]


def _question(name: str) -> Question:
    found = {one.name: one for one in QUESTIONS}
    if name not in found:
        raise InputError(f"--question {name}: {hint(name, list(found))}")
    return found[name]


if __name__ == "__main__":
    typer.run(main)
