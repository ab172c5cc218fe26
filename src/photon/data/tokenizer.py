"""Tokenizer: a byte-level BPE trained on a declared sample, or any Hugging Face tokenizer with an end-of-text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from photon.errors import DataError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """A `tokenizers.Tokenizer` and its end-of-text token, the separator of documents.

    Text never turns into special tokens, even when it spells one (`<|endoftext|>` in a document is ordinary text),
    and nothing is added around it: who packs documents appends `end_of_text`.
    """

    def __init__(self, inner: tokenizers.Tokenizer, end_of_text: str) -> None:
        """Take over `inner` (its truncation and padding are switched off); DataError if it lacks `end_of_text`."""
        found = inner.token_to_id(end_of_text)
        if found is None:
            raise DataError(f"the tokenizer's end-of-text token {end_of_text!r} is not in its vocabulary")
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        self._inner = inner
        self._end_of_text = end_of_text
        self.end_of_text: int = found
        # Ids can have holes (reserved tokens): an embedding must cover the highest one.
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self.sha256: str = hashlib.sha256(f"{end_of_text}\n{inner.to_str()}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The token ids of each text; the library releases the GIL, so threads may call this at once."""
        return [encoding.ids for encoding in self._inner.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, tokens: list[int]) -> str:
        """The text of `tokens`; special tokens are left out, torn characters become U+FFFD."""
        return str(self._inner.decode(tokens, skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Write what `transformers.AutoTokenizer.from_pretrained(folder)` loads into the existing `folder`.

        Begin- and end-of-text are both the separator: it is what a model trained on the stream has seen.
        """
        self._inner.encode_special_tokens = False  # the reader decides; the file must not depend on ours
        text = self._inner.to_str(pretty=True)
        self._inner.encode_special_tokens = True
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._end_of_text,
            "eos_token": self._end_of_text,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, source: Path | str) -> Tokenizer:
        """The tokenizer in a folder, or of a Hugging Face hub id (from its cache when offline).

        DataError if there is none, or if it declares no end-of-text token.
        """
        folder = Path(source)
        if (folder / "tokenizer.json").is_file() and (end_of_text := _declared_end_of_text(folder)):
            return cls(_read(folder / "tokenizer.json"), end_of_text)
        if not folder.is_dir() and (isinstance(source, Path) or folder.is_absolute() or source.startswith((".", "~"))):
            raise DataError(f"{source}: no such folder with a tokenizer")
        return _from_transformers(str(source))


def train_tokenizer(samples: Mapping[str, Iterable[str]], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` ids (256 bytes and end-of-text included) on every owner's sample.

    `samples` maps an owner to its texts. With too little text the vocabulary ends up smaller; with none it is bytes.
    """
    if vocab_size < 257:
        raise DataError(f"data.vocab_size = {vocab_size}: a byte-level vocabulary needs at least 257")
    texts = [text for given in samples.values() for text in given]
    # No more than that can come out, since each merge shortens the text; the library makes room for all it is asked.
    most = 257 + sum(len(text.encode()) for text in texts)
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, most),
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner, END_OF_TEXT)


def _read(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise DataError(f"{path}: not a tokenizer of the `tokenizers` library ({error})") from error


def _declared_end_of_text(folder: Path) -> str | None:
    """The eos_token that the folder's own files name; None leaves it to transformers, which knows class defaults."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            declared: Any = json.loads(path.read_text(encoding="utf-8"))["eos_token"]
        except KeyError:
            continue
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: not a JSON object ({error})") from error
        token = declared.get("content") if isinstance(declared, dict) else declared
        if isinstance(token, str):
            return token
    return None


def _from_transformers(source: str) -> Tokenizer:
    # Importing transformers takes seconds, so only tokenizers that need it pay.
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise DataError(
            f"data.tokenizer = {source!r}: no tokenizer can be loaded from this folder or hub id "
            f"({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__})"
        ) from error
    inner = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(inner, tokenizers.Tokenizer):
        raise DataError(f"data.tokenizer = {source!r} has no fast (`tokenizers`) form; choose one that has")
    if loaded.eos_token is None:
        raise DataError(
            f"data.tokenizer = {source!r} has no end-of-text token to separate documents; "
            'set "eos_token" in its tokenizer_config.json, or choose another tokenizer'
        )
    return Tokenizer(inner, str(loaded.eos_token))
