"""`photon keys`: what a person types, reads and gets."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from photon import keys
from photon.cli_keys import keys_app
from photon.errors import InputError
from photon.identity import bundle_identity

COMMANDS = ("init", "node", "aggregator", "operator", "revoke", "list")


def run(*words: str | Path) -> str:
    """What the command says; its errors are raised."""
    result = CliRunner().invoke(keys_app, [str(word) for word in words], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    assert f"photon keys {command}" in run(command, "--help").split("Example", 1)[1]


def test_the_commands_are_these() -> None:
    group = typer.main.get_command(keys_app)
    assert {name: [p.opts[0] for p in one.params if p.name != "help"] for name, one in group.commands.items()} == {
        "init": ["folder", "--host", "--days"],
        "node": ["name", "folder", "--out", "--days"],
        "aggregator": ["folder", "--host", "--days"],
        "operator": ["folder", "--out"],
        "revoke": ["name", "folder"],
        "list": ["folder"],
    }


def test_help_needs_no_cryptography() -> None:
    """Each start of `photon` would wait for it."""
    code = "import sys, photon.cli_keys; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_from_an_empty_disk_to_a_node_that_was_let_in_again(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    said = run("init", folder, "--host", "photon.example.org", "--host", "203.0.113.7", "--days", "100")
    assert "photon.example.org, 203.0.113.7" in said and f"photon keys node NAME {folder}" in said
    said = run("node", "hospital", folder, "--out", tmp_path / "h.key", "--days", "90")
    assert str(tmp_path / "h.key") in said
    first = bundle_identity(tmp_path / "h.key")
    assert first.name == "hospital"
    assert first.serial in run("revoke", "hospital", folder)
    assert "refused already" in run("revoke", "hospital", folder)
    run("node", "hospital", folder, "--out", tmp_path / "h.key")
    second = bundle_identity(tmp_path / "h.key")
    rows = [line.split("│")[1:-1] for line in run("list", folder).splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert [row[:2] for row in cells] == [
        ["aggregator", "aggregator"],
        ["operator", "operator"],
        ["hospital", "node"],
        ["hospital", "node"],
    ]
    assert [row[3:] for row in cells[2:]] == [["yes", first.serial], ["no", second.serial]]
    ends = [one.not_after for one in keys.issued(folder)]
    assert [row[2] for row in cells] == [f"{end:%Y-%m-%d}" for end in ends]
    assert abs(ends[0] - ends[2] - timedelta(days=10)) < timedelta(minutes=1)  # not `.days`: seconds pass in between


def test_a_folder_of_keys_is_named_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "keys[/x]"
    run("init", folder)
    assert "keys[/x]" in run("list", folder)


def test_the_default_hosts_are_said_to_be_local(tmp_path: Path) -> None:
    said = run("init", tmp_path / "keys")
    assert "localhost, 127.0.0.1" in said and "need --host" in said
    assert "need --host" not in run("init", tmp_path / "more", "--host", "a.org")


def test_renewing_the_aggregator_and_another_operator(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    run("init", folder, "--host", "a.org")
    run("node", "hospital", folder)
    hospital = (folder / "hospital.key").read_bytes()
    said = run("aggregator", folder)
    assert "for a.org, until" in said and "--resume" in said and "new authority" in said
    said = run("aggregator", folder, "--host", "b.org", "--host", "10.0.0.1", "--days", "30")
    assert f"for b.org, 10.0.0.1, until {keys.issued(folder)[-1].not_after:%Y-%m-%d}" in said
    assert (folder / "hospital.key").read_bytes() == hospital
    assert str(tmp_path / "o.key") in run("operator", folder, "--out", tmp_path / "o.key")
    assert bundle_identity(tmp_path / "o.key").role == "operator"
    assert f"photon keys operator {folder}" in run("revoke", "operator", folder)
    assert "until" in run("operator", folder)
    assert [one.revoked for one in keys.issued(folder) if one.role == "operator"] == [True, True, False]


def test_no_command_prints_a_key(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    said = run("init", folder) + run("node", "a", folder) + run("list", folder) + run("revoke", "a", folder)
    said += run("aggregator", folder) + run("operator", folder, "--out", folder / "second.key")
    secrets = [
        line
        for path in folder.iterdir()
        for line in path.read_text().split("END PRIVATE KEY")[0].splitlines()[1:-1]
        if path.suffix in (".key", ".pem")
    ]
    assert len(secrets) >= 10
    assert not any(secret in said for secret in secrets)


@pytest.mark.parametrize(
    "words",
    [
        ["init", "DIR"],
        ["node", "a", "DIR"],
        ["node", "a/b", "DIR"],
        ["node", "b", "DIR", "--days", "0"],
        ["revoke", "b", "DIR"],
        ["aggregator", "DIR", "--host", "a.org:8443"],
        ["aggregator", "DIR", "--days", "100000"],
        ["operator", "DIR"],
    ],
)
def test_a_mistake_is_one_clear_sentence_with_exit_code_2(words: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    run("init", folder)
    run("node", "a", folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError) as caught:
        run(*[str(folder) if word == "DIR" else word for word in words])
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
