"""Where text comes from: `builtin:area`, `hf:dataset`, or files, folders and globs of the owner's own."""

from __future__ import annotations

import glob
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from photon.data import builtin, files
from photon.data.document import Document, document
from photon.errors import DataError

__all__ = ["Document", "Source", "expanded", "limited", "open_source", "read_source"]


def read_source(spec: str, field: str, max_bytes: int | None) -> Iterator[Document]:
    """The documents of a source, at most `max_bytes` of UTF-8 text; paths are relative to the working folder.

    DataError names the file and line of what cannot be read, and a source without any text.
    """
    return open_source(spec, field, Path.cwd()).documents(max_bytes, lambda note: None)


@dataclass(frozen=True)
class Source:
    """A source found but not yet read: its files are listed (none for a hub dataset), not opened."""

    spec: str
    field: str
    files: tuple[Path, ...]
    skipped: tuple[Path, ...]  # found in folders, of kinds that are not text

    def documents(self, max_bytes: int | None, note: Callable[[str], None]) -> Iterator[Document]:
        """Read it: at most `max_bytes` of UTF-8 text (the last document is cut); `note` hears what is left out."""
        count = 0
        for found in limited(self._read(note), max_bytes):
            count += 1
            yield found
        if not count:
            where = f"{self.spec}: {self.files[0]}" if self.files else self.spec
            others = f" and {len(self.files) - 1} more files" if len(self.files) > 1 else ""
            raise DataError(f"{where}{others}: no text at all (empty or blank); put text there or drop the source")

    def identity(self, root: Path) -> dict[str, Any]:
        """What makes this source the same text as last time, without reading it.

        Files: path relative to `root`, size, time of change. Built-in: the Python version and its files' sizes.
        A hub dataset is known by its name alone: its shards are reused until their folder is deleted.
        """
        known: dict[str, Any] = {"spec": self.spec, "field": self.field}
        if self.spec.startswith("builtin:"):
            base = builtin.stdlib()
            sizes = [(path.relative_to(base).as_posix(), path.stat().st_size) for path in self.files]
            return known | {"python": platform.python_version(), "files": sizes}
        entries = []
        for path in self.files:
            status = path.stat()
            entries.append((Path(os.path.relpath(path, root)).as_posix(), status.st_size, status.st_mtime_ns))
        return known | {"files": entries}

    @property
    def text_bytes(self) -> int | None:
        """Bytes of text to expect, None where only reading can tell (records, compression, hub datasets)."""
        if not self.files or self.spec == "builtin:docs":
            return None
        if any(path.suffix.lower() in files.COMPRESSED or files.kind(path) in files.RECORDS for path in self.files):
            return None
        return sum(path.stat().st_size for path in self.files)

    def _read(self, note: Callable[[str], None]) -> Iterator[Document]:
        if self.spec.startswith("builtin:"):
            area = self.spec.removeprefix("builtin:")
            if missing := builtin.missing_parts(area):
                note(f"{self.spec}: this Python comes without {', '.join(missing)}; read without it")
            yield from builtin.builtin_documents(area)
        elif self.spec.startswith("hf:"):
            yield from _hub_documents(self.spec, self.field)
        else:
            yield from self._read_files(note)

    def _read_files(self, note: Callable[[str], None]) -> Iterator[Document]:
        if self.skipped:
            note(f"{self.spec}: {len(self.skipped)} files of other kinds than text left out, first {self.skipped[0]}")
        empty = []
        for path in self.files:
            count = 0
            for found in files.read_file(path, self.field):
                count += 1
                yield found
            if not count:
                empty.append(path)
        if empty:
            note(f"{self.spec}: {len(empty)} files without text left out, first {empty[0]}")


