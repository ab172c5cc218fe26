"""Model bytes on their way while the node does something else: its update, while it saves its own state or trains on;
the base that it will need next, while it trains.

What was sent counts for nothing until a reply names it. So it may begin before the node has committed, and be left
half-way when the work is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

from photon.link.body import FileBody
from photon.link.client import GatewayClient
from photon.link.transfer import OnBytes, download, upload

_POLL_S = 0.5


class _LeftError(Exception):
    """Nobody wants the rest any more."""


class Crossing:
    """One transfer, begun when it is made, on a thread of its own; `name` is the sha256 of what crosses.

    `transfer` does it, and calls back for each piece; what that raises ends it.
    """

    def __init__(self, name: str, transfer: Callable[[OnBytes], object], on_bytes: OnBytes) -> None:
        self.name = name
        self._transfer, self._on_bytes = transfer, on_bytes
        self._left = Event()
        self._error: Exception | None = None
        self._thread: Thread | None = Thread(target=self._run, name="photon-crossing", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # no thread can be started
            self._error, self._thread = error, None

    @property
    def is_in_vain(self) -> bool:
        """Whether it has failed, or was left."""
        return self._left.is_set() or self._error is not None

    def finish(self, check: Callable[[], None]) -> None:
        """Wait for its end, asking `check` meanwhile. Raises what kept it from arriving, and as `check`."""
        while self._thread is not None and self._thread.is_alive():
            check()
            self._thread.join(_POLL_S)
        if self._error is not None:
            raise self._error

    def leave(self) -> None:
        """Move no more of it, and forget that it arrived. Does not wait."""
        self._left.set()

    def end(self) -> None:
        """Leave it, and wait until it has stopped."""
        self.leave()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        def count(moved_bytes: int) -> None:
            self._on_bytes(moved_bytes)
            if self._left.is_set():
                raise _LeftError

        try:
            self._transfer(count)
        except Exception as error:  # noqa: BLE001  # it is raised again in the thread that waits for it
            self._error = error


class Sending:
    """Uploads, one at a time: a store keeps one unfinished upload of a node, and two would undo each other."""

    def __init__(self, client: GatewayClient, streams: int) -> None:
        self._client, self._streams = client, streams
        self._newest: Crossing | None = None

    def begin(self, sha256: str, body: FileBody, deadline_s: float, on_bytes: OnBytes) -> Crossing:
        """Send `body`, if it is not on its way or there already; what else is on its way ends first. Raises nothing.

        `deadline_s` and `on_bytes` are those of `upload`.
        """
        if (newest := self._newest) is not None:
            if newest.name == sha256 and not newest.is_in_vain:
                return newest
            newest.end()

        def transfer(count: OnBytes) -> None:
            upload(self._client, sha256, body, streams=self._streams, deadline_s=deadline_s, on_bytes=count)

        self._newest = Crossing(sha256, transfer, on_bytes)
        return self._newest


def fetching(
    client: GatewayClient,
    sha256: str,
    target: Callable[[], Path],
    streams: int,
    deadline_s: float,
    on_bytes: OnBytes,
) -> Crossing:
    """A download that has begun, into the file that `target` finds on its thread; see `download`."""

    def transfer(count: OnBytes) -> None:
        download(client, sha256, target(), streams=streams, deadline_s=deadline_s, on_bytes=count)

    return Crossing(sha256, transfer, on_bytes)
