"""Who trains where: the plan as a table and as invariants, and the process settings as they really take effect."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from photon.config import NodeConfig
from photon.errors import ConfigError
from photon.node import device
from photon.node.device import (
    WorkerPlan,
    available_cores,
    describe_device,
    plan_workers,
    resolve_devices,
    resolve_precision,
    use_compile,
    worker_environment,
)


@pytest.mark.parametrize(
    ("options", "nodes", "cores", "cuda_devices", "expected"),
    [
        ({}, 4, 2, 0, [("cpu", 1), ("cpu", 1)]),
        ({}, 2, 8, 0, [("cpu", 4), ("cpu", 4)]),
        ({}, 1, 2, 0, [("cpu", 2)]),
        ({}, 4, 8, 2, [("cuda:0", 4), ("cuda:1", 4)]),
        ({}, 1, 8, 2, [("cuda:0", 8)]),
        ({"device": "cpu"}, 8, 2, 4, [("cpu", 1), ("cpu", 1)]),
        ({"device": "cuda:1"}, 4, 8, 2, [("cuda:1", 8)]),
        ({"device": "cuda"}, 4, 8, 2, [("cuda:0", 4), ("cuda:1", 4)]),
        ({"workers": 3}, 4, 8, 2, [("cuda:0", 2), ("cuda:1", 2), ("cuda:0", 2)]),
        ({"workers": 8, "threads": 2}, 3, 4, 0, [("cpu", 2), ("cpu", 2), ("cpu", 2)]),
        ({"workers": 1}, 4, 2, 0, [("cpu", 2)]),
    ],
)
def test_plan(
    options: dict[str, Any], nodes: int, cores: int, cuda_devices: int, expected: list[tuple[str, int]]
) -> None:
    plans = plan_workers(NodeConfig(**options), nodes, cores=cores, cuda_devices=cuda_devices)
    assert [(p.device, p.threads) for p in plans] == expected


@given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 8), st.one_of(st.just("auto"), st.integers(1, 100)))
def test_plan_never_oversubscribes_or_idles(nodes: int, cores: int, cuda_devices: int, workers: Any) -> None:
    plans = plan_workers(NodeConfig(workers=workers), nodes, cores=cores, cuda_devices=cuda_devices)
    assert 1 <= len(plans) <= nodes
    assert all(p.threads >= 1 for p in plans)
    assert len(plans) > cores or sum(p.threads for p in plans) <= cores
    if workers == "auto":
        assert len(plans) == min(nodes, cuda_devices or cores)
        assert len({p.device for p in plans}) == (len(plans) if cuda_devices else 1)


def test_plan_defaults_to_this_machine() -> None:
    plans = plan_workers(NodeConfig(device="cpu"), nodes=1000)
    assert [p.threads for p in plans] == [1] * available_cores()


@pytest.mark.parametrize(
    ("cpu_max", "expected"), [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("9900000 100000", 8)]
)
def test_cores_respect_a_container_quota(
    cpu_max: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(cpu_max + "\n")
    monkeypatch.setattr(device, "_CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert available_cores() == expected


@pytest.mark.parametrize(("requested", "present"), [("cuda", 0), ("cuda:1", 1), ("cuda:0", 0)])
def test_an_absent_device_is_refused(requested: str, present: int) -> None:
    with pytest.raises(ConfigError, match=requested):
        resolve_devices(requested, cuda_devices=present)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has a Metal device")
def test_absent_metal_is_refused() -> None:
    with pytest.raises(ConfigError, match="Metal"):
        resolve_devices("mps")


def test_environment_sets_threads_and_yields_to_the_user_elsewhere() -> None:
    base = {"PATH": "/bin", "OMP_NUM_THREADS": "64", "MALLOC_TRIM_THRESHOLD_": "7"}
    environment = worker_environment(WorkerPlan("cpu", 3), base)
    assert environment == {
        "PATH": "/bin",
        "OMP_NUM_THREADS": "3",
        "MKL_NUM_THREADS": "3",
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_MMAP_THRESHOLD_": str(2**26),
        "MALLOC_TRIM_THRESHOLD_": "7",
    }
    assert base["OMP_NUM_THREADS"] == "64"
    assert worker_environment(WorkerPlan("cuda:1", 1), {})["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


PROBE = """
import json, resource, torch
from photon.node.device import WorkerPlan, configure_process

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.empty(16 * 2**20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = page_faults()
configure_process(WorkerPlan("cpu", 2))
configure_process(WorkerPlan("cpu", 3))
page_faults()
print(json.dumps([first, page_faults(), torch.get_num_threads(), torch.get_num_interop_threads()]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator settings are glibc's")
@pytest.mark.parametrize("mmap_threshold", [None, "131072"])
def test_configured_process_keeps_its_memory(mmap_threshold: str | None) -> None:
    """Freed blocks come back without page faults, except where the user's environment decides otherwise."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    if mmap_threshold is not None:
        environment["MALLOC_MMAP_THRESHOLD_"] = mmap_threshold
    result = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, check=True, capture_output=True, text=True, timeout=120
    )
    before, after, threads, interop_threads = json.loads(result.stdout)
    assert (threads, interop_threads) == (3, 1)
    if mmap_threshold is None:
        assert after < before / 4
    else:
        assert after > before / 4


def test_precision_and_compile_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert resolve_precision(NodeConfig(), cpu) is torch.float32
    assert resolve_precision(NodeConfig(precision="bfloat16"), cpu) is torch.bfloat16
    assert resolve_precision(NodeConfig(precision="float32"), cpu) is torch.float32
    assert not use_compile(NodeConfig(), cpu)
    assert use_compile(NodeConfig(compile="on"), cpu)
    assert use_compile(NodeConfig(), torch.device("cuda"))
    assert not use_compile(NodeConfig(compile="off"), torch.device("cuda"))
    assert describe_device(cpu).startswith("CPU, ")
