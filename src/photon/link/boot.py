"""Whether files that are named by their sha256 can still be trusted: they can since the machine was started.

What arrives is checked before it gets its name, and is not synced to the disk. As long as the machine runs, a name
therefore says what is in the file, whichever processes have ended meanwhile. A power cut may leave other bytes under
the same name. So each folder of such files holds a marker with the boot in which its files were last known to be good;
in another boot they are hashed once, and what is not what its name says is removed: it can be fetched again.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

from photon.link.partial import replace_file

MARKER = "trusted.boot"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # of Linux; containers share it with their machine
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LOG = logging.getLogger("photon.link")


def this_boot() -> str:
    """Differs after each start of the machine; empty if the machine does not tell."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        pass
    import psutil  # type: ignore[import-untyped]  # it ships no types

    try:
        return f"started {round(psutil.boot_time())}"
    except (OSError, RuntimeError, psutil.Error):
        return ""


def verify_after_boot(folder: Path, *patterns: str) -> None:
    """Remove files of `folder`, of those that match a glob of `patterns`, whose names are sha256 of other bytes.

    Call it when the folder is opened, before anybody relies on a name. It reads the files at the first call after a
    start of the machine; later calls read the marker alone, unless the machine cannot tell one start from another.
    Files of other names are left alone. Raises OSError if the folder cannot be written.
    """
    boot, marker = this_boot(), folder / MARKER
    if boot and _content(marker) == boot.encode():
        return
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        if _SHA256.fullmatch(path.name) and path.is_file() and not _is_whole(path):
            _LOG.warning("%s is not what its name says since the machine was started anew: removed", path)
            path.unlink(missing_ok=True)
    replace_file(marker, boot)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _is_whole(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == path.name
    except FileNotFoundError:
        return True  # somebody else has taken it away
    except OSError:  # what the disk cannot give back is as lost as what it gives back wrong
        return False
