"""A whole comparison with real runs: two methods, two seeds; then repeated, and killed half way and repeated."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.faults.federations import finish, run_here, start, wait_for, write_recipe

from photon.compare import Asked, compare, slots_of
from photon.compare_content import Comparison
from photon.compare_curve import is_finished
from photon.compare_jobs import Runner
from photon.compare_plan import Request
from photon.errors import InputError
from photon.method import load_method
from photon.recipe import load_recipe

# Clocks, and bytes: the header of a message holds its seconds, and is as long as their digits.
TIMINGS = {"seconds", "bytes_up", "bytes_down", "bytes_per_token", "command"}
TIMEOUT_S = 600.0


def arguments(recipe: Path, out: Path) -> list[str | Path]:
    return [
        "compare", recipe, "--methods", "fedavg,per-step", "--seeds", "2", "--links", "10Mbps", "--out", out,
        "node.workers=1", "federation.rounds=2", "evaluation.every=1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("comparison"))


@pytest.fixture(scope="module")
def finished(recipe: Path) -> Path:
    out = recipe.parent / "finished"
    code, output = run_here(*arguments(recipe, out))
    assert code == 0, output
    assert str(out / "compare.html") in output.replace("\n", "")
    return out


def without_timings(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_timings(item) for key, item in value.items() if key not in TIMINGS}
    return [without_timings(item) for item in value] if isinstance(value, list) else value


def told(out: Path) -> Any:
    return without_timings(json.loads((out / "compare.json").read_text()))


@pytest.mark.timeout(TIMEOUT_S)
def test_two_methods_and_two_seeds(finished: Path) -> None:
    found = Comparison.model_validate_json((finished / "compare.json").read_bytes())
    fedavg, per_step = found.methods
    assert [run.seed for run in fedavg.runs] == [1337, 1338] == found.setting.seeds
    tokens = 2 * 4 * 3 * 2 * 32  # rounds x tau x owners x batch x sequence
    assert {run.tokens for method in found.methods for run in method.runs} == {tokens}
    # The same initial weights of a seed: the untrained model has the same score under both methods, another seed not.
    untrained = [[run.curve[0].loss for run in method.runs] for method in found.methods]
    assert untrained[0] == untrained[1]
    assert untrained[0][0] != untrained[0][1]
    assert len({run.model_sha256 for method in found.methods for run in method.runs}) == 4
    assert found.target_loss is not None
    assert all(run.loss is not None and run.loss <= found.target_loss for m in found.methods for run in m.runs)
    assert fedavg.to_target is not None
    assert per_step.bytes_are_computed
    parameters = per_step.bytes_up / (4 * 8 * 3)  # 4 bytes, 8 steps, 3 nodes
    assert fedavg.bytes_up > 2 * 3 * 4 * parameters  # 2 rounds
    for method in found.methods:
        assert list(method.hours) == ["10.0 Mbit/s"]
        assert load_recipe_text(method.recipe, finished).seed == 1337


def load_recipe_text(text: str, folder: Path) -> Any:
    path = folder / "told.toml"
    path.write_text(text)
    return load_recipe(path)


@pytest.mark.timeout(TIMEOUT_S)
def test_the_page_holds_every_recipe_and_no_reference(finished: Path) -> None:
    html = (finished / "compare.html").read_text()
    assert not re.search(r"https?://", html)
    assert html.count("outer = &#34;none&#34;") == 1
    assert html.count("outer = &#34;fedavg&#34;") == 1


@pytest.mark.timeout(TIMEOUT_S)
def test_repeated_nothing_is_run_again(recipe: Path, finished: Path) -> None:
    def records() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("*") if path.is_file()}

    before, first = records(), told(finished)
    code, output = run_here(*arguments(recipe, finished))
    assert code == 0, output
    assert "4 of 4 runs are finished already" in output
    assert records() == before
    assert told(finished) == first


@pytest.mark.slow
@pytest.mark.timeout(2 * TIMEOUT_S)
def test_killed_half_way_and_repeated_it_tells_the_same(recipe: Path, finished: Path) -> None:
    """The command is killed with a run under way, which goes on by itself: the repeated one waits for it."""
    out = recipe.parent / "killed"
    process = start(*arguments(recipe, out))

    def half_way() -> bool:
        folders = list((out / "runs").glob("*")) if (out / "runs").is_dir() else []
        return len(folders) == 3 and any(
            (folder / "run.json").is_file() and not is_finished(folder) for folder in folders
        )

    assert wait_for(half_way, process, TIMEOUT_S)
    os.kill(process.pid, signal.SIGKILL)
    finish(process, TIMEOUT_S)
    assert not (out / "compare.json").exists()
    code, output = finish(start(*arguments(recipe, out)), TIMEOUT_S)
    assert code == 0, output
    assert "of 4 runs are finished already" in output
    assert told(out) == told(finished)


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_a_run_that_fails_is_told_and_the_page_written(recipe: Path) -> None:
    out = recipe.parent / "failing"
    given = [*arguments(recipe, out), "federation.deadline_s=0.001", "federation.grace_s=0"]
    given[given.index("2")] = "1"
    code, output = finish(start(*given), TIMEOUT_S)
    assert code == 1, output
    assert "failed, the rest is in" in output.replace("\n", " ")
    assert "failed" in (out / "compare.html").read_text()


@pytest.mark.parametrize(
    ("links", "device", "said"),
    [(("100Mbps",), "h1000", r"--plan-device 'h1000' is not known.*h100"), (("fast",), "h100", "--links")],
)
def test_what_cannot_be_predicted_is_refused_before_anything_runs(
    links: tuple[str, ...], device: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Runner, "run", lambda *rest: pytest.fail("began to train"))
    out = tmp_path / "out"
    request = Request("demo", (), (load_method("fedavg"),))
    with pytest.raises(InputError, match=said):
        compare(request, Asked(out, 1, None, links, device, "photon compare"), Console())
    assert not out.exists()


@pytest.mark.parametrize("below", [".", "deeper"])
def test_a_file_in_the_place_of_its_folder_is_told(below: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    asked = Asked(tmp_path / "out" / below, 1, None, (), "h100", "photon compare")
    with pytest.raises(InputError, match=r"--out .*out.* cannot be made a folder"):
        compare(Request("demo", (), (load_method("fedavg"),)), asked, Console())


def test_jobs_share_the_devices_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    demo = load_recipe("demo")
    assert slots_of(demo, None) == [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "6"}]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots_of(demo, 3)] == ["4", "6", "4"]
    assert slots_of(demo, 1) == [{}]  # one run sees them all
    assert slots_of(load_recipe("demo", ["node.device=cpu"]), None) == [{}]
    assert slots_of(load_recipe("demo", ["node.device=cuda:1"]), 2) == [{}, {}]
