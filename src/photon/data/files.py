"""Text files of every kind: plain text, JSON lines and parquet, each also compressed with gzip, zstd or xz."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from photon.data.document import Document, document
from photon.errors import DataError

COMPRESSED = (".gz", ".zst", ".xz")
RECORDS = (".jsonl", ".ndjson", ".parquet")
# What a folder is searched for; a file named by itself or by a glob is read as text whatever its suffix.
TEXT = (
    ".txt .text .md .markdown .rst .adoc .org .tex .bib .html .htm .xml .csv .tsv .json .yaml .yml .toml .ini .cfg "
    ".py .pyi .c .h .cc .cpp .hpp .cu .java .js .jsx .ts .tsx .go .rs .rb .php .sh .sql .r .jl .lua .scala .kt .swift "
    ".pl .hs .ml .el .lisp .cs .log"
)
PIECE_BYTES = 1 << 20
_WINDOW_BYTES = 1 << 31  # the widest that zstd --long writes; the library alone refuses those above 128 MiB


def kind(path: Path) -> str:
    """The suffix that says how to read a file, without that of its compression: `.jsonl` of `a.jsonl.gz`."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def read_file(path: Path, field: str) -> Iterator[Document]:
    """The documents of one file; `field` holds the text of .jsonl and .parquet records.

    A text file is one document, or one per `PIECE_BYTES` (cut after a line) when it is larger. Text is UTF-8 (a
    byte-order mark is dropped). Empty and blank texts are left out. DataError names the file and the line or row.
    """
    readers = {".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": _parquet}
    reader = readers.get(kind(path))
    try:
        with _opened(path) as file:
            documents = reader(path, file, field) if reader else _text(path, file)
            yield from (found for found in documents if found.text.strip())
    except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged or cut-off {path.suffix} file ({error}); copy it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        with gzip.open(path) as file:
            yield cast("IO[bytes]", file)
    elif suffix == ".xz":
        with lzma.open(path) as file:
            yield file
    elif suffix == ".zst":
        with path.open("rb") as raw, io.BufferedReader(_Zstandard(raw), PIECE_BYTES) as file:
            yield file
    else:
        with path.open("rb") as file:
            yield file


class _Zstandard(io.RawIOBase):
    """Decompressed bytes of one or more zstd frames; unlike the library's reader it notices a cut-off file."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with what is ready, at least one byte before the end; EOFError inside a frame."""
        while not self._ready:
            data = self._raw.read(1 << 17)
            if not data and self._frame is not None:
                raise EOFError("it ends inside a compressed frame")
            if not data:
                return 0
            self._ready = memoryview(self._decompress(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, data: bytes) -> bytes:
        out = b""
        while data:
            frame = self._frame or zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).decompressobj()
            out += frame.decompress(data)
            self._frame, data = (None, frame.unused_data) if frame.eof else (frame, b"")
        return out


def _text(path: Path, file: IO[bytes]) -> Iterator[Document]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    while True:
        piece = file.read(PIECE_BYTES)
        last = len(piece) < PIECE_BYTES
        if not last:
            piece += file.readline(PIECE_BYTES)  # bounded: some files never end their line
        try:
            text = decoder.decode(piece, final=last)
        except UnicodeDecodeError as error:
            raise _not_text(path, error, line) from error
        if "\0" in text:
            raise DataError(f"{path}: line {line + text[: text.index(chr(0))].count(chr(10))}: a NUL byte: {_BINARY}")
        if text:
            yield Document(text, str(path) if line == 1 else f"{path}:{line}")
        if last:
            return
        line += text.count("\n")


_BINARY = "this is a binary file, not text; leave it out of the silo"


def _not_text(path: Path, error: UnicodeDecodeError, line: int) -> DataError:
    """Why bytes are not UTF-8, at which line, and what to do."""
    data, start = bytes(error.object), error.start
    line += data[:start].count(b"\n")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return DataError(f"{path}: line 1: the text is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 (or save as UTF-8)")
    if b"\0" in data:
        return DataError(f"{path}: line {line}: {_BINARY}")
    return DataError(
        f"{path}: line {line}: byte 0x{data[start]:02x} is not UTF-8; convert the file, "
        "for example: iconv -f ISO-8859-1 -t UTF-8"
    )


def _json_lines(path: Path, file: IO[bytes], field: str) -> Iterator[Document]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            record: Any = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise _not_text(path, error, number) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not a JSON record ({error})") from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: a JSON {type(record).__name__} instead of a record with field {field!r}")
        if field not in record:
            raise missing_field(where, field, list(record))
        yield document(record[field], where)


def missing_field(where: str, field: str, present: list[str]) -> DataError:
    """The complaint about a record without the silo's text field."""
    names = ", ".join(repr(name) for name in present[:8]) or "none"
    return DataError(f"{where}: no field {field!r}; fields here: {names}. Name one: the silo's `field`, or --field")


def _parquet(path: Path, file: IO[bytes], field: str) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path}: .parquet needs pyarrow: pip install 'photon-federated[data]'") from error
    with tempfile.TemporaryFile() as seekable:
        if path.suffix.lower() in COMPRESSED:  # parquet is read from its end
            shutil.copyfileobj(file, seekable)
        try:
            table = pq.ParquetFile(seekable if path.suffix.lower() in COMPRESSED else file)
            if field not in table.schema_arrow.names:
                raise missing_field(str(path), field, list(table.schema_arrow.names))
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    yield document(_plain(value, f"{path}: row {row}"), f"{path}: row {row}")
        except pa.ArrowException as error:
            raise DataError(f"{path}: not a readable parquet file ({error})") from error


def _plain(value: Any, where: str) -> object:
    """A parquet value as Python's own; files may hold strings that are none, and nothing has checked them yet."""
    try:
        plain: object = value.as_py()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte 0x{error.object[error.start]:02x} is not UTF-8; write the file anew") from error
    return plain
