from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from photon.data.manifest import FILE_NAME, Manifest, Origin, ShardFile, Split
from photon.data.shards import ShardReader
from photon.data.tokenizer import Tokenizer, train_tokenizer

PROSE = "The quick brown fox jumps over the lazy dog; naïve café, 日本語 🙂.\n"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer({"a": [PROSE * 20], "b": ["def f(x):\n    return x + 1\n" * 20]}, 300)


@pytest.fixture
def origin() -> Callable[..., Origin]:
    def make(sequence_length: int = 8, heldout_fraction: float = 0.1) -> Origin:
        return Origin(
            source="test",
            field="text",
            fingerprint="0" * 16,
            heldout_fraction=heldout_fraction,
            sequence_length=sequence_length,
            max_bytes=None,
        )

    return make


@pytest.fixture
def numbered(tmp_path: Path, origin: Callable[..., Origin]) -> Callable[..., ShardReader]:
    """Shards whose token at place i is `first + i`: a sequence tells by its content which one it is."""

    def make(tokens: int, first: int = 0, shard_tokens: int = 1 << 20, heldout: int = 100) -> ShardReader:
        folder = tmp_path / f"numbered-{first}-{tokens}-{shard_tokens}"
        folder.mkdir()
        splits = {}
        for name, values in (("train", np.arange(tokens) + first), ("heldout", np.arange(heldout))):
            files = []
            for number, start in enumerate(range(0, len(values), shard_tokens)):
                data = values[start : start + shard_tokens].astype("<u4").tobytes()
                path = folder / f"{name}-{number:05d}.bin"
                path.write_bytes(data)
                files.append(ShardFile(name=path.name, tokens=len(data) // 4, sha256=hashlib.sha256(data).hexdigest()))
            splits[name] = Split(documents=1, tokens=len(values), bytes=len(values), files=files)
        manifest = Manifest(
            dtype="uint32",
            tokenizer_sha256="0" * 64,
            vocab_size=1 << 31,
            end_of_text=0,
            origin=origin(),
            train=splits["train"],
            heldout=splits["heldout"],
            unigram_loss=1.0,
            notes=[],
        )
        (folder / FILE_NAME).write_text(manifest.model_dump_json())
        return ShardReader(folder)

    return make
