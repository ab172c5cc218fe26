"""Tiny federations of real processes, as a user would start them: what the fault tests disturb."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from tests.support import without_timings

from photon.cli import main

PHOTON = (sys.executable, "-m", "photon")
TIMEOUT_S = 120.0
OWNERS = ("ada", "bob", "cyd")


def write_recipe(folder: Path, *, rounds: int = 6, extra: str = "") -> Path:
    """Three owners with a little text each and a recipe that trains a very small model on it.

    One thread a process, whatever the cores: on tensors so small a second one only waits, and waits at full speed.
    """
    for index, owner in enumerate(OWNERS):
        (folder / owner).mkdir(parents=True)
        for number in range(6):
            words = [f"{owner} {(index + 2) * number * k % 97} of {k % 13} things;" for k in range(220)]
            (folder / owner / f"{number}.txt").write_text(" ".join(words))
    silos = "\n".join(f'[[silo]]\nname = "{owner}"\ntext = ["{folder / owner}"]\n' for owner in OWNERS)
    path = folder / "tiny.toml"
    path.write_text(
        f'name = "tiny"\n'
        f"[model]\nlayers = 2\nwidth = 32\nheads = 2\nqk_norm = true\n"
        f'[data]\ndir = "{folder / "data"}"\nvocab_size = 300\nsequence_length = 32\nheldout_fraction = 0.2\n'
        f'[node]\nbatch_size = 2\noptimizer = "muon"\nworkers = 2\nthreads = 1\n'
        f'[federation]\nrounds = {rounds}\ntau = 4\nouter = "nesterov"\nouter_lr = 0.7\n'
        f'[evaluation]\nevery = 2\nsequences = 4\nsample_tokens = 4\nprompt = "ada"\n'
        f"{extra}{silos}"
    )
    return path


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """`photon ...` in its own process group, output kept."""
    return subprocess.Popen(
        [*PHOTON, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout_s: float = TIMEOUT_S) -> tuple[int, str]:
    """Wait for its end: (exit code, output)."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout_s} s; it said:\n{output}") from None
    return process.returncode, output


def run(*arguments: str | Path) -> tuple[int, str]:
    """`photon ...` to its end."""
    return finish(start(*arguments))


def run_here(*arguments: str | Path) -> tuple[int, str]:
    """As `run`, but in this process, where torch and transformers are imported already: seconds less each time.

    For what a command says and leaves behind. The workers of a federation are processes of their own here too.
    """
    said, code = io.StringIO(), 0
    with mock.patch.object(sys, "argv", ["photon", *map(str, arguments)]), redirect_stdout(said), redirect_stderr(said):
        try:
            main()
        except SystemExit as end:  # how typer ends every command, and `main` one that failed
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return code, said.getvalue()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = TIMEOUT_S) -> bool:
    """Poll until the condition holds (True) or the process ends first (False)."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.02)
    raise AssertionError(f"nothing happened for {timeout_s} s")


def workers_of(run_folder: Path) -> list[psutil.Process]:
    """Live worker processes of a run."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or []
        is_ours = "photon.fabric.worker" in command and str(run_folder) in command
        if is_ours and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def summary(run_folder: Path) -> dict[str, Any]:
    return dict(json.loads((run_folder / "summary.json").read_text()))


def record(run_folder: Path) -> list[dict[str, Any]]:
    """Rounds and scores of a run, without what two equal runs do not share: clocks, and the digits of their seconds."""
    events = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [without_timings(event) for event in events if event["event"] in ("round", "evaluation")]
