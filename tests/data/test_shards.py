from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from photon.data.document import Document
from photon.data.shards import Manifest, Origin, ShardReader, write_shards
from photon.data.tokenizer import Tokenizer
from photon.errors import DataError

Make = Callable[..., ShardReader]
MakeOrigin = Callable[..., Origin]
TEXTS = [f"Document {i}: naïve text with a number {i * i} in it.\n" for i in range(60)]


def documents(texts: list[str] = TEXTS) -> Iterator[Document]:
    return (Document(text, f"text {i}") for i, text in enumerate(texts))


def all_tokens(folder: Path, part: str) -> list[int]:
    """An independent reading of the format: the files of a split, one after the other."""
    manifest = json.loads((folder / "manifest.json").read_text())
    dtype = {"uint16": "<u2", "uint32": "<u4"}[manifest["dtype"]]
    return np.concatenate([np.fromfile(folder / f["name"], dtype) for f in manifest[part]["files"]]).tolist()


@pytest.fixture
def written(tmp_path: Path, tokenizer: Tokenizer, origin: MakeOrigin) -> Path:
    write_shards(documents(), tokenizer, tmp_path / "shards", origin())
    return tmp_path / "shards"


def test_texts_come_back_in_order_from_both_splits(written: Path, tokenizer: Tokenizer) -> None:
    found: dict[str, list[str]] = {}
    for part in ("train", "heldout"):
        tokens = all_tokens(written, part)
        assert tokens[-1] == tokenizer.end_of_text
        ends = [i for i, token in enumerate(tokens) if token == tokenizer.end_of_text]
        starts = [0, *(end + 1 for end in ends[:-1])]
        found[part] = [tokenizer.decode(tokens[a:b]) for a, b in zip(starts, ends, strict=True)]
    assert not set(found["train"]) & set(found["heldout"])
    assert sorted(found["train"] + found["heldout"]) == sorted(TEXTS)
    assert found["train"] == [text for text in TEXTS if text in found["train"]]
    manifest = ShardReader(written).manifest
    assert manifest.heldout.documents == len(found["heldout"]) > 0
    assert manifest.heldout.tokens < manifest.train.tokens / 3
    assert manifest.heldout.bytes == sum(len(text.encode()) for text in found["heldout"])
    assert manifest.train.bytes == sum(len(text.encode()) for text in found["train"])
    ratio = manifest.heldout.bytes / len(all_tokens(written, "heldout"))
    assert ShardReader(written).bytes_per_token_heldout == ratio


@pytest.mark.parametrize("count", [1, 3])
def test_a_divided_document_is_counted_once(
    count: int, tmp_path: Path, tokenizer: Tokenizer, origin: MakeOrigin
) -> None:
    texts = ["".join(TEXTS), "short", "shorter"][:count]
    manifest = write_shards(documents(texts), tokenizer, tmp_path / "shards", origin())
    assert manifest.train.documents + manifest.heldout.documents == count
    assert min(manifest.train.tokens, manifest.heldout.tokens) > 0
    assert manifest.train.bytes + manifest.heldout.bytes == sum(map(len, map(str.encode, texts)))


def test_unigram_loss_is_the_cross_entropy_of_smoothed_counts(written: Path, tokenizer: Tokenizer) -> None:
    train, heldout = all_tokens(written, "train"), all_tokens(written, "heldout")
    size = len(train) + tokenizer.vocab_size
    reference = -sum(math.log((train.count(token) + 1) / size) for token in heldout) / len(heldout)
    assert ShardReader(written).unigram_loss == pytest.approx(reference, rel=1e-12)
    unsmoothed_share = sum(train.count(token) / len(train) for token in heldout)
    assert reference != pytest.approx(-math.log(unsmoothed_share / len(heldout)))


def test_file_boundaries_worker_count_and_repetition_change_nothing(
    tmp_path: Path, tokenizer: Tokenizer, origin: MakeOrigin, written: Path
) -> None:
    whole = ShardReader(written)
    for workers, shard_tokens in ((1, 37), (3, 1000), (2, 1 << 20)):
        folder = tmp_path / f"{workers}-{shard_tokens}"
        write_shards(documents(), tokenizer, folder, origin(), workers=workers, shard_tokens=shard_tokens)
        reader = ShardReader(folder)
        assert len(reader.manifest.train.files) == -(-whole.manifest.train.tokens // shard_tokens)
        assert all_tokens(folder, "train") == all_tokens(written, "train")
        indices = np.array([5, 0, whole.train_sequences(9) - 1, 5])
        np.testing.assert_array_equal(reader.read(indices, 9), whole.read(indices, 9))
        np.testing.assert_array_equal(reader.heldout(9, 4), whole.heldout(9, 4))
        reader.verify()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(1, 40), data=st.data())
def test_windows_equal_slices(numbered: Make, tmp_path: Path, length: int, data: st.DataObject) -> None:
    tokens, shard_tokens = data.draw(st.integers(length + 1, 300)), data.draw(st.integers(1, 60))
    known = tmp_path / f"numbered-0-{tokens}-{shard_tokens}"
    reader = ShardReader(known) if known.exists() else numbered(tokens, shard_tokens=shard_tokens)
    count = reader.train_sequences(length)
    assert count * length + 1 <= tokens < (count + 1) * length + 1
    indices = data.draw(st.lists(st.integers(0, count - 1), max_size=8))
    reference = [list(range(i * length, i * length + length + 1)) for i in indices]
    got = reader.read(np.array(indices, dtype=np.int64), length)
    assert got.dtype == np.int64
    assert got.shape == (len(indices), length + 1)
    assert got.tolist() == reference
    with pytest.raises(IndexError):
        reader.read(np.array([count]), length)
    with pytest.raises(IndexError):
        reader.read(np.array([-1]), length)


