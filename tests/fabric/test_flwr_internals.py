"""Photon stands on internals of one version of Flower. When the pin moves, this says in one line each what broke."""

from __future__ import annotations

import ast
import importlib
import math
import time
import tomllib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from flwr.common.constant import HEARTBEAT_MIN_INTERVAL
from flwr.supercore.error import ApiErrorCode
from flwr.superlink.routers.fleet.router import router
from tests.fabric.superlinks import SECRET, Link, answer_with, object_of, superlink

from photon.fabric import fleet, flower_run, flwr_internals
from photon.fabric.fleet import NodeKeys
from photon.fabric.fleet_client import FleetClient
from photon.fabric.flower_run import FlowerReply, FlowerRun
from photon.fabric.flwr_internals import RUN_ENDED, FlowerDownError
from photon.fabric.supervise import free_port

ROOT = Path(flwr_internals.__file__).parents[3]
DEADLINE_S = 30.0
INSTALLED = version("flwr")


def imported_names(path: Path) -> list[tuple[str, str]]:
    """Each (module of Flower, name) that a source file imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "flwr":
            found += [(str(node.module), alias.name) for alias in node.names]
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.partition(".")[0] == "flwr"]
    return found


def test_the_installed_flower_is_the_pinned_one() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pins = [word for words in extras.values() for word in words if word.startswith("flwr")]
    assert pins == [f"flwr=={INSTALLED}"], f"pyproject.toml asks for {pins}, flwr {INSTALLED} is installed"


@pytest.mark.parametrize(("module", "name"), imported_names(Path(flwr_internals.__file__)))
def test_flower_still_has(module: str, name: str) -> None:
    try:
        found = hasattr(importlib.import_module(module), name)
    except ImportError:
        pytest.fail(f"flwr {INSTALLED} has no module {module}", pytrace=False)
    if not found:
        pytest.fail(f"flwr {INSTALLED}: {module} has no {name}", pytrace=False)


@pytest.mark.parametrize("name", flwr_internals.__all__)
def test_every_name_that_is_promised_exists(name: str) -> None:
    assert hasattr(flwr_internals, name), f"photon.fabric.flwr_internals has no {name}"


def test_no_other_module_of_photon_imports_flower() -> None:
    modules = [path for path in (ROOT / "src").rglob("*.py") if path.name != "flwr_internals.py"]
    others = {str(path): names for path in modules if (names := imported_names(path))}
    assert len(modules) > 50
    assert not others, f"only flwr_internals.py may import flwr: {others}"


def test_flowers_fleet_calls_are_those_that_are_decided_upon() -> None:
    """A call that is new in Flower does not pass the gateway; somebody has to say whether a node needs it."""
    there = {route.path.removeprefix("/v1/fleet/") for route in router.routes}
    left_out = {"unregister-node", "get-run", "get-fab"}
    assert set(fleet._CALLS) <= there, f"flwr {INSTALLED} no longer has {set(fleet._CALLS) - there}"
    assert there - set(fleet._CALLS) == left_out, f"flwr {INSTALLED} has other fleet calls: {there}"


def test_flowers_numbers_are_those_that_are_used() -> None:
    assert ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED == RUN_ENDED
    assert HEARTBEAT_MIN_INTERVAL <= flwr_internals.HEARTBEAT_S
    assert flwr_internals.SUPERLINK_NODE_ID == 1


# One SuperLink, one run, two nodes.


@dataclass
class Federation:
    link: Link
    run: FlowerRun
    ada: FleetClient
    bob: FleetClient
    ada_id: int
    bob_id: int

    def question(self, ttl_s: float = 30.0, node_id: int | None = None) -> str:
        return self.run.push(node_id or self.ada_id, {"ask": "how are you?", "head": b"\x00\xff"}, ttl_s)

    def answers(self, *questions: str, deadline_s: float = DEADLINE_S) -> list[FlowerReply]:
        """What comes in answer to these, when all have one."""
        found: list[FlowerReply] = []
        end = time.monotonic() + deadline_s
        while len(found) < len(questions) and time.monotonic() < end:
            found += self.run.pull(questions)
            time.sleep(0.05)
        return found


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with superlink(tmp_path_factory.mktemp("superlink"), ["ada", "bob"]) as link:
        ada, bob, run = link.node("ada"), link.node("bob"), link.run()
        yield Federation(link, run, ada, bob, ada.join(None), bob.join(None))
        for client in (ada, bob, run):
            client.close()


@pytest.fixture
def federation(opened: Federation) -> Federation:
    """Nodes that were silent for twenty seconds are offline, and on a busy machine the tests before take longer."""
    opened.ada.heartbeat()
    opened.bob.heartbeat()
    return opened


def test_a_node_is_known_by_the_key_of_its_name(federation: Federation) -> None:
    found = {node.key: (node.node_id, node.is_online) for node in federation.run.nodes()}
    keys = NodeKeys(SECRET)
    assert found == {keys.public("ada"): (federation.ada_id, True), keys.public("bob"): (federation.bob_id, True)}


def test_a_question_and_its_answer_arrive_as_they_were_sent(federation: Federation) -> None:
    asked = federation.question()
    question = federation.ada.pull()
    assert question is not None, "the SuperLink did not hand the question on"
    assert (question.message_id, question.content) == (asked, {"ask": "how are you?", "head": b"\x00\xff"})
    assert federation.ada.pull() is None  # once
    assert federation.bob.pull() is None  # and to nobody else
    federation.ada.reply(question, {"status": "well", "head": b"\x01"})
    assert federation.answers(asked) == [FlowerReply(asked, federation.ada_id, {"status": "well", "head": b"\x01"})]
    assert [reply.content for reply in federation.run.pull([asked])] == [None]  # once


def test_an_answer_to_a_question_that_is_too_old_is_dropped(federation: Federation) -> None:
    asked = federation.question(ttl_s=1.0)
    question = federation.ada.pull()
    assert question is not None
    time.sleep(1.2)
    federation.ada.reply(question, {"status": "late"})
    assert [(reply.content, reply.junk) for reply in federation.answers(asked)] == [(None, "")]


def test_a_node_that_was_killed_comes_back_as_the_same_one(federation: Federation) -> None:
    before = {node.node_id: node.activated_at for node in federation.run.nodes()}
    again = federation.link.node("ada")
    assert again.join(federation.ada_id) == federation.ada_id
    after = {node.node_id: node.activated_at for node in federation.run.nodes()}
    assert after.pop(federation.ada_id) > before.pop(federation.ada_id), "the Aggregator would not notice"
    assert after == before
    assert again.heartbeat()
    again.close()


def test_a_node_that_leaves_is_offline_at_once_and_cannot_be_asked(federation: Federation) -> None:
    bob = federation.link.node("bob")
    bob.join(federation.bob_id)
    bob.leave()
    assert [node.node_id for node in federation.run.nodes()] == [federation.ada_id]
    assert [reply.content for reply in federation.answers(federation.question(node_id=federation.bob_id))] == [None]
    assert bob.join(federation.bob_id) == federation.bob_id
    bob.close()


def test_a_run_that_is_over_is_told_apart_from_a_refusal(federation: Federation) -> None:
    run = federation.link.run()
    run.push(federation.ada_id, {"ask": "the last one"}, 30)
    question = federation.ada.pull()
    assert question is not None
    run.close()
    with pytest.raises(FlowerDownError) as caught:
        federation.ada.reply(question, {"status": "well"})
    assert caught.value.code == RUN_ENDED


def test_a_proxy_of_the_environment_is_not_asked_for_the_way(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not know our loopback; and a node takes the same way for its calls as for its bytes."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with closing(FlowerRun(f"127.0.0.1:{federation.link.port}", SECRET)) as run:
        assert len(run.nodes()) == 2
    with closing(federation.link.node("ada")) as ada:
        assert ada.join(federation.ada_id) == federation.ada_id


def test_a_node_is_not_sent_on_to_other_machines() -> None:
    """A redirect would let the Aggregator choose whom in its owner's network a node speaks to."""
    asked: list[str] = []

    class SendsOn(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response(307)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), SendsOn) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with closing(FleetClient(f"http://127.0.0.1:{server.server_port}", None)) as client:
            client._node = flwr_internals.Node(node_id=7)
            with pytest.raises(FlowerDownError) as caught:
                client.pull()
        server.shutdown()
    assert caught.value.status == 307
    assert asked == ["/v1/fleet/pull-messages"]


