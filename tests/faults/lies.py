"""One lie for each round, and what the Aggregator must say of it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import zstandard
from tests.fabric.superlinks import answer_with, object_of
from tests.faults.liar import TOKENS_PER_STEP, Hand, Liar, Lie
from torch import Tensor

from photon.fabric import flwr_internals as flower
from photon.fabric.control import status_content
from photon.fabric.fleet_client import Question
from photon.link.tensors import encode_tensors, sha256_hex
from photon.link.update import EvaluationReport, Task, seal

MIB = 2**20
Change = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Told:
    """A lie by its name, and a part of the reason for which it is refused."""

    name: str
    lie: Lie
    reason: str


def values(change: Change) -> Lie:
    return lambda liar, task: liar.hand_in_values(task, change)


def says(report: Mapping[str, Any] | None = None, **changes: Any) -> Lie:
    return lambda liar, task: liar.hand_in_values(task, lambda update: update, report=report, **changes)


def one_value(value: float) -> Lie:
    """One number of tens of thousands."""

    def change(update: dict[str, Tensor]) -> dict[str, Tensor]:
        name = max(update, key=lambda key: update[key].numel())
        changed = update[name].clone()
        changed.view(-1)[changed.numel() // 2] = value
        return update | {name: changed}

    return values(change)


def first(change: Callable[[Tensor], Tensor]) -> Change:
    def changed(update: dict[str, Tensor]) -> dict[str, Tensor]:
        name = min(update)
        return update | {name: change(update[name])}

    return changed


def boosted(liar: Liar, task: Task) -> Hand:
    """What the round before changed, thirty times: every number is plausible, the whole is not."""
    *_, before, now = liar.bases.values() if liar.base(task) else ()
    return liar.hand_in_values(task, lambda update: {name: 30 * (before[name] - now[name]) for name in update})


def replayed(liar: Liar, task: Task) -> Hand:
    """The very bytes of its last reply, the update uploaded again."""
    liar.upload((liar.folder / "upload").read_bytes())
    return liar.hands[-1]


def body(make: Callable[[dict[str, Tensor]], bytes]) -> Lie:
    return lambda liar, task: liar.hand_in(task, make(liar.update(task)))


def with_header(header: bytes, rest: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + rest


def parts_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, tensors) of safetensors bytes."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def overlapping(update: dict[str, Tensor]) -> bytes:
    header, rest = parts_of(encode_tensors(update))
    two = sorted(header, key=lambda name: header[name]["data_offsets"][0])[1]
    header[two]["data_offsets"] = [offset - 4 for offset in header[two]["data_offsets"]]
    return with_header(json.dumps(header).encode(), rest)


def negative(update: dict[str, Tensor]) -> bytes:
    header, rest = parts_of(encode_tensors(update))
    header[min(header)]["shape"] = [-size for size in header[min(header)]["shape"]]
    return with_header(json.dumps(header).encode(), rest)


def unaddressable(update: dict[str, Tensor]) -> bytes:
    """One tensor that takes no byte, of a shape that torch cannot make."""
    entry = {"dtype": "F32", "shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}
    return with_header(json.dumps({min(update): entry}).encode(), b"")


def doubled(update: dict[str, Tensor]) -> bytes:
    header, rest = parts_of(encode_tensors(update))
    name = min(header)
    again = json.dumps({name: header[name]})[1:-1]
    return with_header((json.dumps(header)[:-1] + "," + again + "}").encode(), rest)


def padded(update: dict[str, Tensor]) -> bytes:
    """A right update whose header ends in half a MiB of spaces."""
    header, rest = parts_of(encode_tensors(update))
    return with_header(json.dumps(header).encode() + b" " * (MIB // 2), rest)


def uploads(liar: Liar, task: Task) -> Hand:
    """What is wrong before it is handed in: sizes, ends, bits and packing."""
    data = encode_tensors(liar.update(task))
    sha, size = sha256_hex(data), len(data)
    begin = json.dumps({"bytes": size}).encode()
    span = {"Content-Range": f"bytes 0-{size - 1}/{size}"}
    liar.attempt("100 times the size", "POST", f"/v1/uploads/{sha}", json.dumps({"bytes": 100 * size}).encode())
    liar.attempt("100 times the size, sent", "PUT", f"/v1/uploads/{sha}/0", data, span)
    liar.attempt("begun", "POST", f"/v1/uploads/{sha}", begin)
    half = {"Content-Range": f"bytes 0-{size // 2 - 1}/{size}"}
    liar.attempt("half of it", "PUT", f"/v1/uploads/{sha}/0", data[: size // 2], half)
    liar.attempt("half of it, finished", "POST", f"/v1/uploads/{sha}/finish")
    flipped = bytearray(data)
    flipped[size // 2 + 1] ^= 1
    rest = {"Content-Range": f"bytes {size // 2}-{size - 1}/{size}"}
    liar.attempt("one bit", "PUT", f"/v1/uploads/{sha}/0", bytes(flipped[size // 2 :]), rest)
    liar.attempt("one bit, finished", "POST", f"/v1/uploads/{sha}/finish")
    liar.attempt("begun", "POST", f"/v1/uploads/{sha}", begin)
    for packing, bomb in (("gzip", gzip.compress(bytes(64 * MIB))), ("zstd", zstandard.compress(bytes(64 * MIB)))):
        packed = {"Content-Encoding": packing}
        span = {"Content-Range": f"bytes 0-{len(bomb) - 1}/{size}"} | packed
        liar.attempt(f"{packing} upload", "PUT", f"/v1/uploads/{sha}/0", bomb, span)
        liar.attempt(f"{packing} call", "POST", "/v1/fleet/push-messages", bomb, packed)
        liar.attempt(f"{packing} question", "POST", f"/v1/uploads/{sha}", bomb, packed)
    return Hand(liar.head(task, data), size)


UPLOAD_ANSWERS = {
    "100 times the size": 413,
    "100 times the size, sent": 409,
    "begun": 200,
    "half of it": 200,
    "half of it, finished": 409,
    "one bit": 200,
    "one bit, finished": 422,
    **{f"{packing} {what}": 415 for packing in ("gzip", "zstd") for what in ("upload", "call", "question")},
}


def long_headers(liar: Liar, task: Task) -> Hand:
    """A header of megabytes does not pass the gateway; one of 200 kB does, and is no header."""
    hand = liar.hand_in_values(task, lambda update: update)
    text = hand.head[9:].rstrip()

    def of(size: int) -> bytes:
        long = text[:-1] + b',"more":"' + b"x" * size + b'"}'
        return hand.head[:5] + len(long).to_bytes(4, "little") + long

    def send(question: Question) -> None:
        status = liar.status(nonce=task.nonce, phase="done", body_bytes=hand.body_bytes)
        liar.note("a header of 3 MB", lambda: liar.fleet.reply(question, status_content(status, of(3 * MIB))))

    return Hand(of(200_000), hand.body_bytes, [send])


def controls(honest_id: Callable[[], int]) -> Lie:
    """Every kind of answer that is none, one after another, and other nodes' names; then one number that is none."""
    junk = object_of("ConfigRecord", b"\xff" * 60)

    def lie(liar: Liar, task: Task) -> Hand:
        def content(fields: dict[str, Any]) -> Callable[[Question], None]:
            return lambda question: liar.fleet.reply(question, fields)

        def raw(*objects: bytes) -> Callable[[Question], None]:
            return lambda question: answer_with(liar.fleet, question, objects)

        def announced(question: Question) -> None:
            push, flower.push_objects = flower.push_objects, lambda *arguments, **options: None
            try:
                liar.fleet.reply(question, status_content(liar.status(), b""))
            finally:
                flower.push_objects = push

        def as_another(question: Question) -> None:
            mine, theirs = liar.fleet._node, honest_id()
            calls = {"message": lambda: answer_with(liar.fleet, question, [junk], source_id=theirs)}
            liar.note("a message of another node", calls["message"])
            liar.fleet._node = flower.Node(node_id=theirs)
            try:
                liar.note("questions to another node", liar.fleet.pull)
                liar.note("an answer of another node", lambda: liar.fleet.reply(question, {"status": "{}"}))
                liar.note("a heartbeat of another node", liar.fleet.heartbeat)
            finally:
                liar.fleet._node = mine
            liar.attempt("bytes that are no call", "POST", "/v1/fleet/push-messages", b"\xff" * 99)
            liar.fleet.reply(question, {})

        status = liar.status().model_dump()
        shown = liar.status(note="[/bold] [red]\x1b[2J\u202e", photon="[link=x]", loss=1e308, step=2**61)
        hand = one_value(float("nan"))(liar, task)
        hand.before = [
            content({"status": "{"}),
            content({"status": "[" * 100_000}),
            content({"status": json.dumps(status | {"tokens_per_second": float("nan")})}),
            content({"status": json.dumps(status | {"device": "the one behind the door"})}),
            content({"status": b"bytes"}),
            content({"status": json.dumps(status), "head": "text"}),
            lambda question: liar.fleet.reply(question, status_content(shown, b"PHTN\x02")),
            raw(junk),
            raw(object_of("ArrayRecord", b"[" * 10_000)),
            announced,
            announced,  # again, so that what is said of it stands for longer than the status takes to be written
            as_another,
        ]
        return hand

    return lie


