"""The Aggregator's states: what is committed is restored; what is damaged, foreign or missing is refused by name."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from photon.aggregator.state import (
    DOWNLINK_FILE,
    MESSAGE_FILE,
    MODEL_FILE,
    OUTER_FILE,
    GlobalState,
    Progress,
    RoundStore,
)
from photon.aggregator.trust import Charge
from photon.durable import STATE_FILE, NumberedStates
from photon.errors import InputError, StateError
from photon.link.body import Body, FileBody, pieces
from photon.link.ledger import Flow, Traffic
from photon.link.tensors import encode_tensors, sha256_hex, tensor_chunks


def state(round_index: int, run: str = "r") -> GlobalState:
    link = Traffic(
        down=Flow(raw=99, body=22, encoded=33, sent=44, stages={"int4": 20}), up=Flow(raw=99, encoded=11, sent=12)
    )
    progress = Progress(
        run,
        round_index,
        32 * round_index,
        1000 * round_index,
        link,
        3.25,
        44,
        message_from=f"{round_index:064}",
        message_as="int4 of difference",
        message_stages={"int4": 20},
        holders={"ada": "a" * 64, "bob": f"{round_index:064}"},
    )
    return GlobalState(
        progress,
        encode_tensors({"w": torch.full((3,), float(round_index))}),
        {"w/momentum_buffer": torch.tensor([0.5, float(round_index), -0.0])},
        {"exact/w": torch.tensor([0.25, -0.0, float(round_index)])},
        encode_tensors({"w": torch.tensor([round_index], dtype=torch.uint8)}),
    )


def store(folder: Path, rounds: int = 5, keep_last: int = 3, keep_every: int = 0) -> RoundStore:
    out = RoundStore(folder, keep_last, keep_every)
    for round_index in range(rounds):
        out.commit(state(round_index))
    return out


def content(body: Body) -> bytes:
    return b"".join(bytes(piece) for piece in pieces(body))


def same(a: GlobalState, b: GlobalState) -> bool:
    tensors = encode_tensors(a.outer) == encode_tensors(b.outer)
    downlink = encode_tensors(a.downlink) == encode_tensors(b.downlink) and content(a.message) == content(b.message)
    return a.progress == b.progress and content(a.payload) == content(b.payload) and tensors and downlink


def test_what_was_committed_is_restored(tmp_path: Path) -> None:
    rounds = store(tmp_path)
    assert rounds.rounds() == [2, 3, 4]
    assert same(rounds.load("r"), state(4))
    assert same(rounds.load("r", 2), state(2))
    assert same(rounds.load(None), state(4))
    assert not same(rounds.load("r"), state(3))
    assert rounds.load("r").model_sha256 == sha256_hex((tmp_path / "000004" / MODEL_FILE).read_bytes())


def test_a_restored_model_stays_in_its_file(tmp_path: Path) -> None:
    loaded = store(tmp_path).load("r", 3)
    assert loaded.payload == FileBody(tmp_path / "000003" / MODEL_FILE, 0, len(state(3).payload))
    assert loaded.message == FileBody(tmp_path / "000003" / MESSAGE_FILE, 0, len(state(3).message))


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(1, 0, [9]), (3, 0, [7, 8, 9]), (1, 4, [0, 4, 8, 9]), (2, 1, list(range(10))), (20, 0, list(range(10)))],
)
def test_retention(keep_last: int, keep_every: int, kept: list[int], tmp_path: Path) -> None:
    assert store(tmp_path, 10, keep_last, keep_every).rounds() == kept


@pytest.mark.parametrize("file", [MODEL_FILE, OUTER_FILE, DOWNLINK_FILE, MESSAGE_FILE, STATE_FILE])
def test_a_damaged_newest_state_is_never_skipped_and_the_good_ones_are_named(file: str, tmp_path: Path) -> None:
    rounds = store(tmp_path)
    path = tmp_path / "000004" / file
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(StateError, match=rf"round 4 cannot be used: .*000004.{file}.*rounds: \[2, 3\].*--round N"):
        rounds.load("r")
    assert same(rounds.load("r", 3), state(3))


def test_the_last_good_state_gone_is_said_too(tmp_path: Path) -> None:
    rounds = store(tmp_path, 1)
    (tmp_path / "000000" / MODEL_FILE).unlink()
    with pytest.raises(StateError, match="No other is left"):
        rounds.load("r")


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    rounds = store(tmp_path, 2)
    rounds.commit(state(2, run="other"))
    with pytest.raises(StateError, match=r"000002 belongs to run other, not to r.*rounds: \[0, 1\].*--round"):
        rounds.load("r")


def test_a_round_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="holds no committed round"):
        RoundStore(tmp_path / "nothing", 2, 0).load("r")
    with pytest.raises(InputError, match=r"no committed round 1 .*--round is one of \[2, 3, 4\]"):
        store(tmp_path).load("r", 1)


@pytest.mark.parametrize("change", [{"surprise": 1}, {"run": None}])
def test_fields_that_are_not_a_progress_are_refused(change: dict[str, object], tmp_path: Path) -> None:
    rounds = store(tmp_path)
    path = tmp_path / "000004" / STATE_FILE
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"fields": content["fields"] | change}))
    with pytest.raises(StateError, match="round 4 cannot be used"):
        rounds.load("r")


def test_set_aside_and_go_on_from_an_older_round(tmp_path: Path) -> None:
    rounds = store(tmp_path)
    rounds.set_aside(2)
    assert rounds.rounds() == [2]
    other = replace(state(3), payload=encode_tensors({"w": torch.zeros(1)}))
    rounds.commit(other)
    assert same(rounds.load("r"), other)


def test_progress_moves_by_one_round() -> None:
    after = state(2).progress.after_round(96, 500, 0.25)
    assert (after.round, after.sequential_step, after.tokens) == (3, 96, 2500)
    assert after.agreement == 0.25
    assert (after.run, after.link, after.seconds) == ("r", state(2).progress.link, 3.25)
    assert (after.message_from, after.holders) == (state(2).progress.message_from, state(2).progress.holders)


def test_what_was_learnt_of_nodes_is_restored(tmp_path: Path) -> None:
    rounds = RoundStore(tmp_path, 2, 0)
    learnt = replace(
        state(3).progress,
        norms=(((0.1 + 0.2, 32), (1e-300, 1)), (), ((7.0, 4),)),
        charges={"ada": Charge(2, "a 'reason'\nof two lines")},
        seconds_per_step={"ada": 1 / 3},
    )
    rounds.commit(replace(state(3), progress=learnt))
    assert rounds.load("r").progress == learnt


def test_a_state_from_before_nodes_were_remembered_is_read(tmp_path: Path) -> None:
    """And from before there was a downlink: without its files."""
    link = state(3).progress.link
    fields = {
        key: value for key, value in asdict(replace(state(3).progress, link=Traffic())).items() if key not in LEARNT
    }
    files = {MODEL_FILE: pieces(state(3).payload), OUTER_FILE: tensor_chunks(state(3).outer)}
    NumberedStates(tmp_path).commit(3, files, fields | {"link": link.model_dump()})
    progress = replace(state(3).progress, message_from="", message_as="", message_stages={}, holders={})
    before = replace(state(3), progress=progress, downlink={}, message=b"")
    assert same(RoundStore(tmp_path, 2, 0).load("r"), before)


LEARNT = ("norms", "charges", "seconds_per_step", "message_from", "message_as", "message_stages", "holders")
