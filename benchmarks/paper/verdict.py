"""What the runs say to a claim, by one rule, with the numbers that decided.

- `holds`: every fair pair holds (ours has no more tokens than the other).
- `only at more tokens`: some fair pair does not, and there are generous pairs, all of which hold.
- `does not hold`: otherwise.
- `not known`: a run that is needed did not finish.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.paper.questions import Pair, Question
from photon.compare_content import MethodResult, default_target
from photon.compare_curve import reached

HOLDS, MORE_TOKENS, FAILS, UNKNOWN = "holds", "only at more tokens", "does not hold", "not known"


@dataclass(frozen=True)
class Finding:
    """A pair with its numbers; `holds` None: not known. `inside_spread`: the losses differ by less than over seeds."""

    holds: bool | None
    told: str
    inside_spread: bool = False


@dataclass(frozen=True)
class Verdict:
    """`word` is one of the four above; `reasons` have a sentence for each pair."""

    word: str
    reasons: tuple[str, ...]


def judge(question: Question, results: Mapping[str, MethodResult]) -> Verdict:
    """Apply the rule to the rows' results, by label."""
    fair = [look(pair, results) for pair in question.fair]
    generous = [look(pair, results) for pair in question.generous]
    reasons = tuple(
        f"{finding.told}{' (within the spread over seeds)' if finding.inside_spread else ''}"
        for finding in (*fair, *generous)
    )
    return Verdict(_word([one.holds for one in fair], [one.holds for one in generous]), reasons)


def look(pair: Pair, results: Mapping[str, MethodResult]) -> Finding:
    """One pair. Not known as soon as one of its rows lacks a run: the best of those that are left is another claim."""
    labels = (*pair.ours, *pair.other)
    missing = [
        label for label in labels if label not in results or any(run.loss is None for run in results[label].runs)
    ]
    if missing:
        return Finding(None, f"{', '.join(missing)}: not all runs finished")
    ours, other = _best(pair.ours, results), _best(pair.other, results)
    mine, theirs = results[ours], results[other]
    first, second = _loss(mine), _loss(theirs)
    if not math.isfinite(second):
        return Finding(None, f"{other}: the loss is no number")
    deviations = [one.loss.deviation for one in (mine, theirs) if one.loss is not None]
    known = [deviation for deviation in deviations if deviation is not None]
    inside = bool(known) and abs(first - second) < max(known)
    if pair.measure == "loss":
        ratio, unit = first / second, f"loss {first:.4f} / {second:.4f}"
    else:
        target = default_target([*mine.runs, *theirs.runs])
        taken = _steps_to(mine, target), _steps_to(theirs, target)
        if taken[0] is None or taken[1] is None:
            return Finding(False, f"{ours} against {other}: a loss of {target} was not reached by every run")
        ratio, unit = taken[0] / taken[1], f"steps to a loss of {target:.2f}: {taken[0]:,.0f} / {taken[1]:,.0f}"
    holds = ratio <= pair.at_most  # a diverged run's ratio is no number, and no number is at most anything
    told = f"{ours} against {other}: {unit} = {ratio:.3f}, {'at most' if holds else 'not at most'} {pair.at_most:g}"
    return Finding(holds, told, inside)


def _word(fair: Sequence[bool | None], generous: Sequence[bool | None]) -> str:
    if False not in fair:
        return UNKNOWN if None in fair else HOLDS
    if not generous or False in generous:
        return FAILS
    return UNKNOWN if None in generous else MORE_TOKENS


def _best(labels: Sequence[str], results: Mapping[str, MethodResult]) -> str:
    """The label with the lowest mean loss; what is no number comes last."""
    return min(labels, key=lambda label: loss if math.isfinite(loss := _loss(results[label])) else math.inf)


def _loss(result: MethodResult) -> float:
    return result.loss.mean if result.loss is not None else math.nan


def _steps_to(result: MethodResult, target: float | None) -> float | None:
    """Mean sequential steps to the loss; None unless every run came down to it. A start below it is no step at all."""
    if target is None:
        return None
    moments = [reached(run.curve, target) for run in result.runs]
    steps = [moment.sequential_steps for moment in moments if moment is not None]
    return fmean(steps) or None if steps and len(steps) == len(moments) else None
