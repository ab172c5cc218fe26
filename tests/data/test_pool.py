"""The pool: every document at one node, once; shares alike whatever the owners; held out what is held out by owner."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from photon.config import Recipe
from photon.data.build import Prepared, Progress, prepare
from photon.data.document import Document
from photon.data.encode import encode_document
from photon.data.manifest import Origin
from photon.data.pool import Share, dealt_to, write_shares
from photon.data.shards import ShardReader
from photon.data.split import Encoded, content_hash, is_heldout, split
from photon.data.tokenizer import Tokenizer
from photon.errors import DataError

Deal = Callable[[Sequence[str], int], list[int]]
MakeOrigin = Callable[..., Origin]
LENGTH = 16
DOCUMENTS = {"ann": 1500, "bob": 300, "cyd": 40}  # an ordinary corpus, two whose threshold moves
SILOS: list[dict[str, Any]] = [
    {"name": "ann", "text": "ann.jsonl"},
    {"name": "bob", "text": ["bob", "bob.jsonl"]},
    {"name": "cyd", "text": "cyd"},
]


def document(owner: str, number: int) -> str:
    return f"{owner} writes document {number} about the number {number * number}."


def write_texts(root: Path) -> None:
    (root / "ann.jsonl").write_text(records("ann", range(DOCUMENTS["ann"])))
    (root / "bob.jsonl").write_text(records("bob", range(30, DOCUMENTS["bob"])))
    for owner, count in (("bob", 30), ("cyd", DOCUMENTS["cyd"])):
        (root / owner).mkdir()
        for number in range(count):
            (root / owner / f"{number:03d}.txt").write_text(document(owner, number))


def records(owner: str, numbers: range) -> str:
    return "".join(json.dumps({"text": document(owner, number)}) + "\n" for number in numbers)


def recipe(partition: str = "iid", silos: list[dict[str, Any]] = SILOS, **data: Any) -> Recipe:
    options = {"partition": partition, "sequence_length": LENGTH, "tokenizer": "tokenizer", "build_workers": 2} | data
    return Recipe.model_validate({"data": options, "silo": silos})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    write_texts(folder)
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    return folder


@pytest.fixture
def own_root(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    write_texts(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(tmp_path / "tokenizer")
    return tmp_path


def texts(prepared: Prepared, node: str, side: str) -> list[str]:
    """An independent reading of a node's shards: its documents, in order."""
    found = []
    for folder in prepared.silos[node].sources:
        manifest = json.loads((folder / "manifest.json").read_text())
        tokens = np.concatenate([np.fromfile(folder / file["name"], "<u2") for file in manifest[side]["files"]])
        ends = np.flatnonzero(tokens == manifest["end_of_text"])
        starts = [0, *(ends[:-1] + 1)]
        found += [prepared.tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]
    return found


def both_sides(prepared: Prepared, side: str) -> Counter[str]:
    return Counter(text for node in prepared.silos for text in texts(prepared, node, side))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def shares_of(prepared: Prepared) -> dict[str, Path]:
    return {name: folder for name, silo in prepared.silos.items() for folder in silo.sources}


# What is dealt, and to whom


def test_every_document_of_the_pool_ends_at_one_node_once_on_the_side_it_has_by_owner(root: Path) -> None:
    pooled, by_owner = prepare(recipe(), root), prepare(recipe("owner"), root)
    everything = Counter(document(owner, number) for owner, count in DOCUMENTS.items() for number in range(count))
    assert both_sides(pooled, "train") + both_sides(pooled, "heldout") == everything
    for side in ("train", "heldout"):
        assert both_sides(pooled, side) == both_sides(by_owner, side)
    assert all(len(silo.sources) == 1 for silo in pooled.silos.values())


def test_splitting_after_the_deal_would_hold_out_others(root: Path, tokenizer: Tokenizer) -> None:
    """A mutant: deal first, then split each share as if it were a corpus. In small ones the threshold moves."""
    by_owner = prepare(recipe("owner"), root)
    held: Counter[str] = Counter()
    dealt: dict[int, list[Encoded]] = {0: [], 1: [], 2: []}
    for text in both_sides(by_owner, "train") + both_sides(by_owner, "heldout"):
        dealt[dealt_to(text, 3)].append(encode_document(Document(text, "here"), tokenizer))
    for share in dealt.values():
        sides = split(share, 0.05, LENGTH + 1, lambda found: encode_document(found, tokenizer))
        held.update(item.document.text for item, is_held in sides if is_held)
    assert held != both_sides(by_owner, "heldout")


