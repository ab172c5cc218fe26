"""kill -9 at any instant, any number of times, then `photon train --resume`: the model of the undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from tests.faults.federations import (
    finish,
    record,
    run,
    run_here,
    start,
    summary,
    wait_for,
    workers_of,
    write_recipe,
)

ROUNDS = 24  # enough that a disturbance falls into training, not behind it


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe and a finished run of it, by one worker: what comes out does not depend on how many there are."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = write_recipe(folder, rounds=ROUNDS)
    code, output = run_here("train", recipe, "node.workers=1", "--run", folder / "run")
    assert code == 0, output
    return recipe, folder / "run"


def killed_and_resumed(recipe: Path, folder: Path, seed: int, kills: int) -> int:
    """Start a run, kill it `kills` times at random moments, bring it to its end; how often it was really killed."""
    dice = random.Random(seed)
    process = start("train", recipe, "--run", folder)
    done = 0
    for _ in range(kills):
        # Aim at a round so that kills do not all fall into start-up; the moment within it is chance.
        aim = folder / "rounds" / f"{dice.randrange(ROUNDS):06d}"
        wait_for(lambda aim=aim: aim.exists() or (folder / "model").exists(), process)
        time.sleep(dice.uniform(0, 0.4))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            done += 1
        process.communicate()
        assert_no_workers(folder)
        process = start("train", "--resume", folder) if (folder / "run.json").exists() else process
    code, output = finish(process)
    assert code == 0, output
    return done


def assert_no_workers(folder: Path) -> None:
    """Workers end by themselves when the process that started them is gone, however it went."""
    end = time.monotonic() + 20
    while workers_of(folder) and time.monotonic() < end:
        time.sleep(0.1)
    assert workers_of(folder) == []


def test_a_killed_run_ends_in_the_model_of_the_undisturbed_one(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, whole = undisturbed
    assert killed_and_resumed(recipe, tmp_path / "run", seed=1, kills=2) >= 1
    assert summary(tmp_path / "run")["model_sha256"] == summary(whole)["model_sha256"]
    assert record(tmp_path / "run") == record(whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_many_kills_at_random_moments(undisturbed: tuple[Path, Path], tmp_path: Path, seed: int) -> None:
    recipe, whole = undisturbed
    assert killed_and_resumed(recipe, tmp_path / "run", seed=100 + seed, kills=5) >= 1
    assert summary(tmp_path / "run")["model_sha256"] == summary(whole)["model_sha256"]
    assert record(tmp_path / "run") == record(whole)


def test_a_killed_worker_is_replaced_and_its_work_repeated(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, whole = undisturbed
    folder = tmp_path / "run"
    process = start("train", recipe, "--run", folder)
    assert wait_for((folder / "rounds" / "000002").exists, process)
    victims = workers_of(folder)
    assert victims
    victims[0].kill()
    code, output = finish(process)
    starts = [log.read_text().count("starting on") for log in (folder / "logs").glob("worker-*.log")]
    assert sorted(starts) == [1, 2]
    assert code == 0, output
    assert summary(folder)["model_sha256"] == summary(whole)["model_sha256"]
    assert workers_of(folder) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM is how schedulers and systemd end a run."""
    recipe = write_recipe(tmp_path, rounds=400)  # too many to be over before the signal arrives
    folder = tmp_path / "run"
    process = start("train", recipe, "--run", folder)
    assert wait_for((folder / "rounds" / "000001").exists, process)
    os.kill(process.pid, number)
    code, output = finish(process)
    assert code == 1
    assert f"photon train --resume {folder}" in output
    assert "Traceback" not in output
    assert workers_of(folder) == []


@pytest.mark.slow
def test_a_damaged_round_is_refused_by_name_and_an_earlier_one_taken_on_request(
    undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe, whole = undisturbed
    folder = tmp_path / "run"
    code, output = run("train", recipe, "--run", folder)
    assert code == 0, output
    weights = folder / "rounds" / f"{ROUNDS:06d}" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    code, output = run("train", "--resume", folder)
    assert code == 1
    assert f"{ROUNDS:06d}/model.safetensors" in output
    assert "--round N" in output
    code, output = run("train", "--resume", folder, "--round", str(ROUNDS - 1))
    assert code == 0, output
    assert summary(folder)["model_sha256"] == summary(whole)["model_sha256"]
    assert list((folder / "rounds").glob(f"set-aside-{ROUNDS:06d}*"))


@pytest.mark.slow
def test_two_processes_cannot_train_one_run(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, _ = undisturbed
    folder = tmp_path / "run"
    first = start("train", recipe, "--run", folder)
    assert wait_for((folder / "run.json").exists, first)
    code, output = run("train", "--resume", folder)
    assert code == 2
    assert "being trained by another process" in output
    first.kill()
    first.communicate()
