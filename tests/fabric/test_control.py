"""What passes between the Aggregator and a node arrives as it was said; anything else is refused with a WireError."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from photon.errors import WireError
from photon.fabric.control import (
    MAX_WAIT_S,
    Ask,
    NodeStatus,
    ask_content,
    read_ask,
    read_coming,
    read_status,
    status_content,
)

naturals = st.integers(0, 2**62 - 1)
numbers = st.floats(allow_nan=False, allow_infinity=False)


def text(longest: int) -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=longest)


asks = st.builds(
    Ask,
    run=text(64),
    recipe_sha256=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
    wait_s=st.floats(0, MAX_WAIT_S),
    base_bytes=naturals,
    dropped=text(64),
)
statuses = st.builds(
    NodeStatus,
    photon=text(32),
    run=text(64),
    state=st.sampled_from(["preparing", "ready", "resting", "leaving"]),
    note=text(300),
    nonce=text(64),
    phase=st.sampled_from(["idle", "downloading", "waiting", "evaluating", "training", "sending", "done"]),
    round=naturals,
    step=naturals,
    steps=naturals,
    loss=st.none() | numbers,
    body_bytes=naturals,
    tokens_available=naturals,
    tokens_per_second=numbers,
)
ASK = {
    "version": 1,
    "run": "r",
    "recipe_sha256": "a" * 64,
    "wait_s": 1.0,
    "base_bytes": 7,
    "coming_bytes": 5,
    "dropped": "",
}
STATUS = {"version": 1, "photon": "0", "state": "ready"}


@settings(deadline=None)
@given(asks, st.binary(max_size=100), st.binary(max_size=100))
def test_a_question_arrives_as_it_was_asked(ask: Ask, head: bytes, coming: bytes) -> None:
    content = ask_content(ask, head, coming)
    assert read_ask(content) == (ask, head)
    assert read_coming(content) == coming
    assert read_coming(ask_content(ask, head)) == b""


@settings(deadline=None)
@given(statuses, st.binary(max_size=100))
def test_an_answer_arrives_as_it_was_given(status: NodeStatus, head: bytes) -> None:
    assert read_status(status_content(status, head)) == (status, head)


@settings(deadline=None)
@given(asks, statuses)
def test_a_question_is_no_answer(ask: Ask, status: NodeStatus) -> None:
    with pytest.raises(WireError, match="without 'status'"):
        read_status(ask_content(ask, b""))
    with pytest.raises(WireError, match="without 'ask'"):
        read_ask(status_content(status, b""))
    with pytest.raises(WireError, match="malformed ask"):  # nor under the other's name
        read_ask({"ask": status.model_dump_json()})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
values = st.text() | st.binary() | json_values | json_values.map(json.dumps)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["ask", "status", "head", "else"]), values, max_size=4))
def test_junk_is_refused_and_never_anything_but_a_wire_error(content: dict[str, Any]) -> None:
    for read in (read_ask, read_status):
        with pytest.raises(WireError):
            read(content)


@settings(deadline=None)
@given(values)
def test_what_comes_next_is_bytes_or_refused(value: Any) -> None:
    if isinstance(value, bytes):
        assert read_coming({"coming": value}) == value
    else:
        with pytest.raises(WireError, match="not bytes"):
            read_coming({"coming": value})


@settings(deadline=None)
@given(st.sampled_from(sorted(ASK)), json_values)
def test_a_question_with_one_wrong_field_names_it(field: str, value: Any) -> None:
    changed = json.dumps(ASK | {field: value})
    try:
        expected = Ask.model_validate_json(changed)
    except ValidationError:
        with pytest.raises(WireError, match=rf"malformed ask: ({field}|message)"):
            read_ask({"ask": changed, "head": b""})
    else:
        assert read_ask({"ask": changed, "head": b""}) == (expected, b"")


WRONG = {
    "another version": {"version": 2},
    "a field nobody knows": {"text": "/home/ada/letters"},
    "a wait without end": {"wait_s": MAX_WAIT_S + 0.1},
    "a wait that is none": {"wait_s": -1.0},
    "not a number": {"wait_s": float("nan")},
    "infinite": {"wait_s": float("inf")},
    "a number as text": {"base_bytes": "7"},
    "negative bytes": {"base_bytes": -1},
    "more bytes than there are": {"base_bytes": 2**62},
    "a name too long": {"run": "r" * 65},
    "nothing": {"run": None},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_question_is_refused(what: str) -> None:
    assert read_ask({"ask": json.dumps(ASK)}) == (Ask(**ASK), b"")
    with pytest.raises(WireError, match=f"malformed ask: ({'|'.join(WRONG[what])}|message)"):
        read_ask({"ask": json.dumps(ASK | WRONG[what])})


WRONG_STATUS = {
    "another version": {"version": 2},
    "a field nobody knows": {"path": "/home/ada"},
    "a state nobody knows": {"state": "rich"},
    "a phase nobody knows": {"phase": "asleep"},
    "a loss that is not a number": {"loss": float("nan")},
    "an infinite speed": {"tokens_per_second": float("inf")},
    "a truth as a number": {"round": True},
    "no source": {"sources": 0},
    "very many sources": {"sources": 65},
    "a note too long": {"note": "n" * 301},
    "a negative step": {"step": -1},
}


@pytest.mark.parametrize("what", WRONG_STATUS)
def test_a_wrong_answer_is_refused(what: str) -> None:
    assert read_status({"status": json.dumps(STATUS)})[0].state == "ready"
    with pytest.raises(WireError, match=f"malformed status: ({'|'.join(WRONG_STATUS[what])}|message)"):
        read_status({"status": json.dumps(STATUS | WRONG_STATUS[what])})


@pytest.mark.parametrize("head", ["text", None, 7, ["bytes"], bytearray(b"x")])
def test_a_header_that_is_not_bytes_is_refused(head: Any) -> None:
    for content, read in (({"ask": json.dumps(ASK)}, read_ask), ({"status": json.dumps(STATUS)}, read_status)):
        with pytest.raises(WireError, match="header is not bytes"):
            read(content | {"head": head})


@pytest.mark.parametrize("nest", ["[" * 100_000, '{"ask":' * 100_000, "\ud800", "\x00", ""])
def test_no_depth_and_no_half_character_does_harm(nest: str) -> None:
    for content, read in (({"ask": nest}, read_ask), ({"status": nest}, read_status)):
        with pytest.raises(WireError, match="malformed"):
            read(content)


def test_an_answer_can_name_no_text_path_or_shard() -> None:
    """Closed, and small: whoever adds a field has to change this list, and to think of the owner."""
    assert set(NodeStatus.model_fields) == {
        "version", "photon", "run", "state", "note", "nonce", "phase", "round", "step", "steps", "loss", "body_bytes",
        "tokens_available", "tokens_per_second",
    }  # fmt: skip
