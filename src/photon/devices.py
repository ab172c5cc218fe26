"""How fast devices are, as a plan assumes: peak arithmetic, memory, and the share of the peak that training reaches.

Peaks are the vendors' for dense bfloat16 products (float32 for `cpu`). The share (MFU) counts 6 N + 12 L T d operations
a token. It depends on model, batch and software: measure (`photon plan --device measured`), or give `--mfu`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from photon.errors import InputError
from photon.options import hint
from photon.planner import MachineSpeed

MEASURED = "measured"
_GIB = 2**30
# Scoring is the forward pass alone, a third of training's arithmetic.
_EVALUATION_SPEEDUP = 3.0


@dataclass(frozen=True)
class Device:
    """One device. `mfu` is assumed, `source` says after whom."""

    name: str
    peak_flops_per_s: float
    memory_bytes: int
    mfu: float
    source: str


def _device(name: str, peak_tflops: float, memory_gib: float, mfu: float, source: str) -> Device:
    return Device(name, peak_tflops * 1e12, round(memory_gib * _GIB), mfu, source)


_FOUNDRY = "MPT of 1B to 7B at 2048 tokens in MosaicML's llm-foundry, scripts/train/benchmarking/README.md"
_GUESS = "a guess below the H100's, for lack of published training runs"

DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        "b200": _device("NVIDIA B200", 2250, 180, 0.35, _GUESS),
        "h200": _device("NVIDIA H200 SXM", 989, 141, 0.42, f"as an H100: {_FOUNDRY} (0.41 to 0.46)"),
        "h100": _device("NVIDIA H100 SXM", 989, 80, 0.42, f"{_FOUNDRY} (0.41 to 0.46)"),
        "a100": _device("NVIDIA A100 80 GB", 312, 80, 0.55, f"{_FOUNDRY} (0.60 to 0.64), less for small models"),
        "a100-40gb": _device("NVIDIA A100 40 GB", 312, 40, 0.50, f"{_FOUNDRY} (0.50 to 0.55)"),
        "l40s": _device("NVIDIA L40S", 362, 48, 0.35, _GUESS),
        "a10": _device("NVIDIA A10", 125, 24, 0.40, _GUESS),
        "4090": _device("NVIDIA RTX 4090", 165, 24, 0.40, _GUESS),
        "3090": _device("NVIDIA RTX 3090", 71, 24, 0.45, _GUESS),
        "cpu": _device("two CPU cores with AVX-512", 0.30, 16, 0.40, "our decoder, docs/benchmarks.md"),
    }
)

# Beside training a node and the Aggregator work on one core: rates of the float32 model on the machine of
# docs/benchmarks.md, rounded down. `photon plan --device measured` replaces them.
DECODE_BYTES_PER_S = 0.8e9  # sha256 at 1.0e9 and a copy
ENCODE_BYTES_PER_S = 0.8e9
MERGE_BYTES_PER_S = 0.25e9  # 0.09 s for four replies of 5.2 MB: read, hash, verify, fold
OUTER_BYTES_PER_S = 0.25e9
DISK_BYTES_PER_S = 0.7e9  # written and synced
CONTROL_S = {"flower": 3.0, "local": 0.1}  # a round with next to nothing to train took 2.9 to 5.0 s over Flower


def device_named(name: str, option: str = "--device") -> Device:
    """Raises InputError, which names the option, for a device that is not in the table."""
    found = DEVICES.get(name.lower())
    if found is None:
        raise InputError(f"{option} {name!r} is not known; {hint(name, [*DEVICES, MEASURED])}")
    return found


def device_speed(device: Device, devices_per_node: int, mfu: float | None, flops_per_token: float) -> MachineSpeed:
    """A node of so many devices: tokens/s = devices x peak x MFU / (operations per token)."""
    rate = devices_per_node * device.peak_flops_per_s * (device.mfu if mfu is None else mfu)
    return assumed_speed(rate / flops_per_token)


def assumed_speed(tokens_per_s: float) -> MachineSpeed:
    """A node that trains so many tokens a second, with assumed rates for everything else."""
    return MachineSpeed(
        tokens_per_s=tokens_per_s,
        evaluation_tokens_per_s=_EVALUATION_SPEEDUP * tokens_per_s,
        decode_bytes_per_s=DECODE_BYTES_PER_S,
        encode_bytes_per_s=ENCODE_BYTES_PER_S,
        merge_bytes_per_s=MERGE_BYTES_PER_S,
        outer_bytes_per_s=OUTER_BYTES_PER_S,
        disk_bytes_per_s=DISK_BYTES_PER_S,
        control_s=CONTROL_S["flower"],
    )


def ideal_speed(tokens_per_s: float) -> MachineSpeed:
    """The paper's model: a node trains, and nothing else takes time."""
    return MachineSpeed(
        tokens_per_s=tokens_per_s,
        evaluation_tokens_per_s=math.inf,
        decode_bytes_per_s=math.inf,
        encode_bytes_per_s=math.inf,
        merge_bytes_per_s=math.inf,
        outer_bytes_per_s=math.inf,
        disk_bytes_per_s=math.inf,
        control_s=0.0,
    )
