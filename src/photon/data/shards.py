"""Token shards: memory-mapped files of token ids and a JSON manifest, written whole or not at all."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO, Literal, Self

import numpy as np
from numpy.typing import NDArray

from photon.data.atomic import new_folder
from photon.data.document import Document
from photon.data.encode import encode_document, encode_documents
from photon.data.manifest import FILE_NAME, Manifest, Origin, ShardFile, Split
from photon.data.split import Encoded, split
from photon.data.tokenizer import Tokenizer
from photon.errors import DataError

__all__ = ["Manifest", "Origin", "ShardReader", "ShardWriter", "encode_and_split", "write_shards"]

SHARD_TOKENS = 500_000_000  # a gigabyte of uint16
_CHUNK_TOKENS = 1 << 22
_DTYPES: dict[str, np.dtype[np.unsignedinteger]] = {
    "uint16": np.dtype("<u2"),  # little-endian on every machine
    "uint32": np.dtype("<u4"),
}


def write_shards(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: Path,
    origin: Origin,
    *,
    workers: int = 1,
    notes: Sequence[str] = (),
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """Tokenise `documents` on `workers` threads, split them, and write `folder`; if this raises, nothing is there.

    Documents follow each other, an end-of-text after each. `notes` goes into the manifest as it is after the last
    document. DataError from reading passes through; so does that of a text too short for a sequence on both sides.
    """
    with new_folder(folder) as temporary:
        with (
            ShardWriter(temporary, tokenizer, shard_tokens) as writer,
            closing(encode_and_split(documents, tokenizer, origin, workers)) as items,
        ):
            for item, held in items:
                writer.write(item, held)
        return writer.finish(origin, notes)


def encode_and_split(
    documents: Iterable[Document], tokenizer: Tokenizer, origin: Origin, workers: int
) -> Generator[tuple[Encoded, bool], None, None]:
    """Each document of one source with its ids and whether it is held out, in order; raises what `split` raises."""
    need = origin.sequence_length + 1
    with closing(encode_documents(documents, tokenizer, workers)) as encoded:
        yield from split(encoded, origin.heldout_fraction, need, lambda document: encode_document(document, tokenizer))


class ShardWriter:
    """The files of one shard folder: open while documents come, as a context; its manifest is written last."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int = SHARD_TOKENS) -> None:
        self._folder, self._tokenizer = folder, tokenizer
        self._dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        self._train, self._heldout = (
            _SplitWriter(folder, name, _DTYPES[self._dtype], shard_tokens) for name in ("train", "heldout")
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._train.close()
        self._heldout.close()

    def write(self, item: Encoded, held: bool) -> None:
        """Append a document to its side of the split."""
        (self._heldout if held else self._train).write(item)

    def finish(self, origin: Origin, notes: Sequence[str]) -> Manifest:
        """Write the manifest, once the files are closed; DataError if a side holds no sequence of `origin`'s length."""
        # Sums and counts are of what lies in the files, not of what was meant to.
        train_split, train_counts = self._train.summary(self._tokenizer.vocab_size)
        heldout_split, heldout_counts = self._heldout.summary(self._tokenizer.vocab_size)
        need = origin.sequence_length + 1
        if min(train_split.tokens, heldout_split.tokens) < need:
            raise DataError(
                f"{train_split.tokens} training and {heldout_split.tokens} held-out tokens are too few: sequences of "
                f"{origin.sequence_length} need {need} of each; add text or lower data.sequence_length"
            )
        manifest = Manifest(
            dtype=self._dtype,
            tokenizer_sha256=self._tokenizer.sha256,
            vocab_size=self._tokenizer.vocab_size,
            end_of_text=self._tokenizer.end_of_text,
            origin=origin,
            train=train_split,
            heldout=heldout_split,
            unigram_loss=_unigram_loss(train_counts, heldout_counts),
            notes=list(notes),
        )
        (self._folder / FILE_NAME).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
        return manifest


def _unigram_loss(train: NDArray[np.int64], heldout: NDArray[np.int64]) -> float:
    """Cross-entropy, nats/token, of held-out token counts under the add-one-smoothed counts of train."""
    log_probability = np.log(train + 1.0) - math.log(int(train.sum()) + len(train))
    return float(-(heldout * log_probability).sum() / heldout.sum())


class _SplitWriter:
    """Appends documents to `train-00000.bin`, `train-00001.bin`, ... of `shard_tokens` tokens each."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype[np.unsignedinteger], shard_tokens: int) -> None:
        self._folder, self._name, self._dtype, self._shard_tokens = folder, name, dtype, shard_tokens
        self._paths: list[Path] = []
        self._file: IO[bytes] | None = None
        self._room = 0
        self._documents = 0
        self._bytes = 0

    def close(self) -> None:
        """Nothing is written after this."""
        if self._file is not None:
            self._file.close()

    def write(self, item: Encoded) -> None:
        """Append a document; it may run on into the next file."""
        self._documents += not item.is_tail
        self._bytes += len(item.document.text.encode())
        tokens = item.tokens.astype(self._dtype)
        while len(tokens):
            file = self._file if self._file is not None and self._room else self._next_file()
            part, tokens = tokens[: self._room], tokens[self._room :]
            file.write(part.tobytes())
            self._room -= len(part)

    def summary(self, vocab_size: int) -> tuple[Split, NDArray[np.int64]]:
        """What the closed files hold, read back from them, and how often each token id occurs."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        files = []
        for path in self._paths:
            tokens: NDArray[np.unsignedinteger] = np.memmap(path, dtype=self._dtype, mode="r")
            digest = hashlib.sha256()
            for start in range(0, len(tokens), _CHUNK_TOKENS):
                chunk = tokens[start : start + _CHUNK_TOKENS]
                digest.update(chunk.tobytes())
                counts += np.bincount(chunk, minlength=vocab_size)
            files.append(ShardFile(name=path.name, tokens=len(tokens), sha256=digest.hexdigest()))
        tokens_total = sum(file.tokens for file in files)
        return Split(documents=self._documents, tokens=tokens_total, bytes=self._bytes, files=files), counts

    def _next_file(self) -> IO[bytes]:
        if self._file is not None:
            self._file.close()
        path = self._folder / f"{self._name}-{len(self._paths):05d}.bin"
        self._paths.append(path)
        self._file = path.open("wb")
        self._room = self._shard_tokens
        return self._file


class ShardReader:
    """Read access to a shard folder: any training sequence by its index, and evenly spaced held-out ones.

    Sequence `i` of length L is the tokens [i L, i L + L + 1) of the split: the one token of overlap makes every
    token but the very first a target exactly once.
    """

    def __init__(self, folder: Path) -> None:
        """Open it and check every file's size against the manifest; DataError names what is missing or damaged."""
        self.folder = folder
        self.manifest = Manifest.load(folder)
        self._train = self._open(self.manifest.train)
        self._heldout = self._open(self.manifest.heldout)

    def train_sequences(self, sequence_length: int) -> int:
        """How many training sequences there are."""
        return max(0, self.manifest.train.tokens - 1) // sequence_length

    def heldout_sequences(self, sequence_length: int) -> int:
        """How many held-out sequences there are."""
        return max(0, self.manifest.heldout.tokens - 1) // sequence_length

    def read(self, indices: NDArray[np.int64], sequence_length: int) -> NDArray[np.int64]:
        """Training sequences by index: int64 [n, sequence_length + 1]. IndexError outside `train_sequences`."""
        count = self.train_sequences(sequence_length)
        if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= count):
            raise IndexError(f"{self.folder}: sequence outside [0, {count})")
        return _gather(self._train, indices, sequence_length)

    def heldout(self, sequence_length: int, max_sequences: int) -> NDArray[np.int64]:
        """At most `max_sequences` held-out sequences, evenly spaced: int64 [n, sequence_length + 1]."""
        count = self.heldout_sequences(sequence_length)
        wanted = min(count, max_sequences)
        indices = np.arange(wanted, dtype=np.int64) * count // max(1, wanted)
        return _gather(self._heldout, indices, sequence_length)

    def first_document(self, max_tokens: int) -> list[int]:
        """The first `max_tokens` tokens of the first training document, without its end-of-text."""
        tokens: list[int] = self._train[0][:max_tokens].tolist()
        end = self.manifest.end_of_text
        return tokens[: tokens.index(end)] if end in tokens else tokens

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of all text per token, end-of-text included."""
        train, heldout = self.manifest.train, self.manifest.heldout
        return (train.bytes + heldout.bytes) / (train.tokens + heldout.tokens)

    @property
    def bytes_per_token_heldout(self) -> float:
        """UTF-8 bytes of held-out text per held-out token, end-of-text included: turns nats/token into bits/byte."""
        return self.manifest.heldout.bytes / self.manifest.heldout.tokens

    @property
    def unigram_loss(self) -> float:
        """What a model that ignores context would reach on the held-out split, nats/token."""
        return self.manifest.unigram_loss

    def verify(self) -> None:
        """Read every file and compare its SHA-256; DataError names the first that differs."""
        for file in [*self.manifest.train.files, *self.manifest.heldout.files]:
            with (self.folder / file.name).open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest != file.sha256:
                raise self._damaged(file.name, "its content is not what was written (SHA-256 differs)")

    def _open(self, part: Split) -> list[NDArray[np.unsignedinteger]]:
        dtype = _DTYPES[self.manifest.dtype]
        if sum(file.tokens for file in part.files) != part.tokens:
            raise self._damaged(FILE_NAME, "its token counts do not add up")
        opened: list[NDArray[np.unsignedinteger]] = []
        for file in part.files:
            path = self.folder / file.name
            if not path.is_file():
                raise self._damaged(file.name, "it is missing")
            size = path.stat().st_size
            if size != file.tokens * dtype.itemsize or not size:
                raise self._damaged(file.name, f"it has {size} bytes instead of {file.tokens * dtype.itemsize}")
            opened.append(np.memmap(path, dtype=dtype, mode="r"))
        return opened

    def _damaged(self, name: str, what: str) -> DataError:
        return DataError(f"{self.folder / name}: {what}; delete {self.folder} to build it again")


def _gather(
    files: list[NDArray[np.unsignedinteger]], indices: NDArray[np.int64], sequence_length: int
) -> NDArray[np.int64]:
    """Windows [i L, i L + L + 1) of the concatenated files, without concatenating them."""
    positions = indices[:, None] * sequence_length + np.arange(sequence_length + 1, dtype=np.int64)
    if len(files) == 1:
        return np.asarray(files[0][positions], dtype=np.int64)
    ends = np.cumsum([len(file) for file in files])
    which = np.searchsorted(ends, positions, side="right")
    out = np.empty(positions.shape, dtype=np.int64)
    for number in np.unique(which):
        inside = which == number
        out[inside] = files[number][positions[inside] - (ends[number] - len(files[number]))]
    return out
