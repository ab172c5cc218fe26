"""Bytes of blobs that crossed the gateway, per node, in a small file that the round loop reads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from photon.link.partial import replace_file

SAVE_EVERY_S = 1.0
_LOG = logging.getLogger("photon.gateway")


class BlobTraffic(BaseModel):
    """Body bytes of one node since the run began: what was really moved, pieces that were sent twice included."""

    model_config = ConfigDict(extra="forbid", strict=True)

    bytes_up: int = Field(0, ge=0)
    bytes_down: int = Field(0, ge=0)


_ACCOUNTS = TypeAdapter(dict[str, BlobTraffic])


class TrafficAccounts:
    """The accounts in `path`; a gateway that starts again goes on with them. A kill loses at most a second of them."""

    def __init__(self, path: Path, nodes: Iterable[str]) -> None:
        self.path = path
        self._of = {node: BlobTraffic() for node in nodes}
        self._changed = False
        try:
            self._of |= read_traffic(path)
        except ValidationError:
            _LOG.warning("%s is damaged: bytes are counted from zero", path)

    def up(self, node: str, moved_bytes: int) -> None:
        """Count bytes of an upload's body."""
        self._of[node].bytes_up += moved_bytes
        self._changed = True

    def down(self, node: str, moved_bytes: int) -> None:
        """Count bytes of a download's body."""
        self._of[node].bytes_down += moved_bytes
        self._changed = True

    def save(self) -> None:
        """Write the file if a byte has moved since the last time."""
        if self._changed:
            self._changed = False
            replace_file(self.path, _ACCOUNTS.dump_json(self._of).decode())

    async def keep_saving(self) -> None:
        """Save every second, until cancelled."""
        while True:
            await asyncio.sleep(SAVE_EVERY_S)
            try:
                self.save()
            except OSError as error:
                self._changed = True
                _LOG.warning("%s cannot be written: %s", self.path, error.strerror)


def read_traffic(path: Path) -> dict[str, BlobTraffic]:
    """The accounts of every node; none if nothing has moved yet. Raises ValidationError, OSError."""
    try:
        return _ACCOUNTS.validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
