"""Memory within the limits of control groups."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from photon.node import memory
from photon.node.memory import available_memory, total_memory


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 1000 bytes, 900 of them free, whose groups a test writes."""
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "_GROUP_OF_PROCESS", tmp_path / "own")
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=1000, available=900))
    return tmp_path


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_without_groups_it_is_the_machine_s(groups: Path) -> None:
    assert (total_memory(), available_memory()) == (1000, 900)


@pytest.mark.parametrize("own", ["0::/job/step", "4:cpu:/\n0::/job/step"])
def test_the_nearest_limit_around_the_process_counts(own: str, groups: Path) -> None:
    write(groups, own=own)
    write(groups / "job", memory__max="500", memory__current="450", memory__stat="anon 250\ninactive_file 200")
    write(groups / "job" / "step", memory__max="max", memory__current="10")
    assert (total_memory(), available_memory()) == (500, 250)
    write(groups / "job" / "step", memory__max="300", memory__current="310")
    assert (total_memory(), available_memory()) == (300, 0)
    write(groups / "job" / "step", memory__max="5000", memory__current="0")
    assert (total_memory(), available_memory()) == (500, 250)


def test_a_container_is_its_own_root(groups: Path) -> None:
    write(groups, own="0::/../../outside", memory__max="400", memory__current="100", memory__stat="")
    assert (total_memory(), available_memory()) == (400, 300)


def test_groups_of_version_1(groups: Path) -> None:
    write(groups, own="5:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/")
    unlimited = "9223372036854771712"
    write(groups / "memory", memory__limit_in_bytes="600", memory__usage_in_bytes="50", memory__stat="cache 9")
    assert (total_memory(), available_memory()) == (600, 550)
    write(groups / "memory", memory__limit_in_bytes=unlimited)
    assert (total_memory(), available_memory()) == (1000, 900)
    write(groups / "memory" / "docker" / "abc", memory__limit_in_bytes="200", memory__usage_in_bytes="60")
    assert (total_memory(), available_memory()) == (200, 140)
