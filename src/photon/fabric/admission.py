"""Who may ask the gateway what, and in which words it says no."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web

from photon.errors import PhotonError, StateError
from photon.keys import AuthenticationError, Identity, Revocations, peer_identity
from photon.link.partial import BeyondPartError, OffsetError, PartialBusyError, PartialError
from photon.link.store import BlobError, BlobRefusedError

MAX_REQUESTS_AT_ONCE = 16  # of one identity
MAX_REMARKS_A_MINUTE = 30  # on refusals of one identity, in the log
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


class Remarks:
    """How often the log tells of refusals: so many a minute for each name, that no name can fill the disk with them."""

    def __init__(self) -> None:
        self._of: dict[str, tuple[float, int]] = {}  # when its minute began, and its refusals since

    def may_tell(self, name: str, now: float) -> bool:
        """Whether to tell of a refusal at `now` (monotonic seconds). A later minute says how many were left out."""
        began, count = self._of.get(name, (now, 0))
        if now - began >= _MINUTE_S:
            if count > MAX_REMARKS_A_MINUTE:
                _LOG.warning("refused %s %d times more in that minute", name, count - MAX_REMARKS_A_MINUTE)
            began, count = now, 0
        self._of[name] = (began, count + 1)
        return count < MAX_REMARKS_A_MINUTE


class Admission:
    """Asks of every request whose it is, and whether that identity may make it. Runs in one event loop."""

    def __init__(self, keys: Path, nodes: Collection[str]) -> None:
        self._nodes = nodes
        self._revocations = Revocations(keys)
        self._open: Counter[str] = Counter()
        self._remarks = Remarks()

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Admit, have it answered, and otherwise say in JSON and in the log why not."""
        name = "somebody"
        try:
            identity = _identity(request)
            name = identity.name
            self._admit(identity, request)
            with self._one_of(name):
                request[IDENTITY] = identity
                return await handler(request)
        except Exception as error:  # noqa: BLE001  # whatever went wrong in one request must not end the others
            refused = _refusal(error)
        if self._remarks.may_tell(name, time.monotonic()):
            _LOG.warning("refused %s at %s: %d %s", name, request.remote, refused.status, refused)
        answer: dict[str, str | int] = {"error": str(refused)}
        if refused.done is not None:
            answer["done"] = refused.done
        response = web.json_response(answer, status=refused.status)
        if not request.content.is_eof():
            response.force_close()
        return response

    def _admit(self, identity: Identity, request: web.Request) -> None:
        try:
            revoked = self._revocations.is_revoked(identity.serial)
        except StateError as error:
            _LOG.error("%s", error)  # says all; and names a file, which is not for the other end
            raise RequestRefusedError(503, "the Aggregator cannot read who is revoked, and admits nobody") from None
        if revoked:
            raise RequestRefusedError(403, f"the certificate of {identity.name} was revoked: have a new one made")
        if identity.role == "node" and identity.name not in self._nodes:
            raise RequestRefusedError(403, f"{identity.name} takes no part in this run")
        if identity.role == "operator" and request.rel_url.raw_path not in _OPERATORS_PATHS:
            raise RequestRefusedError(403, f"an operator may ask for {' and '.join(_OPERATORS_PATHS)}")
        if "Content-Encoding" in request.headers:
            raise RequestRefusedError(415, "bodies are taken as they are, not compressed")

    @contextmanager
    def _one_of(self, name: str) -> Iterator[None]:
        if self._open[name] >= MAX_REQUESTS_AT_ONCE:
            raise RequestRefusedError(429, f"{name} has {MAX_REQUESTS_AT_ONCE} requests open already")
        self._open[name] += 1
        try:
            yield
        finally:
            self._open[name] -= 1


def read_json(path: Path) -> object:
    """A small file of the Aggregator's process. Raises RequestRefusedError while it is not there."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        _LOG.warning("%s cannot be read: %s", path, type(error).__name__)
        raise RequestRefusedError(503, "the run has not begun yet") from None


def _identity(request: web.Request) -> Identity:
    try:
        return peer_identity(request.get_extra_info("peercert"))
    except AuthenticationError as error:
        raise RequestRefusedError(401, str(error)) from None


def _refusal(error: Exception) -> RequestRefusedError:
    """What to answer to a request that ended in `error`; no words about files or code of ours leave this machine."""
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
        case ConnectionError() | web.RequestPayloadError():
            return RequestRefusedError(400, "the body ended early")
        case OSError():
            _LOG.error("the disk: %s", error)
            return RequestRefusedError(507, "the Aggregator's disk cannot take it")
    _LOG.error("a request failed", exc_info=error)
    return RequestRefusedError(500, "something is wrong at the Aggregator: see its log")