CONTROL_ANSWERS = {
    "a message of another node": 403,
    "questions to another node": 401,
    "an answer of another node": 401,
    "a heartbeat of another node": 401,
    "bytes that are no call": 400,
    "a header of 3 MB": 413,
}
CONTROL_REMARKS = ("malformed status", "cannot be read", "announced and never sent", "header is not bytes")


def all_lies(honest_id: Callable[[], int]) -> list[Told]:
    """In the order of the rounds. Scores are due in every second one, from the first on.

    The first is told while nothing else is held against the liar yet: its status then shows what was wrong with it.
    """
    lies = [
        Told("all kinds of answers", controls(honest_id), "not finite"),
        Told("infinite", one_value(float("inf")), "not finite"),
        Told("many scores", says(evaluation=scores(tokens=10**9, text_bytes=1e9, nats=1e9)), "held-out tokens"),
        Told("a million times", values(lambda u: {name: 1e6 * t for name, t in u.items()}), "1024"),
        Told("scores of another world", says(evaluation=scores(nats=1e300)), "claims 1e+300 nats"),
        Told("another shape", values(first(lambda tensor: tensor.unsqueeze(0))), "expected torch.float32"),
        Told("a tensor less", values(lambda u: {name: u[name] for name in sorted(u)[1:]}), "lacks 1 tensors"),
        Told("a tensor more", values(lambda u: u | {"\U0001f608" * 50: torch.zeros(1)}), "unknown tensor"),
        Told("another type", values(first(lambda tensor: tensor.view(torch.int32))), "is torch.int32"),
        Told("a wider type", values(first(lambda tensor: tensor.double())), "bytes; exact makes"),
        Told("thirty times", boosted, "federation.norm_bound"),
        Told("another base", says(base_sha256="0" * 64), "its base_sha256 is not the one"),
        Told("the reply before", replayed, "the reply to another task"),
        Told("another node", says(node="ada"), "in the name of 'ada'"),
        Told("another run", says(run="another"), "its run is not the one"),
        Told("many tokens", says({"tokens": 100 * 5 * TOKENS_PER_STEP}), "tokens in 5 steps"),
        Told("a loss beyond numbers", says({"loss_mean": 1e308}), "claims 1e+308 as its loss_mean"),
        Told("wrong uploads", uploads, "its update cannot be fetched"),
        Told("overlapping tensors", body(overlapping), "begins at byte"),
        Told("a huge header", body(lambda u: (2**62).to_bytes(8, "little") + encode_tensors(u)[8:]), "declares"),
        Told("negative numbers", body(negative), "natural numbers"),
        Told("sizes beyond torch", body(unaddressable), "more than can be addressed"),
        Told("a name twice", body(doubled), "occurs twice"),
        Told("deep nesting", body(lambda u: with_header(b'{"a":' * 1500, b"")), "is not JSON"),
        Told("a long header", body(padded), "declares"),
        Told("no body", lambda liar, task: Hand(liar.head(task, b""), 0), "too short"),
        Told("long headers", long_headers, "malformed reply header"),
        Told("a task back", lambda liar, task: Hand(seal(task).head, 0), "sent a task, not a reply"),
    ]
    assert {index for index, told in enumerate(lies) if "scores" in told.name} <= set(range(0, len(lies), 2))
    return lies


def scores(**changes: Any) -> EvaluationReport:
    """Scores of its held-out text that nobody would doubt, but for the changes."""
    plain = EvaluationReport(nats=300.0, tokens=100, text_bytes=200.0, unigram_nats=310.0)
    return plain.model_copy(update=changes)
