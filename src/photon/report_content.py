"""What the report says: a run's events turned into figures and table rows. No HTML is made here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise

from markupsafe import Markup

from photon.events import Evaluated, Event, NodeRound, RoundDone, RunStarted, Sampled, Scores
from photon.readable import byte_size, count, duration, significant
from photon.report_charts import COLOURS, Axis, Chart, Series, heat_map, line_chart, sparkline
from photon.summary import Summary, summarise

_MOST_POINTS = 240
_MOST_MISSING_ROWS = 200
_UNTOLD_SHARE = 0.005
_PHASE_WORDS = {
    "nodes": "nodes: exchange, evaluation, local training",
    "merge": "checking and merging replies",
    "outer": "outer step",
    "commit of the round before": "committing the state",
}


@dataclass(frozen=True)
class Run:
    """The events of a run, sorted for reading. Of two events for one round the later one counts."""

    summary: Summary
    start: RunStarted
    began: datetime
    rounds: Mapping[int, RoundDone]
    evaluations: Mapping[int, Evaluated]
    samples: Sequence[Sampled]
    recipe: str

    @classmethod
    def of(cls, events: Sequence[Event], recipe: str) -> Run:
        """Sort `events`. Raises StateError if they hold no run_started event."""
        summary = summarise(events)
        starts = [e for e in events if isinstance(e, RunStarted)]
        samples = {e.round: e for e in events if isinstance(e, Sampled)}
        rounds = {e.round: e for e in events if isinstance(e, RoundDone)}
        evaluations = {e.round: e for e in events if isinstance(e, Evaluated)}
        return cls(
            summary=summary,
            start=starts[-1],
            began=datetime.fromtimestamp(starts[0].time, UTC),
            rounds=dict(sorted(rounds.items())),
            evaluations=dict(sorted(evaluations.items())),
            samples=[samples[number] for number in sorted(samples)],
            recipe=recipe,
        )

    def axes(self) -> list[Axis]:
        """The meanings that the x axis of every chart can take; the page opens with the first."""
        where: dict[int, RoundDone | Evaluated] = {**self.evaluations, **self.rounds}
        moved = {n: float(e.bytes_up + e.bytes_down) for n, e in where.items()}
        axes = [
            Axis(
                "steps",
                "sequential steps",
                "steps",
                "{:,.0f}".format,
                {n: float(e.sequential_step) for n, e in where.items()},
            ),
            Axis("tokens", "tokens", "tokens", count, {n: float(e.tokens) for n, e in where.items()}),
            Axis("bytes", "bytes moved, up and down", "moved", byte_size, moved),
            Axis("time", "training time", "of training", duration, {n: e.seconds for n, e in where.items()}),
        ]
        return [axis for axis in axes if axis.key != "bytes" or any(moved.values())]


@dataclass(frozen=True)
class Figure:
    """A chart drawn over each axis."""

    chart: Chart
    drawings: Sequence[tuple[Axis, Markup]]


def learning_figures(run: Run) -> list[Figure]:
    """Held-out and training loss of the global model, and held-out bits per byte of each silo."""
    evaluated, trained = _thin(run.evaluations), _thin(run.rounds)
    both = sorted({*evaluated, *trained})
    loss = Chart(
        title="Loss",
        caption="Held-out loss of the global model, pooled over all silos, and training loss (mean over each round).",
        unit="nats per token",
        rounds=both,
        series=[
            Series("training loss", [run.rounds[n].train_loss if n in run.rounds else None for n in both], "s2 calm"),
            Series(
                "held-out loss",
                [run.evaluations[n].pooled.loss if n in run.evaluations else None for n in both],
                "s1 strong",
            ),
        ],
    )
    each = [
        Series(name, [_of_silo(run.evaluations[n], name) for n in evaluated], style)
        for name, style in _styles(_silo_names(run))
    ]
    if len(each) > 1:
        each.append(Series("pooled", [run.evaluations[n].pooled.bits_per_byte for n in evaluated], "ink strong"))
    silos = Chart(
        title="Each silo",
        caption="Held-out bits per byte of the global model on each owner's own text, comparable across tokenizers.",
        unit="bits per byte",
        rounds=evaluated,
        series=each,
    )
    return _figures(run, [loss, silos])


def drift_figures(run: Run) -> list[Figure]:
    """How far apart the nodes pull: norms of their updates, and how well the updates agree."""
    rounds = _thin(run.rounds)
    done = [run.rounds[n] for n in rounds]
    names = sorted({name for event in run.rounds.values() for name in event.nodes})
    each = [
        Series(name, [e.nodes[name].update_norm if name in e.nodes else None for e in done], style)
        for name, style in _styles(names)
    ]
    merged = Series("merged update", [e.merged_norm for e in done], "ink strong")
    norms = Chart(
        title="Update norms",
        caption="L2 norm of each node's pseudo-gradient, and of the merged one. Merged far below the rest: "
        "the nodes pull apart.",
        unit="L2 norm",
        rounds=rounds,
        series=[*each, merged],
        from_zero=True,
    )
    pairs = [_pairs(e.cosine) for e in done]
    agreement = Chart(
        title="Agreement of updates",
        caption="Cosine between the updates of two nodes, over all pairs. 1: the same direction; 0: unrelated.",
        unit="cosine",
        rounds=rounds,
        series=[
            Series("closest pair", [max(p) if p else None for p in pairs], "s3 calm"),
            Series("mean of pairs", [sum(p) / len(p) if p else None for p in pairs], "s1 strong"),
            Series("farthest pair", [min(p) if p else None for p in pairs], "s2 calm"),
        ],
        from_zero=True,
    )
    return _figures(run, [norms, agreement] if any(pairs) else [norms])


def heat_maps(run: Run) -> list[tuple[int, Markup]]:
    """Pairwise cosines of the first, the middle and the last round in which two nodes answered, on one scale."""
    able = [n for n, e in run.rounds.items() if len(e.nodes) > 1 and _pairs(e.cosine)]
    if not able:
        return []
    chosen = sorted({able[0], able[len(able) // 2], able[-1]})
    strongest = heat_scale(run)
    return [
        (
            number,
            heat_map(
                sorted(run.rounds[number].nodes),
                run.rounds[number].cosine,
                strongest,
                f"Cosine of each pair of updates in round {number}",
            ),
        )
        for number in chosen
    ]


def heat_scale(run: Run) -> float:
    """The cosine that gets the full colour: the strongest of the run, rounded up to a tenth."""
    strongest = max((abs(c) for e in run.rounds.values() for c in _pairs(e.cosine)), default=1.0)
    return min(1.0, math.ceil(strongest * 10 - 1e-9) / 10) or 0.1


def speed_figures(run: Run) -> list[Figure]:
    """Tokens a second, round by round."""
    rounds = _thin(run.rounds)
    speed = Chart(
        title="Speed",
        caption="Tokens trained on per second of wall time, all nodes together, exchange and evaluation included.",
        unit="tokens per second",
        rounds=rounds,
        series=[Series("tokens per second", [run.rounds[n].tokens_per_second for n in rounds], "s1 strong")],
        from_zero=True,
    )
    return _figures(run, [speed])


@dataclass(frozen=True)
class SiloRow:
    """A silo's held-out quality before and after."""

    name: str
    before: Scores
    after: Scores
    curve: Markup


