"""A node with a valid key that lies in every round: each lie is refused by its name, and the model knows nothing of it.

The reference is a run of the honest two alone. With tau = 5 the tokens of two and of three nodes need the same number
of bits, so both runs merge on the same grid and the models can be compared by their hashes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tests.faults.federations import run
from tests.faults.liar import Hand, Liar, honest
from tests.faults.lies import CONTROL_ANSWERS, CONTROL_REMARKS, UPLOAD_ANSWERS, all_lies, one_value
from tests.faults.sites import Sites, undisturbed

from photon.link.update import Task

HONEST, LIAR, TAU = ("ada", "bob"), "liar", 5
MIB = 2**20


def liar_at(sites: Sites, lie_of: Callable[[Task], Callable[[Liar, Task], Hand]]) -> Liar:
    url = f"https://127.0.0.1:{sites.port}"
    return Liar(LIAR, sites.keys / f"{LIAR}.key", url, sites.folder / "liar", lie_of)


def wait_for_gateway(sites: Sites) -> None:
    log = sites.run_folder / "logs" / "gateway.log"
    sites.wait_until(lambda: log.exists() and "listening on" in log.read_text(), "the gateway is up")


def node_id(sites: Sites, owner: str) -> int:
    return int(json.loads((sites.home(owner) / "flower.json").read_text())["node_id"])


def memory_of(sites: Sites) -> dict[str, int]:
    """Bytes in memory of the processes that a node can reach."""
    found = {}
    for name in ("rounds", "gateway", "superlink"):
        process = sites.part(name)
        assert isinstance(process, psutil.Process)
        found[name] = process.memory_info().rss
    return found


@pytest.mark.sites
@pytest.mark.timeout(1200)
def test_every_lie_is_refused_by_its_name_and_the_model_is_that_of_the_honest(tmp_path: Path) -> None:
    lies = all_lies(lambda: node_id(sites, HONEST[0]))
    extra = "quorum = 0.6\ngrace_s = 120.0\nsuspend_after = 0"
    model = undisturbed(tmp_path / "texts", len(lies), extra, HONEST, TAU)

    def lie_of(task: Task) -> Callable[[Liar, Task], Hand]:
        if task.tau == 0:  # the last score
            return lambda liar, task: liar.hand_in(task, b"", evaluation=None)
        return lies[task.round].lie

    owners = (*HONEST, LIAR)
    with Sites(tmp_path / "sites", tmp_path / "texts", rounds=len(lies), extra=extra, owners=owners, tau=TAU) as sites:
        sites.start(HONEST)
        wait_for_gateway(sites)
        liar = liar_at(sites, lie_of)
        liar.start()
        for index in range(1, len(lies)):
            sites.wait_for_round(index)
            assert liar.failures == []
            if index == 2:
                before = memory_of(sites)
        grown = {name: (after - before[name]) // MIB for name, after in memory_of(sites).items()}
        sites.finish()
        liar.close()
        rounds = sites.rounds()
    assert liar.failures == []
    reasons = {told.name: rounds[index]["missing"].get(LIAR, "nothing") for index, told in enumerate(lies)}
    assert {name: reason for name, reason in reasons.items() if not _is_refused(reason)} == {}
    assert [(told.name, reasons[told.name]) for told in lies if told.reason not in reasons[told.name]] == []
    assert [sorted(one["nodes"]) for one in rounds] == [list(HONEST)] * len(lies)
    assert [set(one["missing"]) for one in rounds] == [{LIAR}] * len(lies)
    assert liar.answers == UPLOAD_ANSWERS | CONTROL_ANSWERS
    assert [remark for remark in CONTROL_REMARKS if not any(remark in heard for heard in liar.heard)] == []
    assert sites.model_sha256() == model
    assert max(grown.values()) < 60, f"MiB more than after two rounds: {grown}"
    log = (sites.run_folder / "logs" / "gateway.log").read_text()
    assert log.count("listening on") == 1  # it was never started anew
    assert "refused liar at" in log
    assert set(re.findall(r"refused (?:ada|bob) at \S+ (\d+)", log)) <= {"503"}  # before the SuperLink was up
    assert "Traceback" not in log


def _is_refused(reason: str) -> bool:
    """By what was found, not by its not having come in time."""
    return reason.startswith(("refused: ", "its update cannot be fetched", "it hands in the reply to another task"))


@pytest.mark.sites
@pytest.mark.timeout(900)
def test_a_liar_is_suspended_until_the_operator_readmits_it(tmp_path: Path) -> None:
    owners, reformed = (HONEST[0], LIAR), False
    extra = "quorum = 0.5\ngrace_s = 120.0\nsuspend_after = 3"
    undisturbed(tmp_path / "texts", 1, extra, owners[:1], TAU)

    def lie_of(task: Task) -> Callable[[Liar, Task], Hand]:
        return honest if reformed else one_value(float("nan"))

    with Sites(tmp_path / "sites", tmp_path / "texts", rounds=1000, extra=extra, owners=owners, tau=TAU) as sites:
        sites.start(owners[:1])
        wait_for_gateway(sites)
        liar = liar_at(sites, lie_of)
        liar.start()
        sites.wait_for_round(6)
        assert liar.failures == []
        rounds = sites.rounds()
        assert ["not finite" in one["missing"].get(LIAR, "") for one in rounds[:6]] == [True] * 3 + [False] * 3
        assert ["not finite" in one["suspended"].get(LIAR, "") for one in rounds[:6]] == [False] * 2 + [True] * 4
        assert len(liar.hands) == 3  # it was not asked to train again
        reformed = True
        code, output = run("readmit", LIAR, sites.run_folder)
        assert code == 0, output
        sites.wait_until(lambda: LIAR in sites.rounds()[-1]["nodes"], "the liar is readmitted")
        assert sites.rounds()[-1]["suspended"] == {}
        liar.close()
        assert liar.failures == []
