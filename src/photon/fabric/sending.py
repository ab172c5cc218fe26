"""A node's update on its way up, from the moment it is durable: it travels while the node's own state is saved.

What was sent counts for nothing until a reply names it. So it may begin before the node has committed, and be left
half-way when the work is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event, Thread

from photon.link.body import FileBody
from photon.link.client import GatewayClient
from photon.link.transfer import OnBytes, upload

_POLL_S = 0.5


class _LeftError(Exception):
    """Nobody wants the rest any more."""


@dataclass
class _Upload:
    sha256: str
    left: Event = field(default_factory=Event)
    thread: Thread | None = None
    error: Exception | None = None

    @property
    def is_in_vain(self) -> bool:
        return self.left.is_set() or self.error is not None


class Sending:
    """One upload at a time, on a thread of its own."""

    def __init__(self, client: GatewayClient, streams: int) -> None:
        self._client, self._streams = client, streams
        self._upload: _Upload | None = None

    def begin(self, sha256: str, body: FileBody, deadline_s: float, on_bytes: OnBytes) -> None:
        """Send `body`, if it is not on its way or there already; what else is on its way ends first. Raises nothing.

        `deadline_s` and `on_bytes` are those of `upload`; what `on_bytes` raises ends it.
        """
        if (current := self._upload) is not None:
            if current.sha256 == sha256 and not current.is_in_vain:
                return
            current.left.set()
            if current.thread is not None:
                current.thread.join()  # a store keeps one unfinished upload of a node: two would undo each other
        self._upload = new = _Upload(sha256)
        thread = Thread(target=self._run, args=(new, body, deadline_s, on_bytes), name="photon-sending", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no thread can be started
            new.error = error
        else:
            new.thread = thread

    def finish(self, check: Callable[[], None]) -> None:
        """Wait for what was begun last, asking `check` meanwhile. Raises what kept it from arriving, and as `check`."""
        if (current := self._upload) is None:
            return
        while current.thread is not None and current.thread.is_alive():
            check()
            current.thread.join(_POLL_S)
        if current.error is not None:
            raise current.error

    def leave(self) -> None:
        """Send no more of what was begun last, and forget that it was sent. Does not wait."""
        if self._upload is not None:
            self._upload.left.set()

    def _run(self, current: _Upload, body: FileBody, deadline_s: float, on_bytes: OnBytes) -> None:
        def count(moved_bytes: int) -> None:
            on_bytes(moved_bytes)
            if current.left.is_set():
                raise _LeftError

        try:
            upload(self._client, current.sha256, body, streams=self._streams, deadline_s=deadline_s, on_bytes=count)
        except Exception as error:  # noqa: BLE001  # it is raised again in the thread that waits for it
            current.error = error
