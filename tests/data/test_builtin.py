from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from photon.data import builtin
from photon.data.builtin import AREAS, builtin_documents, builtin_files, missing_parts
from photon.errors import DataError


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library in miniature, with traps."""
    long = "A docstring that goes on, in plain English, about what the thing below does. " * 4
    files = {
        "decimal.py": f'"""{long}"""\nimport os\n\ndef f():\n    """{long}é"""\n\n'
        'def g():\n    """Short."""\n    return 1\n',
        "json/__init__.py": "x = 1\n",
        "asyncio/base.py": f"if True:\n    class A:\n        '''{long}'''; y = 'ü'\n",
        "idlelib/editor.py": "print 'python 2'\n",
        "idlelib/idle_test/test_editor.py": "import unittest\n",
        "test/test_x.py": "t = 1\n",
        "test/bad.py": "# coding: no-such\n",
        "encodings/cp1.py": "table = '\\u0100'\n",
        "html/entities.py": "e = {}\n",
        "html/parser.py": "p = 1\n",
        "latin.py": "# coding: latin-1\n# caf\xe9\n",
        "site-packages/torch/nn.py": "secret = 1\n",
        "_sysconfigdata__linux.py": "build_path = '/home/someone'\n",
        "pydoc_data/topics.py": "# generated\n"
        "topics = {'assert': 'The assert statement.', 'if': 'The if ' 'statement.'}\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="latin-1" if name == "latin.py" else "utf-8")
    monkeypatch.setattr(builtin, "stdlib", lambda: tmp_path)
    return tmp_path


def texts(area: str, root: Path) -> dict[str, str]:
    return {d.origin.removeprefix(f"{root}/"): d.text for d in builtin_documents(area)}


def test_every_file_goes_to_its_area_and_no_other(library: Path) -> None:
    names = {area: [p.relative_to(library).as_posix() for p in builtin_files(area)] for area in AREAS}
    assert names["core"] == ["decimal.py", "json/__init__.py", "latin.py"]
    assert names["net"] == ["asyncio/base.py", "html/parser.py"]
    assert names["tools"] == ["idlelib/editor.py"]
    assert names["tables"] == ["encodings/cp1.py", "html/entities.py"]
    assert names["tests"] == ["idlelib/idle_test/test_editor.py", "test/bad.py", "test/test_x.py"]


def test_docstrings_move_from_the_code_to_docs(library: Path) -> None:
    docs = texts("docs", library)
    assert docs["pydoc_data/topics.py:assert"] == "The assert statement."
    assert docs["pydoc_data/topics.py:if"] == "The if statement."
    assert sorted(name for name in docs if "topics" not in name) == [
        "asyncio/base.py:3",
        "decimal.py:1",
        "decimal.py:5",
    ]
    core = texts("core", library)["decimal.py"]
    assert core == '...\nimport os\n\ndef f():\n    ...\n\ndef g():\n    """Short."""\n    return 1\n'
    assert texts("net", library)["asyncio/base.py"] == "if True:\n    class A:\n        ...; y = 'ü'\n"


def test_declared_encodings_are_obeyed_and_broken_files_left_out(library: Path) -> None:
    assert "# café" in texts("core", library)["latin.py"]
    assert sorted(texts("tests", library)) == ["idlelib/idle_test/test_editor.py", "test/test_x.py"]
    assert texts("tools", library) == {"idlelib/editor.py": "print 'python 2'\n"}


def test_an_area_that_is_not_there_is_refused(library: Path) -> None:
    with pytest.raises(DataError, match=r"builtin:art: there is no such area; choose one of core, net, tools"):
        next(builtin_documents("art"))
    for path in builtin_files("tests"):
        path.unlink()
    with pytest.raises(DataError, match=r"builtin:tests: this Python .* carries nothing of it"):
        next(builtin_documents("tests"))


def test_missing_parts_are_told(library: Path) -> None:
    assert missing_parts("tools") == ["tkinter", "turtledemo", "unittest"]
    assert missing_parts("docs") == []


def test_this_installation_has_four_owners_worth_of_text() -> None:
    seen: dict[str, set[str]] = {}
    for area, megabytes in (("core", 2.0), ("net", 1.5), ("tools", 1.0), ("docs", 1.0)):
        found = list(builtin_documents(area))
        assert sum(len(document.text) for document in found) > megabytes * 1e6
        seen[area] = {document.text for document in found}
    assert not set.intersection(*seen.values())
    assert not seen["docs"] & (seen["core"] | seen["net"] | seen["tools"])
    a_docstring = ast.get_docstring(ast.parse(Path(builtin.stdlib(), "json", "__init__.py").read_text("utf-8")))
    assert a_docstring
    assert a_docstring + "\n" in seen["docs"]
    assert not any(a_docstring in text for text in seen["core"])
    for text in sorted(seen["core"])[:40]:
        ast.parse(text)
    assert "idlelib" not in sys.modules
