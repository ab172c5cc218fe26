from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from photon import status_board
from photon.events import Event, NodeProgress, RoundDone, RunFinished
from photon.fabric.base import NodeInfo
from photon.fabric.control import NodeStatus
from photon.fabric.flower import Peer
from photon.fabric.traffic import BlobTraffic
from photon.identity import Identity
from photon.link.update import Sealed
from photon.status_board import MAX_ERRORS, History, RunFacts, Status, StatusBoard, build_status
from photon.track import Tracker

MakeEvents = Callable[..., list[Event]]
NOW = 1.8e9
NAMES = ("alice", "bob", "carol")
FACTS = RunFacts("run-1", "demo", 6, NAMES)
DEADLINE_S = 20.0
TASK = Sealed(b"head", b"body")


def peer(name: str, **changes: object) -> Peer:
    status = NodeStatus(photon="0", run="run-1", state="ready")
    made = Peer(NodeInfo(name, 10), is_online=True, status=status, heard_at=NOW - 3.0)
    for key, value in changes.items():
        assert hasattr(made, key)
        setattr(made, key, value)
    return made


def everybody(**changes: object) -> list[Peer]:
    return [peer(name, **changes) for name in NAMES]


def rounds_of(events: list[Event]) -> list[RoundDone]:
    return [event for event in events if isinstance(event, RoundDone)]


def unfinished(events: list[Event]) -> list[Event]:
    return [event for event in events if not isinstance(event, RunFinished)]


def told(events: list[Event]) -> History:
    history = History()
    for event in events:
        history.fold(event)
    return history


def done(node: str, round_index: int, steps: int = 16) -> NodeProgress:
    return NodeProgress(node=node, round=round_index, state="done", step=steps, steps=steps)


def test_rounds_are_counted_and_reasons_kept(make_events: MakeEvents) -> None:
    reasons = {2: {"bob": "refused: its norm is 9e9"}, 3: {"carol": "no answer before the deadline"}}
    history = told(make_events(rounds=3, planned=6, missing=reasons))
    status = build_status(FACTS, history, everybody(), {}, NOW)
    assert (status.run, status.recipe, status.round, status.rounds, status.updated) == ("run-1", "demo", 3, 6, NOW)
    assert status.committed == 1.7e9 + 30
    assert {name: entry.counted_rounds for name, entry in status.nodes.items()} == {"alice": 3, "bob": 2, "carol": 2}
    assert {name: entry.refusals for name, entry in status.nodes.items()} == {"alice": 0, "bob": 1, "carol": 0}
    # Only what went wrong in the last round is an error of now.
    assert [entry.last_error for entry in status.nodes.values()] == ["", "", "no answer before the deadline"]


def test_a_spare_that_was_not_needed_did_nothing_wrong(make_events: MakeEvents) -> None:
    history = told(make_events(rounds=1, planned=6, missing={1: {"bob": "not needed: 2 others had answered"}}))
    entry = build_status(FACTS, history, everybody(), {}, NOW).nodes["bob"]
    assert (entry.last_error, entry.refusals, entry.counted_rounds) == ("", 0, 0)


def test_a_suspension_ends_when_a_round_no_longer_names_it(make_events: MakeEvents) -> None:
    first, second = rounds_of(make_events(rounds=2, planned=6))
    history = told([first.model_copy(update={"suspended": {"bob": "its norm is 9e9"}})])
    assert build_status(FACTS, history, [], {}, NOW).nodes["bob"].suspended == "its norm is 9e9"
    history.fold(second)
    assert build_status(FACTS, history, [], {}, NOW).nodes["bob"].suspended == ""


