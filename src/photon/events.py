"""The schema of metrics.jsonl: one JSON object a line, one class per kind of event.

Every event carries `event` (its kind), `time` (Unix seconds, UTC) and `seconds` (training time of the run so far,
added up over resumes). Bytes and tokens are running totals of the committed run unless named `round_*`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from photon.link.ledger import Traffic


class _Event(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    time: float = Field(description="Unix seconds when it was written.")
    seconds: float = Field(description="Training time of the run so far, over all resumes.")


class RunStarted(_Event):
    """Written when a run begins and each time it is resumed."""

    event: Literal["run_started"] = "run_started"
    run: str = Field(description="Identity of the run; every task, reply and state carries it.")
    recipe: str = Field(description="Name of the recipe.")
    nodes: list[str] = Field(description="Nodes that train; the baseline has one, `pooled`.")
    nodes_per_round: int = Field(description="Nodes sampled each round.")
    rounds: int = Field(description="Rounds planned.")
    tau: int = Field(description="Local steps a round.")
    parameters: int = Field(description="Trained numbers of the model, tied weights once.")
    payload_bytes: int = Field(description="The global model as raw float32.")
    first_round: int = Field(description="0, or the round that is done first after a resume.")
    first_step: int = Field(0, description="Sequential steps committed before it.")
    device: str = Field(description="torch devices of the workers.")
    workers: int = Field(description="Worker processes.")
    threads: int = Field(description="CPU threads of each worker.")


class Scores(BaseModel):
    """Held-out quality on one silo, or pooled over all."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    loss: float = Field(description="Nats per token.")
    perplexity: float = Field(description="exp(loss), capped at exp(700).")
    bits_per_byte: float = Field(description="Comparable across tokenizers.")
    unigram_excess: float = Field(description="loss minus the silo's unigram loss, in nats; below 0 = context is used.")
    tokens: int = Field(description="Held-out tokens scored.")


class Evaluated(_Event):
    """Held-out quality of the global model after `round` rounds (0 = before training)."""

    event: Literal["evaluation"] = "evaluation"
    round: int = Field(description="Committed rounds behind the model that was scored.")
    sequential_step: int = Field(description="Sequential steps behind it.")
    tokens: int = Field(description="Tokens trained on behind it, by all nodes.")
    bytes_up: int = Field(description="Nodes to Aggregator, up to when it was committed.")
    bytes_down: int = Field(description="Aggregator to nodes, up to when it was committed.")
    link: Traffic = Field(default_factory=Traffic, description="The same bytes at each step of their way.")
    pooled: Scores = Field(description="Over all held-out tokens of the silos below.")
    silos: dict[str, Scores] = Field(description="Of each owner that answered.")


class NodeRound(BaseModel):
    """What one node did in one round."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    tokens: int = Field(description="Really trained on; its weight in the merge, discounted by `age`.")
    age: int = Field(0, description="Rounds that had ended since its task was given; 0: on time.")
    steps: int = Field(description="Local steps really taken.")
    loss_first: float = Field(description="Training loss of the first local step.")
    loss_last: float = Field(description="Of the last.")
    loss_mean: float = Field(description="Mean over the local steps.")
    gradient_norm_mean: float = Field(description="Mean global gradient norm before clipping.")
    clipped_steps: int = Field(description="Steps whose gradient was clipped.")
    update_norm: float = Field(description="L2 norm of its pseudo-gradient as received.")
    seconds: float = Field(description="Local training time.")
    receive_s: float = Field(0.0, description="Time to decode and load the base and its own state.")
    encode_s: float = Field(0.0, description="Time to encode the update.")
    save_s: float = Field(0.0, description="Time to write update and state to its disk.")
    evaluation_seconds: float = Field(0.0, description="Time it took to score the base before training.")
    tokens_per_second: float = Field(description="tokens / seconds.")
    epoch: float = Field(description="Passes over its own text so far.")
    bytes_up: int = Field(description="Its replies this round, refused ones included.")
    bytes_down: int = Field(description="Its tasks this round.")


class RoundDone(_Event):
    """One committed round."""

    event: Literal["round"] = "round"
    round: int = Field(description="Rounds committed so far, this one included (the first is 1).")
    sequential_step: int = Field(description="Sequential steps behind the global model after this round.")
    tokens: int = Field(description="Trained on so far, by all nodes.")
    round_tokens: int = Field(description="Trained on in this round.")
    tokens_per_second: float = Field(description="Of this round: tokens over wall seconds.")
    bytes_up: int = Field(description="Nodes to Aggregator so far.")
    bytes_down: int = Field(description="Aggregator to nodes so far.")
    round_bytes_up: int = Field(description="Nodes to Aggregator in this round.")
    round_bytes_down: int = Field(description="Aggregator to nodes in this round.")
    link: Traffic = Field(default_factory=Traffic, description="All bytes so far, at each step of their way.")
    round_link: dict[str, Traffic] = Field(
        default_factory=dict, description="Those of this round by node, also of nodes that did not count."
    )
    train_loss: float = Field(description="Token-weighted mean over nodes of the round's mean loss.")
    learning_rate: float = Field(description="At the last local step.")
    merged_norm: float = Field(description="L2 norm of the merged pseudo-gradient.")
    outer_norm: float = Field(description="L2 norm of the step the outer optimizer made.")
    nodes: dict[str, NodeRound] = Field(description="Nodes that counted.")
    missing: dict[str, str] = Field(
        description="Nodes asked that did not count, with the reason; `refused: ...` is charged to the node."
    )
    suspended: dict[str, str] = Field(
        default_factory=dict, description="Nodes that are no longer asked, with the reason of the last refusal."
    )
    cosine: list[list[float]] = Field(description="Pairwise cosine of updates (sketched), rows as sorted(nodes).")
    phases_s: dict[str, float] = Field(
        description="Wall seconds by phase; nodes = waiting for them (exchange, training and evaluation there), "
        "merge = checking and folding their replies."
    )


class Sampled(_Event):
    """Text the global model wrote."""

    event: Literal["sample"] = "sample"
    round: int = Field(description="Committed rounds behind the model that wrote.")
    prompt: str = Field(description="What it was given.")
    text: str = Field(description="What it wrote after the prompt, which is not repeated.")


class RunFinished(_Event):
    """The last event of a finished run."""

    event: Literal["run_finished"] = "run_finished"
    round: int = Field(description="Rounds of the run.")
    model_sha256: str = Field(description="Of the final model's weights as they travel.")


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
