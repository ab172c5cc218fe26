from __future__ import annotations

import io
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.fabric.gateways import Site, in_thread
from tests.support import tiny_recipe

from photon import status as status_module
from photon.aggregator.trust import Charge, Trust
from photon.errors import InputError, StateError, WireError
from photon.keys import create_authority
from photon.link.client import LinkDownError, LinkRefusedError
from photon.recipe import dump_recipe
from photon.runfolder import RunFolder
from photon.status import read_status, readmit, show_status, status_table

WHOLE: dict[str, Any] = {
    "version": 1,
    "run": "run-1",
    "recipe": "demo",
    "round": 3,
    "rounds": 10,
    "committed": 1.8e9,
    "updated": 1.8e9,
    "state": "training",
    "nodes": {
        "ada": {"online": True, "state": "ready", "phase": "training", "step": 7, "steps": 16, "loss": 2.5,
                "late": True, "tokens_per_second": 1200.0, "last_heard_s_ago": 65,
                "bytes_up": 2_000_000, "bytes_down": 3_000_000, "counted_rounds": 3},
        "bob": {"online": False, "state": "ready", "last_error": "no answer [bold]before[/bold]\x1b[2J the deadline"},
        "cyd": {"online": True, "state": "ready", "suspended": "its norm is 9e9", "refusals": 3},
        "dan": {},
    },
    "errors": [{"time": 1.8e9, "text": f"error {number}"} for number in range(20)],
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    (folder.path / "exchange").mkdir(parents=True)
    folder.recipe.write_text(dump_recipe(tiny_recipe(["ada", "bob"])))
    folder.write_identity(13)
    return folder


def put(run: RunFolder, **changes: Any) -> dict[str, Any]:
    status = WHOLE | {"updated": time.time()} | changes
    (run.path / "exchange" / "status.json").write_text(json.dumps(status))
    return status


def shown(status: dict[str, Any], width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(*status_table(status), sep="\n")
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


@contextmanager
def answering(*answers: tuple[int, Any]) -> Iterator[tuple[str, list[str]]]:
    """A gateway of a few lines: these answers in turn, then the last one again. Yields URL and what was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers[min(len(asked), len(answers) - 1)]
            asked.append(self.path)
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the library's name
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join(20)


def test_a_run_folder_is_read_as_it_is(run: RunFolder) -> None:
    status = put(run)
    assert read_status(str(run.path), None) == status


def test_an_old_status_says_that_nobody_keeps_it(run: RunFolder) -> None:
    put(run, updated=time.time() - 3600)
    status = read_status(str(run.path), None)
    assert status["warning"].startswith("the aggregator is not running: this is how things stood 1:00:0")
    assert "the aggregator is not running" in shown(status)
    # A clock that was set back is no reason to call it dead, and a run that is over need not run.
    put(run, updated=time.time() + 3600)
    assert "warning" not in read_status(str(run.path), None)
    put(run, updated=time.time() - 3600, state="finished")
    assert "warning" not in read_status(str(run.path), None)


def test_folders_that_have_no_status(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only photon aggregator keeps one"):
        read_status(str(run.path), None)
    with pytest.raises(InputError, match="is not a run"):
        read_status(str(tmp_path), None)
    with pytest.raises(InputError, match="no run folder hub:8443; an address is written https://"):
        read_status("hub:8443", None)
    put(run)
    with pytest.raises(InputError, match="a key is only for an address"):
        read_status(str(run.path), tmp_path / "operator.key")


@pytest.mark.parametrize("name", ["", "run.json"])
def test_a_run_of_another_user_is_said_to_be_one(run: RunFolder, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As systemd keeps it, readable by its own user alone."""
    stat, hidden = Path.stat, run.path / name

    def refused(path: Path, **options: Any) -> os.stat_result:
        if path == hidden:
            raise PermissionError(13, "Permission denied")
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refused)
    with pytest.raises(InputError, match="cannot be read: Permission denied; is the run another user's"):
        read_status(str(run.path), None)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON"),
        ("\u00e9".encode("latin-1"), "not JSON"),
        ("[]", "all of it"),
        ('{"version": 2, "run": "r", "round": 0, "nodes": {}}', "version"),
        ('{"run": "r", "round": 0, "nodes": {"ada": {"loss": NaN}}}', r"nodes\.ada\.loss"),
    ],
)
def test_a_damaged_file_is_named(run: RunFolder, text: str | bytes, why: str) -> None:
    path = run.path / "exchange" / "status.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(StateError, match=rf"status\.json is damaged \(.*{why}"):
        read_status(str(run.path), None)


def test_a_gateway_is_asked(tmp_path: Path) -> None:
    with answering((200, WHOLE)) as (url, asked):
        assert read_status(url, None) == WHOLE  # however old: the clock there is another
    assert asked == ["/v1/status"]
    with pytest.raises(LinkDownError):
        read_status(url, None)
    with pytest.raises(InputError, match=r"--keys FILE, operator\.key"):
        read_status("https://127.0.0.1:1", None)
    with pytest.raises(InputError):
        read_status("https://127.0.0.1:1", tmp_path / "absent.key")
    create_authority(tmp_path / "keys")
    with pytest.raises(LinkDownError):
        read_status("https://127.0.0.1:1", tmp_path / "keys" / "operator.key")


def test_the_real_gateway_shows_an_operator_all_and_a_node_itself(tmp_path: Path) -> None:
    site = Site(tmp_path)
    (tmp_path / "status.json").write_text(json.dumps(WHOLE))
    with in_thread(site):
        url = f"https://127.0.0.1:{site.port}"
        assert read_status(url, site.keys / "operator.key") == WHOLE
        seen = read_status(url, site.keys / "ada.key")
    assert seen == {"run": "run-1", "round": 3, "nodes": {"ada": WHOLE["nodes"]["ada"]}}
    assert "training, late" in shown(seen)


@pytest.mark.parametrize(
    ("answer", "error", "why"),
    [
        ((403, {"error": "your key was revoked"}), LinkRefusedError, "your key was revoked"),
        ((503, {"error": "the run has not begun yet"}), LinkDownError, "has not begun"),
        ((200, {"hello": "world"}), WireError, "did not answer with the status of a run"),
        ((200, [1]), WireError, "did not answer with the status of a run"),
    ],
)
def test_what_a_gateway_may_answer_instead(answer: tuple[int, Any], error: type[Exception], why: str) -> None:
    with answering(answer) as (url, _), pytest.raises(error, match=why):
        read_status(url, None)


def test_the_table_says_who_does_what() -> None:
    text = shown(WHOLE)
    header = text.splitlines()[0]
    assert header.startswith("run run-1  demo  round 3/10  training  up 2.00 MB down 3.00 MB  last round at ")
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()[2:6]]
    states = {name: state for name, state, *_ in rows}
    assert rows[0] == ["ada", "training, late", "7/16", "2.50", "1.20k", "2.00 MB", "3.00 MB", "1:05", "3", "0"]
    assert (states["bob"], states["cyd"], states["dan"]) == ("offline", "suspended", "offline")
    assert rows[3][-3] == "never"
    assert "cyd: suspended: its norm is 9e9" in text
    # What another site wrote is neither markup nor an escape sequence.
    assert "bob: no answer [bold]before[/bold]\ufffd[2J the deadline" in text
    assert "error 19" in text
    assert "error 14" not in text


