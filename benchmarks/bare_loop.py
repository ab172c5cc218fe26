"""One training step: Photon's decoder and Trainer against a nanoGPT-style model and loop, on a CPU.

Both do the same work (before timing, equal weights must give equal losses and gradients on one batch), each in its
own way: `photon` with the stream, the loss in pieces and the Trainer's bookkeeping, `bare` with random windows, whole
logits and nothing else. A third variant, our decoder in the bare loop, tells the model's share from the Trainer's.
Blocks of steps take turns in one process. At least 1.0 is wanted: the federation must not cost a step any speed.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from benchmarks.bare import SmallGPT, adamw, copy_weights, gpt_config, random_windows, train_bare
from benchmarks.common import (
    DATA_DIR,
    RESULTS,
    DataDir,
    Out,
    Report,
    Spread,
    builtin_text,
    pin,
    pooled_stream,
    refuse_unknown,
    take_turns,
)
from photon.config import NodeConfig
from photon.data.stream import Stream
from photon.model.build import build_model
from photon.model.decoder import Decoder
from photon.node.trainer import Trainer

# name: layers, width, heads. With a vocabulary of 4096: 1.5, 3.9 and 12.3 million numbers, embeddings included.
SIZES = {"1M": (5, 128, 4), "3M": (7, 192, 6), "10M": (6, 384, 6)}
LENGTH, VOCABULARY, BATCH_SIZE = 256, 4096, 8
CPU = torch.device("cpu")


def main(
    sizes: Annotated[list[str] | None, typer.Option(help="Of 1M, 3M, 10M; repeatable.")] = None,
    turns: Annotated[int, typer.Option(help="Measured turns per size.", min=1)] = 12,
    seconds_per_block: Annotated[float, typer.Option(help="CPU seconds of one variant's block of steps.")] = 1.5,
    data_dir: DataDir = DATA_DIR,
    out: Out = RESULTS,
) -> None:
    """Tokens per CPU second of Photon's Trainer over a nanoGPT-style loop, one thread, AdamW."""
    refuse_unknown("--sizes", sizes, SIZES)
    pin()
    report = Report("bare_loop", out)
    stream = pooled_stream(builtin_text(data_dir), LENGTH, seed=1)
    for name in sizes or list(SIZES):
        report.add(compare(name, stream, turns, seconds_per_block))
    report.show("tokens per CPU second: median; ratios of speed: median over turns [quartiles]")


def compare(name: str, stream: Stream, turns: int, seconds_per_block: float) -> dict[str, object]:
    """Measure one size."""
    layers, width, heads = SIZES[name]
    model = build_model(gpt_config(layers, width, heads), VOCABULARY, LENGTH, seed=1)
    assert isinstance(model, Decoder)
    small = SmallGPT(layers, width, heads, VOCABULARY, LENGTH)
    check_same_work(model, small, stream)

    node = NodeConfig(optimizer="adamw", schedule="constant", device="cpu", batch_size=BATCH_SIZE)
    trainer = Trainer(model, node, CPU, total_steps=10**6)
    optimizer = adamw(small)
    decoder = build_model(gpt_config(layers, width, heads), VOCABULARY, LENGTH, seed=1)
    decoder_optimizer = adamw(decoder)
    windows = random_windows(stream.batch(0, 4096)[:, 1:].astype("uint16").ravel(), BATCH_SIZE, LENGTH, CPU, seed=1)
    steps, position = 1, 0

    def photon() -> None:
        nonlocal position
        trainer.train(stream, position, BATCH_SIZE, steps, 0, lambda step, loss: True)
        position += steps * BATCH_SIZE

    def bare() -> None:
        for loss in train_bare(small, optimizer, small.parameters(), windows, [1.0] * steps):
            loss.item()

    def decoder_in_bare_loop() -> None:
        for loss in train_bare(decoder.loss, decoder_optimizer, decoder.parameters(), windows, [1.0] * steps):
            loss.item()

    variants = {"photon": photon, "bare": bare, "decoder": decoder_in_bare_loop}
    once = take_turns(variants, 2)
    steps = max(1, round(seconds_per_block / Spread(once["bare"]).median))
    seconds = take_turns(variants, turns)
    tokens = steps * BATCH_SIZE * LENGTH
    return {
        "size": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "photon tokens/s": tokens / Spread(seconds["photon"]).median,
        "bare tokens/s": tokens / Spread(seconds["bare"]).median,
        "photon / bare": str(Spread.of_ratio(seconds["bare"], seconds["photon"])),
        "decoder in bare loop / bare": str(Spread.of_ratio(seconds["bare"], seconds["decoder"])),
        "turns": turns,
        "steps per block": steps,
    }


def check_same_work(model: Decoder, small: SmallGPT, stream: Stream) -> None:
    """With equal weights the two must give equal losses and gradients, or the comparison is void."""
    copy_weights(model, small)
    batch = torch.from_numpy(stream.batch(0, 2))
    ours, theirs = model.loss(batch[:, :-1], batch[:, 1:]), small(batch[:, :-1], batch[:, 1:])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    norms = []
    for loss, weights in ((ours, model.parameters()), (theirs, small.parameters())):
        gradients = torch.autograd.grad(loss, list(weights))
        norms.append(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
    torch.testing.assert_close(*norms, atol=1e-5, rtol=1e-4)


if __name__ == "__main__":
    typer.run(main)
