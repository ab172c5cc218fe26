"""The commands: their names and options are frozen, and every mistake ends in one clear sentence and exit code 2."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from photon import __version__, sites_far
from photon.cli import app, main, split_words
from photon.cli_sites import split_address
from photon.errors import InputError

FROZEN = {
    "train": ["words", "--run", "--method", "--resume", "--fabric", "--round"],
    "aggregator": ["--keys", "words", "--listen", "--run", "--resume"],
    "node": ["--keys", "--aggregator", "--silo", "--state", "--socket"],
    "status": ["target", "--keys", "--json", "--watch"],
    "readmit": ["name", "run"],
    "keys init": ["folder", "--host", "--days"],
    "keys node": ["name", "folder", "--out", "--days"],
    "keys revoke": ["name", "folder"],
    "keys list": ["folder"],
    "keys aggregator": ["folder", "--host", "--days"],
    "keys operator": ["folder", "--out"],
    "presets": ["name"],
    "data build": ["recipe", "options"],
    "data show": ["folder"],
    "evaluate": ["run", "--data", "--field", "--sequences", "--round"],
    "generate": ["run", "prompt", "--tokens", "--temperature", "--top-k", "--seed", "--round"],
    "export": ["run", "folder", "--round"],
    "report": ["run"],
    "plan": [
        "words", "--method", "--nodes", "--bandwidth", "--bandwidth-down", "--aggregator-bandwidth", "--latency",
        "--device", "--devices-per-node", "--mfu", "--tokens-per-second", "--steps-per-second", "--at-once",
        "--control", "--ideal", "--topology", "--parameters", "--bytes-per-parameter", "--compute-ratio",
        "--baseline-steps", "--baseline-steps-per-second", "--baseline-bytes-per-parameter", "--utilisation",
        "--price-device", "--price-traffic", "--paper", "--sweep", "--out", "--json",
    ],
    "compare": [
        "words", "--methods", "--budget", "--seeds", "--target-loss", "--links", "--plan-device", "--tune", "--jobs",
        "--out",
    ],
    "methods": ["name"],
}  # fmt: skip


def commands() -> dict[str, list[str]]:
    group = typer.main.get_command(app)
    found = {}
    for name, command in group.commands.items():
        nested = getattr(command, "commands", None)
        for path, one in (
            {f"{name} {key}": value for key, value in nested.items()}.items() if nested else [(name, command)]
        ):
            found[path] = [p.opts[0] for p in one.params if p.name != "help"]
    return found


def test_commands_and_options_are_frozen() -> None:
    """Users' scripts rely on them: add freely, rename never without a word in the changelog."""
    assert commands() == FROZEN


@pytest.mark.parametrize("command", FROZEN)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert f"photon {command}" in result.output.split("Example", 1)[1]


