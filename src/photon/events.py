"""The schema of metrics.jsonl: one JSON object a line, one class per kind of event.

Every event carries `event` (its kind), `time` (Unix seconds, UTC) and `seconds` (training time of the run so far,
added up over resumes). Bytes and tokens are running totals of the committed run unless named `round_*`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class _Event(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    time: float = Field(description="Unix seconds when it was written.")
    seconds: float = Field(description="Training time of the run so far, over all resumes.")


class RunStarted(_Event):
    """Written when a run begins and each time it is resumed."""

    event: Literal["run_started"] = "run_started"
    run: str = Field(description="Identity of the run; every task, reply and state carries it.")
    recipe: str
    nodes: list[str]
    nodes_per_round: int
    rounds: int
    tau: int
    parameters: int
    payload_bytes: int = Field(description="The global model as raw float32.")
    first_round: int = Field(description="0, or the round that is done first after a resume.")
    device: str
    workers: int
    threads: int


class Scores(BaseModel):
    """Held-out quality on one silo, or pooled over all."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    loss: float = Field(description="Nats per token.")
    perplexity: float
    bits_per_byte: float = Field(description="Comparable across tokenizers.")
    unigram_excess: float = Field(description="loss minus the silo's unigram loss, in nats; below 0 = context is used.")
    tokens: int


class Evaluated(_Event):
    """Held-out quality of the global model after `round` rounds (0 = before training)."""

    event: Literal["evaluation"] = "evaluation"
    round: int
    sequential_step: int
    tokens: int
    bytes_up: int
    bytes_down: int
    pooled: Scores
    silos: dict[str, Scores]


class NodeRound(BaseModel):
    """What one node did in one round."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    tokens: int
    steps: int
    loss_first: float
    loss_last: float
    loss_mean: float
    gradient_norm_mean: float
    clipped_steps: int
    update_norm: float = Field(description="L2 norm of its pseudo-gradient as received.")
    seconds: float = Field(description="Local training time.")
    evaluation_seconds: float = Field(0.0, description="Time it took to score the base before training.")
    tokens_per_second: float
    epoch: float = Field(description="Passes over its own text so far.")
    bytes_up: int
    bytes_down: int


class RoundDone(_Event):
    """One committed round."""

    event: Literal["round"] = "round"
    round: int = Field(description="Rounds committed so far, this one included (the first is 1).")
    sequential_step: int = Field(description="Sequential steps behind the global model after this round.")
    tokens: int
    round_tokens: int
    tokens_per_second: float = Field(description="Of this round: tokens over wall seconds.")
    bytes_up: int
    bytes_down: int
    round_bytes_up: int
    round_bytes_down: int
    train_loss: float = Field(description="Token-weighted mean over nodes of the round's mean loss.")
    learning_rate: float = Field(description="At the last local step.")
    merged_norm: float = Field(description="L2 norm of the merged pseudo-gradient.")
    outer_norm: float = Field(description="L2 norm of the step the outer optimizer made.")
    nodes: dict[str, NodeRound]
    missing: dict[str, str] = Field(description="Sampled nodes that did not count, with the reason.")
    cosine: list[list[float]] = Field(description="Pairwise cosine of updates (sketched), rows as sorted(nodes).")
    phases_s: dict[str, float] = Field(
        description="Wall seconds by phase; nodes = exchange, training and evaluation there."
    )


class Sampled(_Event):
    """Text the global model wrote."""

    event: Literal["sample"] = "sample"
    round: int
    prompt: str
    text: str = Field(description="What it wrote after the prompt, which is not repeated.")


class RunFinished(_Event):
    """The last event of a finished run."""

    event: Literal["run_finished"] = "run_finished"
    round: int
    model_sha256: str


Event = Annotated[
    RunStarted | Evaluated | RoundDone | Sampled | RunFinished,
    Field(discriminator="event"),
]
_ADAPTER: TypeAdapter[Event] = TypeAdapter(Event)


def parse_event(line: str | bytes) -> Event:
    """Read one line of metrics.jsonl. Raises pydantic's ValidationError on anything that is not an event."""
    return _ADAPTER.validate_json(line)


class NodeProgress(BaseModel):
    """A node's state this moment; shown live, not stored."""

    model_config = ConfigDict(frozen=True)

    node: str
    round: int
    state: Literal["waiting", "training", "evaluating", "sending", "done", "failed"]
    step: int = 0
    steps: int = 0
    loss: float | None = None
    note: str = ""
