from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from photon.config import Recipe
from photon.data import build
from photon.data.build import Prepared, Progress, describe, prepare, prepare_tokenizer, shard_folders
from photon.data.shards import ShardReader
from photon.data.split import is_heldout
from photon.data.stream import Stream
from photon.data.tokenizer import Tokenizer
from photon.errors import DataError


def write_text(folder: Path, owner: str, documents: int = 30) -> None:
    (folder / owner).mkdir(parents=True)
    for i in range(documents):
        (folder / owner / f"{i:03d}.txt").write_text(f"{owner} writes document {i} about the number {i * i}.\n" * 4)


def recipe(silos: dict[str, str | list[str]] | None = None, **data: Any) -> Recipe:
    options = {"vocab_size": 300, "sequence_length": 16, "build_workers": 2} | data
    owners = [{"name": name, "text": text} for name, text in (silos or {"ann": "ann", "bob": "bob/*.txt"}).items()]
    return Recipe.model_validate({"data": options, "silo": owners})


def shard_paths(prepared: Prepared) -> list[Path]:
    return [path for silo in prepared.silos.values() for path in silo.sources]


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file below."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_text(tmp_path, "ann")
    write_text(tmp_path, "bob")
    return tmp_path


def test_a_recipe_becomes_a_tokenizer_and_shards(root: Path) -> None:
    prepared = prepare(recipe(), root)
    assert list(prepared.silos) == ["ann", "bob"]
    assert prepared.silos["ann"].folder == root / "data" / "silos" / "ann"
    assert Tokenizer.load(prepared.tokenizer_folder).sha256 == prepared.tokenizer.sha256
    for path in shard_paths(prepared):
        reader = ShardReader(path)
        reader.verify()
        assert reader.manifest.tokenizer_sha256 == prepared.tokenizer.sha256
        assert reader.manifest.train.documents + reader.manifest.heldout.documents == 30
        assert reader.manifest.heldout.documents >= 1
    stream = Stream([ShardReader(path) for path in prepared.silos["ann"].sources], None, 16, 0, "ann")
    text = prepared.tokenizer.decode(stream.batch(0, 1)[0].tolist())
    assert any(word in text for word in ("ann", "writes", "document", "number"))


def test_nothing_is_built_twice(root: Path) -> None:
    first = prepare(recipe(), root)
    before = snapshot(root / "data")
    heard: list[Progress] = []
    second = prepare(recipe(), root, heard.append)
    assert snapshot(root / "data") == before
    assert shard_paths(second) == shard_paths(first)
    assert second.tokenizer.sha256 == first.tokenizer.sha256
    assert [event.phase for event in heard] == ["reuse", "reuse"]


def test_the_same_recipe_gives_the_same_bytes_elsewhere(root: Path) -> None:
    first = prepare(recipe(), root)
    second = prepare(recipe(dir="other", build_workers=1), root)
    for one, other in zip(shard_paths(first), shard_paths(second), strict=True):
        assert one.name == other.name
        assert {k: v[0] for k, v in snapshot(one).items()} == {k: v[0] for k, v in snapshot(other).items()}


def test_the_name_of_an_owners_shards_is_what_it_always_was(root: Path) -> None:
    """Data folders on other people's disks are found again: no option that leaves shards alone is in their name."""
    prepared = prepare(recipe({"ann": ["ann", "bob"]}, max_bytes_per_silo=3000), root)
    for spec, folder in zip(("ann", "bob"), prepared.silos["ann"].sources, strict=True):
        files = [(path, path.stat()) for path in sorted((root / spec).iterdir())]
        known = {
            "version": 1,
            "origin": {
                "source": spec, "field": "text", "fingerprint": "", "heldout_fraction": 0.05, "sequence_length": 16,
                "max_bytes": 1500,
            },
            "text": {
                "spec": spec,
                "field": "text",
                "files": [[f"{spec}/{path.name}", status.st_size, status.st_mtime_ns] for path, status in files],
            },
            "tokenizer": prepared.tokenizer.sha256,
        }  # fmt: skip
        assert folder.name == hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    explicit = prepare(recipe({"ann": ["ann", "bob"]}, max_bytes_per_silo=3000, partition="owner"), root)
    assert shard_paths(explicit) == shard_paths(prepared)


@pytest.mark.parametrize(
    "change",
    [
        {"heldout_fraction": 0.2},
        {"sequence_length": 32},
        {"max_bytes_per_silo": 2000},
        {"vocab_size": 280},
        {"tokenizer_bytes_per_silo": 500},
    ],
)
def test_an_option_that_shapes_the_shards_builds_new_ones(root: Path, change: dict[str, Any]) -> None:
    first, second = prepare(recipe(), root), prepare(recipe(**change), root)
    assert not set(shard_paths(first)) & set(shard_paths(second))
    assert all(path.is_dir() for path in shard_paths(first)), "the old ones stay valid for who uses them"


