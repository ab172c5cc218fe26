"""What a comparison found: the schema of compare.json, from which the table and the page are written.

Every field says what it holds. A mean is over the seeds that finished.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from pydantic import Field

from photon.compare_curve import Closed, Moment, RunResult, Spread, mean_moment, reached
from photon.config import Recipe
from photon.method import Method
from photon.readable import count

_CENT = 100


class TunedPoint(Closed):
    """One point that was tried, with the first seed."""

    settings: str = Field(description="What differs from the method as it stands; empty: nothing.")
    loss: float | None = Field(description="Held-out loss of its final model; null if it did not finish.")
    failure: str = Field(description="Why it did not finish; empty if it did.")
    won: bool = Field(description="Whether the method is compared with these settings.")


class MethodResult(Closed):
    """One row of the table."""

    name: str
    title: str
    about: str
    cites: str
    settings: str = Field(description="What tuning changed; empty: nothing.")
    recipe: str = Field(description="The complete recipe with the first seed, as TOML.")
    loss: Spread | None = Field(description="Held-out loss of the final models; null if none finished.")
    difference_percent: float | None = Field(description="Of its mean loss, to the first method's.")
    tokens: float = Field(description="Mean, really trained on.")
    sequential_steps: float = Field(description="Mean.")
    bytes_up: float = Field(description="Mean of the whole run, all nodes.")
    bytes_down: float = Field(description="Mean of the whole run, all nodes.")
    bytes_per_token: float | None = Field(description="Up and down over tokens.")
    bytes_are_computed: bool = Field(
        description="Trained in one place: bytes are of float32 gradients up and down at each step, none for K = 1."
    )
    runs_that_reached: int = Field(description="Runs that came down to the target loss.")
    to_target: Moment | None = Field(description="Mean at the target loss; null unless every run reached it.")
    hours: dict[str, float] = Field(description="Predicted hours of the whole run, by bandwidth of a node's link.")
    tuned: list[TunedPoint] = Field(description="Every point that was tried; empty without tuning.")
    edges: list[str] = Field(description="Numbers for which the winner lies at the end of what could be tried.")
    runs: list[RunResult] = Field(description="By seed.")


class Setting(Closed):
    """What all methods share; `label` says it in a line and stands at every figure."""

    silos: list[str]
    partition: str = Field(description="owner: each silo has its own text; iid: all text dealt out evenly.")
    nodes_per_round: int
    dropout: float = Field(description="Probability that a node drops out of a round.")
    tau: int
    rounds: int
    batch_size: int = Field(description="node.batch_size, sequences.")
    sequence_length: int
    tokens: int = Field(description="What each run is to train on.")
    seeds: list[int]
    label: str


class Comparison(Closed):
    """compare.json."""

    recipe: str
    about: str
    photon: str = Field(description="Version that wrote this.")
    command: str = Field(description="Makes this comparison again, or goes on with it.")
    setting: Setting
    points_per_method: int = Field(description="1: nothing was tuned.")
    target_loss: float | None = Field(description="Null if no run finished.")
    target_was_given: bool = Field(description="False: the worst final loss of any run, rounded up.")
    headline: str
    notes: list[str] = Field(description="What a reader must know, a sentence each.")
    hours_rest_on: str = Field(description="The machine that predicted hours assume; empty without links.")
    methods: list[MethodResult] = Field(description="In the order asked for; differences are to the first.")


def setting_of(recipe: Recipe, methods: Mapping[str, Recipe], tokens: int, seeds: Sequence[int]) -> Setting:
    """The setting of a comparison on `recipe`; the label also names `methods` that change its batch or tau."""
    partition, dropout = recipe.data.partition, recipe.federation.dropout
    silos, sampled = len(recipe.silo), recipe.nodes_per_round
    split = "IID" if partition == "iid" else f"by {partition}"
    parts = [
        f"{silos} silo{'s' if silos > 1 else ''}, {split}",
        f"{sampled} of {silos} a round",
        f"drop-out {dropout:g}" if dropout else "no drop-out",
        f"tau {recipe.federation.tau}",
        *(told for name, own in methods.items() if (told := _departure(name, own, recipe))),
        f"{count(tokens)} tokens",
        f"{len(seeds)} seeds ({seeds[0]} to {seeds[-1]})" if len(seeds) > 1 else f"one seed ({seeds[0]})",
    ]
    return Setting(
        silos=[silo.name for silo in recipe.silo],
        partition=partition,
        nodes_per_round=sampled,
        dropout=dropout,
        tau=recipe.federation.tau,
        rounds=recipe.federation.rounds,
        batch_size=recipe.node.batch_size,
        sequence_length=recipe.data.sequence_length,
        tokens=tokens,
        seeds=list(seeds),
        label="; ".join(parts),
    )


def _departure(name: str, own: Recipe, recipe: Recipe) -> str:
    """What a federated method makes of tau and the local batch, if it leaves them not as they are."""
    if own.federation.outer == "none":
        return ""
    changed = [f"tau {own.federation.tau}"] if own.federation.tau != recipe.federation.tau else []
    changed += [f"batch {own.node.batch_size}"] if own.node.batch_size != recipe.node.batch_size else []
    return f"{name} {' and '.join(changed)}" if changed else ""


def default_target(runs: Sequence[RunResult]) -> float | None:
    """The worst final loss of any finished run, rounded up to cents, so that every one reaches it; None of no run."""
    losses = [run.loss for run in runs if run.loss is not None and math.isfinite(run.loss)]
    return math.ceil(round(max(losses) * _CENT, 6)) / _CENT if losses else None


def method_result(
    method: Method, recipe: str, runs: Sequence[RunResult], target_loss: float | None, computed: bool
) -> MethodResult:
    """The row of one method, without what depends on others: its difference, its tuning, its hours."""
    runs = [_with_target(run, target_loss) for run in runs]
    done = [run for run in runs if run.loss is not None]
    found = [run.reached for run in runs if run.reached is not None]
    tokens = _mean([run.tokens for run in done])
    moved = _mean([run.bytes_up + run.bytes_down for run in done])
    return MethodResult(
        name=method.name,
        title=method.title,
        about=method.about,
        cites=method.cites,
        settings="",
        recipe=recipe,
        loss=Spread.of([run.loss for run in done if run.loss is not None]),
        difference_percent=None,
        tokens=tokens,
        sequential_steps=_mean([run.sequential_steps for run in done]),
        bytes_up=_mean([run.bytes_up for run in done]),
        bytes_down=_mean([run.bytes_down for run in done]),
        bytes_per_token=moved / tokens if tokens else None,
        bytes_are_computed=computed,
        runs_that_reached=len(found),
        to_target=mean_moment(found) if len(found) == len(runs) else None,
        hours={},
        tuned=[],
        edges=[],
        runs=runs,
    )


def with_differences(methods: Sequence[MethodResult]) -> list[MethodResult]:
    """Each row with its difference to the first one's mean loss."""
    first = methods[0].loss
    return [
        method.model_copy(
            update={
                "difference_percent": None
                if first is None or method.loss is None
                else 100 * (method.loss.mean - first.mean) / first.mean
            }
        )
        for method in methods
    ]


