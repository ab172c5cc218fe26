"""Which documents are held out: those whose content hashes lowest, so equal texts never fall on both sides."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from photon.data.document import Document
from photon.errors import DataError

_HASH_RANGE = 1 << 64
# From here on a corpus is ordinary: chance no longer moves the held-out share much.
_ORDINARY_DOCUMENTS = 1024
_ORDINARY_TOKENS = 1 << 24


@dataclass(frozen=True)
class Encoded:
    """A document and its token ids (end-of-text last); `is_tail`: the second part of one that was divided."""

    document: Document
    tokens: NDArray[np.int64]
    is_tail: bool = False


def content_hash(text: str) -> int:
    """64 bits of BLAKE2b of the text in UTF-8."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a document of a corpus of ordinary size is held out: decided by its content and `fraction` alone."""
    return content_hash(text) < fraction * _HASH_RANGE


def split(
    documents: Iterable[Encoded], fraction: float, sequence_tokens: int, encode: Callable[[Document], Encoded]
) -> Iterator[tuple[Encoded, bool]]:
    """Pair every document with whether it is held out, in order.

    An ordinary corpus is split by `is_heldout` alone. In a small one, of few documents, that could hold out nothing
    or next to nothing: there the threshold on the hash moves, as little as it must, until the held-out side has its
    `fraction` of the tokens and both sides at least `sequence_tokens`. Where no threshold does (one document, or one
    that dwarfs the rest), the longest document is cut into a training head and a held-out tail. DataError when the
    whole text is too short for that. Documents wait in memory only until the corpus is known to be ordinary.
    """
    waiting: list[Encoded] = []
    tokens = {True: 0, False: 0}
    source = iter(documents)
    for item in source:
        waiting.append(item)
        tokens[is_heldout(item.document.text, fraction)] += len(item.tokens)
        ordinary = len(waiting) >= _ORDINARY_DOCUMENTS or sum(tokens.values()) >= _ORDINARY_TOKENS
        if ordinary and min(tokens.values()) >= sequence_tokens:
            yield from ((held, is_heldout(held.document.text, fraction)) for held in waiting)
            break
    else:
        yield from _small(waiting, fraction, sequence_tokens, encode)
        return
    waiting.clear()
    for item in source:
        yield item, is_heldout(item.document.text, fraction)


def _small(
    items: list[Encoded], fraction: float, need: int, encode: Callable[[Document], Encoded]
) -> Iterator[tuple[Encoded, bool]]:
    """The split of a small corpus, with `need` tokens on both sides."""
    total = sum(len(item.tokens) for item in items)
    if total < 2 * need:
        raise DataError(
            f"{total} tokens are too few: sequences of {need - 1} tokens need at least {2 * need}, for training and "
            "held-out; add text or lower data.sequence_length"
        )
    hashes = [content_hash(item.document.text) for item in items]
    natural = fraction * _HASH_RANGE
    for wanted in (max(need, int(fraction * total)), need):
        threshold = _nearest_threshold(items, hashes, natural, (wanted, total // 2))
        if threshold is not None:
            yield from ((item, key <= threshold) for item, key in zip(items, hashes, strict=True))
            return
    longest = max(range(len(items)), key=lambda i: (len(items[i].tokens), hashes[i]))
    parts = _cut(items[longest], fraction, need, encode)
    if parts is None:  # a few documents of hardly a sequence each: then more than half of them is held out
        threshold = _nearest_threshold(items, hashes, natural, (need, total - need))
        if threshold is None:
            raise DataError(
                f"{items[longest].document.origin}: its {len(items[longest].tokens)} tokens cannot be divided into "
                f"training and held-out of {need} each; add text or lower data.sequence_length"
            )
        yield from ((item, key <= threshold) for item, key in zip(items, hashes, strict=True))
        return
    for index, (item, key) in enumerate(zip(items, hashes, strict=True)):
        if index == longest:
            yield from zip(parts, (False, True), strict=True)
        elif key != hashes[longest]:  # a copy of the divided document would leak its tail into training
            yield item, key < natural


def _nearest_threshold(items: list[Encoded], hashes: list[int], natural: float, tokens: tuple[int, int]) -> int | None:
    """The highest hash to hold out so that their tokens lie within `tokens`, closest in rank to `natural`."""
    weight: Counter[int] = Counter()
    for item, key in zip(items, hashes, strict=True):
        weight[key] += len(item.tokens)
    ranked = sorted(weight)
    held = accumulate(weight[key] for key in ranked)
    natural_rank = sum(key < natural for key in ranked) - 1
    fitting = [rank for rank, count in enumerate(held) if tokens[0] <= count <= tokens[1]]
    return ranked[min(fitting, key=lambda rank: abs(rank - natural_rank))] if fitting else None


def _cut(
    item: Encoded, fraction: float, need: int, encode: Callable[[Document], Encoded]
) -> tuple[Encoded, Encoded] | None:
    """The head of a document for training and its tail as held-out, cut at a character; None if it is too short."""
    text, origin = item.document.text, item.document.origin
    # A quarter more than needed: tokens are not spread evenly over the characters.
    share = min(0.5, max(fraction, 1.25 * need / len(item.tokens)))
    at = round(len(text) * (1 - share))
    head, tail = encode(Document(text[:at], origin)), encode(Document(text[at:], origin))
    return None if min(len(head.tokens), len(tail.tokens)) < need else (head, replace(tail, is_tail=True))