def test_a_document_goes_where_its_content_says(root: Path) -> None:
    prepared = prepare(recipe(), root)
    for place, node in enumerate(["ann", "bob", "cyd"]):
        for side in ("train", "heldout"):
            assert {dealt_to(text, 3) for text in texts(prepared, node, side)} == {place}


@given(st.text(), st.integers(1, 1000))
def test_a_place_is_one_of_those_there_are(text: str, nodes: int) -> None:
    assert 0 <= dealt_to(text, nodes) < nodes


def test_a_deal_is_fixed_across_versions() -> None:
    """Shards of another version of Photon are reused, and studies are repeated."""
    assert [dealt_to(text, 7) for text in ("", "a", "naïve", "日本語")] == [4, 2, 3, 3]


# How it is dealt

POOL = [
    document(owner, number) for owner, count in (("ann", 4000), ("bob", 800), ("cyd", 200)) for number in range(count)
]
OWNERS = ["ann", "bob", "cyd"]


def by_content(documents: Sequence[str], nodes: int) -> list[int]:
    return [dealt_to(text, nodes) for text in documents]


def by_order(documents: Sequence[str], nodes: int) -> list[int]:
    """A mutant: in turn, as they are read."""
    return [number % nodes for number in range(len(documents))]


def by_owner(documents: Sequence[str], nodes: int) -> list[int]:
    """A mutant: not pooled at all."""
    return [OWNERS.index(text.split()[0]) % nodes for text in documents]


def by_the_splits_hash(documents: Sequence[str], nodes: int) -> list[int]:
    """A mutant: with the hash that also says what is held out."""
    return [content_hash(text) * nodes >> 64 for text in documents]


def depends_on_order(deal: Deal) -> bool:
    """Whether a silo that is named elsewhere in the recipe sends its documents elsewhere."""
    turned = POOL[4001:] + POOL[:4001]
    return dict(zip(POOL, deal(POOL, 5), strict=True)) != dict(zip(turned, deal(turned, 5), strict=True))


def is_balanced(deal: Deal, documents: Sequence[str], nodes: int) -> bool:
    """Each node has its binomial share, within 4 standard deviations."""
    counts = Counter(deal(documents, nodes))
    sigma = math.sqrt(len(documents) * (1 / nodes) * (1 - 1 / nodes))
    return all(abs(counts[node] - len(documents) / nodes) < 4 * sigma for node in range(nodes))


def chi_square(table: np.ndarray) -> tuple[float, int]:
    """Pearson's statistic of independence of rows (nodes) and columns (owners), and its degrees of freedom."""
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    return float(((table - expected) ** 2 / expected).sum()), (table.shape[0] - 1) * (table.shape[1] - 1)


def are_alike(table: np.ndarray) -> bool:
    """Whether the nodes' mixes of owners differ no more than chance has it.

    The bound is the quantile of chi-square that a normal variable exceeds at 4 deviations (Wilson and Hilferty 1931).
    """
    statistic, freedom = chi_square(table)
    spread = 2 / (9 * freedom)
    return statistic < freedom * (1 - spread + 4 * math.sqrt(spread)) ** 3


def mixes(deal: Deal, nodes: int) -> np.ndarray:
    table = np.zeros((nodes, 3))
    for node, text in zip(deal(POOL, nodes), POOL, strict=True):
        table[node, OWNERS.index(text.split()[0])] += 1
    return table


@pytest.mark.parametrize("nodes", [2, 3, 5, 16])
def test_shares_are_equal_and_alike(nodes: int) -> None:
    assert is_balanced(by_content, POOL, nodes)
    assert are_alike(mixes(by_content, nodes))
    assert not is_balanced(by_owner, POOL, nodes)
    assert not are_alike(mixes(by_owner, 3))


def test_held_out_documents_are_shared_equally_too() -> None:
    held = [text for text in POOL if is_heldout(text, 0.2)]
    assert len(held) > 800
    assert is_balanced(by_content, held, 4)
    assert not is_balanced(by_the_splits_hash, held, 4)