def silo_rows(run: Run) -> list[SiloRow]:
    """Each silo, then the pool, from the first to the last evaluation; empty before there is one."""
    evaluations = list(run.evaluations.values())
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    thinned = [run.evaluations[n] for n in _thin(run.evaluations)]
    rows = [
        SiloRow(name, first.silos[name], last.silos[name], sparkline([_of_silo(e, name) for e in thinned]))
        for name in _silo_names(run)
        if name in first.silos and name in last.silos
    ]
    pooled = sparkline([e.pooled.bits_per_byte for e in thinned])
    return [*rows, SiloRow("pooled", first.pooled, last.pooled, pooled)]


@dataclass(frozen=True)
class NodeRow:
    """What one node did over the whole run."""

    name: str
    rounds: int
    missed: int
    tokens: int
    steps: int
    seconds: float
    evaluation_seconds: float
    tokens_per_second: float
    epoch: float
    clipped: float
    bytes_up: int
    bytes_down: int


def node_rows(run: Run) -> list[NodeRow]:
    """Each node's share of the work, summed over the committed rounds it counted in."""
    missed = Counter(name for event in run.rounds.values() for name in event.missing)
    taken_part = {name for event in run.rounds.values() for name in event.nodes}
    return [
        _node_row(name, [e.nodes[name] for e in run.rounds.values() if name in e.nodes], missed[name])
        for name in sorted(taken_part | set(missed) | set(run.start.nodes))
    ]


def _node_row(name: str, rounds: Sequence[NodeRound], missed: int) -> NodeRow:
    tokens, steps = sum(r.tokens for r in rounds), sum(r.steps for r in rounds)
    seconds = sum(r.seconds for r in rounds)
    return NodeRow(
        name=name,
        rounds=len(rounds),
        missed=missed,
        tokens=tokens,
        steps=steps,
        seconds=seconds,
        evaluation_seconds=sum(r.evaluation_seconds for r in rounds),
        tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
        epoch=max((r.epoch for r in rounds), default=0.0),
        clipped=sum(r.clipped_steps for r in rounds) / steps if steps else 0.0,
        bytes_up=sum(r.bytes_up for r in rounds),
        bytes_down=sum(r.bytes_down for r in rounds),
    )