def test_what_a_node_is_shown_renders_too() -> None:
    seen = {"run": "run-1", "round": 3, "nodes": {"ada": WHOLE["nodes"]["ada"]}}
    text = shown(seen)
    assert text.startswith("run run-1  round 3  up 2.00 MB down 3.00 MB\n")
    assert "training, late" in text
    assert "bob" not in text
    assert shown({"run": "run-1", "round": 3, "nodes": {}})


def test_times_and_numbers_that_no_calendar_has() -> None:
    text = shown(WHOLE | {"committed": 1e300, "errors": [{"time": -1e300, "text": "odd"}]})
    assert "1e+300" in text
    assert "odd" in text


def test_shown_once(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    status = put(run)
    show_status(str(run.path), None, as_json=True, watch_s=None)
    assert json.loads(capsys.readouterr().out) == status
    show_status(str(run.path), None, as_json=False, watch_s=None)
    assert "round 3/10" in capsys.readouterr().out


def test_watched_until_it_is_finished(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(status_module.time, "sleep", pauses.append)
    answers = [(200, WHOLE), (503, {"error": "the run has not begun yet"}), (200, WHOLE | {"state": "finished"})]
    with answering(*answers) as (url, asked):
        show_status(url, None, as_json=True, watch_s=2.0)
    output = capsys.readouterr()
    assert [json.loads(line)["state"] for line in output.out.splitlines()] == ["training", "finished"]
    assert "has not begun" in output.err
    assert (len(asked), pauses) == (3, [2.0, 2.0])
    with answering(*answers) as (url, _):
        show_status(url, None, as_json=False, watch_s=2.0)
    assert "has not begun" in capsys.readouterr().out


def test_watched_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(status_module.time, "sleep", lambda seconds: None)
    with answering((200, WHOLE), (503, {}), (200, WHOLE | {"state": "finished"})) as (url, _):
        show_status(url, None, as_json=False, watch_s=2.0)
    assert "finished" in capsys.readouterr().out


def test_watching_ends_with_ctrl_c_and_not_with_a_refusal_unheard(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    put(run)
    monkeypatch.setattr(status_module.time, "sleep", interrupt)
    show_status(str(run.path), None, as_json=False, watch_s=2.0)
    assert "round 3/10" in capsys.readouterr().out
    with answering((403, {"error": "revoked"})) as (url, _), pytest.raises(LinkRefusedError, match="revoked"):
        show_status(url, None, as_json=False, watch_s=2.0)


@pytest.mark.parametrize("watch_s", [0.0, -1.0, 0.1, float("nan")])
def test_a_watch_that_never_rests_is_refused(run: RunFolder, watch_s: float) -> None:
    put(run)
    with pytest.raises(InputError, match="--watch"):
        show_status(str(run.path), None, as_json=False, watch_s=watch_s)


def test_the_aggregator_heeds_a_readmission(run: RunFolder) -> None:
    assert "ada belongs to the run again from the next round on" in readmit(run, "ada")
    readmit(run, "ada")  # twice is once
    folder = run.path / "operator"
    assert [path.name for path in folder.iterdir()] == ["readmit-ada"]
    charges = {"ada": Charge(3, "its norm"), "bob": Charge(3, "its norm")}
    trust = Trust(charges, 3, folder, lambda text: None)
    trust.readmit()
    assert list(trust.suspended) == ["bob"]


@pytest.mark.parametrize("name", ["adda", "", "../../evil", "Ada"])
def test_only_a_node_of_the_recipe_is_readmitted(run: RunFolder, name: str) -> None:
    with pytest.raises(InputError, match="has no node"):
        readmit(run, name)
    assert not (run.path / "operator").exists()


def test_a_readmission_needs_a_run_that_can_be_written_to(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run"):
        readmit(RunFolder(tmp_path), "ada")
    (run.path / "operator").write_text("a file")
    with pytest.raises(InputError, match="cannot be written to"):
        readmit(run, "ada")