def test_the_order_of_reading_is_rejected_as_a_source_of_chance() -> None:
    assert not depends_on_order(by_content)
    assert depends_on_order(by_order)


def test_nodes_hold_the_same_mix_of_owners(root: Path) -> None:
    """On what is in the shards, both ways of preparing them."""
    tables = []
    for partition in ("iid", "owner"):
        prepared = prepare(recipe(partition), root)
        counts = [Counter(text.split()[0] for text in texts(prepared, node, "train")) for node in OWNERS]
        tables.append(np.array([[count[owner] for owner in OWNERS] for count in counts], dtype=float))
    assert are_alike(tables[0])
    assert not are_alike(tables[1])


# Shares on disk


def test_shares_do_not_depend_on_the_order_of_silos_nor_on_threads(root: Path) -> None:
    first = shares_of(prepare(recipe(), root))
    other = shares_of(prepare(recipe(silos=SILOS[::-1], dir="other", build_workers=1), root))
    assert list(other) == list(first)[::-1]
    for node, folder in first.items():
        assert other[node].name == folder.name
        assert snapshot(other[node]) == snapshot(folder)


def test_a_pool_is_not_dealt_twice_and_a_lost_share_is_dealt_again(own_root: Path) -> None:
    heard: list[Progress] = []
    first = shares_of(prepare(recipe(), own_root))
    before = {node: snapshot(folder) for node, folder in first.items()}
    written = {node: folder.stat().st_mtime_ns for node, folder in first.items()}
    assert shares_of(prepare(recipe(), own_root, heard.append)) == first
    assert [(event.silo, event.phase) for event in heard] == [(node, "reuse") for node in OWNERS]
    for file in [*first["bob"].iterdir()]:
        file.unlink()
    first["bob"].rmdir()
    heard.clear()
    prepare(recipe(), own_root, heard.append)
    assert {node: snapshot(folder) for node, folder in first.items()} == before
    assert [(e.silo, e.phase) for e in heard][-3:] == [("ann", "reuse"), ("bob", "done"), ("cyd", "reuse")]
    assert {node for node in OWNERS if first[node].stat().st_mtime_ns != written[node]} == {"bob"}


@pytest.mark.parametrize("change", [{"heldout_fraction": 0.2}, {"sequence_length": 8}, {"max_bytes_per_silo": 3000}])
def test_an_option_that_shapes_the_shares_deals_new_ones(root: Path, change: dict[str, Any]) -> None:
    first, second = shares_of(prepare(recipe(), root)), shares_of(prepare(recipe(**change), root))
    assert not set(first.values()) & set(second.values())


def test_text_that_changes_or_comes_deals_every_share_anew(own_root: Path) -> None:
    first = prepare(recipe(), own_root)
    owned = prepare(recipe("owner"), own_root)
    (own_root / "cyd" / "new.txt").write_text("cyd has more to say. " * 10)
    second = prepare(recipe(), own_root)
    fewer = prepare(recipe(silos=SILOS[:2]), own_root)
    for node in ("ann", "bob"):
        assert len({first.silos[node].sources[0], second.silos[node].sources[0], fewer.silos[node].sources[0]}) == 3
        assert first.silos[node].sources[0] not in owned.silos[node].sources
    assert sum(both_sides(second, "train").values()) + sum(both_sides(second, "heldout").values()) == 1841


def test_limits_are_those_of_the_owners(root: Path) -> None:
    limited = {"max_bytes_per_silo": 4000}
    pooled, by_owner = prepare(recipe(**limited), root), prepare(recipe("owner", **limited), root)
    for side in ("train", "heldout"):
        assert both_sides(pooled, side) == both_sides(by_owner, side)


def test_progress_names_the_silo_that_is_read_and_then_every_share(own_root: Path) -> None:
    (own_root / "cyd" / "empty.txt").write_text("")
    heard: list[Progress] = []
    prepared = prepare(recipe(), own_root, heard.append)
    assert [event.silo for event in heard if event.phase == "done"] == OWNERS
    assert {event.silo for event in heard if event.phase == "tokenize"} == {"cyd"}  # the others read less than is told
    last = heard[-1]
    manifest = ShardReader(prepared.silos["cyd"].sources[0]).manifest
    assert last.total_bytes == manifest.train.bytes + manifest.heldout.bytes
    assert last.note.startswith("share 3 of 3 of the pool of all silos: ")
    for silo in prepared.silos.values():  # nobody knows where an empty file would have gone
        assert any("1 files without text left out" in note for note in ShardReader(silo.sources[0]).manifest.notes)