def test_an_entry_says_what_the_node_said() -> None:
    said = NodeStatus(
        photon="0", run="run-1", state="ready", note="SECRET", nonce="n", phase="training", round=2, step=7, steps=16,
        loss=3.5, tokens_available=1000, tokens_per_second=12.5,
    )  # fmt: skip
    moved = {"bob": BlobTraffic(bytes_up=5, bytes_down=7)}
    status = build_status(FACTS, History(), [peer("bob", status=said, last_error="its update is lost")], moved, NOW)
    assert status.nodes["bob"].model_dump() == {
        "online": True, "state": "ready", "phase": "training", "step": 7, "steps": 16, "loss": 3.5, "round": 2,
        "tokens_per_second": 12.5, "tokens_available": 1000, "late": False,
        "last_heard_s_ago": 3.0, "bytes_up": 5, "bytes_down": 7, "last_error": "its update is lost", "refusals": 0,
        "suspended": "", "counted_rounds": 0,
    }  # fmt: skip
    assert list(status.nodes) == list(NAMES)
    assert status.nodes["alice"].last_heard_s_ago is None


def test_work_for_another_run_is_not_shown() -> None:
    other = NodeStatus(photon="0", run="run-0", state="ready", phase="training", step=7, steps=16, round=40, loss=1.0)
    entry = build_status(FACTS, History(), [peer("bob", status=other)], {}, NOW).nodes["bob"]
    assert (entry.phase, entry.step, entry.steps, entry.round, entry.loss) == ("idle", 0, 0, 0, None)


def test_who_is_not_of_the_recipe_has_no_entry() -> None:
    status = build_status(FACTS, History(), [peer("mallory")], {"mallory": BlobTraffic(bytes_up=1)}, NOW)
    assert set(status.nodes) == set(NAMES)


def late(history: History, peers: list[Peer]) -> list[str]:
    status = build_status(FACTS, history, peers, {}, NOW)
    return [name for name, entry in status.nodes.items() if entry.late]


def test_late_is_who_was_asked_and_has_not_answered_when_others_have(make_events: MakeEvents) -> None:
    history = told(rounds_of(make_events(rounds=1, planned=6)))
    assert history.round == 1
    peers = [peer("alice"), peer("bob", task=TASK), peer("carol")]
    assert late(history, peers) == []  # nobody has answered
    history.progress(done("alice", 0), NOW)  # an answer of the round before, heard late
    assert late(history, peers) == []
    history.progress(done("carol", 1, steps=0), NOW)  # scores alone are quick
    assert late(history, peers) == []
    history.progress(done("alice", 1), NOW)
    assert late(history, peers) == ["bob"]  # carol was not asked to train, or is done
    # A mutant that forgets the rounds would call everybody late as soon as the next one begins.
    history.fold(rounds_of(make_events(rounds=2, planned=6))[1])
    assert late(history, everybody(task=TASK)) == []


def test_in_the_last_score_of_all_no_answer_has_steps(make_events: MakeEvents) -> None:
    history = told(unfinished(make_events(rounds=6)))
    history.progress(done("alice", 6, steps=0), NOW)
    assert late(history, [peer("alice"), peer("bob", task=TASK)]) == ["bob"]


def test_where_tau_varies_the_run_ends_by_its_steps(make_events: MakeEvents) -> None:
    """Six rounds of 16 steps are planned; the third has all that is left, and no round after it."""
    events = [
        event.model_copy(update={"sequential_step": {1: 16, 2: 48, 3: 96}[event.round]})
        if isinstance(event, RoundDone)
        else event
        for event in unfinished(make_events(rounds=3, planned=6))
    ]
    as_planned, last = told(events[: events.index(rounds_of(events)[0]) + 1]), told(events)
    assert build_status(FACTS, as_planned, [], {}, NOW).rounds == 6
    assert build_status(FACTS, last, [], {}, NOW).rounds is None
    last.progress(done("alice", 3, steps=0), NOW)  # a mutant that counts rounds would wait for three more
    assert late(last, [peer("alice"), peer("bob", task=TASK)]) == ["bob"]


def test_a_node_is_not_late_because_of_its_own_answer() -> None:
    history = History()
    history.progress(done("bob", 0), NOW)  # its scores came, and it was asked again
    assert late(history, [peer("bob", task=TASK)]) == []