@dataclass(frozen=True)
class PhaseRow:
    """A part of the run's wall time."""

    name: str
    seconds: float
    share: float


def phase_rows(run: Run) -> list[PhaseRow]:
    """Where the wall time of the run went, the phases of all rounds added up, in the order they happen."""
    seconds: Counter[str] = Counter()
    for event in run.rounds.values():
        seconds.update(event.phases_s)
    told = sum(seconds.values())
    total = max(run.summary.seconds, told)
    rows = [PhaseRow(_PHASE_WORDS.get(name, name), s, s / total if total else 0.0) for name, s in seconds.items()]
    if total and (total - told) / total > _UNTOLD_SHARE:
        rest = PhaseRow("outside rounds: start-up, last evaluation, samples", total - told, (total - told) / total)
        rows.append(rest)
    return rows


@dataclass(frozen=True)
class RoundRow:
    """The numbers behind the loss chart."""

    number: int
    where: RoundDone | Evaluated
    trained: RoundDone | None
    evaluated: Evaluated | None


def round_rows(run: Run) -> list[RoundRow]:
    """The rounds that the loss chart draws."""
    numbers = sorted({*_thin(run.evaluations), *_thin(run.rounds)})
    where: dict[int, RoundDone | Evaluated] = {**run.evaluations, **run.rounds}
    return [RoundRow(n, where[n], run.rounds.get(n), run.evaluations.get(n)) for n in numbers]


def missing_rows(run: Run) -> list[tuple[int, str, str]]:
    """Round, node and reason of each reply that did not count; the latest ones if there are very many."""
    rows = [(n, name, reason) for n, event in run.rounds.items() for name, reason in sorted(event.missing.items())]
    return rows[-_MOST_MISSING_ROWS:]


def shown_samples(run: Run) -> list[Sampled]:
    """The first and the last sample."""
    return [run.samples[0], run.samples[-1]] if len(run.samples) > 1 else list(run.samples)


def lede(run: Run) -> str:
    """The run in two sentences."""
    summary = run.summary
    who = f"{summary.nodes} nodes" if summary.nodes > 1 else "One node"
    rounds = f"{summary.rounds} round{'s' if summary.rounds != 1 else ''} of {local_steps(run)}"
    together = " together" if summary.nodes > 1 else ""
    sentence = f"{who} trained a language model of {count(summary.parameters)} parameters{together}, in {rounds}."
    if summary.bytes_ratio is None or summary.nodes == 1:  # one node may hold the text of many owners
        return sentence
    moved = byte_size(summary.bytes_up + summary.bytes_down)
    fewer = f"{significant(summary.bytes_ratio)} times fewer bytes than gradients exchanged at every step"
    return f"{sentence} No text left its owner; {moved} of model weights and updates travelled, {fewer}."


def local_steps(run: Run) -> str:
    """Of a round, as they were: a part may have set another tau than the recipe's, in each round its own."""
    ends = pairwise([0, *(event.sequential_step for event in run.rounds.values())])
    taus = [end - begin for begin, end in ends] or [run.summary.tau]
    fewest, most = min(taus), max(taus)
    return f"{fewest} to {most} local steps" if fewest < most else f"{most} local step{'s' if most != 1 else ''}"


def _figures(run: Run, charts: Iterable[Chart]) -> list[Figure]:
    axes = run.axes()
    drawable = [chart for chart in charts if chart.rounds and chart.series]
    return [Figure(chart, [(axis, line_chart(chart, axis)) for axis in axes]) for chart in drawable]


def _thin(rounds: Iterable[int]) -> list[int]:
    """At most `_MOST_POINTS` rounds, evenly spaced, the first and the last among them."""
    numbers = sorted(rounds)
    if len(numbers) <= _MOST_POINTS:
        return numbers
    last = len(numbers) - 1
    return [numbers[round(i * last / (_MOST_POINTS - 1))] for i in range(_MOST_POINTS)]


def _styles(names: Sequence[str]) -> list[tuple[str, str]]:
    """A colour for each name while there are enough; a crowd is drawn in one quiet tone."""
    if len(names) > COLOURS:
        return [(name, "crowd calm") for name in names]
    return [(name, f"s{i + 1}") for i, name in enumerate(names)]


def _silo_names(run: Run) -> list[str]:
    return sorted({name for event in run.evaluations.values() for name in event.silos})


def _of_silo(event: Evaluated, name: str) -> float | None:
    return event.silos[name].bits_per_byte if name in event.silos else None


def _pairs(cosine: Sequence[Sequence[float]]) -> list[float]:
    """The values below the diagonal that are numbers."""
    return [row[j] for i, row in enumerate(cosine) for j in range(i) if math.isfinite(row[j])]