def test_changed_text_is_noticed_for_its_owner_only(root: Path) -> None:
    plain = recipe(tokenizer=str(prepare(recipe(), root).tokenizer_folder))
    first = prepare(plain, root)
    (root / "bob" / "new.txt").write_text("bob has more to say. " * 10)
    second = prepare(plain, root)
    assert first.silos["ann"] == second.silos["ann"]
    assert first.silos["bob"].sources != second.silos["bob"].sources
    assert ShardReader(second.silos["bob"].sources[0]).manifest.train.documents > 0


def test_every_owner_declares_its_share_of_the_tokenizer(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[str]] = {}
    real = build.train_tokenizer

    def spy(samples: dict[str, list[str]], vocab_size: int) -> Tokenizer:
        seen.update(samples)
        return real(samples, vocab_size)

    monkeypatch.setattr(build, "train_tokenizer", spy)
    prepared = prepare(recipe(tokenizer_bytes_per_silo=700, heldout_fraction=0.3), root)
    about = json.loads((prepared.tokenizer_folder / "photon.json").read_text())
    assert about["sample"] == {
        name: {"documents": len(texts), "bytes": sum(len(text) for text in texts)} for name, texts in seen.items()
    }
    assert {share["bytes"] for share in about["sample"].values()} == {700}
    whole = [text for texts in seen.values() for text in texts[:-1]]  # the last is cut
    assert whole
    assert not any(is_heldout(text, 0.3) for text in whole)
    files = [path.read_text() for path in sorted((root / "ann").iterdir())]
    assert any(is_heldout(text, 0.3) for text in files[: len(seen["ann"])]), "the check above can fail"


def test_a_tokenizer_from_a_folder_is_used_and_kept_beside_the_shards(root: Path, tokenizer: Tokenizer) -> None:
    (root / "mine").mkdir()
    tokenizer.save(root / "mine")
    prepared = prepare(recipe(tokenizer="mine"), root)
    assert prepared.tokenizer.sha256 == tokenizer.sha256
    assert prepared.tokenizer_folder.parent == root / "data" / "tokenizers"
    assert ShardReader(shard_paths(prepared)[0]).manifest.vocab_size == tokenizer.vocab_size


def test_sources_of_a_silo_stay_apart_and_share_its_limit(root: Path) -> None:
    prepared = prepare(recipe({"both": ["ann", "bob"]}, max_bytes_per_silo=3000), root)
    readers = [ShardReader(path) for path in prepared.silos["both"].sources]
    assert [reader.manifest.origin.source for reader in readers] == ["ann", "bob"]
    assert [reader.manifest.train.bytes + reader.manifest.heldout.bytes for reader in readers] == [1500, 1500]
    counts = Stream(readers, [0.8, 0.2], 16, 0, "both").counts(100)
    assert counts.tolist() == [80, 20]


def test_progress_tells_silo_phase_and_bytes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_REPORT_BYTES", 500)
    (root / "ann" / "empty.txt").write_text("")
    heard: list[Progress] = []
    prepare(recipe(), root, heard.append)
    phases = list(dict.fromkeys((event.silo, event.phase) for event in heard))
    assert phases == [
        ("ann", "sample"),
        ("bob", "sample"),
        ("", "train tokenizer"),
        ("ann", "tokenize"),
        ("ann", "done"),
        ("bob", "tokenize"),
        ("bob", "done"),
    ]
    ann = [event for event in heard if (event.silo, event.phase) == ("ann", "tokenize")]
    size = sum(path.stat().st_size for path in (root / "ann").iterdir())
    assert {event.total_bytes for event in ann} == {size}
    assert sorted(event.done_bytes for event in ann) == [event.done_bytes for event in ann]
    assert any("1 files without text left out" in event.note for event in ann)


def test_what_was_built_is_never_read_as_text(root: Path) -> None:
    write_text(root / "data", "carl")
    first = prepare(recipe({"carl": "data", "all": "**/*"}), root)
    second = prepare(recipe({"carl": "data", "all": "**/*"}), root)
    assert shard_paths(first) == shard_paths(second)
    manifests = [ShardReader(path).manifest for path in shard_paths(first)]
    assert [manifest.train.documents + manifest.heldout.documents for manifest in manifests] == [30, 90]
    with pytest.raises(DataError, match=r"silo x: data/silos: only files that Photon built"):
        prepare(recipe({"x": "data/silos"}), root)


def test_what_was_built_is_not_read_through_a_link_either(root: Path) -> None:
    (root / "elsewhere").symlink_to(root)
    seen = recipe({"all": str(root / "elsewhere")})
    first, second = prepare(seen, root), prepare(seen, root)
    assert shard_paths(first) == shard_paths(second)
    manifest = ShardReader(shard_paths(first)[0]).manifest
    assert manifest.train.documents + manifest.heldout.documents == 60


