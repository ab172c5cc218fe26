"""A federation of real processes over real sockets: one `photon aggregator`, one `photon node` for each owner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from tests.faults.federations import OWNERS, finish, start

from photon.fabric.supervise import free_port
from photon.keys import create_authority, issue_node

TIMEOUT_S = 240.0
PARTS = {"rounds": "photon.sites_far", "gateway": "photon.fabric.gateway", "superlink": "photon.fabric.superlink"}


def write_texts(folder: Path, owners: Sequence[str] = OWNERS) -> None:
    """A little text for each owner."""
    for index, owner in enumerate(owners):
        (folder / owner).mkdir(parents=True)
        for number in range(6):
            words = [f"{owner} {(index + 2) * number * k % 97} of {k % 13} things;" for k in range(220)]
            (folder / owner / f"{number}.txt").write_text(" ".join(words))


def recipe_text(
    folder: Path, owners: Sequence[str], rounds: int, *, with_text: bool, extra: str = "", tau: int = 4
) -> str:
    """The recipe of a very small model; with the owners' text for one machine, or with their names alone."""
    silos = "\n".join(
        f'[[silo]]\nname = "{owner}"\n' + (f'text = ["{folder / owner}"]\n' if with_text else "") for owner in owners
    )
    return (
        f'name = "tiny"\n'
        f"[model]\nlayers = 2\nwidth = 32\nheads = 2\nqk_norm = true\n"
        f'[data]\ndir = "{folder / "data"}"\nvocab_size = 300\nsequence_length = 32\nheldout_fraction = 0.2\n'
        f'tokenizer_text = ["{folder / owners[0]}"]\n'
        f'[node]\nbatch_size = 2\noptimizer = "muon"\nworkers = 2\nthreads = 1\nmicro_batch_size = 2\n'
        f"[evaluation]\nevery = 2\nsequences = 4\nsample_tokens = 0\n"
        f'[federation]\nrounds = {rounds}\ntau = {tau}\nouter = "nesterov"\nouter_lr = 0.7\n{extra}\n{silos}'
    )


def undisturbed(folder: Path, rounds: int, extra: str = "", owners: Sequence[str] = OWNERS, tau: int = 4) -> str:
    """`model_sha256` of the same recipe and text on the local fabric."""
    write_texts(folder, owners)
    recipe = folder / "local.toml"
    recipe.write_text(recipe_text(folder, owners, rounds, with_text=True, extra=extra, tau=tau))
    code, output = finish(start("train", recipe, "--run", folder / "local"), TIMEOUT_S)
    assert code == 0, output
    return str(json.loads((folder / "local" / "summary.json").read_text())["model_sha256"])


