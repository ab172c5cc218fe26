from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from photon.data import split as split_module
from photon.data.document import Document
from photon.data.split import Encoded, content_hash, is_heldout, split
from photon.errors import DataError

Sides = list[tuple[str, bool]]


def encode(document: Document) -> Encoded:
    """One token per character and an end."""
    return Encoded(document, np.arange(len(document.text) + 1))


def sides(texts: list[str], fraction: float, need: int) -> Sides:
    encoded = (encode(Document(text, "here")) for text in texts)
    return [(item.document.text, held) for item, held in split(encoded, fraction, need, encode)]


def check_split(result: Sides, need: int) -> None:
    """No text on both sides, and a sequence on each."""
    held = [text for text, is_held in result if is_held]
    train = [text for text, is_held in result if not is_held]
    assert not set(held) & set(train)
    assert sum(len(text) + 1 for text in held) >= need
    assert sum(len(text) + 1 for text in train) >= need


def check_lowest_hashes(result: Sides) -> None:
    """The held-out documents are those that hash lowest."""
    held = [content_hash(text) for text, is_held in result if is_held]
    train = [content_hash(text) for text, is_held in result if not is_held]
    assert max(held) < min(train)


def alphabet(kind: int, length: int) -> str:
    """A text that shares no character with one of another kind, nor its halves with each other."""
    return "".join(chr(256 + 40 * kind + i) for i in range(length))


# Few kinds, so that copies are common.
texts = st.lists(st.builds(alphabet, st.integers(0, 12), st.integers(1, 30)), max_size=25)


@given(texts=texts, fraction=st.floats(0.01, 0.49), need=st.integers(2, 20))
def test_small_corpora_have_both_sides_and_no_leak_or_are_refused(texts: list[str], fraction: float, need: int) -> None:
    try:
        result = sides(texts, fraction, need)
    except DataError:
        # Refused for a reason: too little in all, or nothing that can be divided.
        total = sum(len(text) + 1 for text in texts)
        longest = max((len(text) + 1 for text in texts), default=0)
        assert total < 2 * need or longest < 2.5 * need + 2
        ranked = sorted(set(texts), key=content_hash)
        weights = [texts.count(text) * (len(text) + 1) for text in ranked]
        assert not any(need <= held <= total - need for held in itertools.accumulate(weights))
        return
    check_split(result, need)


def test_documents_of_hardly_a_sequence_each_are_divided_among_the_sides() -> None:
    """More than half is held out where the longer one hashes lower, and neither could be cut."""
    pairs = [(alphabet(kind, 16), alphabet(kind + 1, 12)) for kind in range(12)]
    assert any(content_hash(longer) < content_hash(shorter) for longer, shorter in pairs)
    for pair in pairs:
        result = sides([*pair], 0.05, 10)
        check_split(result, 10)
        check_lowest_hashes(result)


def test_documents_stay_in_order_and_none_is_lost() -> None:
    names = [f"document number {i}" for i in range(300)]
    assert [text for text, _ in sides(names, 0.1, 20)] == names


def test_an_ordinary_corpus_is_split_by_content_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_module, "_ORDINARY_DOCUMENTS", 50)
    names = [f"document number {i}" for i in range(2000)]
    result = dict(sides(names, 0.1, 20))
    assert result == {name: is_heldout(name, 0.1) for name in names}
    assert 140 < sum(result.values()) < 260
    shuffled = random.Random(0).sample(names, len(names))
    assert dict(sides(shuffled, 0.1, 20)) == result
    more = dict(sides([*names, *(f"added {i}" for i in range(100))], 0.1, 20))
    assert {name: more[name] for name in names} == result


def test_copies_fall_on_the_same_side() -> None:
    names = [f"document number {i % 100}" for i in range(1000)]
    check_split(sides(names, 0.2, 20), 20)

    by_place = [(name, i % 7 == 0) for i, name in enumerate(names)]  # mutant: decided by the place
    with pytest.raises(AssertionError):
        check_split(by_place, 20)


def test_a_small_corpus_holds_out_its_share_and_the_lowest_hashes() -> None:
    for seed in range(30):
        generator = random.Random(seed)
        names = [generator.randbytes(20).hex() for _ in range(20)]
        result = sides(names, 0.05, 3)
        check_lowest_hashes(result)
        assert 1 <= sum(held for _, held in result) <= 4
        assert sides(names[::-1], 0.05, 3) == result[::-1]


def test_one_document_is_split_by_position() -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(1000))
    (head, head_held), (tail, tail_held) = sides([text], 0.05, 10)
    assert (head + tail, head_held, tail_held) == (text, False, True)
    assert len(tail) == 50
    (_, _), (tail, _) = sides([text], 0.05, 200)
    assert len(tail) + 1 >= 200


def test_a_document_that_dwarfs_the_rest_is_divided_rather_than_held_out() -> None:
    for seed in range(10):
        giant = random.Random(seed).randbytes(500).hex()
        result = sides(["tiny", giant, "small", giant], 0.05, 10)
        check_split(result, 10)
        assert sum(len(text) for text, held in result if not held) > 900
        assert sum(giant.startswith(text) and len(text) > 100 for text, _ in result) == 1, "a copy would leak"


def test_too_little_text_says_how_much_is_needed() -> None:
    with pytest.raises(DataError, match=r"12 tokens are too few: sequences of 9 tokens need at least 20"):
        sides(["hello", "world"], 0.05, 10)
    with pytest.raises(DataError, match=r"0 tokens"):
        sides([], 0.05, 10)
