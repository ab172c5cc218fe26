"""summary.json: one run in one page of numbers, computed from its events alone.

The names in `Summary` are what other programs read; a test freezes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from photon.durable import write_atomic
from photon.errors import StateError
from photon.events import Evaluated, Event, RoundDone, RunFinished, RunStarted, Scores
from photon.link.ledger import Flow, Traffic

BYTES_DDP_FORMULA = "2 x payload_bytes x sequential_steps x nodes_per_round"


class _Closed(BaseModel):
    # A diverged run has NaN losses. "NaN" as a string is JSON and reads back as the same number; null would not.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Quality(_Closed):
    """Held-out quality of one model on one text."""

    loss: float = Field(description="Nats per token.")
    perplexity: float
    bits_per_byte: float = Field(description="Comparable across tokenizers.")

    @classmethod
    def of(cls, scores: Scores) -> Self:
        """The three numbers of a full score."""
        return cls(loss=scores.loss, perplexity=scores.perplexity, bits_per_byte=scores.bits_per_byte)


class Standing(Quality):
    """Held-out quality at one moment: pooled over all silos (this object's own numbers), and on each."""

    round: int = Field(description="Rounds behind the model that was evaluated; 0 = before training.")
    silos: dict[str, Quality]

    @classmethod
    def at(cls, event: Evaluated) -> Self:
        """What an evaluation found."""
        pooled = event.pooled
        return cls(
            loss=pooled.loss,
            perplexity=pooled.perplexity,
            bits_per_byte=pooled.bits_per_byte,
            round=event.round,
            silos={name: Quality.of(scores) for name, scores in event.silos.items()},
        )


class LinkSummary(_Closed):
    """Bytes of the whole run at each step of their way, beside the tokens that they served."""

    up: Flow = Field(description="Nodes to Aggregator.")
    down: Flow = Field(description="Aggregator to nodes.")
    bytes_per_token: float | None = Field(description="Sent, up and down, over tokens trained on; null before any.")


class Summary(_Closed):
    """What a run was, what it cost and what it reached. All bytes and tokens count committed rounds only."""

    run: str = Field(description="Identity of the run.")
    recipe: str
    status: Literal["finished", "unfinished"] = Field(description="finished = its model is written.")
    device: str
    rounds: int = Field(description="Rounds committed.")
    rounds_planned: int
    tau: int = Field(description="Local steps a round.")
    sequential_steps: int
    nodes: int
    nodes_per_round: int
    resumes: int = Field(description="Times the run was taken up again.")
    parameters: int
    payload_bytes: int = Field(description="The global model as raw float32.")
    tokens: int = Field(description="Trained on, by all nodes together.")
    seconds: float = Field(description="Training time over all resumes.")
    tokens_per_second: float = Field(description="tokens / seconds, evaluation and exchange included.")
    bytes_up: int = Field(description="Serialised payload, nodes to Aggregator.")
    bytes_down: int = Field(description="Serialised payload, Aggregator to nodes.")
    link: LinkSummary
    bytes_ddp: int = Field(description="What per-step data-parallel training would have moved for the same steps.")
    bytes_ddp_formula: str = Field(description="How bytes_ddp was computed.")
    bytes_ratio: float | None = Field(description="bytes_ddp / (bytes_up + bytes_down); null for one node or no bytes.")
    before: Standing | None = Field(description="First evaluation; null before there is one.")
    after: Standing | None = Field(description="Last evaluation; null before there is one.")
    model_sha256: str | None = Field(description="Of the final model's weights; null until the run is finished.")

    @property
    def apart(self) -> str:
        """A remark if the pooled scores `before` and `after` are not of the same silos, so not of the same text."""
        if self.before is None or self.after is None:
            return ""
        once = sorted(self.before.silos.keys() ^ self.after.silos.keys())
        return f"the pooled scores before and after are not of the same silos: {', '.join(once)}" if once else ""


def summarise(events: Sequence[Event]) -> Summary:
    """Sum up a run, finished or not, from the events of its metrics.jsonl in the order they were written.

    Raises StateError if no run_started event is among them.
    """
    starts = [e for e in events if isinstance(e, RunStarted)]
    if not starts:
        raise StateError("metrics.jsonl holds no run_started event, so there is no run to sum up.")
    start = starts[-1]  # a resume may run on other hardware; identity and shape never change
    rounds = sorted((e for e in events if isinstance(e, RoundDone)), key=lambda e: e.round)
    evaluations = sorted((e for e in events if isinstance(e, Evaluated)), key=lambda e: e.round)
    finish = next((e for e in reversed(events) if isinstance(e, RunFinished)), None)
    last = rounds[-1] if rounds else None
    tokens, steps = (last.tokens, last.sequential_step) if last else (0, 0)
    # The evaluation after the last round moves the model once more, and says so itself.
    totals: list[RoundDone | Evaluated] = [*rounds, *evaluations]
    bytes_up = max((e.bytes_up for e in totals), default=0)
    bytes_down = max((e.bytes_down for e in totals), default=0)
    link = max(totals, key=lambda e: e.link.up.encoded + e.link.down.encoded).link if totals else Traffic()
    seconds = max(e.seconds for e in events)
    # Per-step training through a centre sends each node's float32 gradient up and the mean down at every step.
    # (A ring of N nodes moves (N - 1) / N of that.)
    bytes_ddp = 2 * start.payload_bytes * steps * start.nodes_per_round
    moved = bytes_up + bytes_down
    return Summary(
        run=start.run,
        recipe=start.recipe,
        status="finished" if finish else "unfinished",
        device=start.device,
        rounds=last.round if last else 0,
        rounds_planned=start.rounds,
        tau=start.tau,
        sequential_steps=steps,
        nodes=len(start.nodes),
        nodes_per_round=start.nodes_per_round,
        resumes=len(starts) - 1,
        parameters=start.parameters,
        payload_bytes=start.payload_bytes,
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
        bytes_up=bytes_up,
        bytes_down=bytes_down,
        link=LinkSummary(
            up=link.up,
            down=link.down,
            bytes_per_token=(link.up.sent + link.down.sent) / tokens if tokens else None,
        ),
        bytes_ddp=bytes_ddp,
        bytes_ddp_formula=BYTES_DDP_FORMULA,
        bytes_ratio=bytes_ddp / moved if moved and start.nodes_per_round > 1 else None,
        before=Standing.at(evaluations[0]) if evaluations else None,
        after=Standing.at(evaluations[-1]) if evaluations else None,
        model_sha256=finish.model_sha256 if finish else None,
    )


def write_summary(run_folder: Path, summary: Summary) -> Path:
    """Write RUN/summary.json atomically and return its path."""
    path = run_folder / "summary.json"
    write_atomic(path, summary.model_dump_json(indent=2) + "\n")
    return path
