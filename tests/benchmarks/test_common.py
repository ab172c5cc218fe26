"""A row says when what it measured, or what measured it, is not what the commit has."""

from __future__ import annotations

import subprocess
from pathlib import Path
from unittest import mock

from benchmarks import common


def test_changed_code_is_told_and_written_results_are_not(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a", *arguments], check=True)

    git("init", "--quiet")
    for name in ("src/a.py", "benchmarks/b.py", "benchmarks/results/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    git("add", ".")
    git("commit", "--quiet", "-m", "a")

    def told() -> str:
        with mock.patch.object(common, "ROOT", tmp_path):
            return str(common.revision()["commit"]).partition(" ")[2]

    assert told() == ""
    (tmp_path / "benchmarks/results/c.jsonl").write_text("2\n")
    assert told() == ""
    (tmp_path / "benchmarks/b.py").write_text("2\n")
    assert told() == "with changes in benchmarks"
    (tmp_path / "src/new.py").write_text("2\n")
    assert told() == "with changes in src and benchmarks"