def photon(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The command in this process: (exit code, what it said)."""
    argv = sys.argv
    sys.argv = ["photon", *map(str, arguments)]
    try:
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = argv
    captured = capsys.readouterr()
    return code, captured.out + captured.err


MISTAKES = {
    "unknown preset": (["train", "demmo"], "demo"),
    "two recipes": (["train", "demo", "own-text"], "one recipe at a time"),
    "unknown option": (["train", "demo", "node.batchsize=3"], "batch_size"),
    "out of range": (["train", "demo", "federation.tau=0"], "federation.tau"),
    "no such file": (["train", "missing.toml"], "missing.toml"),
    "round without resume": (["train", "--round", "3"], "--resume"),
    "resume with a recipe": (["train", "demo", "--resume", "."], "takes no recipe"),
    "resume of no run": (["train", "--resume", "."], "is not a run"),
    "report of no run": (["report", "."], "is not a run"),
    "evaluate of no run": (["evaluate", "nowhere"], "nowhere is not a run"),
    "generate of no run": (["generate", "nowhere", "x"], "nowhere is not a run"),
    "export of no run": (["export", "nowhere", "out"], "nowhere is not a run"),
    "sequences with data": (["evaluate", ".", "--data", "x", "--sequences", "3"], "--sequences"),
    "field without data": (["evaluate", ".", "--field", "body"], "--field is for --data"),
    "shards of nothing": (["data", "show", "."], "no shards here"),
    "unknown device": (["train", "demo", "node.device=cuda:99", "--run", "r"], "cuda:99"),
    "missing text": (["train", "own-text", "--run", "r"], "text/library"),
    "unknown command": (["trian"], "trian"),
    "unknown flag": (["train", "--rnu", "x"], "--rnu"),
    "unknown preset to print": (["presets", "demmo"], "demo"),
    "unknown method to print": (["methods", "dilocco"], "diloco"),
    "unknown method to train": (["train", "--method", "dilocco"], "diloco"),
    "resume with a method": (["train", "--method", "diloco", "--resume", "."], "takes no recipe"),
    "unknown method to compare": (["compare", "--methods", "fedavg,dilocco"], "diloco"),
    "no methods": (["compare", "--methods", ","], "--methods names none"),
    "method twice": (["compare", "--methods", "fedavg,fedavg"], "named twice"),
    "no budget": (["compare", "--budget", "a lot"], "tokens=8M"),
    "more points than a grid has": (["compare", "--methods", "fedavg", "--tune", "99"], "at most 5"),
    "no bandwidth": (["compare", "--links", "fast"], "--links"),
    "target below nothing": (["compare", "--target-loss", "-1"], "--target-loss"),
    "compared device": (["compare", "--methods", "fedavg", "node.device=cuda:99", "--out", "o"], "cuda:99"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_and_exit_with_2(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, expected = MISTAKES[mistake]
    code, output = photon(*arguments, capsys=capsys)
    assert code == 2, output
    assert expected in output
    assert "Traceback" not in output


def test_a_refused_device_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    photon("train", "demo", "node.device=cuda:99", "--run", "r", capsys=capsys)
    assert not list(tmp_path.rglob("run.json"))
    assert not (tmp_path / "data").exists()


def test_a_run_folder_that_holds_something_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    code, output = photon("train", "demo", "--run", tmp_path, capsys=capsys)
    assert code == 2
    assert "is not empty: choose another --run; it holds no run that could be resumed" in " ".join(output.split())
    (tmp_path / "run.json").write_text("{}")
    _, output = photon("train", "demo", "--run", tmp_path, capsys=capsys)
    assert f"or go on with --resume {tmp_path}" in " ".join(output.split())
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    for place in (tmp_path / "thesis.txt", tmp_path / "thesis.txt" / "run"):
        code, output = photon("train", "demo", "--run", place, capsys=capsys)
        assert code == 2
        assert "cannot be a run's folder" in output


def test_presets_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code, output = photon("presets", capsys=capsys)
    assert code == 0
    assert all(name in output for name in ("demo", "paper-7b", "llama-125m"))
    assert "…" not in output  # nothing is cut off at the 80 columns that a file or pipe has
    code, text = photon("presets", "demo", capsys=capsys)
    assert code == 0
    assert "[[silo]]" in text


def test_methods_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code, output = photon("methods", capsys=capsys)
    assert code == 0
    assert all(name in output for name in ("per-step", "fedavg", "diloco", "2311.08105"))
    code, text = photon("methods", "diloco", capsys=capsys)
    assert code == 0
    assert tomllib.loads(text)["set"]["federation.outer"] == "nesterov"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "photon: No space left on device; make room"),
        (PermissionError(13, "Permission denied", "/runs/x"), "photon: /runs/x: Permission denied; make room"),
    ],
)
def test_a_full_or_closed_disk_is_no_traceback(
    error: OSError, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("photon.run.write_results", fail)
    code, output = photon("report", tmp_path, capsys=capsys)
    assert code == 1
    assert said in output
    error.errno = 2
    with pytest.raises(OSError, match="Errno 2"):  # one of ours to mend, with its traceback
        photon("report", tmp_path, capsys=capsys)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert photon("--version", capsys=capsys) == (0, f"{__version__}\n")


@pytest.mark.parametrize(
    ("listen", "host", "port"),
    [
        ("0.0.0.0:8443", "0.0.0.0", 8443),  # noqa: S104 - to be reached is what it is for
        ("[2001:db8::1]:8443", "2001:db8::1", 8443),
        ("hub.example.org:0", "hub.example.org", 0),
    ],
)
def test_an_address_to_listen_on_is_read_and_written(listen: str, host: str, port: int) -> None:
    assert split_address(listen) == (host, port)
    assert sites_far._address(host, port) == listen


@pytest.mark.parametrize(
    "listen", ["2001:db8::1", "::1", "[::1]", "[::1:8443", "h", ":1", "h:", "h:65536", "h:" + "9" * 9999]
)
def test_what_is_no_address_to_listen_on_is_refused(listen: str) -> None:
    """2001:db8::1 was taken for port 1 of 2001:db8:, and ten thousand digits ended in a traceback."""
    with pytest.raises(InputError, match=r"\[2001:db8::1\]:8443"):
        split_address(listen)


def test_words_of_train() -> None:
    assert split_words([]) == ("demo", [])
    assert split_words(["node.lr=1"]) == ("demo", ["node.lr=1"])
    assert split_words(["node.lr=1", "a.toml", "seed=3"]) == ("a.toml", ["node.lr=1", "seed=3"])
    with pytest.raises(InputError, match="one recipe"):
        split_words(["a", "b"])


def test_a_path_with_an_equals_sign_is_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for word in ("/data/lr=1/a.toml", "./lr=1.toml", "../seed=3"):
        assert split_words(["node.lr=1", word]) == (word, ["node.lr=1"])
    assert split_words(["lr=1/a.toml"]) == ("demo", ["lr=1/a.toml"])  # no such file: an option, which is refused
    (tmp_path / "lr=1").mkdir()
    (tmp_path / "lr=1" / "a.toml").write_text("")
    assert split_words(["lr=1/a.toml", "seed=3"]) == ("lr=1/a.toml", ["seed=3"])
    long = f"data.tokenizer_text={['text'] * 1000}"  # a file cannot have so long a name
    assert split_words([long]) == ("demo", [long])


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; import photon.cli; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
