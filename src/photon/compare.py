"""`photon compare`: several methods on the same silos, tokenizer, initial weights and tokens, side by side.

Everything that decides the outcome is in the runs, and these are kept by content. So the command can be killed at any
instant and repeated: it goes on where it was, and ends with the same comparison.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from photon import __version__
from photon.compare_content import (
    Comparison,
    MethodResult,
    TunedPoint,
    default_target,
    headline,
    method_result,
    setting_of,
    with_differences,
)
from photon.compare_curve import RunResult, computes_bytes, is_finished, read_run
from photon.compare_jobs import RECIPES, Runner, Slot
from photon.compare_links import check_prediction, predicted_hours
from photon.compare_plan import ComparePlan, Job, MethodPlan, Request, make_plan, notes_of
from photon.compare_report import compare_page
from photon.compare_tune import axes_of, edges_of, winner_of
from photon.config import Recipe
from photon.durable import only_process, write_atomic
from photon.errors import InputError, PhotonError
from photon.recipe import dump_recipe

JSON_FILE, PAGE_FILE = "compare.json", "compare.html"
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Asked:
    """What beside the request decides how it is run and told. `out` and `jobs` None: chosen here."""

    out: Path | None
    jobs: int | None
    target_loss: float | None
    links: tuple[str, ...]
    device: str
    command: str


@dataclass(frozen=True)
class _Chosen:
    """A method with the point that is compared."""

    plan: MethodPlan
    point: int
    tuned: list[TunedPoint]


def compare(request: Request, asked: Asked, console: Console) -> tuple[Comparison, Path]:
    """Run what is missing, write compare.json and compare.html, and return the comparison and its folder.

    Raises ConfigError or InputError for what cannot be compared, StoppedError on Ctrl-C, and PhotonError, after all
    else is done and written, if runs failed.
    """
    check_prediction(asked.links, asked.device)  # which is asked for after all runs, hours later
    plan = make_plan(request)
    out = asked.out or Path("compare") / f"{plan.base.name}-{plan.key}"
    slots = slots_of(plan.base, asked.jobs)
    console.print(f"comparison in {out}", markup=False, highlight=False, soft_wrap=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be made a folder: {error.strerror}") from error
    with only_process(out / ".lock", f"{out} is being worked on by another photon compare"):
        runner = Runner(out, slots, console, asked.command)
        if len(slots) > 1:
            _prepare_data(plan, out)
        runner.run(plan.tuning, "tuning")
        chosen = [_choose(plan, one, runner) for one in plan.methods]
        jobs = [plan.runs(one.plan, one.plan.points[one.point]) for one in chosen]
        runner.run([job for own in jobs for job in own], "run")
        comparison = _comparison(plan, asked, chosen, jobs, runner)
        write_atomic(out / JSON_FILE, comparison.model_dump_json(indent=1) + "\n")
        write_atomic(out / PAGE_FILE, compare_page(comparison))
    failed = [run for method in comparison.methods for run in method.runs if run.failure]
    if failed:
        told = "; ".join(f"{run.folder}: {run.failure}" for run in failed)
        raise PhotonError(f"{len(failed)} run(s) failed, the rest is in {out / PAGE_FILE}. {told}")
    return comparison, out


def slots_of(recipe: Recipe, jobs: int | None) -> list[Slot]:
    """What each of the jobs at once finds in its environment. By default one job for each CUDA device, or one.

    Several jobs share the devices out; a single one sees them all, as `photon train` would.
    """
    devices = _cuda_devices() if recipe.node.device in ("auto", "cuda") else []
    count = jobs or max(1, len(devices))
    if count == 1 or not devices:
        return [{} for _ in range(count)]
    return [{_VISIBLE: devices[index % len(devices)]} for index in range(count)]


def _cuda_devices() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    import torch

    visible = [name.strip() for name in os.environ.get(_VISIBLE, "").split(",") if name.strip()]
    return visible or [str(index) for index in range(torch.cuda.device_count())]


def _prepare_data(plan: ComparePlan, out: Path) -> None:
    """Tokenise once, before several jobs at once would all begin with it. Raises InputError if that is refused."""
    recipe = out / RECIPES / "data.toml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(recipe, dump_recipe(plan.base))
    command = [sys.executable, "-m", "photon", "data", "build", str(recipe)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - our own module
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise InputError(lines[-1].removeprefix("photon: ") if lines else "the text could not be prepared")


def _choose(plan: ComparePlan, one: MethodPlan, runner: Runner) -> _Chosen:
    """The point that won the tuning of a method; without tuning the method as it stands."""
    if plan.request.tune < 2:
        return _Chosen(one, 0, [])
    results = [_result(plan.job(one, point, plan.seeds[0]), runner) for point in one.points]
    best = winner_of([result.loss for result in results])
    tuned = [
        TunedPoint(settings=one.label(point), loss=result.loss, failure=result.failure, won=index == best)
        for index, (point, result) in enumerate(zip(one.points, results, strict=True))
    ]
    return _Chosen(one, best, tuned)


def _result(job: Job, runner: Runner) -> RunResult:
    folder = runner.folder(job)
    name = folder.relative_to(runner.out).as_posix()
    if not is_finished(folder):
        failure = runner.failures.get(job.key, "did not finish")
        return RunResult(seed=job.seed, folder=name, failure=failure)
    return read_run(folder, job.recipe, job.seed, name)


def _comparison(
    plan: ComparePlan, asked: Asked, chosen: Sequence[_Chosen], jobs: Sequence[Sequence[Job]], runner: Runner
) -> Comparison:
    results = [[_result(job, runner) for job in own] for own in jobs]
    given = asked.target_loss is not None
    target = asked.target_loss if given else default_target([run for own in results for run in own])
    methods: list[MethodResult] = []
    rest_on = ""
    for one, own, runs in zip(chosen, jobs, results, strict=True):
        recipe, point = own[0].recipe, one.plan.points[one.point]
        row = method_result(one.plan.method, dump_recipe(recipe), runs, target, computes_bytes(recipe))
        hours, rest_on = predicted_hours(recipe, asked.links, asked.device, runner.out / RECIPES / "plan.toml")
        edges = edges_of(axes_of(one.plan.method, one.plan.default), point) if one.tuned else []
        settings = one.plan.label(point)
        methods.append(
            row.model_copy(update={"settings": settings, "hours": hours, "tuned": one.tuned, "edges": edges})
        )
    methods = with_differences(methods)
    recipes = {one.plan.method.name: own[0].recipe for one, own in zip(chosen, jobs, strict=True)}
    setting = setting_of(plan.base, recipes, plan.tokens, plan.seeds)
    return Comparison(
        recipe=plan.base.name,
        about=plan.base.about,
        photon=__version__,
        command=asked.command,
        setting=setting,
        points_per_method=plan.request.tune,
        target_loss=target,
        target_was_given=given,
        headline=headline(methods, setting),
        notes=[*notes_of(plan), *_told(methods, plan, asked, rest_on)],
        hours_rest_on=rest_on,
        methods=methods,
    )


def _told(methods: Sequence[MethodResult], plan: ComparePlan, asked: Asked, rest_on: str) -> list[str]:
    """What is true of every comparison, as far as it applies to this one."""
    notes = [
        "All runs of a seed have the same silos, tokenizer and initial weights; held-out loss is that of the final "
        "model, pooled over all silos.",
        "Bytes are those of serialised messages, of all nodes, with the scoring of the model.",
    ]
    if any(method.bytes_are_computed for method in methods):
        notes.append(
            "* computed: these train in one place. K nodes that train data-parallel would send 4 bytes a parameter up "
            "and get as many back at every step; one node alone exchanges nothing."
        )
    if len(plan.seeds) > 1:
        notes.append("± is the sample standard deviation over seeds.")
    if plan.request.tune == 1:
        notes.append("Nothing was tuned (--tune).")
    if plan.base.federation.dropout:
        notes.append("Tokens are those really trained on: nodes that drop out train none.")
    if asked.target_loss is None:
        notes.append(
            "The target is the worst final loss of any run, rounded up, so that every finished run reaches it."
        )
    notes.append("What it took to reach the target is read off a straight line between evaluations.")
    if rest_on:
        notes.append(f"Predicted time is a formula's (photon plan): {rest_on}.")
    return notes