def state(history: History, peers: list[Peer]) -> str | None:
    return build_status(FACTS, history, peers, {}, NOW).state


def test_states_of_a_run(make_events: MakeEvents) -> None:
    resting = NodeStatus(photon="0", run="run-1", state="resting")
    assert state(History(), []) == "waiting for nodes"
    two = [peer("alice"), peer("bob")]
    assert state(History(), two) == "waiting for nodes"
    assert state(History(), [*two, peer("carol", is_online=False)]) == "waiting for nodes"
    assert state(History(), [*two, peer("carol", status=resting)]) == "waiting for nodes"
    assert state(History(), everybody()) == "training"  # between rounds: nobody is waited for
    assert state(History(), [peer("alice", task=TASK)]) == "training"
    assert state(History(suspended={"carol": "lies"}), two) == "training"
    finished = make_events(rounds=6)
    assert isinstance(finished[-1], RunFinished)
    assert state(told(finished[:-1]), everybody()) == "training"
    assert state(told(finished), []) == "finished"


def test_failures_are_remarks_and_a_refusal_is_told_once() -> None:
    history = History()
    history.progress(NodeProgress(node="bob", round=3, state="failed", note="no answer before the deadline"), NOW)
    history.progress(NodeProgress(node="bob", round=0, state="failed", note="refused: its norm"), NOW)
    history.progress(NodeProgress(node="bob", round=3, state="waiting", note="not needed: 2 others"), NOW)
    assert [remark.text for remark in history.remarks] == ["round 3: bob: no answer before the deadline"]


def test_remarks_are_the_last_twenty_in_one_line_each() -> None:
    history = History()
    for number in range(30):
        history.remark(f"line {number}\n\x1b[2J{'x' * 9999}", NOW + number)
    history.remark("again", NOW)
    history.remark("again", NOW + 50)
    remarks = list(history.remarks)
    assert len(remarks) == MAX_ERRORS
    assert (remarks[0].text.split("\ufffd")[0], remarks[-1].text, remarks[-1].time) == ("line 11 ", "again", NOW + 50)
    assert remarks[-2].text.startswith("line 29")
    assert all(len(remark.text) <= 400 and "\x1b" not in remark.text and "\n" not in remark.text for remark in remarks)


@given(
    text=st.text(),
    heard=st.floats(allow_nan=False, allow_infinity=False, min_value=0, max_value=4e9),
    loss=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    steps=st.integers(0, 2**61),
    open_task=st.booleans(),
)
def test_the_json_is_valid_and_reads_back_the_same(
    text: str, heard: float, loss: float | None, steps: int, open_task: bool
) -> None:
    said = NodeStatus(photon="0", run="run-1", state="ready", loss=loss, steps=steps, step=steps, note=text[:300])
    known = [peer("bob", status=said, heard_at=heard, last_error=text, task=TASK if open_task else None)]
    history = History()
    history.remark(text, NOW)
    status = build_status(FACTS, history, known, {}, NOW)
    line = status.model_dump_json()
    assert Status.model_validate_json(line) == status
    assert json.loads(line, parse_constant=pytest.fail) == status.model_dump(mode="json")
    assert build_status(FACTS, history, known, {}, NOW) == status
    ago = status.nodes["bob"].last_heard_s_ago
    assert ago is None if heard == 0 else ago is not None and ago >= 0


def test_the_keys_of_the_file_are_frozen() -> None:
    """Others read it with their own programs: a key that goes or changes its name is a new version."""
    status = build_status(FACTS, History(), [], {}, NOW).model_dump()
    assert list(status) == [
        "version", "run", "recipe", "round", "rounds", "committed", "updated", "state", "nodes", "errors",
    ]  # fmt: skip
    assert status["version"] == 1


