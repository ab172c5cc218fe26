"""The C library's allocator: set where it is glibc's and nobody else has said anything."""

from __future__ import annotations

import ctypes
import platform
from unittest.mock import MagicMock

import pytest

from photon.aggregator.allocator import return_freed_memory


@pytest.mark.parametrize(
    ("library", "environment", "calls"),
    [("glibc", {}, [(-3, 2**20)]), ("glibc", {"MALLOC_MMAP_THRESHOLD_": "9"}, []), ("musl", {}, [])],
)
def test_only_glibc_is_told_and_a_user_s_word_stands(
    library: str, environment: dict[str, str], calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    libc = MagicMock()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(platform, "libc_ver", lambda: (library, "2.39"))
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return_freed_memory()
    assert [call.args for call in libc.mallopt.call_args_list] == calls
