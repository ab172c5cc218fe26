"""How a node answers and leaves: turn by turn, with a Flower and a trainer that do what the test says."""

from __future__ import annotations

import errno
import math
import ssl
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, cast

import pytest
from tests import authorities
from tests.authorities import at
from tests.fabric.gateways import Site, in_thread

from photon.certificates import check_dates, load_bundle
from photon.errors import InputError
from photon.fabric import agent as agents
from photon.fabric import home as homes
from photon.fabric.agent import Agent, NodeOptions, NodeRefusedError
from photon.fabric.control import Ask, NodeStatus, ask_content, read_status
from photon.fabric.errands import Errands, Standing
from photon.fabric.fleet_client import Question
from photon.fabric.flwr_internals import RUN_ENDED, Content, FlowerDownError, Node
from photon.fabric.home import NodeHome
from photon.identity import client_context
from photon.keys import issue_node, renew_aggregator
from photon.link.update import Task, seal
from photon.siteconfig import Caps, SiteConfig

ready = authorities.ready

RECIPE, OTHER_RECIPE = "a" * 64, "b" * 64
DONE = Standing(phase="done", nonce="n1", round=3, head=b"a reply")


class Fleet:
    """Hands out the `questions`, keeps the answers; a run of Flower's in `ended` takes none."""

    def __init__(self) -> None:
        self.questions: list[Question] = []
        self.answers: list[tuple[str, NodeStatus]] = []
        self.ended: set[int] = set()

    def pull(self) -> Question | None:
        return self.questions.pop(0) if self.questions else None

    def reply(self, question: Question, content: Content) -> None:
        if question.run_id in self.ended:
            raise FlowerDownError("the run is over", 403, RUN_ENDED)
        self.answers.append((question.message_id, read_status(content)[0]))


class Desk:
    """Errands that stand as they are told to, and note what they are offered."""

    def __init__(self) -> None:
        self.stands = Standing()
        self.offered: list[bytes] = []
        self.coming: list[tuple[bytes, int] | None] = []
        self.refused: list[str] = []
        self.is_busy = True
        self.handed_in = 0

    def standing(self) -> Standing:
        return self.stands

    def hand_in(self) -> bool:
        self.handed_in += 1
        return self.is_busy

    def offer(self, head: bytes, base_bytes: int, coming: tuple[bytes, int] | None) -> None:
        self.offered.append(head)
        self.coming.append(coming)

    def refuse(self, head: bytes, reason: str) -> None:
        self.refused.append(reason)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Agent, Fleet, Desk]]:
    """A node of run r that is prepared and online."""
    fleet, desk = Fleet(), Desk()
    monkeypatch.setattr(agents, "FleetClient", lambda url, context: fleet)
    monkeypatch.setattr(agents, "POLL_S", 0.0)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    site, home = SiteConfig(text=["x"]), NodeHome(tmp_path)
    one = Agent(NodeOptions("ada", "https://127.0.0.1:1", context, lambda: None, site, home))
    one._errands = cast(Errands, desk)
    one._preparation = agents._Preparation("r", RECIPE, note="")
    yield one, fleet, desk


def question(
    number: int,
    task: str = "",
    *,
    wait_s: float = 0.0,
    run_id: int = 1,
    recipe_sha256: str = RECIPE,
    coming: bytes = b"",
    coming_bytes: int = 0,
) -> Question:
    """One with the task of that nonce in it, or with none; and what comes after it."""
    head = b""
    if task:
        fields: dict[str, Any] = {"run": "r", "round": 3, "node": "ada", "nonce": task, "base_sha256": "a" * 64}
        head = seal(Task(**fields, evaluate=False, sequential_step=12, tau=4, nodes=2, deadline_s=60.0), b"").head
    ask = Ask(run="r", recipe_sha256=recipe_sha256, wait_s=wait_s, coming_bytes=coming_bytes)
    content = ask_content(ask, head, coming)
    return Question(f"q{number}", run_id, 0.0, 60.0, time.monotonic(), content)


def test_a_node_that_leaves_stays_until_what_it_handed_in_was_taken(node: tuple[Agent, Fleet, Desk]) -> None:
    """Flower drops the last answer of a node that goes offline before it was fetched."""
    one, fleet, desk = node
    fleet.questions = [question(1, "n1")]
    one._turn()
    assert len(desk.offered) == 1
    one._leaving.set()
    assert not one._has_left()
    desk.stands = DONE
    fleet.questions = [question(2, "n1")]
    one._turn()
    assert fleet.answers[-1][1].phase == "done"
    assert not one._has_left(), "it was told, and perhaps not heard"
    fleet.questions = [question(3, "n1")]
    one._turn()
    assert not one._has_left(), "the Aggregator still asks for it"
    fleet.questions = [question(4)]
    one._turn()
    assert one._has_left()