def test_no_text_of_a_node_and_no_sample_gets_into_the_file(make_events: MakeEvents) -> None:
    said = NodeStatus(photon="0", state="preparing", note="reading /home/owner/patients.txt")
    events = make_events(rounds=6)
    samples = [event.text for event in events if event.event == "sample"]
    line = build_status(FACTS, told(events), [peer("bob", status=said, task=TASK)], {}, NOW).model_dump_json()
    assert "patients" not in line
    assert samples
    assert not any(text.strip() in line for text in samples if text.strip())


def read(path: Path) -> Status:
    return Status.model_validate_json(path.read_bytes())


def board_in(folder: Path, run: str = "run-1") -> StatusBoard:
    return StatusBoard(folder / "status.json", folder / "traffic.json", run, "demo", 6, NAMES, lambda: [peer("bob")])


def test_a_board_is_a_display_of_the_tracker(tmp_path: Path, make_events: MakeEvents) -> None:
    (tmp_path / "traffic.json").write_text('{"bob": {"bytes_up": 3, "bytes_down": 4}}')
    with board_in(tmp_path) as board:
        tracker = Tracker([], [board])
        for event in make_events(rounds=2, planned=6):
            tracker.write(event)
        tracker.note("a remark")
        tracker.progress(NodeProgress(node="bob", round=2, state="failed", note="lost"))
        board.data_progress("bob", "reading", 1, None, "patients.txt")
        board.save()
        status = read(board.path)
    assert (status.round, status.nodes["bob"].counted_rounds, status.nodes["bob"].bytes_down) == (2, 2, 4)
    assert [remark.text for remark in status.errors] == ["a remark", "round 2: bob: lost"]
    assert status.updated is not None
    assert math.isclose(status.updated, time.time(), abs_tol=3600)


def test_the_thread_saves_by_itself_and_close_saves_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_board, "SAVE_EVERY_S", 0.01)
    board = board_in(tmp_path)
    board.note("first")
    until = time.monotonic() + DEADLINE_S
    while not (board.path.exists() and read(board.path).errors):  # every read finds a whole file
        assert time.monotonic() < until
    board.note("last")
    board.close()
    assert [remark.text for remark in read(board.path).errors] == ["first", "last"]
    board.close()
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_restart_goes_on_with_the_remarks_of_its_run_alone(tmp_path: Path) -> None:
    with board_in(tmp_path) as board:
        board.note("the round failed")
    with board_in(tmp_path) as board:
        board.note("again")
    assert [remark.text for remark in read(board.path).errors] == ["the round failed", "again"]
    board_in(tmp_path, run="run-2").close()
    assert read(board.path).errors == []


def test_damaged_accounts_keep_the_last_numbers_and_are_told(tmp_path: Path) -> None:
    traffic = tmp_path / "traffic.json"
    traffic.write_text('{"bob": {"bytes_up": 3, "bytes_down": 4}}')
    with board_in(tmp_path) as board:
        board.save()
        traffic.write_text("{")
        board.save()
        board.save()
        status = read(board.path)
    assert status.nodes["bob"].bytes_up == 3
    assert [remark.text for remark in status.errors] == [
        "bytes are not up to date, traffic.json cannot be read: it is damaged"
    ]


def test_a_status_that_cannot_be_written_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "absent"
    board = board_in(folder)
    with pytest.raises(FileNotFoundError):
        board.save()
    board.close()
    folder.mkdir()
    board.save()
    assert read(board.path).run == "run-1"
    assert sum("status.json cannot be written" in record.getMessage() for record in caplog.records) == 1


def test_a_node_sees_an_entry_and_nothing_of_the_others(make_events: MakeEvents) -> None:
    from photon.fabric.gateway import visible_status

    status = build_status(FACTS, told(make_events(rounds=2, planned=6)), everybody(), {}, NOW).model_dump(mode="json")
    seen = Status.model_validate(visible_status(Identity("bob", "node", "1"), status))
    assert (seen.run, seen.round, list(seen.nodes), seen.errors, seen.state) == ("run-1", 2, ["bob"], [], None)
