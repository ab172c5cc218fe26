"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # ships no types

from photon.errors import DataError


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `folder`; when the block ends well, sync it to disk and rename it to `folder`.

    If the block raises, nothing is left. If the process dies, a hidden leftover stays that nobody reads; the next
    build beside it removes it. If another process finished the same folder first, that one is kept: folders are
    named by their content.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        temporary = folder.parent / f".{folder.name}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        temporary.mkdir()
    except OSError as error:
        raise DataError(f"{folder}: cannot be created ({error.strerror}); choose another data.dir") from error
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        _sync(folder.parent)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _host() -> str:
    return "".join(c for c in socket.gethostname() if c.isalnum() or c == "-") or "host"


def _remove_leftovers(parent: Path) -> None:
    """Remove what builds of this host left that were killed; a living process and other hosts keep theirs."""
    for path in parent.glob(f".*.{_host()}.*.tmp"):
        pid = path.name.split(".")[-3]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have the bytes of a file, or the names in a folder, on disk (folders: where the OS has such a call)."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
