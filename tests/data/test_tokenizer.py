from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models

from photon.data.tokenizer import END_OF_TEXT, Tokenizer, train_tokenizer
from photon.errors import DataError


@given(text=st.text(max_size=60))
def test_any_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert tokenizer.end_of_text not in tokens


def test_text_that_spells_a_special_token_stays_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = f"before {END_OF_TEXT} after"
    plain = tokenizers.Tokenizer.from_str(tokenizer._inner.to_str())
    assert tokenizer.end_of_text in plain.encode(text).ids, "the library's default would inject a separator"
    tokenizer.save(tmp_path)
    for one in (tokenizer, Tokenizer.load(tmp_path)):
        assert one.end_of_text not in one.encode(text)
        assert one.decode(one.encode(text)) == text


def test_batches_encode_as_single_texts_do(tokenizer: Tokenizer) -> None:
    texts = ["", "hello world", "naïve 🙂", "x" * 1000]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_training_is_deterministic_and_bounded() -> None:
    sample = {"a": ["the cat sat on the mat " * 30], "b": ["def f(): return 1\n" * 30]}
    first, second = train_tokenizer(sample, 270), train_tokenizer(sample, 270)
    assert first.sha256 == second.sha256
    assert first.vocab_size == 270
    assert train_tokenizer({"a": sample["a"], "b": ["other text altogether " * 30]}, 270).sha256 != first.sha256


def test_without_a_sample_the_tokens_are_bytes() -> None:
    plain = train_tokenizer({}, 4096)
    assert plain.vocab_size == 257
    assert len(plain.encode("naïve")) == len("naïve".encode())


def test_a_vocabulary_beyond_the_text_costs_no_memory() -> None:
    """The library makes room for as many tokens as it is asked for, and ends the process where it cannot."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32));"
        "from photon.data.tokenizer import train_tokenizer;"
        "print(train_tokenizer({'a': ['low lower lowest'] * 3}, 2**32 - 1).vocab_size)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == train_tokenizer({"a": ["low lower lowest"] * 3}, 1000).vocab_size


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(DataError, match="at least 257"):
        train_tokenizer({}, 256)


def test_saved_folder_loads_in_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "The quick brown fox, naïve café 🙂"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.eos_token_id, theirs.bos_token_id) == (tokenizer.end_of_text, tokenizer.end_of_text)
    assert len(theirs) == tokenizer.vocab_size
    ours = Tokenizer.load(tmp_path)
    assert (ours.sha256, ours.encode(text)) == (tokenizer.sha256, tokenizer.encode(text))


def test_an_end_of_text_declared_elsewhere_is_found(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": END_OF_TEXT}}))
    assert Tokenizer.load(tmp_path).end_of_text == tokenizer.end_of_text


def test_a_tokenizer_without_end_of_text_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(DataError, match=r"no end-of-text token.*eos_token"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(DataError, match=r"'</s>' is not in its vocabulary"):
        Tokenizer.load(tmp_path)


def test_an_embedding_of_vocab_size_covers_ids_beyond_a_hole() -> None:
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 9, "<eos>": 3}))
    assert Tokenizer(inner, "<eos>").vocab_size == 10


def test_damaged_and_missing_folders_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: not a JSON object"):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        Tokenizer.load(tmp_path / "absent")
