from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from photon.data import encode
from photon.data.document import Document
from photon.data.encode import encode_documents
from photon.data.tokenizer import Tokenizer


def many(count: int) -> Iterator[Document]:
    return (Document(f"text {i} " * (i % 17), f"here:{i}") for i in range(count))


@pytest.mark.parametrize("workers", [1, 4])
def test_documents_come_back_in_order_with_their_end(
    tokenizer: Tokenizer, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_CHUNK_DOCUMENTS", 3)
    encoded = list(encode_documents(many(200), tokenizer, workers))
    assert [item.document for item in encoded] == list(many(200))
    for item in encoded:
        assert item.tokens.tolist() == [*tokenizer.encode(item.document.text), tokenizer.end_of_text]


def test_reading_runs_only_a_few_chunks_ahead(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_CHUNK_DOCUMENTS", 3)
    read = 0

    def counted() -> Iterator[Document]:
        nonlocal read
        for document in many(1000):
            read += 1
            yield document

    encoded = encode_documents(counted(), tokenizer, 2)
    next(encoded)
    assert read <= 3 * (2 * 2 + 1)
    encoded.close()


def test_the_library_switch_is_put_back_however_the_reading_ends(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "as it was")
    threads = threading.active_count()
    encoded = encode_documents(many(10), tokenizer, 2)
    next(encoded)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    encoded.close()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "as it was"
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    assert len(list(encode_documents(many(10), tokenizer, 2))) == 10
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    assert threading.active_count() == threads
