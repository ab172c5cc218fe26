"""The paper's questions: for each the runs that answer it, and what decides.

A row is a method with a budget; what it does not name is the size's (`sizes.py`). A claim is a list of pairs of rows.
Where the paper's numbers come from: [NB] its authors' plotting notebooks, [NOTES] third-party notes on the paper,
[CALC] computed from these. The body of the paper itself was not at hand; numbers are quoted, never measured by us.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Measure = Literal["loss", "steps"]
_TAUS = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Row:
    """One run per seed. `steps` and `lr` are factors of the size's; `owners` and `tau` 0: the size's.

    `central_batch`: each node has the batch of all nodes. `mixed`: the text of owners that differ in kind. `paper` is
    what the paper has for this row.
    """

    label: str
    method: str = "photon"
    owners: int = 0
    steps: float = 1.0
    tau: int = 0
    lr: float = 1.0
    central_batch: bool = False
    mixed: bool = False
    settings: tuple[str, ...] = ()
    paper: str = ""


@dataclass(frozen=True)
class Pair:
    """`measure` of the best of `ours` is at most `at_most` times that of the best of `other`; rows by their labels.

    Best is the lowest held-out loss. `steps` are those to the worst final loss of the two.
    """

    ours: tuple[str, ...]
    other: tuple[str, ...]
    at_most: float = 1.0
    measure: Measure = "loss"


@dataclass(frozen=True)
class Question:
    """`fair` pairs give ours no more tokens than the other, `generous` ones give it more (see `verdict.judge`)."""

    name: str
    title: str
    claim: str
    paper: str
    rows: tuple[Row, ...]
    fair: tuple[Pair, ...]
    generous: tuple[Pair, ...] = ()
    note: str = ""


_PHOTON = Row("federated")
_PHOTON_RATES = (_PHOTON, Row("federated, rate x0.5", lr=0.5), Row("federated, rate x2", lr=2.0))
_CENTRAL_RATES = (
    Row("central", method="per-step"),
    Row("central, rate x0.5", method="per-step", lr=0.5),
    Row("central, rate x2", method="per-step", lr=2.0),
)


def _labels(rows: tuple[Row, ...]) -> tuple[str, ...]:
    return tuple(row.label for row in rows)


CENTRAL = Question(
    name="central",
    title="Federated against centralised",
    claim="federated training reaches a lower perplexity than centralised training",
    paper=(
        "Validation perplexity at equal sequential steps [NOTES]; each client has the whole central batch, so K times "
        "the tokens [CALC]. At 125M, K = 8, to perplexity 42: 1.84 B tokens centrally, 4.33 B (tau 64) to 5.58 B (tau "
        "512) federated [NB, CALC]."
    ),
    rows=(
        *_PHOTON_RATES,
        *_CENTRAL_RATES,
        Row("central, batch of one node", method="central-small"),
        Row("central, half the steps", method="per-step", steps=0.5, paper="1.3B 23.2, 3B 18.2, 7B 16.6"),
        Row(
            "federated, half the steps, central batch at every node",
            steps=0.5,
            central_batch=True,
            paper="1.3B 20.1, 3B 15.7, 7B 13.8",
        ),
    ),
    fair=(Pair(_labels(_PHOTON_RATES), _labels(_CENTRAL_RATES)),),
    generous=(Pair(("federated, half the steps, central batch at every node",), ("central, half the steps",)),),
    note=(
        "Fair: equal tokens and equal sequential steps, best of three rates each. Generous: equal sequential steps, K "
        "times the tokens. The batch of one node has equal tokens and K times the sequential steps."
    ),
)

SCALING = Question(
    name="scaling",
    title="Scaling with K",
    claim="more nodes reach a lower loss",
    paper="125M, tau 128: sequential steps and tokens to perplexity 42 [NB]; 16 clients save a third [CALC].",
    rows=(
        Row("K = 1, equal steps", owners=1, paper="12,778 steps, 0.83 B tokens"),
        Row("K = 2, equal steps", owners=2, paper="10,756 steps, 1.40 B tokens"),
        Row("K = 4, equal steps", owners=4, paper="9,498 steps, 2.47 B tokens"),
        Row("K = 8, equal steps", owners=8, paper="8,997 steps, 4.67 B tokens"),
        Row("K = 1, equal tokens", owners=1, steps=4.0),
        Row("K = 2, equal tokens", owners=2, steps=2.0),
        Row("K = 8, equal tokens", owners=8, steps=0.5),
    ),
    fair=(Pair(("K = 8, equal tokens",), ("K = 1, equal tokens",)),),
    generous=(
        Pair(("K = 2, equal steps",), ("K = 1, equal steps",)),
        Pair(("K = 4, equal steps",), ("K = 2, equal steps",)),
        Pair(("K = 8, equal steps",), ("K = 4, equal steps",)),
    ),
    note=(
        "Equal steps: tokens grow with K. Equal tokens: those of K = 4 at equal steps, so sequential steps shrink with "
        "K. All K are dealt the same text and scored on the same held-out text."
    ),
)

TAU = Question(
    name="tau",
    title="Local steps",
    claim="tau of 512 needs at most 1.29 times the sequential steps of 64",
    paper=(
        "125M, K = 8: sequential steps to perplexity 42 [NB]; tau 512 needs 1.29 times those of 64 [CALC]. Bytes at "
        "matched perplexity fall 27, 50 and 166 times, not 64, 128 and 512 [CALC]."
    ),
    rows=tuple(
        Row(
            f"tau = {tau}",
            steps=2.0,
            tau=tau,
            paper={64: "8,341 steps", 128: "8,997 steps", 512: "10,751 steps"}.get(tau, ""),
        )
        for tau in _TAUS
    ),
    fair=(Pair(("tau = 512",), ("tau = 64",), at_most=1.29, measure="steps"),),
    note="Equal tokens and equal sequential steps, twice those of the other questions.",
)

_WEAK = Row(
    "DiLoCo, outer 0.1, momentum 0.9", method="diloco", settings=("federation.outer_lr=0.1",), paper="twice the steps"
)
_DILOCO = (
    *(
        Row(
            f"DiLoCo, outer {rate}, momentum {momentum}",
            method="diloco",
            settings=(f"federation.outer_lr={rate}", f"federation.outer_momentum={momentum}"),
        )
        for rate, momentum in ((0.3, 0.9), (0.7, 0.9), (0.3, 0.5), (0.7, 0.5), (1.0, 0.5))
    ),
    Row("DiLoCo, outer 0.7, momentum 0.5, rate x0.5", "diloco", lr=0.5, settings=("federation.outer_momentum=0.5",)),
    Row("DiLoCo, outer 0.7, momentum 0.5, rate x2", "diloco", lr=2.0, settings=("federation.outer_momentum=0.5",)),
)

DILOCO = Question(
    name="diloco",
    title="Photon against tuned DiLoCo",
    claim="Photon is no worse than DiLoCo, tuned over outer rate, momentum and inner rate",
    paper=(
        "Converges twice as fast as DiLoCo; the comparison is with outer rate 0.1, tau 512, K = 2, 4, 8 [NB]. DiLoCo's "
        "own is 0.7."
    ),
    rows=(*_PHOTON_RATES, _WEAK, *_DILOCO),
    fair=(Pair(_labels(_PHOTON_RATES), _labels((_WEAK, *_DILOCO))),),
    note=(
        f"Equal tokens and equal sequential steps. Photon is the best of {len(_PHOTON_RATES)}, DiLoCo of "
        f"{len(_DILOCO) + 1}, chosen on the mean of all seeds: more tries for DiLoCo."
    ),
)

DILOCO_WEAK = Question(
    name="diloco-weak",
    title="Photon against DiLoCo with an outer rate of 0.1",
    claim="Photon needs half of DiLoCo's sequential steps",
    paper=DILOCO.paper,
    rows=(_PHOTON, _WEAK),
    fair=(Pair(("federated",), (_WEAK.label,), at_most=0.5, measure="steps"),),
    note="The paper's own comparison. Equal tokens and equal sequential steps.",
)

HETEROGENEITY = Question(
    name="heterogeneity",
    title="Heterogeneous owners",
    claim="owners whose texts differ in kind cost at most 5 % of loss (the bound is ours)",
    paper="Pile-CC, Wikipedia, ArXiv, PG-19 on 4, 8, 16 clients: converges, slower if more differ [NB, no numbers].",
    rows=(
        Row("4 owners, dealt evenly", owners=4, mixed=True),
        Row("4 owners, each its own kind", owners=4, mixed=True, settings=("data.partition=owner",)),
        Row("8 owners, dealt evenly", owners=8, mixed=True),
        Row("8 owners, two of each kind", owners=8, mixed=True, settings=("data.partition=owner",)),
    ),
    fair=(
        Pair(("4 owners, each its own kind",), ("4 owners, dealt evenly",), at_most=1.05),
        Pair(("8 owners, two of each kind",), ("8 owners, dealt evenly",), at_most=1.05),
    ),
    note=(
        "Equal sequential steps; equal tokens within a number of owners. Held-out text of all owners. An owner "
        "trains on as many tokens however little text it has: small kinds count for more than if dealt evenly."
    ),
)

PARTICIPATION = Question(
    name="participation",
    title="Partial participation",
    claim="half, a quarter or an eighth of the owners in a round costs at most 5 % of loss (the bound is ours)",
    paper="64 clients, tau 512, participation 0.5, 0.25, 0.125: converges [NB, no numbers].",
    rows=tuple(
        Row(f"{k} of 8 owners", owners=8, settings=(f"federation.nodes_per_round={k}",) if k < 8 else ())
        for k in (8, 4, 2, 1)
    ),
    fair=tuple(Pair((f"{k} of 8 owners",), ("8 of 8 owners",), at_most=1.05) for k in (4, 2, 1)),
    note="Equal sequential steps, so fewer tokens the fewer take part. Text dealt evenly.",
)


def _dropping(kind: str, share: float) -> Row:
    own = ("data.partition=owner",) if kind == "own kinds" else ()
    dropout = (f"federation.dropout={share}",) if share else ()
    return Row(f"{kind}, drop-out {share:g}", owners=8, mixed=True, settings=(*own, *dropout))


_SHARES = (0.0, 0.125, 0.5, 0.875)
_KINDS = ("dealt evenly", "own kinds")

DROPOUT = Question(
    name="dropout",
    title="Drop-out",
    claim="drop-out up to 0.875 costs at most 5 % of loss (the bound is ours)",
    paper="Drop-out 0, 0.125, 0.5, 0.875; C4 and non-IID; 8 and 16 clients: robust [NB, no numbers].",
    rows=tuple(_dropping(kind, share) for kind in _KINDS for share in _SHARES),
    fair=tuple(
        Pair((_dropping(kind, share).label,), (_dropping(kind, 0.0).label,), at_most=1.05)
        for kind in _KINDS
        for share in _SHARES[1:]
    ),
    note="Equal sequential steps, so fewer tokens the more drop out; at least one stays.",
)

QUESTIONS = (CENTRAL, SCALING, TAU, DILOCO, DILOCO_WEAK, HETEROGENEITY, PARTICIPATION, DROPOUT)