def test_a_killed_deal_is_simply_done_again(own_root: Path) -> None:
    expected = {node: snapshot(folder) for node, folder in shares_of(prepare(recipe(dir="expected"), own_root)).items()}
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from photon.config import Recipe; from photon.data import atomic, build\n"
        "rename = Path.rename\n"
        "def once(path, target):\n"
        "    if list(target.parent.parent.glob('*/[0-9a-f]*')):  # one share is there already\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return rename(path, target)\n"
        "Path.rename = once\n"
        "build.prepare(Recipe.model_validate_json(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    prepare(recipe("owner", silos=SILOS[:1], dir="data"), own_root)  # the tokenizer's folder, and one of an owner
    for folder in (own_root / "data" / "silos").iterdir():
        folder.rename(own_root / "away")
    done = subprocess.run([sys.executable, "-c", script, recipe().model_dump_json(), str(own_root)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list((own_root / "data" / "silos").glob("*/[0-9a-f]*"))) == 1
    again = shares_of(prepare(recipe(), own_root))
    assert {node: snapshot(folder) for node, folder in again.items()} == expected
    assert not list(own_root.rglob("*.tmp"))


def test_the_tokenizer_is_the_one_of_the_owners(own_root: Path) -> None:
    trained = {"tokenizer": "train", "vocab_size": 300}
    pooled, by_owner = prepare(recipe(**trained), own_root), prepare(recipe("owner", **trained), own_root)
    assert pooled.tokenizer_folder == by_owner.tokenizer_folder
    assert pooled.tokenizer.sha256 == by_owner.tokenizer.sha256


# What cannot be dealt


def test_a_share_too_small_for_a_sequence_is_refused_and_nothing_is_left(own_root: Path) -> None:
    many = [{"name": f"n{index}", "text": "cyd"} for index in range(12)]
    complaint = r"silo n\d+, its share of the pool: \d+ training and \d+ held-out tokens are too few: .*fewer silos"
    with pytest.raises(DataError, match=complaint):
        prepare(recipe(silos=many, sequence_length=32), own_root)
    assert not list(own_root.glob("data/silos/*/[0-9a-f]*"))
    assert not list(own_root.rglob("*.tmp"))


def test_bad_text_names_silo_and_source(own_root: Path) -> None:
    (own_root / "bad.txt").write_bytes(b"one\ncaf\xe9")
    bad = [*SILOS, {"name": "eve", "text": "bad.txt"}]
    with pytest.raises(DataError, match=r"silo eve, source bad\.txt: .*bad\.txt: line 2: byte 0xe9"):
        prepare(recipe(silos=bad), own_root)
    assert not list(own_root.glob("data/silos/*/[0-9a-f]*"))


def test_a_damaged_share_is_reported_not_reused(own_root: Path) -> None:
    share = shares_of(prepare(recipe(), own_root))["bob"]
    os.truncate(share / "train-00000.bin", 10)
    with pytest.raises(
        DataError, match=r"silo bob, its share of the pool: .*train-00000\.bin: it has 10 bytes.*delete"
    ):
        prepare(recipe(), own_root)


# Memory


def test_nothing_of_the_pool_is_kept(tmp_path: Path, tokenizer: Tokenizer, origin: MakeOrigin) -> None:
    """When a document is dealt, those before it have been freed; a list of the pool keeps them all."""

    def most_alive(read: Callable[[Iterator[tuple[Encoded, bool]]], Any], name: str) -> int:
        alive: weakref.WeakSet[Document] = weakref.WeakSet()
        most = 0

        def pool() -> Iterator[tuple[Encoded, bool]]:
            nonlocal most
            for number in range(300):
                found = Document(document("ann", number), f"{number}")
                alive.add(found)
                most = max(most, len(alive))
                yield encode_document(found, tokenizer), number % 4 == 0
                del found

        shares = {place: Share(str(place), tmp_path / name / str(place), origin()) for place in range(2)}
        write_shares(read(pool()), shares, 2, tokenizer, [])
        return most

    gc.collect()
    assert most_alive(lambda pool: pool, "streamed") < 5
    assert most_alive(list, "mutant") == 300
