"""What can be asked of a trained run: held-out scores, text, and the model in Hugging Face form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from photon.aggregator.scores import Tally
from photon.data.shards import ShardReader
from photon.data.sources import read_source
from photon.data.tokenizer import Tokenizer
from photon.errors import DataError, InputError
from photon.events import Scores
from photon.model.generate import generate
from photon.model.hf import export
from photon.node.heldout import HeldOut, held_out, score
from photon.node.trainer import Trainer
from photon.run import Run, load_trained
from photon.runfolder import RunFolder


def evaluate_run(
    folder: RunFolder, texts: list[str], max_sequences: int | None, round_index: int | None = None, field: str = "text"
) -> tuple[Scores, dict[str, Scores]]:
    """Scores of a run's model, (pooled, by name): per silo, or on the given sources of text.

    `field` holds the text of their .jsonl and .parquet records. The model is that of a committed round, here and
    below; None: the newest. Raises DataError if a source cannot be read or holds no two tokens, and what
    `load_trained` raises.
    """
    run, model, _ = load_trained(folder, round_index)
    trainer = Trainer(model, run.recipe.node, torch.device("cpu"), run.recipe.total_steps)
    tally = Tally()
    sources = _given(run, texts, field) if texts else _silos(run, max_sequences or run.recipe.evaluation.sequences)
    for name, parts in sources:
        tally.add(name, score(trainer, parts, run.recipe.evaluation.batch_size))
    return tally.pooled(), tally.silos()


def continue_text(
    folder: RunFolder,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    round_index: int | None = None,
) -> str:
    """What a run's model writes after `prompt`. Raises InputError if the prompt is not text."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # what a terminal of another encoding hands over
        raise InputError(f"character {error.start + 1} of the prompt is not UTF-8: type it anew") from error
    run, model, _ = load_trained(folder, round_index)
    encoded = run.tokenizer.encode(prompt) or [run.tokenizer.end_of_text]
    return run.tokenizer.decode(generate(model, encoded, tokens, temperature, top_k, seed, run.tokenizer.end_of_text))


def export_run(folder: RunFolder, out: Path, round_index: int | None = None) -> None:
    """Write a run's model as a Hugging Face folder. Raises InputError rather than overwrite something else."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder: choose another place for the model")
    run, model, _ = load_trained(folder, round_index)
    export(model, run.recipe.model, folder.tokenizer, out)


def _silos(run: Run, max_sequences: int) -> Iterator[tuple[str, list[HeldOut]]]:
    if not run.sites:
        raise InputError("the owners' text is not on this machine: give text to score with --data")
    length = run.recipe.data.sequence_length
    for site in run.sites:
        if site.evaluates:
            yield site.name, [held_out(ShardReader(source), length, max_sequences) for source in site.sources]


def _given(run: Run, texts: list[str], field: str) -> Iterator[tuple[str, list[HeldOut]]]:
    for text in texts:
        yield text, _windows(text, field, run.tokenizer, run.recipe.data.sequence_length)


def _windows(spec: str, field: str, tokenizer: Tokenizer, sequence_length: int) -> list[HeldOut]:
    """All of a source's tokens as windows; the last one is as short as what is left."""
    documents = [document.text for document in read_source(spec, field, None)]
    encoded = tokenizer.encode_batch(documents)
    stream = np.array([token for ids in encoded for token in (*ids, tokenizer.end_of_text)], dtype=np.int64)
    if len(stream) < 2:
        raise DataError(f"{spec}: no text to score")
    bytes_per_token = sum(len(text.encode()) for text in documents) / len(stream)
    # There is no training text to take a unigram from: the text's own entropy is the best any unigram could do.
    shares = np.unique(stream, return_counts=True)[1] / len(stream)
    unigram_loss = float(-(shares * np.log(shares)).sum())
    full = (len(stream) - 1) // sequence_length
    starts = np.arange(full)[:, None] * sequence_length
    windows = [stream[starts + np.arange(sequence_length + 1)]] if full else []
    rest = stream[full * sequence_length :]
    if len(rest) > 1:
        windows.append(rest[None])
    return [HeldOut(window, bytes_per_token, unigram_loss) for window in windows]
