"""Main memory that this process may use: the machine's, or less where its control group has a limit."""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]  # it ships no types

_GROUP_OF_PROCESS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def total_memory() -> int:
    """Bytes of the machine, or the lowest limit around this process."""
    return min([int(psutil.virtual_memory().total), *(limit for _, limit in _limits())])


def available_memory() -> int:
    """Bytes that may still be taken: what is left of the machine, or of the tightest limit around this process."""
    left = [max(0, limit - _used(group)) for group, limit in _limits()]
    return min([int(psutil.virtual_memory().available), *left])


def _limits() -> list[tuple[Path, int]]:
    """The control groups of memory, of version 1 or 2, that this process is in, each with its limit in bytes.

    A container sees its own group as the root, but may be told the path that the group has outside: what is not there
    is passed over.
    """
    found = []
    for line in _lines(_GROUP_OF_PROCESS):
        _, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        if kinds and "memory" not in kinds.split(","):
            continue
        root, name = (_GROUPS / "memory", "memory.limit_in_bytes") if kinds else (_GROUPS, "memory.max")
        group = root / path.strip("/")
        for place in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
            found += [(place, int(text)) for text in _lines(place / name) if text.isdecimal()]  # not: max
    return found


def _used(group: Path) -> int:
    """Bytes that a group has taken, less the cached files that it gives back when asked."""
    used = sum(int(text) for name in ("memory.current", "memory.usage_in_bytes") for text in _lines(group / name))
    cached = [line.removeprefix("inactive_file ") for line in _lines(group / "memory.stat")]
    return used - sum(int(text) for text in cached if text.isdecimal())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # of another system, or of the other version
        return []
