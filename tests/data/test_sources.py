from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from photon.data.document import Document
from photon.data.sources import Source, limited, open_source, read_source
from photon.errors import DataError


def texts(spec: Path | str, field: str = "text", max_bytes: int | None = None) -> list[str]:
    return [document.text for document in read_source(str(spec), field, max_bytes)]


def notes(spec: Path | str) -> list[str]:
    heard: list[str] = []
    list(open_source(str(spec), "text", Path.cwd()).documents(None, heard.append))
    return heard


def test_folders_globs_and_single_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/two.md", "a.txt", "b/c/three.py", "picture.png", ".hidden/x.txt", "b/.secret.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a.txt", "b/c/three.py", "b/two.md"]
    assert texts(f"{tmp_path}/**/*.md") == ["b/two.md"]
    assert texts(f"{tmp_path}/*") == ["a.txt", "b/c/three.py", "b/two.md", "picture.png"]
    assert texts(tmp_path / "picture.png") == ["picture.png"], "named by itself, a file is text whatever its suffix"
    assert notes(tmp_path) == [f"{tmp_path}: 1 files of other kinds than text left out, first {tmp_path}/picture.png"]
    monkeypatch.chdir(tmp_path)
    assert texts("b") == texts("b/**") == ["b/c/three.py", "b/two.md"]


def test_a_folder_whose_name_looks_like_a_glob(tmp_path: Path) -> None:
    folder = tmp_path / "run [1]"
    folder.mkdir()
    (folder / "a.txt").write_text("inside")
    assert [d.text for d in open_source("*.txt", "text", folder).documents(None, lambda note: None)] == ["inside"]
    assert texts(folder) == ["inside"]


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_a_source_without_text_names_its_first_file(tmp_path: Path, content: str) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=r"a\.txt and 1 more files: no text at all \(empty or blank\)"):
        texts(tmp_path)
    with pytest.raises(DataError, match=r"b\.txt: no text at all"):
        texts(tmp_path / "b.txt")


def test_empty_files_among_others_are_left_out_with_a_word(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("")
    assert texts(tmp_path) == ["text"]
    assert notes(tmp_path) == [f"{tmp_path}: 1 files without text left out, first {tmp_path}/b.txt"]


def test_a_pipe_in_a_folder_is_left_out_with_a_word(tmp_path: Path) -> None:
    """Nobody writes into it, and to read it would be to wait for ever."""
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("text")
    source, notes = open_source(".", "text", tmp_path), list[str]()
    assert source.files == (tmp_path / "b.txt",)
    assert [found.text for found in source.documents(None, notes.append)] == ["text"]
    assert "1 files of other kinds than text left out" in notes[0]


def test_nothing_found_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"absent/\*\.txt: no text files match; looked for {tmp_path}/absent"):
        open_source("absent/*.txt", "text", tmp_path)
    (tmp_path / "x.png").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"\(1 files of other kinds than text\)"):
        open_source(".", "text", tmp_path)


def test_what_cannot_be_listed_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "sub").mkdir()
    list_folder = os.scandir

    def closed(path: Any) -> Any:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return list_folder(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", closed)
        with pytest.raises(DataError, match=r"/sub: cannot be read \(Permission denied\)"):
            open_source(".", "text", tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read \(No such file or directory\)"):
        open_source(".", "text", tmp_path)


def test_names_that_no_file_can_have_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for spec, complaint in (
        ("", "a source without a name"),
        (" ", "a source without a name"),
        ("Once upon a time " * 20, r"cannot be read \(File name too long\)"),
        ("~no-such-user/text", r"~no-such-user is no user's home here; write ~/no-such-user/text for your own"),
    ):
        with pytest.raises(DataError, match=complaint):
            open_source(spec, "text", tmp_path)


@given(parts=st.lists(st.text("aé🙂", min_size=1, max_size=20), max_size=8), limit=st.integers(1, 60))
def test_a_limit_cuts_at_a_character(parts: list[str], limit: int) -> None:
    cut = "".join(d.text for d in limited((Document(part, "x") for part in parts), limit))
    assert cut == "".join(parts).encode()[:limit].decode(errors="ignore")


def test_the_limit_holds_over_files(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 10)
    assert texts(tmp_path, max_bytes=25) == ["a" * 10, "b" * 10, "c" * 5]
    assert texts(tmp_path, max_bytes=20) == ["a" * 10, "b" * 10]


def test_identity_changes_with_the_text_and_not_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")

    def identity() -> dict[str, Any]:
        return open_source("*.txt", "text", tmp_path).identity(tmp_path)

    before = identity()
    assert before == identity()
    assert str(tmp_path) not in json.dumps(before)
    (tmp_path / "a.txt").write_text("texts")
    changed = identity()
    (tmp_path / "b.txt").write_text("more")
    assert len({json.dumps(i) for i in (before, changed, identity())}) == 3


def test_expected_bytes_are_known_for_plain_files_only(tmp_path: Path) -> None:
    def expected(name: str) -> int | None:
        (tmp_path / name).write_bytes(b"12345")
        return open_source(name, "text", tmp_path).text_bytes

    assert expected("a.txt") == 5
    assert [expected(name) for name in ("a.txt.gz", "a.jsonl", "a.parquet")] == [None] * 3
    assert open_source("hf:org/name", "text", tmp_path).text_bytes is None
    assert isinstance(open_source("builtin:core", "text", tmp_path), Source)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A stand-in for the `datasets` library that notes how it is called."""
    called: dict[str, Any] = {}
    fake = types.SimpleNamespace(
        config=types.SimpleNamespace(HF_HUB_OFFLINE=False), rows=[{"text": "row"}], called=called
    )

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        called.update(name=name, config=config, split=split, streaming=streaming)
        if isinstance(fake.rows, Exception):
            raise fake.rows
        return iter(fake.rows)

    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


@pytest.mark.parametrize(
    ("spec", "name", "config", "split"),
    [
        ("hf:wikitext", "wikitext", None, "train"),
        ("hf:allenai/c4", "allenai/c4", None, "train"),
        ("hf:allenai/c4/en", "allenai/c4", "en", "train"),
        ("hf:allenai/c4/en:validation", "allenai/c4", "en", "validation"),
        ("hf:org/name:train[:10%]", "org/name", None, "train[:10%]"),
    ],
)
def test_hub_specs(hub: types.SimpleNamespace, spec: str, name: str, config: str | None, split: str) -> None:
    assert texts(spec) == ["row"]
    assert hub.called == {"name": name, "config": config, "split": split, "streaming": True}


def test_a_hub_declared_offline_is_read_from_the_cache(hub: types.SimpleNamespace) -> None:
    hub.config.HF_HUB_OFFLINE = True
    assert texts("hf:org/name") == ["row"]
    assert hub.called["streaming"] is False


def test_hub_complaints(hub: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="expected hf:org/name"):
        open_source("hf:org//x", "text", Path())
    hub.rows = [{"text": "fine"}, {"body": "x"}]
    with pytest.raises(DataError, match=r"hf:org/name: row 2: no field 'text'; fields here: 'body'"):
        texts("hf:org/name")
    hub.rows = ConnectionError("no route to the hub\nand much more")
    with pytest.raises(DataError, match=r"hf:org/name: the dataset cannot be read \(no route to the hub\)"):
        texts("hf:org/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"photon-federated\[data\]"):
        texts("hf:org/name")
