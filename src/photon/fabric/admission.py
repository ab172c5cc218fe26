"""Who may ask the gateway what, and in which words it says no."""

from __future__ import annotations

import json
import logging
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from aiohttp import web

from photon.errors import PhotonError, StateError
from photon.identity import AuthenticationError, Identity, Revocations, peer_identity
from photon.link.partial import BeyondPartError, OffsetError, PartialBusyError, PartialError
from photon.link.store import BlobError, BlobRefusedError

MAX_REQUESTS_AT_ONCE = 16  # of one identity; and as many connections for bytes of blobs beside them
MAX_REMARKS_A_MINUTE = 30  # on refusals of one identity, in the log
SOMEBODY = "somebody"  # who has not said who it is
_MINUTE_S = 60.0
IDENTITY = web.RequestKey("identity", Identity)
_OPERATORS_PATHS = ("/v1/run", "/v1/status")
_LOG = logging.getLogger("photon.gateway")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RequestRefusedError(PhotonError):
    """A request that is answered with an HTTP status and the reason. `done`: bytes of its part that are here."""

    def __init__(self, status: int, reason: str, done: int | None = None) -> None:
        super().__init__(reason)
        self.status, self.done = status, done

    @property
    def answer(self) -> dict[str, str | int]:
        """What the other end is told, as JSON."""
        return {"error": str(self)} | ({} if self.done is None else {"done": self.done})


class Remarks:
    """How often the log tells of refusals: so many a minute for each name, that no name can fill the disk with them."""

    def __init__(self) -> None:
        self._of: dict[str, tuple[float, int]] = {}  # when its minute began, and its refusals since
        self._lock = Lock()

    def may_tell(self, name: str, now: float) -> bool:
        """Whether to tell of a refusal at `now` (monotonic seconds). A later minute says how many were left out."""
        with self._lock:
            began, count = self._of.get(name, (now, 0))
            if now - began >= _MINUTE_S:
                if count > MAX_REMARKS_A_MINUTE:
                    _LOG.warning("refused %s %d times more in that minute", name, count - MAX_REMARKS_A_MINUTE)
                began, count = now, 0
            self._of[name] = (began, count + 1)
            return count < MAX_REMARKS_A_MINUTE


class Admission:
    """Asks of every request whose it is, and whether that identity may make it. From any thread."""

    def __init__(self, keys: Path, nodes: Collection[str]) -> None:
        self._nodes = nodes
        self._revocations = Revocations(keys)
        self._open: Counter[tuple[str, str]] = Counter()  # by (identity, what of it is open)
        self._lock = Lock()
        self._remarks = Remarks()

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Admit, have it answered, and otherwise say in JSON and in the log why not."""
        name = SOMEBODY
        try:
            identity = identity_of(request.get_extra_info("peercert"))
            name = identity.name
            self.admit(identity, request.rel_url.raw_path, request.headers)
            with self.one_of(name):
                request[IDENTITY] = identity
                return await handler(request)
        except Exception as error:  # noqa: BLE001  # whatever went wrong in one request must not end the others
            refused = self.refusal(error, name, request.remote)
        response = web.json_response(refused.answer, status=refused.status)
        if not request.content.is_eof():
            response.force_close()
        return response

    def admit(self, identity: Identity, path: str, headers: Mapping[str, str]) -> None:
        """Let a request of an identity pass. Raises RequestRefusedError."""
        try:
            revoked = self._revocations.is_revoked(identity.serial)
        except StateError as error:
            _LOG.error("%s", error)  # says all; and names a file, which is not for the other end
            raise RequestRefusedError(503, "the Aggregator cannot read who is revoked, and admits nobody") from None
        if revoked:
            raise RequestRefusedError(403, f"the certificate of {identity.name} was revoked: have a new one made")
        if identity.role == "node" and identity.name not in self._nodes:
            raise RequestRefusedError(403, f"{identity.name} takes no part in this run")
        if identity.role == "operator" and path not in _OPERATORS_PATHS:
            raise RequestRefusedError(403, f"an operator may ask for {' and '.join(_OPERATORS_PATHS)}")
        if "Content-Encoding" in headers:
            raise RequestRefusedError(415, "bodies are taken as they are, not compressed")

    @contextmanager
    def one_of(self, name: str, what: str = "requests") -> Iterator[None]:
        """Count one of `what` while the block runs. Raises RequestRefusedError if the identity has too many open.

        Each sort has its own count: a node that moves bytes over all its connections still says that it is there.
        """
        key = name, what
        with self._lock:
            if self._open[key] >= MAX_REQUESTS_AT_ONCE:
                raise RequestRefusedError(429, f"{name} has {MAX_REQUESTS_AT_ONCE} {what} open already")
            self._open[key] += 1
        try:
            yield
        finally:
            with self._lock:
                self._open[key] -= 1

    def refusal(self, error: Exception, name: str, address: str | None) -> RequestRefusedError:
        """What to answer to a request of `name` that ended in `error`; the log tells of it too."""
        refused = _refusal(error)
        if self._remarks.may_tell(name, time.monotonic()):
            _LOG.warning("refused %s at %s: %d %s", name, address, refused.status, refused)
        return refused


def read_json(path: Path) -> object:
    """A small file of the Aggregator's process. Raises RequestRefusedError while it is not there."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        _LOG.warning("%s cannot be read: %s", path, type(error).__name__)
        raise RequestRefusedError(503, "the run has not begun yet") from None


def identity_of(certificate: Mapping[str, object] | None) -> Identity:
    """Whose connection it is, asked at each request: it may expire. Raises RequestRefusedError."""
    try:
        return peer_identity(certificate)
    except AuthenticationError as error:
        raise RequestRefusedError(401, str(error)) from None


def _refusal(error: Exception) -> RequestRefusedError:
    """No words about files or code of ours leave this machine."""
    match error:
        case RequestRefusedError():
            return error
        case BlobRefusedError():
            return RequestRefusedError(error.status, str(error))
        case BlobError():
            _LOG.error("the store: %s", error)
            return RequestRefusedError(503, "the Aggregator's store does not answer")
        case OffsetError():
            return RequestRefusedError(409, str(error), error.done)
        case BeyondPartError():
            return RequestRefusedError(413, str(error))
        case PartialBusyError():
            return RequestRefusedError(503, "this upload is being received by another process")
        case PartialError() | FileNotFoundError():  # its round ended while it arrived
            return RequestRefusedError(409, "this upload is not expected any more")
        case web.HTTPException():
            return RequestRefusedError(error.status, error.reason)
        case TimeoutError():
            return RequestRefusedError(408, "too long a silence")
        case ConnectionError() | web.RequestPayloadError() | ssl.SSLError():
            return RequestRefusedError(400, "the body ended early")
        case OSError():
            _LOG.error("the disk: %s", error)
            return RequestRefusedError(507, "the Aggregator's disk cannot take it")
    _LOG.error("a request failed", exc_info=error)
    return RequestRefusedError(500, "something is wrong at the Aggregator: see its log")
