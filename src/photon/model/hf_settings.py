"""The config of a Hugging Face model, fitted to a run or refused.

transformers takes seconds to import, so every function imports what it uses when it runs.
"""

from __future__ import annotations

from typing import Any

from photon.errors import ConfigError

# Checkpoints pad their embedding to round numbers; more spare rows than this mean another tokenizer.
MAX_PADDING_ROWS = 1024
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")


def read_settings(source: str) -> Any:
    """transformers' config of the model at `source`, a folder or hub id. Raises ConfigError if there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # of many kinds, where config.json says what cannot be
        raise ConfigError(f"{source!r} is neither a folder with a Hugging Face model nor a hub id: {error}") from error


def fitted_settings(source: str, weights: str, vocab_size: int, sequence_length: int) -> Any:
    """transformers' config of the model at `source`, fitted to the run or refused (ConfigError)."""
    settings = read_settings(source)
    if not hasattr(settings, "vocab_size"):
        raise ConfigError(
            f"model.hf = {source!r} is no plain language model (a {settings.model_type!r} has other inputs)"
        )
    longest = min((n for key in LENGTHS if (n := getattr(settings, key, None)) is not None), default=sequence_length)
    if weights == "pretrained":
        rows = settings.vocab_size
        if not 0 <= rows - vocab_size < MAX_PADDING_ROWS:
            raise ConfigError(
                f"model.hf = {source!r} has {rows} token embeddings, the tokenizer {vocab_size} tokens: "
                f"continued pre-training needs the model's own tokenizer, data.tokenizer = {source!r}"
            )
        if sequence_length > longest:
            raise ConfigError(
                f"model.hf = {source!r} knows positions up to {longest}: data.sequence_length = {sequence_length} "
                f"must be at most that"
            )
    else:
        settings.vocab_size = vocab_size
        for key in LENGTHS:
            if getattr(settings, key, None) is not None:
                setattr(settings, key, max(longest, sequence_length))
        # These name tokens of the tokenizer it came with; a padding token would even freeze its embedding.
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            try:
                setattr(settings, key, None)
            except Exception as error:  # of huggingface_hub's own kind
                raise ConfigError(
                    f"model.hf = {source!r} cannot be trained from scratch: a {settings.model_type!r} insists on the "
                    f'{key} of its own tokenizer; take model.hf_weights = "pretrained", or another type ("llama")'
                ) from error
    # Pre-training sees each token about once: no dropout, and no state of a generator to carry between rounds.
    for key, value in settings.to_dict().items():
        if ("dropout" in key or key.endswith(("pdrop", "layerdrop"))) and type(value) in (int, float):
            setattr(settings, key, type(value)(0))
    return settings
