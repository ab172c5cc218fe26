"""Which devices a node trains on, how many processes share them, and how each process is set up.

Two settings are worth more on a CPU than the choice of model code. Threads: K single-threaded processes on K cores beat
one process with K threads, and more threads than cores cost a third. The allocator: glibc returns large blocks to the
kernel after each use, and faulting them in again costs 8-14% of a training step. Both are set here, visibly, and both
can be overridden: threads by `node.workers` and `node.threads`, the allocator by its own environment variables.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from photon.config import NodeConfig
from photon.errors import ConfigError

# Control groups, version 2: microseconds of CPU time per period, or `max`.
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
# Blocks below the first size come from the heap; the heap shrinks only when more than the second is free at its top.
# 64 MiB: a step's activations are smaller and stay, a model-sized buffer of the exchange is larger and goes back.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**26), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
# The same two for mallopt(3), by their numbers in malloc.h.
_MALLOPT = {"MALLOC_MMAP_THRESHOLD_": -3, "MALLOC_TRIM_THRESHOLD_": -1}


@dataclass(frozen=True)
class WorkerPlan:
    """One training process: its torch device (`cpu`, `mps`, `cuda:0`) and its CPU threads."""

    device: str
    threads: int


def available_cores() -> int:
    """CPU cores this process may use: fewer than the machine has under `taskset`, or with a container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if _CPU_QUOTA.exists():
        quota, period = _CPU_QUOTA.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def resolve_devices(requested: str, cuda_devices: int | None = None) -> list[str]:
    """The torch devices that `node.device` or a silo's `device` stands for; `cuda_devices` defaults to those present.

    `auto` is every CUDA device, or the CPU; `cuda` is every CUDA device. Raises ConfigError on a device that is absent.
    """
    present = torch.cuda.device_count() if cuda_devices is None else cuda_devices
    every = [f"cuda:{index}" for index in range(present)]
    if requested == "auto":
        return every or ["cpu"]
    if requested == "cpu":
        return ["cpu"]
    if requested == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError('node.device = "mps", but torch finds no Metal device here; use "auto" or "cpu"')
        return ["mps"]
    chosen = every if requested == "cuda" else [requested]
    if not chosen or not set(chosen) <= set(every):
        raise ConfigError(
            f'node.device = "{requested}", but torch finds {", ".join(every) or "no CUDA device"} here; use "auto"'
        )
    return chosen


def plan_workers(
    node: NodeConfig, nodes: int, cores: int | None = None, cuda_devices: int | None = None
) -> list[WorkerPlan]:
    """The processes that train `nodes` virtual nodes on this machine; never more processes than nodes.

    On GPUs one process per device; on a CPU one per core. `node.workers` overrides the number (more than devices: they
    take turns on them), `node.threads` the threads of each, which otherwise share the cores evenly.
    """
    cores = available_cores() if cores is None else cores
    devices = resolve_devices(node.device, cuda_devices)
    automatic = cores if devices == ["cpu"] else len(devices)
    workers = max(1, min(nodes, automatic if node.workers == "auto" else node.workers))
    threads = max(1, cores // workers) if node.threads == "auto" else node.threads
    return [WorkerPlan(devices[index % len(devices)], threads) for index in range(workers)]


def worker_environment(plan: WorkerPlan, base: Mapping[str, str]) -> dict[str, str]:
    """The environment to start a worker in: `base` and what has to be known before its first import.

    Threads are always those of the plan. The rest yields to what the user set in `base`.
    """
    environment = _KEEP_MEMORY | {"TOKENIZERS_PARALLELISM": "false"}
    if plan.device.startswith("cuda"):
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS repeats its sums only with a fixed workspace
    threads = str(plan.threads)
    return environment | dict(base) | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


def configure_process(plan: WorkerPlan) -> None:
    """Set up this process to train: threads, allocator, and TF32 for what stays float32 on CUDA.

    Also right for a process that was not started in `worker_environment`; call it before the first tensor.
    """
    torch.set_num_threads(plan.threads)
    if torch.get_num_interop_threads() != 1:
        torch.set_num_interop_threads(1)
    if plan.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
    if platform.libc_ver()[0] == "glibc":
        _keep_freed_memory(os.environ)


def resolve_precision(node: NodeConfig, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: bfloat16 by autocast over float32 weights, or float32 throughout.

    `auto` is bfloat16 on CUDA devices that have it in hardware (Ampere and later), else float32: on most CPUs bfloat16
    products are several times slower.
    """
    if node.precision == "auto":
        native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if node.precision == "bfloat16" else torch.float32


def use_compile(node: NodeConfig, device: torch.device) -> bool:
    """Whether to `torch.compile` the loss; `auto` is on CUDA only, since on a CPU it gains little and takes long."""
    return device.type == "cuda" if node.compile == "auto" else node.compile == "on"


def describe_device(device: torch.device) -> str:
    """A device for people and run records: `NVIDIA H100 80GB HBM3, 79 GiB` or `CPU, 1 thread`."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if device.type == "mps":
        return f"Apple GPU of {platform.processor() or platform.machine()}"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'' if threads == 1 else 's'}"


def _keep_freed_memory(environment: Mapping[str, str]) -> None:
    """Apply the allocator's defaults of `worker_environment` to the running process, unless its environment rules."""
    libc = ctypes.CDLL(None)
    for variable, option in _MALLOPT.items():
        if variable not in environment:
            libc.mallopt(option, int(_KEEP_MEMORY[variable]))