def test_a_run_that_was_started_and_never_driven_is_not_in_the_way_of_the_next(federation: Federation) -> None:
    """Its starter was killed between two calls. Flower gives out its task first, whose token serves no other run."""
    flower_run._start_run(f"127.0.0.1:{federation.link.port}")
    with closing(federation.link.run()) as run:
        asked = run.push(federation.ada_id, {"ask": "how are you?"}, 30)
        question = federation.ada.pull()
        assert question is not None
        assert question.message_id == asked


# What a hostile node can send; the SuperLink takes all of it.


def test_an_answer_of_no_time_keeps_nobody_from_being_heard(federation: Federation) -> None:
    hostile, asked = federation.question(), federation.question(node_id=federation.bob_id)
    bad, question = federation.ada.pull(), federation.bob.pull()
    assert bad is not None
    assert question is not None
    with pytest.raises(FlowerDownError, match="a time that is no number"):
        answer_with(federation.ada, bad, [PART], created_at=math.nan)
    federation.bob.reply(question, {"status": "well"})
    assert [reply.message_id for reply in federation.run.pull([hostile, asked])] == [asked]


def test_an_answer_that_is_announced_and_never_sent_keeps_nobody_waiting(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, asked = federation.question(), federation.question(node_id=federation.bob_id)
    withheld, question = federation.ada.pull(), federation.bob.pull()
    assert withheld is not None
    assert question is not None
    with monkeypatch.context() as patch:
        patch.setattr(flwr_internals, "push_objects", lambda *arguments, **options: None)
        federation.ada.reply(withheld, {"status": "well"})
    federation.bob.reply(question, {"status": "well"})
    assert [reply.message_id for reply in federation.run.pull([hidden, asked])] == [asked]
    assert federation.run.pull([hidden]) == []
    monkeypatch.setattr(flower_run.time, "monotonic", lambda: 1e12)
    assert [(reply.message_id, reply.junk) for reply in federation.run.pull([hidden])] == [
        (hidden, "its answer was announced and never sent")
    ]
    assert [reply.junk for reply in federation.run.pull([hidden])] == [""]


PART = object_of("ConfigRecord", b"")
JUNK = {
    "a message of noise": [object_of("Message", b"\xff" * 50, [PART]), PART],
    "no message at all": [PART],
    "a record of noise": [object_of("ConfigRecord", b"\xff" * 50)],
    "arrays of another shape than they say": [object_of("Array", b'{"dtype": "float32", "shape": [-1]}')],
    "a list that never ends": [object_of("ArrayRecord", b"[" * 10_000)],
    "parts that were not sent": [object_of("RecordDict", b"{}", [b"somewhere else"])],
    "text that is none": [object_of("RecordDict", b"\xff\xfe")],
}


@pytest.mark.parametrize("what", JUNK)
def test_junk_in_an_answer_is_dropped_and_the_next_question_is_heard(federation: Federation, what: str) -> None:
    """A liar can send any bytes as an object; whatever Flower's inflating does with them, the run goes on."""
    asked = federation.question()
    question = federation.ada.pull()
    assert question is not None
    answer_with(federation.ada, question, JUNK[what])
    (reply,) = federation.answers(asked)
    assert (reply.message_id, reply.node_id, reply.content) == (asked, federation.ada_id, None)
    assert reply.junk.startswith("its answer cannot be read: "), reply
    again = federation.question()
    question = federation.ada.pull()
    assert question is not None
    federation.ada.reply(question, {"status": "well"})
    assert [reply.content for reply in federation.answers(again)] == [{"status": "well"}]


def test_a_node_that_confirms_what_was_not_sent_yet_is_the_only_one_that_cannot_be_asked(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It removes its own question that way. If that looked like a Flower that is gone, nobody behind it was asked."""
    send, ada = flwr_internals.push_objects, federation.ada

    def be_quick(*arguments: Any, **options: Any) -> None:
        (message,) = ada._client.PullMessages(flwr_internals.PullMessagesRequest(node=ada._joined())).messages_list
        ada._client.ConfirmMessageReceived(
            flwr_internals.ConfirmMessageReceivedRequest(
                node=ada._joined(), run_id=message.metadata.run_id, message_object_id=message.metadata.message_id
            )
        )
        send(*arguments, **options)

    monkeypatch.setattr(flwr_internals, "push_objects", be_quick)
    with pytest.raises(FlowerDownError, match="did not wait for its message") as caught:
        federation.question()
    assert caught.value.status == 404


def test_a_node_cannot_speak_as_another(federation: Federation) -> None:
    """In the call it is the SuperLink that notices, in the message the gateway."""
    asked = federation.question(node_id=federation.bob_id)
    question = federation.bob.pull()
    assert question is not None
    ada = federation.link.node("ada")
    ada._node = flwr_internals.Node(node_id=federation.bob_id)  # bob's id, and the key of ada's certificate
    for call in (ada.pull, ada.heartbeat, lambda: ada.reply(question, {"status": "bad"})):
        with pytest.raises(FlowerDownError, match="Invalid SuperNode authentication") as caught:
            call()
        assert caught.value.status == 401
    with pytest.raises(FlowerDownError, match="names another sender") as caught:
        answer_with(federation.ada, question, [PART], source_id=federation.bob_id)
    assert caught.value.status == 403
    ada.leave()  # leaves bob alone
    ada.close()
    federation.bob.heartbeat()  # a busy machine takes its time for all this
    federation.bob.reply(question, {"status": "well"})
    assert [reply.content for reply in federation.answers(asked)] == [{"status": "well"}]
