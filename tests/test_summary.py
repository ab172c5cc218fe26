from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from photon.errors import StateError
from photon.events import Evaluated, Event, RoundDone, RunStarted, Sampled
from photon.link.ledger import Flow, Traffic
from photon.summary import Summary, summarise, write_summary

MakeEvents = Callable[..., list[Event]]

# Other programs read these names: they may be added to, never changed.
PROMISED = {
    "tokens",
    "sequential_steps",
    "rounds",
    "nodes",
    "parameters",
    "bytes_up",
    "bytes_down",
    "bytes_ddp",
    "seconds",
    "tokens_per_second",
    "model_sha256",
    "before",
    "after",
}
FROZEN = PROMISED | {
    "run",
    "recipe",
    "status",
    "device",
    "rounds_planned",
    "tau",
    "nodes_per_round",
    "resumes",
    "payload_bytes",
    "bytes_ddp_formula",
    "bytes_ratio",
    "link",
}


def test_the_names_of_summary_json_are_frozen(make_events: MakeEvents, tmp_path: Path) -> None:
    path = write_summary(tmp_path, summarise(make_events()))
    written = json.loads(path.read_text())
    assert path == tmp_path / "summary.json"
    assert set(written) == FROZEN
    assert set(written["link"]) == {"up", "down", "bytes_per_token"}
    for way in ("up", "down"):
        assert set(written["link"][way]) == {"raw", "body", "encoded", "sent", "stages"}
    for moment in ("before", "after"):
        assert set(written[moment]) == {"loss", "perplexity", "bits_per_byte", "round", "silos"}
        assert set(written[moment]["silos"]) == {"alice", "bob", "carol"}
        for silo in written[moment]["silos"].values():
            assert set(silo) == {"loss", "perplexity", "bits_per_byte"}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]  # no leftovers of the atomic write


def test_the_numbers_are_those_of_the_events(make_events: MakeEvents) -> None:
    summary = summarise(make_events(rounds=6, tau=16))
    assert (summary.rounds, summary.sequential_steps, summary.nodes, summary.resumes) == (6, 96, 3, 0)
    assert summary.tokens == 6 * 3 * 16_000
    assert summary.bytes_up == summary.bytes_down == 6 * 3 * 4_000_000
    assert summary.seconds == 60.0
    assert summary.tokens_per_second == summary.tokens / 60.0
    assert summary.status == "finished"
    assert summary.model_sha256 == "ab" * 32
    assert summary.before is not None
    assert summary.after is not None
    assert (summary.before.round, summary.after.round) == (0, 6)
    assert summary.after.loss == pytest.approx(2.5 + 5.8 * math.exp(-0.9))


def test_the_link_is_that_of_the_last_event(make_events: MakeEvents) -> None:
    """Also where the last one is an evaluation, which moves the model once more; no tokens have no bytes each."""
    events = make_events(rounds=6, tau=16)
    last = next(event for event in reversed(events) if isinstance(event, Evaluated))
    more = Traffic(down=Flow(encoded=7, sent=8), up=Flow(encoded=1, sent=2))
    events[events.index(last)] = last.model_copy(update={"link": last.link + more})
    link = summarise(events).link
    assert (link.up, link.down) == ((last.link + more).up, (last.link + more).down)
    assert link.up.stages == {"topk": 2 * link.up.body, "int8": link.up.body}
    sent = 2 * (72_000_000 + 7_200_000) + 8 + 2
    assert link.bytes_per_token == sent / (6 * 3 * 16_000)
    begun = summarise(events[:1]).link
    assert (begun.up, begun.down, begun.bytes_per_token) == (Flow(), Flow(), None)


def test_bytes_of_per_step_training_count_the_steps_done(make_events: MakeEvents) -> None:
    """Gradients up and means down, 2 payloads a node and step; the run itself moved 2 payloads a node and round."""
    summary = summarise(make_events(rounds=6, planned=10, tau=16))
    assert summary.bytes_ddp == 2 * 4_000_000 * 96 * 3
    assert summary.bytes_ratio == 16.0  # tau: nothing else may come out for uncompressed updates
    mutants = {"planned": 2 * 4_000_000 * 160 * 3, "one way": 4_000_000 * 96 * 3, "one node": 2 * 4_000_000 * 96}
    assert summary.bytes_ddp not in mutants.values()


def test_only_the_nodes_of_a_round_count_for_per_step_training(make_events: MakeEvents) -> None:
    events = make_events()
    assert isinstance(events[0], RunStarted)
    events[0] = events[0].model_copy(update={"nodes_per_round": 2})
    summary = summarise(events)
    assert (summary.nodes, summary.nodes_per_round) == (3, 2)
    assert summary.bytes_ddp == 2 * 4_000_000 * 96 * 2


def test_an_unfinished_run_ends_at_its_last_evaluation(make_events: MakeEvents) -> None:
    summary = summarise(make_events(rounds=5, planned=9, every=2))
    assert (summary.status, summary.rounds, summary.rounds_planned) == ("unfinished", 5, 9)
    assert summary.model_sha256 is None
    assert summary.after is not None
    assert summary.after.round == 4


def test_a_run_that_has_only_begun(make_events: MakeEvents) -> None:
    summary = summarise(make_events()[:1])
    assert (summary.tokens, summary.rounds, summary.bytes_ddp, summary.tokens_per_second) == (0, 0, 0, 0.0)
    assert summary.before is None
    assert summary.after is None
    assert summary.bytes_ratio is None


def test_without_a_start_there_is_no_run(make_events: MakeEvents) -> None:
    with pytest.raises(StateError, match="run_started"):
        summarise(make_events()[1:])
    with pytest.raises(StateError, match="run_started"):
        summarise([])


def test_order_within_a_round_does_not_matter(make_events: MakeEvents) -> None:
    events = make_events(missing={2: {"bob": "late"}})
    shuffled = events[:]
    random.Random(7).shuffle(shuffled)
    assert summarise(shuffled) == summarise(events)


def test_resumes_are_counted_and_change_no_number(make_events: MakeEvents) -> None:
    events = make_events()
    start = events[0]
    assert isinstance(start, RunStarted)
    again = start.model_copy(update={"first_round": 3, "seconds": 30.0, "device": "cuda:0"})
    middle = next(i for i, e in enumerate(events) if isinstance(e, RoundDone) and e.round == 3) + 1
    resumed = summarise([*events[:middle], again, *events[middle:]])
    assert (resumed.resumes, resumed.device) == (1, "cuda:0")
    assert resumed.model_copy(update={"resumes": 0, "device": "cpu"}) == summarise(events)


def test_a_diverged_run_is_written_and_read_back(make_events: MakeEvents, tmp_path: Path) -> None:
    events = [
        e.model_copy(update={"pooled": e.pooled.model_copy(update={"loss": math.nan, "perplexity": math.inf})})
        if isinstance(e, Evaluated) and e.round
        else e
        for e in make_events()
    ]
    text = write_summary(tmp_path, summarise(events)).read_text()
    after = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["after"]
    assert (float(after["loss"]), float(after["perplexity"])) == (pytest.approx(math.nan, nan_ok=True), math.inf)
    back = Summary.model_validate_json(text)
    assert back.after is not None
    assert math.isnan(back.after.loss)


def test_samples_change_nothing(make_events: MakeEvents) -> None:
    events = make_events()
    assert summarise([e for e in events if not isinstance(e, Sampled)]) == summarise(events)