def test_a_node_that_leaves_is_not_given_other_work_and_answers_at_once(node: tuple[Agent, Fleet, Desk]) -> None:
    one, fleet, desk = node
    one._leaving.set()
    fleet.questions = [question(1, "n2", wait_s=50.0)]
    one._turn()
    assert desk.offered == []
    assert [(name, status.state) for name, status in fleet.answers] == [("q1", "leaving")]
    desk.is_busy = False
    assert one._has_left()


def test_a_node_leaves_at_its_deadline_whoever_listens(node: tuple[Agent, Fleet, Desk]) -> None:
    one, _, _ = node
    one._leaving.set()
    assert not one._has_left()
    one._leave_by = time.monotonic() - 1
    assert one._has_left()


def test_a_node_that_stayed_prepares_anew_for_a_recipe_that_was_changed(
    node: tuple[Agent, Fleet, Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would train on by the old schedule after its operator had raised the rounds and resumed."""
    one, fleet, desk = node
    learnt: list[str] = []
    monkeypatch.setattr(one, "_learn_of_run", lambda: learnt.append("card"))
    fleet.questions = [question(1, "n1")]
    one._turn()
    assert (learnt, len(desk.offered)) == ([], 1)
    fleet.questions = [question(2, "n2", recipe_sha256=OTHER_RECIPE)]
    one._turn()
    assert (learnt, len(desk.offered)) == (["card"], 1), "and takes no task before that"


def test_a_question_is_held_until_there_is_news(node: tuple[Agent, Fleet, Desk]) -> None:
    one, fleet, desk = node
    fleet.questions = [question(1, "n1", wait_s=50.0)]
    one._turn()
    one._turn()
    assert fleet.answers == []
    desk.stands = DONE
    one._news.set()
    one._turn()
    assert [(name, status.nonce) for name, status in fleet.answers] == [("q1", "n1")]


def test_news_that_found_no_question_is_told_to_the_next(node: tuple[Agent, Fleet, Desk]) -> None:
    one, fleet, desk = node
    desk.stands = DONE
    one._news.set()
    one._turn()
    assert not one._news.is_set(), "it would ask the gateway without a pause until a question comes"
    fleet.questions = [question(1, "n1", wait_s=50.0)]
    one._turn()
    assert [name for name, _ in fleet.answers] == ["q1"]


def test_a_question_of_a_run_that_is_over_does_not_cost_the_next_one(node: tuple[Agent, Fleet, Desk]) -> None:
    """A round loop that was started again asks while its predecessor's question is still held."""
    one, fleet, desk = node
    fleet.questions = [question(1, "n1", wait_s=50.0)]
    one._turn()
    fleet.ended = {1}
    fleet.questions = [question(2, "n2", run_id=2)]
    one._turn()
    one._turn()
    assert [name for name, _ in fleet.answers] == ["q2"]
    assert len(desk.offered) == 2


def test_of_two_questions_the_first_is_answered_by_what_is_known_now(node: tuple[Agent, Fleet, Desk]) -> None:
    one, fleet, _ = node
    fleet.questions = [question(1, wait_s=50.0)]
    one._turn()
    fleet.questions = [question(2, wait_s=50.0)]
    one._turn()
    assert [name for name, _ in fleet.answers] == ["q1"]


@pytest.mark.parametrize(("begins", "ends", "handed_in"), [(-1, 1, 0), (1, 2, 1), (-2, -1, 1)])
def test_who_is_outside_its_hours_trains_no_further(
    node: tuple[Agent, Fleet, Desk], begins: int, ends: int, handed_in: int
) -> None:
    """A task of six hours that was begun shortly before the end went on into the owner's own time."""
    one, fleet, desk = node
    span = "-".join(f"{datetime.now() + timedelta(hours=hours):%H:%M}" for hours in (begins, ends))
    site = SiteConfig(text=["x"], caps=Caps(hours=[span]))
    one._options = replace(one._options, site=site)
    desk.stands = Standing(phase="training", nonce="n1", round=3)
    fleet.questions = [question(1, "n1")]
    one._turn()
    assert desk.handed_in == handed_in


@pytest.mark.parametrize(("used", "taken"), [(8, False), (7, True)])
def test_the_bytes_of_a_day_hold_what_goes_up_for_a_base_that_comes_as_nothing(
    used: int, taken: bool, node: tuple[Agent, Fleet, Desk]
) -> None:
    one, fleet, desk = node
    one._options = replace(one._options, site=SiteConfig(text=["x"], caps=Caps(bytes_per_day="10B")))
    desk.stands = replace(DONE, body_bytes=3)  # it knows how much it sent the last time
    fleet.questions = [question(1)]
    one._turn()
    one._count(used)
    fleet.questions = [question(2, "n2")]
    one._turn()
    assert (len(desk.offered), len(desk.refused)) == (int(taken), int(not taken))


@pytest.mark.parametrize(("used", "told"), [(1, True), (2, False)])
def test_what_comes_next_is_begun_early_only_if_the_day_has_bytes_for_it(
    used: int, told: bool, node: tuple[Agent, Fleet, Desk]
) -> None:
    """The task itself needs 3 up; what comes 3 down and 3 up. When it is asked for, it is refused as any other."""
    one, fleet, desk = node
    one._options = replace(one._options, site=SiteConfig(text=["x"], caps=Caps(bytes_per_day="10B")))
    desk.stands = replace(DONE, body_bytes=3)
    fleet.questions = [question(1)]
    one._turn()
    one._count(used)
    fleet.questions = [question(2, "n2", coming=b"next", coming_bytes=3)]
    one._turn()
    assert len(desk.offered) == 1
    assert desk.coming == [(b"next", 3) if told else None]


def test_a_disk_that_is_full_costs_no_node_its_place(
    node: tuple[Agent, Fleet, Desk], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its task fails for that and is said to; when there is room again it goes on."""

    def full(path: Path, data: bytes | str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(homes, "write_atomic", full)
    one, fleet, _ = node
    one._traffic_written = -math.inf
    fleet.questions = [question(1)]
    one._turn()
    assert [name for name, _ in fleet.answers] == ["q1"]
    assert "today's bytes cannot be written down: No space left on device" in capsys.readouterr().out
    NodeHome(one._options.home.path).keep_id(7)


def test_what_the_disk_does_not_take_while_a_run_is_prepared_is_a_sentence(node: tuple[Agent, Fleet, Desk]) -> None:
    one, _, _ = node
    one._preparation = agents._Preparation("r", RECIPE, failed=OSError(errno.ENOSPC, "No space left", "/data/x"))
    one._preparation.thread = Thread()
    with pytest.raises(InputError, match=r"run r cannot be prepared here: .*No space left: '/data/x'"):
        one._turn()


def test_a_state_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    home, site = NodeHome(tmp_path / "file"), SiteConfig(text=["x"])
    with pytest.raises(InputError, match=r"file cannot hold what this node keeps .*: name another --state"):
        Agent(NodeOptions("ada", "https://127.0.0.1:1", context, lambda: None, site, home)).run()


def test_a_key_that_expires_while_there_is_no_connection_ends_the_node(
    node: tuple[Agent, Fleet, Desk], ready: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would try for ever, and each time hear of TLS no more than that."""
    one, fleet, _ = node
    key = ready / "alice.key"
    one._options = replace(one._options, check_key=partial(check_dates, key, load_bundle(key)))
    one._leaving.set()  # so that no pause follows a failure

    def down() -> Question | None:
        raise FlowerDownError("cannot ask for messages through Flower: ReadError: sslv3 alert certificate expired")

    monkeypatch.setattr(fleet, "pull", down)
    one._turn()
    at(monkeypatch, days=400)
    with pytest.raises(InputError, match=r"alice\.key expired on 20.*photon keys node alice DIR"):
        one._turn()


def online(site: Site, home: Path, context: ssl.SSLContext, key: Path) -> Agent:
    """A node that has joined the gateway of `site`, and is asked to leave so that no pause follows a failure."""
    options = NodeOptions(
        "ada",
        f"https://127.0.0.1:{site.port}",
        context,
        partial(check_dates, key, load_bundle(key)),
        SiteConfig(text=["x"]),
        NodeHome(home),
    )
    one = Agent(options)
    one._fleet._node = Node(node_id=1)
    one._leaving.set()
    return one


def test_a_key_that_has_expired_though_not_by_the_clock_of_the_node_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had joined; then every new connection ends in the handshake, and its own clock never tells it why."""
    at(monkeypatch, days=-400)
    site = Site(tmp_path)
    key = site.keys / "ada.key"
    context = client_context(key)
    with in_thread(site):
        one = online(site, tmp_path / "home", context, key)
        with pytest.raises(NodeRefusedError, match=r"this node's key has expired.*clock"):
            one._turn()


def test_an_aggregator_whose_certificate_has_expired_is_named_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be renewed, or the clock here may be wrong: neither is a reason for a node to end."""
    at(monkeypatch, days=-400)
    site = Site(tmp_path)
    renew_aggregator(site.keys, days=30)
    with in_thread(site):
        at(monkeypatch, days=0)
        key = issue_node(site.keys, "bob2")
        one = online(site, tmp_path / "home", client_context(key), key)
        for _ in range(2):
            one._turn()
    told = capsys.readouterr()
    assert (told.out + told.err).count("has expired: renew it there (or the clock of this machine is wrong)") == 1


def test_a_connection_that_broke_in_tls_once_costs_no_node_its_place(
    node: tuple[Agent, Fleet, Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, fleet, _ = node
    one._leaving.set()
    monkeypatch.setattr(one._client, "json", lambda method, path: {})

    def down() -> Question | None:
        raise FlowerDownError("a record that is none", is_tls=True)

    monkeypatch.setattr(fleet, "pull", down)
    one._turn()  # it neither ends nor joins again: `Fleet` cannot
