"""A Hugging Face config that fits a run, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from photon.errors import ConfigError
from photon.model.hf_settings import fitted_settings


@pytest.mark.parametrize(("model_type", "key"), [("modernbert-decoder", "pad_token_id"), ("cwm", "bos_token_id")])
def test_special_tokens_that_must_be_numbers_do_not_start_from_scratch(
    model_type: str, key: str, tmp_path: Path
) -> None:
    """The numbers are another tokenizer's, and the embedding of a padding token would not be trained."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 320}))
    with pytest.raises(ConfigError, match=f"a '{model_type}' insists on the {key} .*pretrained"):
        fitted_settings(str(tmp_path), "scratch", 300, 16)
    assert fitted_settings(str(tmp_path), "pretrained", 320, 16).vocab_size == 320
