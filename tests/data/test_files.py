from __future__ import annotations

import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from photon.data import files
from photon.data.files import read_file
from photon.errors import DataError

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}
TEXT = "First line, naïve.\nSecond line 日本.\n"


def texts(path: Path, field: str = "text") -> list[str]:
    return [document.text for document in read_file(path, field)]


def parquet_bytes(rows: list[Any], field: str = "text") -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": list(range(len(rows))), field: rows}), sink)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("packed", PACKERS)
def test_every_format_reads_the_same_text_compressed_or_not(tmp_path: Path, packed: str) -> None:
    records = "\n".join(json.dumps({"text": t, "id": i}) for i, t in enumerate([TEXT, "two", "", "three"])) + "\n\n"
    for name, data, expected in (
        ("plain.txt", TEXT.encode(), [TEXT]),
        ("notes.md", b"\xef\xbb\xbf# Title\n", ["# Title\n"]),
        ("records.jsonl", records.encode(), [TEXT, "two", "three"]),
        ("rows.parquet", parquet_bytes([TEXT, "two", "", "three"]), [TEXT, "two", "three"]),
    ):
        path = tmp_path / (name + packed)
        path.write_bytes(PACKERS[packed](data))
        assert texts(path) == expected, path.name


@pytest.mark.parametrize("packed", [".gz", ".xz", ".zst"])
def test_concatenated_and_cut_off_compressed_files(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(PACKERS[packed](b"one ") + PACKERS[packed](b"two"))
    assert texts(path) == ["one two"]
    path.write_bytes(PACKERS[packed](TEXT.encode() * 50)[:-9])
    with pytest.raises(DataError, match=rf"a\.txt\{packed}: damaged or cut-off"):
        texts(path)
    path.write_bytes(b"this is not compressed at all")
    with pytest.raises(DataError, match=rf"a\.txt\{packed}: damaged"):
        texts(path)


def test_large_files_are_cut_after_a_line_and_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", 50)
    path = tmp_path / "a.txt"
    lines = [f"line {i} é\n" for i in range(40)]
    path.write_text("".join(lines))
    documents = list(read_file(path, "text"))
    assert "".join(d.text for d in documents) == "".join(lines)
    assert len(documents) > 5
    assert all(d.text.endswith("\n") for d in documents)
    numbers = [int(d.origin.rpartition(":")[2]) for d in documents[1:]]
    assert [lines[n - 1] for n in numbers] == [d.text.splitlines(keepends=True)[0] for d in documents[1:]]
    path.write_text("é" * 200)  # no line ever ends, and pieces end inside a character
    assert "".join(texts(path)) == "é" * 200
    path.write_bytes(b"fine\n" * 30 + b"caf\xe9\n")
    with pytest.raises(DataError, match=r"a\.txt: line 31: byte 0xe9 is not UTF-8"):
        texts(path)


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("latin.txt", b"one\ntwo caf\xe9\n", r"latin\.txt: line 2: byte 0xe9 is not UTF-8; convert.*iconv"),
        ("wide.txt", "text".encode("utf-16"), r"wide\.txt: line 1: the text is UTF-16"),
        ("binary.txt", b"a\nb\0c", r"binary\.txt: line 2: a NUL byte: this is a binary file"),
        ("image.txt", b"\x89PNG\r\n\x1a\n\0\0", r"image\.txt: line 1: this is a binary file"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "y", "id": 1}\n', r"a\.jsonl: line 3: no field 'text'.*'body', 'id'"),
        ("b.jsonl", b'{"text": "x"}\n{"text": \n', r"b\.jsonl: line 2: not a JSON record"),
        ("c.jsonl", b'["text"]\n', r"c\.jsonl: line 1: a JSON list instead of a record"),
        ("d.jsonl", b'{"text": 5}\n', r"d\.jsonl: line 1: the text is of type int, not a string"),
        ("e.jsonl", b'{"text": null}\n', r"e\.jsonl: line 1: the text is null"),
        ("f.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"f\.jsonl: line 2: byte 0xff is not UTF-8"),
        ("g.jsonl", b'{"text": "\\ud800"}\n', r"g\.jsonl: line 1: character 1 is half of a surrogate pair"),
        ("h.jsonl", b"[" * 100_000, r"h\.jsonl: line 1: not a JSON record"),
        ("a.parquet", b"PAR1 but not really", r"a\.parquet: not a readable parquet file"),
        ("b.parquet", parquet_bytes(["x"], "body"), r"b\.parquet: no field 'text'; fields here: 'id', 'body'"),
        ("c.parquet", parquet_bytes(["x", None]), r"c\.parquet: row 2: the text is null"),
        ("d.parquet", parquet_bytes([1, 2]), r"d\.parquet: row 1: the text is of type int"),
    ],
)
def test_bad_input_names_file_and_line(tmp_path: Path, name: str, data: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=complaint):
        texts(tmp_path / name)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(["x"]))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"a\.parquet needs|photon-federated\[data\]"):
        texts(tmp_path / "a.parquet")


def test_a_zstd_file_with_a_wide_window_is_read(tmp_path: Path) -> None:
    """As `zstd --long=31` writes it: large archives of text are often packed so."""
    for window in (28, 31):
        wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=window)
        packer = zstandard.ZstdCompressor(compression_params=wide).compressobj()
        (tmp_path / "a.txt.zst").write_bytes(packer.compress(TEXT.encode()) + packer.flush())
        assert texts(tmp_path / "a.txt.zst") == [TEXT]


def test_parquet_strings_that_are_not_utf8_are_refused_by_row(tmp_path: Path) -> None:
    whole = pa.array(["one", "two"])
    torn = pa.Array.from_buffers(pa.string(), 2, [None, whole.buffers()[1], pa.py_buffer(b"onet\xffo")])
    pq.write_table(pa.table({"text": torn}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: row 2: byte 0xff is not UTF-8"):
        texts(tmp_path / "a.parquet")
