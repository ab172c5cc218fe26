"""A made-up run: the events that training would write, with numbers chosen to be easy to check."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import pytest

from photon.events import Evaluated, Event, NodeRound, RoundDone, RunFinished, RunStarted, Sampled, Scores
from photon.link.ledger import Flow, Traffic

# Tests run side by side on few cores and compute little: threads of torch's own would only fight each other.
# Set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MakeEvents = Callable[..., list[Event]]
PAYLOAD_BYTES = 4_000_000
ROUND_SECONDS = 10.0


def made_up_scores(loss: float) -> Scores:
    """Scores that belong together, for text of 4 bytes a token."""
    return Scores(
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=loss / math.log(2) / 4,
        unigram_excess=loss - 6.0,
        tokens=16_384,
    )


def made_up_link(moved: int) -> Traffic:
    """What so many bytes of messages each way were before their codec, and on the network."""
    down = Flow(raw=moved, body=moved - moved // 100, encoded=moved, sent=moved + moved // 10)
    stages = {"topk": 2 * down.body, "int8": down.body}
    return Traffic(down=down, up=down.model_copy(update={"raw": 4 * moved, "stages": stages}))


def made_up_node(index: int, round_number: int, tau: int) -> NodeRound:
    loss = 8.0 * math.exp(-0.12 * round_number) + 0.1 * index
    return NodeRound(
        tokens=1000 * tau,
        steps=tau,
        loss_first=loss + 0.2,
        loss_last=loss - 0.2,
        loss_mean=loss,
        gradient_norm_mean=0.8,
        clipped_steps=tau // 4,
        update_norm=2.0 / math.sqrt(round_number) + 0.1 * index,
        seconds=7.0 + 0.3 * (index % 5),
        evaluation_seconds=0.5,
        tokens_per_second=1000 * tau / 7.0,
        epoch=0.05 * round_number,
        bytes_up=PAYLOAD_BYTES,
        bytes_down=PAYLOAD_BYTES,
    )


def made_up_evaluation(names: Sequence[str], round_number: int, tau: int) -> Evaluated:
    loss = 2.5 + 5.8 * math.exp(-0.15 * round_number)
    moved = round_number * len(names) * PAYLOAD_BYTES
    return Evaluated(
        time=1.7e9 + ROUND_SECONDS * round_number,
        seconds=ROUND_SECONDS * round_number,
        round=round_number,
        sequential_step=round_number * tau,
        tokens=round_number * len(names) * 1000 * tau,
        bytes_up=moved,
        bytes_down=moved,
        link=made_up_link(moved),
        pooled=made_up_scores(loss),
        silos={
            name: made_up_scores(loss + 0.3 * math.sin(1.7 * index) * min(1.0, round_number / 4))
            for index, name in enumerate(names)
        },
    )


def made_up_round(names: Sequence[str], round_number: int, tau: int, missing: dict[str, str]) -> RoundDone:
    present = sorted(set(names) - set(missing))
    round_bytes = len(names) * PAYLOAD_BYTES
    cosine = [
        [1.0 if a == b else 0.9 * math.exp(-0.08 * round_number) - 0.03 * abs(a - b) for b in range(len(present))]
        for a in range(len(present))
    ]
    return RoundDone(
        time=1.7e9 + ROUND_SECONDS * round_number,
        seconds=ROUND_SECONDS * round_number,
        round=round_number,
        sequential_step=round_number * tau,
        tokens=round_number * len(names) * 1000 * tau,
        round_tokens=len(names) * 1000 * tau,
        tokens_per_second=len(names) * 1000 * tau / ROUND_SECONDS,
        bytes_up=round_number * round_bytes,
        bytes_down=round_number * round_bytes,
        round_bytes_up=round_bytes,
        round_bytes_down=round_bytes,
        link=made_up_link(round_number * round_bytes),
        round_link=dict.fromkeys(names, made_up_link(PAYLOAD_BYTES)),
        train_loss=2.2 + 5.4 * math.exp(-0.16 * round_number),
        learning_rate=1e-3,
        merged_norm=1.5 / math.sqrt(round_number),
        outer_norm=1.4 / math.sqrt(round_number),
        nodes={name: made_up_node(names.index(name), round_number, tau) for name in present},
        missing=missing,
        cosine=cosine,
        phases_s={"nodes": 9.0, "outer": 0.1, "commit of the round before": 0.2},
    )


def made_up_run(
    names: Sequence[str] = ("alice", "bob", "carol"),
    rounds: int = 6,
    planned: int | None = None,
    tau: int = 16,
    every: int = 1,
    missing: dict[int, dict[str, str]] | None = None,
) -> list[Event]:
    """Events of a run of `rounds` rounds; unfinished if more were `planned`."""
    planned = planned or rounds
    events: list[Event] = [
        RunStarted(
            time=1.7e9,
            seconds=0.0,
            run="demo-1a2b3c",
            recipe="demo",
            nodes=list(names),
            nodes_per_round=len(names),
            rounds=planned,
            tau=tau,
            parameters=PAYLOAD_BYTES // 4,
            payload_bytes=PAYLOAD_BYTES,
            first_round=0,
            device="cpu",
            workers=2,
            threads=1,
        ),
        Sampled(time=1.7e9, seconds=0.0, round=0, prompt="def ", text=" ,, the)) of\n((,,"),
    ]
    for number in range(1, rounds + 1):
        # As the Aggregator does it: nodes score a round's model while they do the next round.
        if (number - 1) % every == 0:
            events.append(made_up_evaluation(names, number - 1, tau))
        events.append(made_up_round(names, number, tau, (missing or {}).get(number, {})))
    if rounds == planned:
        end_s = ROUND_SECONDS * rounds
        events.append(made_up_evaluation(names, rounds, tau))
        sample = "main(argv):\n    return 0\n"
        events.append(Sampled(time=1.7e9 + end_s, seconds=end_s, round=rounds, prompt="def ", text=sample))
        events.append(RunFinished(time=1.7e9 + end_s, seconds=end_s, round=rounds, model_sha256="ab" * 32))
    return events


@pytest.fixture(scope="session")
def make_events() -> MakeEvents:
    """`made_up_run`, for tests that read a run's events."""
    return made_up_run
