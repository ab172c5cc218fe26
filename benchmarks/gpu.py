"""Training speed on one CUDA device at the paper's smallest size: 125M parameters, 2048 tokens, bfloat16.

For each shape, with and without `torch.compile`: Photon's Trainer, and a hand-written loop over the same model (and,
for GPT-2's shape, over a nanoGPT-style model of its own). Tokens are random: speed does not depend on them. Model
FLOPs utilisation (MFU) counts 6 N + 12 L T d per token over the peak that is given; the H100's dense bfloat16 peak is
989 TFLOP/s. `--device cpu --toy` runs the same code in seconds, to see that it runs; its numbers mean nothing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.bare import SmallGPT, adamw, random_windows, train_bare
from benchmarks.common import RESULTS, Out, Report, Spread, pin, refuse_unknown
from photon.config import ModelConfig, NodeConfig
from photon.model.base import LanguageModel
from photon.model.build import build_model
from photon.node.trainer import Trainer
from photon.shapes import apply_shape

GPT = {"layers": 12, "width": 768, "heads": 12, "positions": "learned"}
SHAPES: dict[str, dict[str, object]] = {
    "mpt-125m": apply_shape({"preset": "mpt-125m"}),
    "llama-125m": apply_shape({"preset": "llama-125m"}),
    "gpt-125m": dict(GPT),
}
LENGTH, VOCABULARY = 2048, 50368
STEPS = 10  # of a measured block
TOY: dict[str, object] = {"layers": 2, "width": 64, "heads": 2}

Step = Callable[[int], None]


class RandomTokens:
    """A batch source of random tokens: one array, read round and round."""

    def __init__(self, vocabulary: int, length: int, sequences: int) -> None:
        self.array = np.random.default_rng(1).integers(0, vocabulary, (sequences, length + 1), dtype=np.int64)

    def batch(self, position: int, size: int) -> np.ndarray:
        """See `photon.node.trainer.BatchSource`."""
        return self.array[np.arange(position, position + size) % len(self.array)]


def main(
    shapes: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SHAPES)}; repeatable; default all.")] = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:N or cpu.")] = "cuda",
    batch_size: Annotated[int, typer.Option(help="Sequences per step, in one forward pass.", min=1)] = 16,
    turns: Annotated[int, typer.Option(help="Measured blocks of each variant.", min=1)] = 5,
    peak_tflops: Annotated[float, typer.Option(help="Dense bfloat16 peak of the device, for MFU.")] = 989.0,
    toy: Annotated[bool, typer.Option("--toy", help="A tiny model and short text, to see that it runs.")] = False,
    out: Out = RESULTS,
) -> None:
    """Tokens per second and MFU of the Trainer and of bare loops on one CUDA device."""
    refuse_unknown("--shapes", shapes, SHAPES)
    where = torch.device(device)
    pin(device=device)
    report = Report("gpu", out)
    length, vocabulary = (64, 512) if toy else (LENGTH, VOCABULARY)
    for shape in shapes or list(SHAPES):
        config = ModelConfig.model_validate(SHAPES[shape] | (TOY if toy else {}))
        bench = Bench(where, config, vocabulary, length, batch_size)
        for compile_it in (False, True):
            for loop, build in bench.loops(compile_it).items():
                row: dict[str, object] = {"shape": shape, "compile": "on" if compile_it else "off", "loop": loop}
                try:
                    seconds, peak_bytes = bench.time(build, turns)
                except torch.OutOfMemoryError:
                    report.add(row | {"tokens/s": "out of memory"})
                    continue
                speed = Spread([STEPS * batch_size * length / s for s in seconds])
                row |= {"tokens/s": round(speed.median), "quartiles": f"{speed.low:.0f} to {speed.high:.0f}"}
                row |= {"MFU": f"{speed.median * bench.flops_per_token / (peak_tflops * 1e12):.1%}"}
                row |= {"peak memory GiB": round(peak_bytes / 2**30, 2)}
                report.add(row | {"batch": batch_size, "parameters": bench.parameters})
    report.show(f"one device, {length} tokens a sequence, {vocabulary} words{', TOY SIZE' if toy else ''}")


class Bench:
    """One shape on one device. Variants run one after the other, each alone in memory: their peaks are their own."""

    def __init__(
        self, device: torch.device, config: ModelConfig, vocabulary: int, length: int, batch_size: int
    ) -> None:
        self.device, self.config, self.vocabulary = device, config, vocabulary
        self.length, self.batch_size = length, batch_size
        self.tokens = RandomTokens(vocabulary, length, sequences=max(256, 2 * batch_size))
        model = self.decoder()
        self.flops_per_token = model.flops_per_token(length)
        self.parameters = sum(p.numel() for p in model.parameters())

    def decoder(self) -> LanguageModel:
        """Photon's model, on the CPU."""
        return build_model(self.config, self.vocabulary, self.length, seed=1)

    def loops(self, compile_it: bool) -> dict[str, Callable[[], Step]]:
        """What to compare: name -> a function that builds it."""
        loops: dict[str, Callable[[], Step]] = {
            "photon": lambda: self.photon(compile_it),
            "bare, same model": lambda: self.bare(self.decoder(), compile_it),
        }
        if self.config.positions == "learned":
            shape = (self.config.layers, self.config.width, self.config.heads)
            loops["bare, nanoGPT-style"] = lambda: self.bare(SmallGPT(*shape, self.vocabulary, self.length), compile_it)
        return loops

    def photon(self, compile_it: bool) -> Step:
        """Photon's Trainer; a call takes so many steps, as one round would."""
        node = NodeConfig(
            optimizer="adamw",
            schedule="constant",
            device=str(self.device),
            precision="bfloat16",
            compile="on" if compile_it else "off",
            micro_batch_size=self.batch_size,
        )
        trainer = Trainer(self.decoder(), node, self.device, total_steps=10**6)
        return lambda steps: void(trainer.train(self.tokens, 0, self.batch_size, steps, 0, lambda step, loss: True))

    def bare(self, model: torch.nn.Module, compile_it: bool) -> Step:
        """The hand-written loop; it reads the losses once, at the end of a block."""
        model.to(self.device)
        parameters = list(model.parameters())
        optimizer = adamw(model)
        loss_of = model.loss if isinstance(model, LanguageModel) else model
        compiled = torch.compile(loss_of) if compile_it else loss_of
        flat = self.tokens.array[:, 1:].astype("uint16" if self.vocabulary <= 2**16 else "uint32").ravel()
        windows = random_windows(flat, self.batch_size, self.length, self.device, seed=1)

        def loss_in_bfloat16(inputs: Tensor, targets: Tensor) -> Tensor:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                loss: Tensor = compiled(inputs, targets)
                return loss

        def take(steps: int) -> None:
            losses = train_bare(loss_in_bfloat16, optimizer, parameters, windows, [1.0] * steps)
            torch.stack(losses).cpu()

        return take

    def time(self, build: Callable[[], Step], turns: int) -> tuple[list[float], int]:
        """(wall seconds of each block, peak bytes); building, compiling and a warm-up come before."""
        step = build()
        step(3)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = []
        for _ in range(turns):
            self.synchronise()
            began = time.perf_counter()
            step(STEPS)
            self.synchronise()
            seconds.append(time.perf_counter() - began)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        del step
        gc.collect()  # modules and hooks refer to each other
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return seconds, peak

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def void(result: object) -> None:
    """Drop a result, where a function without one is wanted."""


if __name__ == "__main__":
    typer.run(main)
