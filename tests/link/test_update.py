"""The wire format: what is written is read, and nothing else is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from photon.errors import WireError
from photon.link.update import (
    EvaluationReport,
    Reply,
    Task,
    decode_message,
    encode_message,
    expect_reply,
    expect_task,
)

BASE = "0" * 64


def task(**changes: object) -> Task:
    fields = {
        "run": "r", "round": 3, "node": "core", "nonce": "n", "base_sha256": BASE,
        "evaluate": False, "sequential_step": 96, "tau": 32, "nodes": 4, "deadline_s": 60.0,
    }  # fmt: skip
    return Task.model_validate(fields | changes)


def reply() -> Reply:
    report = EvaluationReport(nats=3.5, tokens=2, text_bytes=7.0, unigram_nats=9.0)
    return Reply(run="r", round=3, node="core", nonce="n", base_sha256=BASE, status="ok", evaluation=report)


@given(st.binary(max_size=300))
def test_round_trip(body: bytes) -> None:
    for header in (task(), reply()):
        message = decode_message(encode_message(header, body))
        assert message.header == header
        assert bytes(message.body) == body


def test_the_body_begins_aligned_so_tensors_are_viewed_in_place() -> None:
    for name in ("a", "ab", "abc" * 9):
        data = encode_message(task(node=name), b"x" * 10)
        assert data.index(b"x" * 10) % 64 == 0


def test_a_reply_is_not_a_task() -> None:
    with pytest.raises(WireError, match="not a task"):
        expect_task(decode_message(encode_message(reply())))
    with pytest.raises(WireError, match="not a reply"):
        expect_reply(decode_message(encode_message(task())))


@given(st.data())
def test_every_truncation_of_the_header_is_refused(data: st.DataObject) -> None:
    good = encode_message(task())
    with pytest.raises(WireError):
        decode_message(good[: data.draw(st.integers(0, len(good) - 1))])


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(WireError):
        decode_message(noise)
    with pytest.raises(WireError):
        decode_message(b"PHTN\x02" + noise)


@pytest.mark.parametrize(
    "change",
    [
        {"round": -1}, {"round": "3"}, {"tau": 1.5}, {"node": "../../etc"}, {"base_sha256": "short"},
        {"deadline_s": 0.0}, {"evaluate": "yes"}, {"extra": 1}, {"round": 2**70},
    ],
)  # fmt: skip
def test_headers_out_of_bounds_are_refused(change: dict[str, object]) -> None:
    text = task().model_dump_json()
    import json

    bad = json.dumps(json.loads(text) | change).replace('"kind": "task"', '"kind":"task"').encode()
    with pytest.raises(WireError, match="malformed task header"):
        decode_message(b"PHTN\x02" + len(bad).to_bytes(4, "little") + bad)


def test_not_a_number_does_not_pass_as_json() -> None:
    data = encode_message(reply()).replace(b'"nats":3.5', b'"nats":NaN')
    with pytest.raises(WireError):
        decode_message(data)


def test_another_version_says_what_to_do() -> None:
    data = bytearray(encode_message(task()))
    data[4] = 9
    with pytest.raises(WireError, match="update the older end"):
        decode_message(data)
