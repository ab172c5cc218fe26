"""What came out, as data (paper.json) and as tables for docs/results.md (paper.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.paper.questions import Question
from benchmarks.paper.verdict import Verdict
from photon.compare_content import MethodResult, loss_text

HEADER = (
    "Run",
    "Tokens",
    "Sequential steps",
    "Held-out loss",
    "Perplexity",
    "Bytes up",
    "Bytes down",
    "Steps to the target",
    "The paper's",
)


@dataclass(frozen=True)
class Answer:
    """A question with its rows' results by label, and the loss that all of them reached."""

    question: Question
    results: Mapping[str, MethodResult]
    target_loss: float | None
    verdict: Verdict


def cells(answer: Answer) -> list[tuple[str, ...]]:
    """A line of words a row, under HEADER."""
    return [
        (row.label, *_numbers(answer.results[row.label]), row.paper)
        for row in answer.question.rows
        if row.label in answer.results
    ]


def markdown(answers: Sequence[Answer], conditions: Mapping[str, object]) -> str:
    """Every question as a section: the claim, both verdict and numbers, the table, and where it comes from."""
    parts = [f"`{conditions['command']}`, {_origin(conditions)}.\n"]
    for answer in answers:
        question = answer.question
        target = f"{answer.target_loss:.2f}" if answer.target_loss is not None else "not known"
        lines = ["| " + " | ".join(line) + " |" for line in (HEADER, ("---",) * len(HEADER), *cells(answer))]
        failed = [f"- {label}: {why}" for label, why in _failures(answer)]
        parts.append(
            "\n".join(
                [
                    f"### {question.title}\n",
                    f"Claim: {question.claim}. **{answer.verdict.word}**.\n",
                    *lines,
                    "",
                    f"Target: a loss of {target}, the worst of these. {question.note}\n",
                    f"The paper: {question.paper}\n",
                    *[f"- {reason}." for reason in answer.verdict.reasons],
                    *failed,
                    "",
                ]
            )
        )
    return "\n".join(parts)


def as_json(answers: Sequence[Answer], conditions: Mapping[str, object]) -> str:
    """All of it; results as in compare.json."""
    content = {
        "conditions": conditions,
        "questions": [
            {
                "name": answer.question.name,
                "title": answer.question.title,
                "claim": answer.question.claim,
                "paper": answer.question.paper,
                "note": answer.question.note,
                "verdict": answer.verdict.word,
                "reasons": answer.verdict.reasons,
                "target_loss": answer.target_loss,
                "rows": [
                    {
                        "label": row.label,
                        "paper": row.paper,
                        "result": answer.results[row.label].model_dump(mode="json"),
                    }
                    for row in answer.question.rows
                    if row.label in answer.results
                ],
            }
            for answer in answers
        ],
    }
    return json.dumps(content, indent=1) + "\n"


def _numbers(result: MethodResult) -> tuple[str, ...]:
    if result.loss is None:
        return ("failed",) + ("",) * (len(HEADER) - 3)
    mark = "*" if result.bytes_are_computed else ""
    # Perplexity of the mean loss: the geometric mean over seeds.
    perplexity = f"{math.exp(result.loss.mean):.2f}" if result.loss.mean < 100 else "no number"
    return (
        f"{result.tokens:,.0f}",
        f"{result.sequential_steps:,.0f}",
        loss_text(result.loss),
        perplexity,
        f"{_bytes(result.bytes_up)}{mark}",
        f"{_bytes(result.bytes_down)}{mark}",
        f"{result.to_target.sequential_steps:,.0f}" if result.to_target is not None else "not reached",
    )


def _failures(answer: Answer) -> list[tuple[str, str]]:
    return [
        (label, f"seed {run.seed} {run.failure}")
        for label, result in answer.results.items()
        for run in result.runs
        if run.failure
    ]


def _bytes(number: float) -> str:
    return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def _origin(conditions: Mapping[str, object]) -> str:
    """Commit, date, machine and seeds in a line."""
    device = conditions.get("gpu") or f"{conditions['cores']} cores of {conditions['cpu']}"
    seeds = conditions["seeds"]
    assert isinstance(seeds, list)
    told = f"seeds {seeds[0]} to {seeds[-1]}, ± is the sample standard deviation" if len(seeds) > 1 else "one seed"
    return (
        f"commit {conditions['commit']}, {conditions['date']}, {device}, torch {conditions['torch']}, load "
        f"{conditions['load_average']} at the start; {told}; * computed: float32 gradients both ways at every step"
    )