def open_source(spec: str, field: str, root: Path) -> Source:
    """Find what `spec` names, relative to `root`; DataError if it names nothing."""
    if spec.startswith("builtin:"):
        return Source(spec, field, tuple(builtin.builtin_files(spec.removeprefix("builtin:"))), ())
    if spec.startswith("hf:"):
        _hub_name(spec)
        return Source(spec, field, (), ())
    if not spec.strip():
        raise DataError("a source without a name; name a folder, a file or a pattern (. is the working folder)")
    try:
        found, skipped = _find(spec, root)
        for path in found:
            path.stat()  # a link to nothing shows itself here
    except OSError as error:
        raise DataError(f"{error.filename or spec}: cannot be read ({error.strerror}); mend or remove it") from error
    if not found:
        kinds = f" ({len(skipped)} files of other kinds than text)" if skipped else ""
        raise DataError(f"{spec}: no text files match{kinds}; looked for {root / expanded(spec)}")
    return Source(spec, field, tuple(found), tuple(skipped))


def expanded(path: str) -> Path:
    """`path` with `~` and `~user` replaced by their homes; DataError if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = path.partition("/")[0]
        raise DataError(
            f"{path}: {user} is no user's home here; write ~/{path[1:]} for your own, ./{path} for this folder"
        ) from error


def _find(spec: str, root: Path) -> tuple[list[Path], list[Path]]:
    """The files that `spec` names, and those that it passes over; raises OSError for a folder that cannot be listed."""
    path, pattern = root / expanded(spec), str(expanded(spec))
    names = glob.glob(pattern, root_dir=root, recursive=True)  # noqa: PTH207  # Path.glob refuses absolute patterns
    matches = [path] if path.exists() else [root / name for name in sorted(names)]
    found: list[Path] = []
    skipped: list[Path] = []
    for match in matches:
        if not match.is_dir():
            found.append(match)
        elif "**" not in spec:  # which lists the files of the folders it meets by itself
            for inside in _walk(match):
                known = files.kind(inside) in files.RECORDS or files.kind(inside) in files.TEXT.split()
                # Of a pipe that nobody writes into, the first byte would be waited for without an end.
                (found if known and not inside.is_fifo() else skipped).append(inside)
    return found, skipped


def _walk(folder: Path) -> list[Path]:
    """The files under a folder, sorted; hidden files and folders are left out, links to folders not followed."""

    def refuse(error: OSError) -> None:
        raise error  # os.walk would leave out what it cannot list

    found = []
    for where, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(where, name) for name in names if not name.startswith(".")]
    return sorted(found)


def limited(documents: Iterator[Document], max_bytes: int | None) -> Iterator[Document]:
    """The first `max_bytes` bytes of text; the last document is cut at a character."""
    if max_bytes is None:
        yield from documents
        return
    left = max_bytes
    for found in documents:
        data = found.text.encode()
        if len(data) < left:
            left -= len(data)
            yield found
            continue
        text = data[:left].decode(errors="ignore")
        if text.strip():
            yield Document(text, found.origin)
        return


def _hub_name(spec: str) -> tuple[str, str | None, str]:
    """Dataset, config and split of `hf:name`, `hf:org/name` or `hf:org/name/config`, each with an optional `:split`.

    Two parts are always organisation and name; every dataset of the hub has its organisation's name.
    """
    name, _, split = spec.removeprefix("hf:").partition(":")
    parts = name.split("/", 2)
    if not all(parts):
        raise DataError(f"{spec}: expected hf:org/name[/config][:split]")
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split or "train"


def _hub_documents(spec: str, field: str) -> Iterator[Document]:
    """Rows of a hub dataset: streamed when online, from the local cache when the hub is declared offline."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{spec}: hub datasets need the `datasets` library: pip install 'photon-federated[data]'"
        ) from error
    name, config, split = _hub_name(spec)
    streaming = not datasets.config.HF_HUB_OFFLINE
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=streaming)
        for number, row in enumerate(rows, start=1):
            where = f"{spec}: row {number}"
            if field not in row:
                raise files.missing_field(where, field, list(row))
            yield document(row[field], where)
    except (OSError, ValueError, RuntimeError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        how = "a config is written hf:org/name/config" if streaming else "the hub is declared offline (HF_HUB_OFFLINE)"
        raise DataError(f"{spec}: the dataset cannot be read ({why}); {how}") from error