def test_heldout_windows_are_evenly_spaced_and_never_repeat(numbered: Make) -> None:
    reader = numbered(50, heldout=101)
    assert reader.heldout(10, 100)[:, 0].tolist() == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert reader.heldout(10, 4)[:, 0].tolist() == [0, 20, 50, 70]
    assert reader.heldout(10, 1).tolist() == [list(range(11))]
    assert reader.heldout(200, 4).shape == (0, 201)


def test_large_vocabularies_take_four_bytes(tmp_path: Path, tokenizer: Tokenizer, origin: MakeOrigin) -> None:
    tokenizer_32 = Tokenizer(tokenizer._inner, "<|endoftext|>")
    tokenizer_32.vocab_size = 65537
    manifest = write_shards(documents(), tokenizer_32, tmp_path / "wide", origin())
    narrow = write_shards(documents(), tokenizer, tmp_path / "narrow", origin())
    assert (manifest.dtype, narrow.dtype) == ("uint32", "uint16")
    assert all_tokens(tmp_path / "wide", "train") == all_tokens(tmp_path / "narrow", "train")


def test_a_failing_source_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer, origin: MakeOrigin) -> None:
    def failing() -> Iterator[Document]:
        yield from documents()
        raise DataError("line 61 is bad")

    before = os.environ.get("TOKENIZERS_PARALLELISM")
    with pytest.raises(DataError, match="line 61"):
        write_shards(failing(), tokenizer, tmp_path / "shards", origin(), workers=2)
    with pytest.raises(DataError, match="too few"):
        write_shards(documents(["short"]), tokenizer, tmp_path / "shards", origin(sequence_length=64))
    assert list(tmp_path.iterdir()) == []
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


def test_a_killed_build_leaves_nothing_that_is_read(
    tmp_path: Path, tokenizer: Tokenizer, origin: MakeOrigin, written: Path
) -> None:
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(tmp_path / "tokenizer")
    script = (
        "import sys, time; from pathlib import Path; from photon.data.document import Document\n"
        "from photon.data.shards import Origin, write_shards; from photon.data.tokenizer import Tokenizer\n"
        "def documents():\n"
        "    for i in range(3000):\n"
        "        yield Document(f'Document {i}: some text that is long enough to reach the disk. ' * 5, 'x')\n"
        "    print('half-way', flush=True); time.sleep(60)\n"
        "root = Path(sys.argv[1])\n"
        "origin = Origin.model_validate_json(sys.argv[2])\n"
        "write_shards(documents(), Tokenizer.load(root / 'tokenizer'), root / 'killed', origin)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), origin().model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"half-way\n"
        (leftover,) = tmp_path.glob(".killed.*.tmp")
        assert (leftover / "train-00000.bin").stat().st_size > 0, "killed while writing, not before"
        os.kill(child.pid, signal.SIGKILL)
    assert not (tmp_path / "killed").exists()
    with pytest.raises(DataError, match="no shards here"):
        ShardReader(tmp_path / "killed")
    write_shards(documents(), tokenizer, tmp_path / "killed", origin())
    assert all_tokens(tmp_path / "killed", "train") == all_tokens(written, "train")
    assert not leftover.exists()


def damage(folder: Path, how: str) -> str:
    """Damage a shard folder; returns what the complaint must name."""
    file, manifest = folder / "train-00000.bin", folder / "manifest.json"
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-2])
        return r"train-00000\.bin: it has \d+ bytes instead of"
    if how == "missing":
        file.unlink()
        return r"train-00000\.bin: it is missing"
    if how == "no manifest":
        manifest.unlink()
        return "no shards here"
    record = json.loads(manifest.read_text())
    if how == "sums":
        record["train"]["tokens"] += 1
    elif how == "unknown key":
        record["colour"] = "red"
    elif how == "version":
        record["version"] = 2
    elif how == "path":
        record["train"]["files"][0]["name"] = "../train-00000.bin"
    manifest.write_text("{" if how == "syntax" else json.dumps(record))
    return {
        "sums": r"manifest\.json: its token counts do not add up",
        "unknown key": r"manifest\.json: not a manifest.*colour",
        "version": r"manifest\.json: not a manifest.*version",
        "path": r"manifest\.json: not a manifest.*train\.files\.0\.name",
        "syntax": r"manifest\.json: not a manifest.*Invalid JSON",
    }[how]


@pytest.mark.parametrize("how", ["cut", "missing", "no manifest", "sums", "unknown key", "version", "path", "syntax"])
def test_damage_is_noticed_on_open_and_named(written: Path, how: str) -> None:
    ShardReader(written)
    complaint = damage(written, how)
    with pytest.raises(DataError, match=complaint):
        ShardReader(written)


def test_a_flipped_bit_is_noticed_by_verify(written: Path) -> None:
    ShardReader(written).verify()
    file = written / "heldout-00000.bin"
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"heldout-00000\.bin: .*SHA-256"):
        ShardReader(written).verify()


def test_manifest_survives_its_own_round_trip(written: Path) -> None:
    manifest = Manifest.load(written)
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_first_document_stops_at_its_end(written: Path, tokenizer: Tokenizer) -> None:
    reader = ShardReader(written)
    first = next(text for text in TEXTS if tokenizer.decode(reader.first_document(1000)) == text)
    assert tokenizer.decode(reader.first_document(3)) == first[: len(tokenizer.decode(reader.first_document(3)))]
