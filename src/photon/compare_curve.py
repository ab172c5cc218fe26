"""One run of a comparison as numbers: its held-out curve, what it cost, and what it took to reach a loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from photon.config import Recipe
from photon.events import Evaluated
from photon.summary import Summary, summarise
from photon.track import METRICS_FILE, read_events


class Closed(BaseModel):
    """What goes into compare.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Moment(Closed):
    """A held-out score, and what stood behind the model that was scored."""

    tokens: float
    sequential_steps: float
    bytes_up: float = Field(description="Nodes to Aggregator, all nodes.")
    bytes_down: float = Field(description="Aggregator to nodes, all nodes.")
    loss: float = Field(description="Held-out, nats per token, pooled over all silos.")

    @property
    def bytes_moved(self) -> float:
        """Up and down."""
        return self.bytes_up + self.bytes_down


class RunResult(Closed):
    """One run: one method, one seed."""

    seed: int
    folder: str = Field(description="Of the run, in the comparison's folder.")
    failure: str = Field("", description="Why it did not finish, or cannot be compared; else empty.")
    loss: float | None = Field(None, description="Held-out loss of the final model; null if it failed.")
    tokens: int = Field(0, description="Really trained on.")
    sequential_steps: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = Field(0.0, description="Training time on this machine.")
    model_sha256: str | None = None
    curve: list[Moment] = Field(default_factory=list, description="Every evaluation.")
    reached: Moment | None = Field(None, description="Where the target loss was reached; null: it was not.")


class Spread(Closed):
    """A number over seeds."""

    mean: float
    deviation: float | None = Field(None, description="Sample standard deviation (n - 1); null for one seed.")
    values: list[float] = Field(description="By seed, in the order of the seeds.")

    @classmethod
    def of(cls, values: Sequence[float]) -> Self | None:
        """Mean and deviation; None of no values."""
        if not values:
            return None
        deviation = stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
        return cls(mean=fmean(values), deviation=deviation, values=list(values))


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder`, if there is one, came to its end. Raises StateError if its record is damaged."""
    path = folder / METRICS_FILE
    return path.is_file() and any(event.event == "run_finished" for event in read_events(path))


def read_run(folder: Path, recipe: Recipe, seed: int, name: str) -> RunResult:
    """The numbers of a finished run; without a loss if its final model lacks the score of an owner.

    Raises StateError if its record is damaged.
    """
    events = read_events(folder / METRICS_FILE)
    summary = summarise(events)
    evaluations = sorted((event for event in events if isinstance(event, Evaluated)), key=lambda event: event.round)
    curve = [_moment(event, recipe, summary) for event in evaluations]
    owners = {owner for event in evaluations for owner in event.silos}
    final = next((event for event in evaluations if event.round == summary.rounds), None)
    is_scored = final is not None and owners <= final.silos.keys()
    bytes_up, bytes_down = bytes_of(recipe, summary, summary.sequential_steps, (summary.bytes_up, summary.bytes_down))
    return RunResult(
        seed=seed,
        folder=name,
        failure="" if is_scored else f"not every owner scored the final model; remove {folder} and compare again",
        loss=final.pooled.loss if final is not None and is_scored else None,
        tokens=summary.tokens,
        sequential_steps=summary.sequential_steps,
        bytes_up=bytes_up,
        bytes_down=bytes_down,
        seconds=summary.seconds,
        model_sha256=summary.model_sha256,
        curve=curve,
    )


def computes_bytes(recipe: Recipe) -> bool:
    """Whether the run stands for one whose traffic it does not have: everything is trained in one place."""
    return recipe.federation.outer == "none"


def bytes_of(recipe: Recipe, summary: Summary, steps: int, measured: tuple[int, int]) -> tuple[int, int]:
    """Bytes (up, down) behind `steps` sequential steps: measured, or of per-step data-parallel training computed.

    Through a centre, each of the K nodes that share a step sends its float32 gradient up and gets the mean. One node
    alone exchanges nothing.
    """
    if not computes_bytes(recipe):
        return measured
    nodes = recipe.nodes_per_round
    each_way = summary.payload_bytes * steps * nodes if nodes > 1 else 0
    return each_way, each_way


def reached(curve: Sequence[Moment], target_loss: float) -> Moment | None:
    """Where the curve first came down to `target_loss`, on a straight line between evaluations; None: nowhere.

    A score that is no number is passed over.
    """
    before: Moment | None = None
    for moment in curve:
        if not math.isfinite(moment.loss):
            continue
        if moment.loss <= target_loss:
            return moment if before is None else _between(before, moment, target_loss)
        before = moment
    return None


def mean_moment(moments: Sequence[Moment]) -> Moment | None:
    """The mean of each number; None of no moments."""
    if not moments:
        return None
    return Moment(**{name: fmean(getattr(moment, name) for moment in moments) for name in Moment.model_fields})


def _between(before: Moment, after: Moment, loss: float) -> Moment:
    share = (before.loss - loss) / (before.loss - after.loss)
    names = [name for name in Moment.model_fields if name != "loss"]
    ends = {name: (getattr(before, name), getattr(after, name)) for name in names}
    return Moment(**{name: low + share * (high - low) for name, (low, high) in ends.items()}, loss=loss)


def _moment(event: Evaluated, recipe: Recipe, summary: Summary) -> Moment:
    up, down = bytes_of(recipe, summary, event.sequential_step, (event.bytes_up, event.bytes_down))
    return Moment(
        tokens=event.tokens,
        sequential_steps=event.sequential_step,
        bytes_up=up,
        bytes_down=down,
        loss=event.pooled.loss,
    )