def headline(methods: Sequence[MethodResult], setting: Setting) -> str:
    """The result in one sentence, with what it is worth."""
    losses = {method.name: method.loss for method in methods if method.loss and math.isfinite(method.loss.mean)}
    ranked = sorted(losses.items(), key=lambda item: item[1].mean)
    if not ranked:
        return "No method finished a run."
    best, loss = ranked[0]
    told = f"After {count(setting.tokens)} tokens {best} has the lowest held-out loss, {loss_text(loss)}"
    if len(ranked) == 1:
        return f"{told}."
    name, second = ranked[1]
    gap = second.mean - loss.mean
    told += f", {100 * gap / second.mean:.2f} % below {name} ({loss_text(second)})"
    if loss.deviation is None or second.deviation is None:
        return f"{told}; one seed, so the spread is not known."
    spread = max(loss.deviation, second.deviation)
    return f"{told}; that is {'less' if gap < spread else 'more'} than the spread over seeds."


def loss_text(loss: Spread) -> str:
    """`4.033 ± 0.004`, or the one value."""
    return f"{loss.mean:.4f}" + (f" ± {loss.deviation:.4f}" if loss.deviation is not None else "")


def _with_target(run: RunResult, target_loss: float | None) -> RunResult:
    if target_loss is None or run.loss is None:
        return run
    return run.model_copy(update={"reached": reached(run.curve, target_loss)})


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0