class Sites:
    """Starts and ends the processes of a federation under `folder`; text must be there (`write_texts`)."""

    def __init__(
        self,
        folder: Path,
        texts: Path,
        *,
        rounds: int = 4,
        extra: str = "",
        owners: Sequence[str] = OWNERS,
        tau: int = 4,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.texts, self.owners = folder, texts, list(owners)
        self.run_folder, self.keys = folder / "run", folder / "keys"
        self.port = free_port()
        self.recipe = folder / "sites.toml"
        self.recipe.write_text(recipe_text(texts, owners, rounds, with_text=False, extra=extra, tau=tau))
        create_authority(self.keys, ["127.0.0.1", "localhost"])
        for owner in owners:
            issue_node(self.keys, owner)
        self.aggregator: subprocess.Popen[str] | None = None
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}

    def start_aggregator(self) -> None:
        """A new run, or the one that is there."""
        what = ["--resume", self.run_folder] if (self.run_folder / "run.json").exists() else [self.recipe]
        where = [] if what[0] == "--resume" else ["--run", self.run_folder]
        listen = ["--keys", self.keys, "--listen", f"127.0.0.1:{self.port}"]
        self.aggregator = start("aggregator", *what, *where, *listen)

    def start_node(self, owner: str, port: int | None = None, site: str = "") -> None:
        """A node; `port` where something stands between it and the gateway; `site` adds to its site.toml."""
        file = self.folder / f"{owner}.toml"
        data = self.folder / "node-data" / owner
        file.write_text(f'text = ["{self.texts / owner}"]\nthreads = 1\ndata = "{data}"\n{site}')
        command = [sys.executable, "-m", "photon", "node", "--keys", str(self.keys / f"{owner}.key")]
        command += ["--aggregator", f"https://127.0.0.1:{port or self.port}", "--silo", str(file)]
        command += ["--state", str(self.home(owner))]
        with self.node_log(owner).open("ab") as log:
            self.nodes[owner] = subprocess.Popen(command, stdout=log, stderr=log, process_group=0)

    def start(self, owners: Iterable[str] | None = None) -> None:
        """The Aggregator and its nodes."""
        self.start_aggregator()
        for owner in self.owners if owners is None else owners:
            self.start_node(owner)

    def home(self, owner: str) -> Path:
        return self.folder / f"home-{owner}"

    def node_log(self, owner: str) -> Path:
        return self.folder / f"node-{owner}.log"

    def part(self, name: str) -> psutil.Process | None:
        """A child of the Aggregator's supervisor, `rounds`, `gateway` or `superlink`, if it is up."""
        if self.aggregator is None:
            return None
        try:
            children = psutil.Process(self.aggregator.pid).children()
            return next((child for child in children if PARTS[name] in child.cmdline()), None)
        except psutil.Error:
            return None

    def wait_for_part(self, name: str, other_than: int = 0) -> psutil.Process:
        """A child of the supervisor, once it is up; `other_than` is the process that it must not be any more."""

        def found() -> bool:
            part = self.part(name)
            return part is not None and part.pid != other_than

        self.wait_until(found, f"{name} is up")
        part = self.part(name)
        assert part is not None, f"{name} ended at once\n{self.story()}"
        return part

    def kill_part(self, name: str) -> int:
        """kill -9 of a child of the supervisor; its process id. The supervisor is to start it again."""
        part = self.wait_for_part(name)
        part.kill()
        return int(part.pid)

    def kill_aggregator(self) -> None:
        """kill -9 of the supervisor. Its children must end by themselves."""
        assert self.aggregator is not None
        parts = [part for part in map(self.part, PARTS) if part is not None]
        self.aggregator.kill()
        self.aggregator.wait(20)
        _, alive = psutil.wait_procs(parts, timeout=20)
        assert not alive, f"these outlived their supervisor: {alive}"
        self.aggregator.communicate()
        self.aggregator = None

    def stop_aggregator(self) -> tuple[int, str]:
        """SIGTERM to the supervisor, as systemd sends it: (exit code, what it said)."""
        assert self.aggregator is not None
        self.aggregator.terminate()
        ended = finish(self.aggregator, TIMEOUT_S)
        self.aggregator = None
        return ended

    def stop_node(self, owner: str) -> int:
        """SIGTERM to a node, as systemd sends it: its exit code."""
        self.nodes[owner].terminate()
        return self.nodes[owner].wait(TIMEOUT_S)

    def trainer(self, owner: str) -> psutil.Process | None:
        """The process in which a node trains, if it is up."""
        try:
            children = psutil.Process(self.nodes[owner].pid).children()
            return next((child for child in children if "photon.fabric.worker" in child.cmdline()), None)
        except psutil.Error:
            return None

    def trainer_log(self, owner: str) -> str:
        """What the trainers of a node have said."""
        return next((self.home(owner) / "runs").iterdir()).joinpath("logs/trainer.log").read_text()

    def status(self) -> dict[str, Any]:
        """`status.json`, as `photon status` reads it; a few seconds old."""
        path = self.run_folder / "exchange" / "status.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def is_training(self, owner: str, least_step: int = 1) -> bool:
        """Whether a node was seen in the middle of the open round."""
        entry = self.status().get("nodes", {}).get(owner, {})
        is_open = entry.get("round") == self.committed() and entry.get("phase") == "training"
        return bool(is_open and entry["step"] >= least_step)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
        """Look again and again until `condition` holds; `what` says it in words."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"not after {timeout_s} s: {what}\n{self.story()}"
            time.sleep(0.02)

    def check_streams(self, length: int = 32) -> None:
        """Each counted round began where the state before it had ended, and consumed what its report says.

        So in a node's stream no token was trained twice or skipped. Asks for `checkpoint.keep_last` beyond the rounds.
        """
        places = {owner: self.positions(owner) for owner in self.owners}
        for event in self.rounds():
            number = event["round"] - 1
            for owner, report in event["nodes"].items():
                of = places[owner]
                begin = of[max(ready for ready in of if ready <= number)]
                assert (of[number + 1] - begin) * length == report["tokens"], (owner, number, of, report)

    def kill_node(self, owner: str) -> None:
        """kill -9 of the node's process; its trainer ends with it."""
        os.kill(self.nodes[owner].pid, signal.SIGKILL)
        self.nodes[owner].wait(20)

    def committed(self) -> int:
        """The newest committed round; -1 before there is one."""
        rounds = self.run_folder / "rounds"
        numbers = [int(entry.name) for entry in rounds.iterdir() if entry.name.isdecimal()] if rounds.is_dir() else []
        return max(numbers, default=-1)

    def wait_for_round(self, number: int, timeout_s: float = TIMEOUT_S) -> None:
        end = time.monotonic() + timeout_s
        while self.committed() < number:
            assert time.monotonic() < end, f"round {number} was not committed in {timeout_s} s\n{self.story()}"
            assert self.aggregator is not None
            assert self.aggregator.poll() is None, f"the Aggregator ended\n{self.story()}"
            time.sleep(0.05)

    def finish(self, timeout_s: float = TIMEOUT_S) -> str:
        """Wait for the run's end; what the Aggregator said."""
        assert self.aggregator is not None
        code, output = finish(self.aggregator, timeout_s)
        self.aggregator = None
        assert code == 0, f"{output}\n{self.story()}"
        return output

    def model_sha256(self) -> str:
        return str(json.loads((self.run_folder / "summary.json").read_text())["model_sha256"])

    def rounds(self) -> list[dict[str, Any]]:
        """The recorded rounds."""
        events = [json.loads(line) for line in (self.run_folder / "metrics.jsonl").read_text().splitlines()]
        return [event for event in events if event["event"] == "round"]

    def positions(self, owner: str) -> dict[int, int]:
        """Place in the owner's data by the round that its node's states are ready for."""
        states = next((self.home(owner) / "runs").iterdir()) / "nodes" / owner / "state"
        found = {}
        for entry in states.iterdir():
            if entry.name.isdecimal():
                found[int(entry.name)] = json.loads((entry / "state.json").read_text())["fields"]["position"]
        return found

    def story(self) -> str:
        """The ends of all logs, for a failed test."""
        logs = [*self.folder.glob("node-*.log"), *(self.run_folder / "logs").glob("*.log")]
        return "\n".join(
            f"== {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-8:]) for log in logs
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.nodes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(20)
        if self.aggregator is not None:
            self.aggregator.kill()
            self.aggregator.communicate()