@pytest.mark.parametrize(
    ("silos", "complaint"),
    [
        ({"ann": "ann", "eve": "absent"}, r"silo eve: absent: no text files match"),
        ({"ann": "ann", "eve": "bad.txt"}, r"silo eve, source bad\.txt: .*bad\.txt: line 2: byte 0xe9"),
        ({"ann": "ann", "eve": "short.txt"}, r"silo eve, source short\.txt: \d+ tokens are too few: sequences of 16"),
        ({"ann": "ann", "eve": "builtin:art"}, r"silo eve: builtin:art: there is no such area"),
    ],
)
def test_bad_text_names_silo_and_source_and_leaves_nothing_half_written(
    root: Path, silos: dict[str, str | list[str]], complaint: str
) -> None:
    (root / "bad.txt").write_bytes(b"one\ncaf\xe9")
    (root / "short.txt").write_text("short")
    with pytest.raises(DataError, match=complaint):
        prepare(recipe(silos), root)
    assert not list(root.glob("data/silos/eve/*"))
    assert not list(root.rglob("*.tmp"))


def test_a_killed_preparation_is_simply_done_again(root: Path) -> None:
    expected = prepare(recipe(dir="expected"), root)
    script = (
        "import os, signal, sys, tempfile; from pathlib import Path\n"
        "from photon.config import Recipe; from photon.data import build, shards\n"
        "def die(*_):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "shards._unigram_loss = die  # all token files written, no manifest yet\n"
        "build.prepare(Recipe.model_validate_json(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, recipe().model_dump_json(), str(root)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(root.glob("data/silos/ann/.*.tmp/train-*.bin"))) == 1
    with pytest.raises(DataError, match="no shards here"):
        shard_folders(root / "data")
    prepared = prepare(recipe(), root)
    for one, other in zip(shard_paths(prepared), shard_paths(expected), strict=True):
        assert {k: v[0] for k, v in snapshot(one).items()} == {k: v[0] for k, v in snapshot(other).items()}
    assert not list(root.rglob("*.tmp"))


def test_damaged_results_are_reported_not_reused(root: Path) -> None:
    prepared = prepare(recipe(), root)
    shard = shard_paths(prepared)[0] / "train-00000.bin"
    os.truncate(shard, 10)
    with pytest.raises(DataError, match=r"silo ann, source ann: .*train-00000\.bin: it has 10 bytes.*delete"):
        prepare(recipe(), root)
    (prepared.tokenizer_folder / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    with pytest.raises(DataError, match="not the one that was saved here"):
        prepare(recipe(), root)


def test_description_of_a_shard_folder(root: Path) -> None:
    prepared = prepare(recipe(), root)
    assert shard_folders(root) == sorted(shard_paths(prepared))
    told = describe(shard_paths(prepared)[0])
    assert json.loads(json.dumps(told)) == told
    assert (told["documents"], told["source"]) == (30, "ann")
    assert told["bytes"] == sum(path.stat().st_size for path in (root / "ann").iterdir())
    assert told["bytes_per_token"] == told["bytes"] / told["tokens"]
    assert told["options"]["sequence_length"] == 16
    assert told["excerpt"].startswith("ann writes document")
    for file in prepared.tokenizer_folder.iterdir():
        file.unlink()
    assert describe(shard_paths(prepared)[0])["excerpt"] is None
    with pytest.raises(DataError, match="no shards here"):
        shard_folders(root / "ann")


def test_an_owner_without_text_here_cannot_be_prepared_here(root: Path) -> None:
    with pytest.raises(DataError, match="silo bob has no text: name it in the recipe, or let its owner join"):
        prepare(recipe({"ann": "ann", "bob": []}), root)


def test_a_tokenizer_may_be_trained_on_text_of_nobody_in_particular(root: Path) -> None:
    """The Aggregator alone, and a machine that has all owners' text, make the same one; no silo shapes it."""
    shared = recipe(tokenizer_text="ann")
    alone = prepare_tokenizer(recipe({"ann": [], "bob": []}, tokenizer_text="ann", dir="elsewhere"), root)
    assert prepare(shared, root).tokenizer.sha256 == alone.sha256
    write_text(root / "bob", "more")
    assert prepare(shared, root).tokenizer.sha256 == alone.sha256
    assert prepare(recipe(), root).tokenizer.sha256 != alone.sha256


def test_owners_text_far_away_trains_no_tokenizer(root: Path) -> None:
    with pytest.raises(DataError, match=r"data\.tokenizer_text"):
        prepare_tokenizer(recipe({"ann": [], "bob": []}), root)
    with pytest.raises(DataError, match=r"data\.tokenizer_text"):
        prepare_tokenizer(recipe(), root)  # its text may be in the recipe: an Aggregator still does not read it
