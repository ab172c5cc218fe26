from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from photon.events import Evaluated, Event, RoundDone, Sampled, Scores, parse_event
from photon.link.ledger import Traffic

MakeEvents = Callable[..., list[Event]]


def test_every_kind_of_event_reads_back_equal(make_events: MakeEvents) -> None:
    events = make_events(missing={2: {"bob": "no reply within 60 s"}})
    assert {e.event for e in events} == {"run_started", "evaluation", "round", "sample", "run_finished"}
    for event in events:
        assert parse_event(event.model_dump_json()) == event


def test_a_record_from_before_there_was_a_ledger_of_links_is_read(make_events: MakeEvents) -> None:
    for event in make_events():
        if isinstance(event, RoundDone | Evaluated):
            assert event.link.up.encoded == event.bytes_up
            line = json.loads(event.model_dump_json())
            before = parse_event(json.dumps({k: v for k, v in line.items() if k not in ("link", "round_link")}))
            links: dict[str, object] = {"link": Traffic()}
            if isinstance(event, RoundDone):
                links["round_link"] = {}
            assert before == event.model_copy(update=links)


@given(text=st.text(), prompt=st.text())
def test_a_sample_of_any_text_is_one_line_and_reads_back_equal(text: str, prompt: str) -> None:
    sample = Sampled(time=1.0, seconds=0.0, round=0, prompt=prompt, text=text)
    line = sample.model_dump_json()
    assert "\n" not in line
    assert parse_event(line) == sample


def test_kinds_and_keys_are_closed(make_events: MakeEvents) -> None:
    line = json.loads(make_events()[0].model_dump_json())
    for wrong in ({**line, "event": "other"}, {**line, "surprise": 1}, {k: v for k, v in line.items() if k != "tau"}):
        with pytest.raises(ValidationError):
            parse_event(json.dumps(wrong))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_losses_of_a_diverged_run_read_back(make_events: MakeEvents, value: float) -> None:
    """JSON has no NaN: written as null, the event could not be read again."""
    scores = Scores(loss=value, perplexity=value, bits_per_byte=value, unigram_excess=value, tokens=1)
    events = make_events()
    evaluation = next(e for e in events if isinstance(e, Evaluated))
    done = next(e for e in events if isinstance(e, RoundDone))
    nodes = {name: node.model_copy(update={"loss_last": value}) for name, node in done.nodes.items()}
    for event in (
        evaluation.model_copy(update={"pooled": scores, "silos": {"alice": scores}}),
        done.model_copy(update={"train_loss": value, "cosine": [[value]], "nodes": nodes}),
    ):
        line = event.model_dump_json()
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert repr(parse_event(line)) == repr(event)  # NaN differs from itself, so compare what is shown
