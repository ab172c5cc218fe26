"""Documents to token ids on several threads, in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from photon.data.document import Document
from photon.data.split import Encoded
from photon.data.tokenizer import Tokenizer

_CHUNK_BYTES = 1 << 18
_CHUNK_DOCUMENTS = 512


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, workers: int
) -> Generator[Encoded, None, None]:
    """Each document with its ids and an end-of-text, in order; `workers` threads encode, a few chunks are in flight.

    Threads suffice: the library encodes a batch without the GIL. Its own thread pool is held off meanwhile.
    """
    pending: deque[Future[list[Encoded]]] = deque()
    with _library_threads_off(), ThreadPoolExecutor(workers, "encode") as pool:
        try:
            for chunk in _chunks(documents):
                pending.append(pool.submit(_encode, chunk, tokenizer))
                while len(pending) > 2 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def encode_document(document: Document, tokenizer: Tokenizer) -> Encoded:
    """One document with its ids and an end-of-text."""
    return _encode([document], tokenizer)[0]


def _encode(documents: list[Document], tokenizer: Tokenizer) -> list[Encoded]:
    batches = tokenizer.encode_batch([document.text for document in documents])
    return [
        Encoded(document, np.array([*tokens, tokenizer.end_of_text], dtype=np.int64))
        for document, tokens in zip(documents, batches, strict=True)
    ]


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= _CHUNK_BYTES or len(chunk) >= _CHUNK_DOCUMENTS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


@contextmanager
def _library_threads_off() -> Iterator[None]:
    """Have `tokenizers` encode on the calling thread; the variable is its only switch, and is put back."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
