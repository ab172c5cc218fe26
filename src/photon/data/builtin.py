"""Corpora that need nothing: the text every Python installation carries, cut into different owners' silos.

Areas share no text: source code comes without the docstrings that `docs` holds. What an installation lacks (many
Linux packages leave out idlelib and the tests) is read around; `missing_parts` says so. Nothing is imported or run.
"""

from __future__ import annotations

import ast
import os
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from photon.data.document import Document
from photon.errors import DataError

AREAS = {
    "core": "source of the language's own modules: collections, datetime, decimal, json, ...",
    "net": "source of asyncio, email, http, logging, urllib, xml, ...",
    "tools": "source of idlelib, tkinter, unittest, pdb, typing, ...",
    "docs": "English: the language reference, and docstrings longer than 200 characters",
    "tables": "data: character encodings, entities, locales",
    "tests": "source of Python's own tests",
}

_DOCSTRING_CHARACTERS = 200
_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "lib-dynload", "pydoc_data"}
_TESTS = {"test", "tests", "idle_test"}
_NET = (
    "asyncio http email urllib xml html ssl ftplib logging socket socketserver smtplib smtpd poplib imaplib nntplib "
    "telnetlib xmlrpc wsgiref cgi cgitb mailbox mailcap mimetypes netrc selectors asyncore asynchat uuid base64 quopri "
    "uu binhex webbrowser ipaddress nturl2path"
)
_TOOLS = (
    "idlelib tkinter turtle turtledemo distutils lib2to3 unittest doctest pdb bdb ast inspect typing pydoc dis opcode "
    "trace traceback tracemalloc profile cProfile pstats timeit ensurepip venv zipapp compileall py_compile pyclbr "
    "symtable tabnanny tokenize token argparse optparse getopt cmd code codeop rlcompleter modulefinder pkgutil runpy "
    "linecache site sysconfig _pyrepl"
)
_TABLES = ("encodings/", "html/entities.py", "stringprep.py", "locale.py")
# What a complete installation of every version has; lib2to3 and distutils are gone since 3.13 and 3.12.
_EXPECTED = {
    "core": ("collections", "json"),
    "net": ("asyncio", "email"),
    "tools": ("idlelib", "tkinter", "turtledemo", "unittest"),
    "docs": ("pydoc_data",),
    "tables": ("encodings",),
    "tests": ("test",),
}


def builtin_documents(area: str) -> Iterator[Document]:
    """The documents of `area`: a file each, a topic of the reference each, or a docstring each, in a fixed order.

    DataError for an unknown area, or one of which this installation has nothing.
    """
    files = builtin_files(area)
    if not files:
        raise DataError(f"builtin:{area}: this Python ({sys.prefix}) carries nothing of it; choose another area")
    for path in files:
        if area == "docs":
            yield from _prose(path)
            continue
        text = _source(path)
        if text is not None and area in ("core", "net", "tools"):
            text = _without_docstrings(text)
        if text:
            yield Document(text, str(path))


def builtin_files(area: str) -> list[Path]:
    """The files that `area` is read from, sorted; the docstrings of `docs` come from those of core, net and tools."""
    if area not in AREAS:
        raise DataError(f"builtin:{area}: there is no such area; choose one of {', '.join(AREAS)}")
    root = stdlib()
    if area == "docs":
        topics = root / "pydoc_data" / "topics.py"
        sources = [path for code in ("core", "net", "tools") for path in builtin_files(code)]
        return [topics, *sources] if topics.is_file() else sources
    return [path for path in _modules(root) if _area(path.relative_to(root)) == area]


def missing_parts(area: str) -> list[str]:
    """Packages of `area` that a complete installation has and this one lacks."""
    return [name for name in _EXPECTED[area] if not (stdlib() / name).is_dir()]


def stdlib() -> Path:
    """The folder of the standard library's source."""
    return Path(sysconfig.get_path("stdlib"))


def _modules(root: Path) -> list[Path]:
    """Every .py file of the standard library, sorted; folders of installed packages are not even entered."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _area(path: Path) -> str | None:
    """The area of a standard-library file, None for what belongs to no area."""
    parts = path.parts
    # _sysconfigdata holds the paths of the machine that built Python; config-* are its build files.
    if parts[0].startswith(("_sysconfigdata", "config-")):
        return None
    if _TESTS.intersection(parts[:-1]):
        return "tests"
    if path.as_posix().startswith(_TABLES):
        return "tables"
    module = path.stem if len(parts) == 1 else parts[0]
    return "net" if module in _NET.split() else "tools" if module in _TOOLS.split() else "core"


def _source(path: Path) -> str | None:
    """The text of a source file in its declared encoding; None for the deliberately broken ones among the tests."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
    except (SyntaxError, UnicodeDecodeError):
        return None
    return None if "\0" in text else text


def _prose(path: Path) -> Iterator[Document]:
    text = _source(path)
    if text is None:
        return
    if path.parent.name == "pydoc_data":
        for topic, prose in _topics(text, path).items():
            yield Document(prose, f"{path}:{topic}")
        return
    for statement, docstring in _docstrings(text):
        yield Document(docstring + "\n", f"{path}:{statement.lineno}")


def _topics(text: str, path: Path) -> dict[str, str]:
    """The topics of the language reference: the one dictionary literal in pydoc_data/topics.py."""
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            return {str(k): str(v) for k, v in ast.literal_eval(statement.value).items()}
    raise DataError(f"{path}: the table of topics is not where pydoc keeps it; leave out builtin:docs")


def _docstrings(text: str) -> list[tuple[ast.stmt, str]]:
    """The long docstrings of a source file and the statements that hold them; none if it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's source
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            return []
    found = []
    blocks: list[ast.AST] = [tree]
    while blocks:
        node = blocks.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) > _DOCSTRING_CHARACTERS:
                found.append((node.body[0], docstring))
        # Statements only: walking into every expression as ast.walk does takes five times as long.
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            inner = getattr(node, name, None)
            blocks.extend(inner if isinstance(inner, list) else [])
    return sorted(found, key=lambda item: item[0].lineno)


def _without_docstrings(text: str) -> str:
    """The source with `...` for each docstring that `docs` holds: still valid Python."""
    lines = text.encode().split(b"\n")  # ast counts columns in UTF-8 bytes
    for statement, _ in reversed(_docstrings(text)):
        first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
        before, after = lines[first][: statement.col_offset], lines[last][statement.end_col_offset :]
        lines[first : last + 1] = [before + b"..." + after]
    return b"\n".join(lines).decode()
