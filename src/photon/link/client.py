"""The node's end of a connection to the gateway, and what its failures mean.

Blocking sockets, `http.client` and TLS in large pieces (`photon.link.tls`): the node has threads, and this was measured
to move more than twice the bytes per second of the asynchronous clients. A failure is either worth another try
(`LinkDownError`) or it is not (`LinkRefusedError`); a failure of TLS says which end has to be mended.
"""

from __future__ import annotations

import json
import select
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from threading import Lock
from typing import Any
from urllib.parse import SplitResult, urlsplit

from photon.errors import ConfigError, PhotonError
from photon.link.tls import TlsSession, TlsStream

MAX_ANSWER_BYTES = 16 * 2**20
_MAX_REASON_CHARACTERS = 500
_IDLE_S = 20.0  # shorter than the gateway keeps an idle connection
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_AGAIN = (408, 425, 429)
_UNAUTHORIZED, _MISDIRECTED = 401, 421
# What the other end's TLS says of a key that will never count; a bad certificate may merely not count yet.
_KEY_REFUSED = ("CERTIFICATE_EXPIRED", "CERTIFICATE_REVOKED", "CERTIFICATE_REQUIRED", "UNKNOWN_CA", "DECRYPT_ERROR")
# What the verification of the Aggregator's certificate on our side found (X509_V_ERR_*).
_NOT_YET_VALID, _EXPIRED, _OTHER_HOST, _OTHER_ADDRESS = 9, 10, 62, 64


class LinkError(PhotonError):
    """Something asked over the link did not work."""


class LinkDownError(LinkError):
    """The other end cannot be reached, or not right now: another try may work."""


class LinkRefusedError(LinkError):
    """The other end does not grant it: another try of the same is in vain. `status` is HTTP's (0: TLS said no).

    401 also where the other end's TLS refuses our key for good.
    """

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


class GatewayClient:
    """Asks a gateway at `url`, `https://HOST:PORT`, with the TLS context of the node's key.

    `http://` is only for the same machine. Each read and write may take `timeout_s`. Methods may be called from any
    thread; connections are kept and used again. Raises ConfigError on a URL that is none.
    """

    def __init__(self, url: str, context: ssl.SSLContext | None, timeout_s: float = 30.0) -> None:
        self.url, self.context, self.timeout_s = url, context, timeout_s
        parts = _split(url)
        if parts is None or parts.path not in ("", "/") or parts.query:
            raise ConfigError(f"{url!r} is not the address of a gateway: expected https://HOST:PORT")
        if parts.scheme == "https" and context is None:
            raise ConfigError(f"{url} asks for a certificate: give this node its key file")
        self.place = parts.netloc
        self._split = parts
        self._idle: list[tuple[HTTPConnection, float]] = []
        self._lock = Lock()

    def json(self, method: str, path: str, body: object = None) -> Any:
        """Send `body` (if not None) and return the answer, both JSON. Raises LinkDownError, LinkRefusedError."""
        data = b"" if body is None else json.dumps(body).encode()
        answer = self.call(method, path, data, {"Content-Type": "application/json"} if data else {})
        try:
            return json.loads(answer)
        except (ValueError, RecursionError):
            raise LinkDownError(f"{self.place} did not answer {method} {path} with JSON") from None

    def call(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
        """Send one small request and return the answer's body. Raises LinkDownError, LinkRefusedError."""
        status, data = self._ask(self._take(), method, path, body, headers or {})
        if status == _MISDIRECTED:  # the connection carried calls before and this is about bytes, or the reverse
            status, data = self._ask(self.connect(), method, path, body, headers or {})
        check_status(status, data, f"{method} {path}", self.place)
        return data

    def _ask(
        self, connection: HTTPConnection, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, bytes]:
        try:
            with explained(self.place):
                try:
                    connection.request(method, path, body, dict(headers))
                except (BrokenPipeError, ConnectionResetError):
                    if connection.sock is None:
                        raise
                response = connection.getresponse()  # also if it hung up: perhaps it said why before
            data = read_answer(response, self.place)
        except BaseException:
            connection.close()
            raise
        self._give(connection)
        return response.status, data

    def connect(self) -> HTTPConnection:
        """A connection to the gateway for the caller alone, who closes it. It opens with its first request."""
        if self.context is None:
            return _connection(self._split, None, self.timeout_s)
        return _GatewayConnection(str(self._split.hostname), self._split.port, self.context, self.timeout_s)

    def close(self) -> None:
        """Close the connections that are kept."""
        with self._lock:
            for connection, _ in self._idle:
                connection.close()
            self._idle.clear()

    def _take(self) -> HTTPConnection:
        while True:
            with self._lock:
                if not self._idle:
                    return self.connect()
                connection, since = self._idle.pop()
            if time.monotonic() - since < _IDLE_S and not _has_ended(connection):
                return connection
            connection.close()

    def _give(self, connection: HTTPConnection) -> None:
        if connection.sock is not None:  # None: the gateway closed with its answer
            with self._lock:
                self._idle.append((connection, time.monotonic()))


class _GatewayConnection(HTTPConnection):
    """An HTTPS connection in the node's name."""

    default_port = HTTPSConnection.default_port

    def __init__(self, host: str, port: int | None, context: ssl.SSLContext, timeout_s: float) -> None:
        super().__init__(host, port, timeout=timeout_s)
        self._context = context

    def connect(self) -> None:
        """Connect and do the handshake. Raises OSError."""
        plain = socket.create_connection((self.host, self.port), self.timeout)
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream = TlsStream(plain, TlsSession(self._context, self.host))
            stream.handshake()
        except BaseException:
            plain.close()
            raise
        self.sock = stream  # it has of a socket what http.client uses


def outside_connection(url: str, timeout_s: float) -> tuple[HTTPConnection, str]:
    """(connection, request target) for a presigned URL, without our certificate. Raises LinkRefusedError.

    Plain HTTP is refused but on the same machine: updates are not shown to the network between.
    """
    parts = _split(url)
    if parts is None:
        raise LinkRefusedError("the gateway named a place for a blob that is neither https:// nor on this machine")
    target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    return _connection(parts, ssl.create_default_context() if parts.scheme == "https" else None, timeout_s), target


def read_answer(response: HTTPResponse, place: str) -> bytes:
    """The body of a small answer. Raises LinkDownError."""
    with explained(place):
        data = response.read(MAX_ANSWER_BYTES + 1)
    if len(data) > MAX_ANSWER_BYTES:
        raise LinkDownError(f"{place} answers with more than {MAX_ANSWER_BYTES} bytes")
    return data


def check_status(status: int, data: bytes, asked: str, place: str) -> None:
    """Raise what an HTTP status means, with the reason that the other end gives."""
    if 200 <= status < 300:  # HTTP's own numbers
        return
    try:
        answer = json.loads(data)
        reason = str(answer["error"])[:_MAX_REASON_CHARACTERS]
    except (ValueError, RecursionError, KeyError, TypeError):
        reason = f"status {status}"
    if status >= 500 or status in _AGAIN:  # HTTP's own numbers
        raise LinkDownError(f"{place} cannot answer {asked} now: {reason}")
    raise LinkRefusedError(f"{place} refuses {asked}: {reason}", status)


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Turn errors of a socket, of TLS and of HTTP into LinkDownError and LinkRefusedError about `place`."""
    try:
        yield
    except ssl.SSLError as error:
        sentence = _tls_sentence(error, place)
        if sentence is not None:
            raise LinkRefusedError(sentence, _UNAUTHORIZED if _says_reason(error, _KEY_REFUSED) else 0) from None
        raise LinkDownError(f"the connection to {place} broke ({error.reason or 'it was closed'})") from None
    except TimeoutError:
        raise LinkDownError(f"{place} was silent for too long") from None
    except (OSError, HTTPException) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
        raise LinkDownError(f"no answer from {place}: {reason}") from None


def _split(url: str) -> SplitResult | None:
    """The parts of a URL that may be called, None of any other."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # raises on a port that is none
    except ValueError:
        return None
    host = parts.hostname
    allowed = parts.scheme == "https" or (parts.scheme == "http" and host in _LOOPBACK)
    return parts if host and allowed and parts.username is None else None


def _connection(parts: SplitResult, context: ssl.SSLContext | None, timeout_s: float) -> HTTPConnection:
    host = str(parts.hostname)
    if parts.scheme == "https":
        return HTTPSConnection(host, parts.port, timeout=timeout_s, context=context)
    return HTTPConnection(host, parts.port, timeout=timeout_s)


def _has_ended(connection: HTTPConnection) -> bool:
    """Whether the other end closed an idle connection: then there is something to read."""
    if connection.sock is None:
        return True
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return bool(poll.poll(0))


def _tls_sentence(error: ssl.SSLError, place: str) -> str | None:
    """What to mend, and at which end; None if the connection merely broke."""
    host = urlsplit(f"//{place}").hostname
    if isinstance(error, ssl.SSLCertVerificationError):
        other = (
            f"the certificate at {place} is not for {host}: reach the Aggregator under a name it has, or have it "
            f"renewed there with photon keys aggregator DIR --host {host}"
        )
        return {
            _OTHER_HOST: other,
            _OTHER_ADDRESS: other,
            _EXPIRED: f"the certificate at {place} has expired: renew it there (or the clock of this machine is wrong)",
            _NOT_YET_VALID: f"the certificate at {place} is not valid yet: a clock is wrong, there or here",
        }.get(
            error.verify_code,
            f"the certificate at {place} is not from the authority that made this node's key: the address is another "
            "federation's, or the key is",
        )
    sentences = {
        "CERTIFICATE_REQUIRED": f"{place} asks for a certificate and this node showed none: give it its key file",
        "UNKNOWN_CA": f"{place} does not know the authority that made this node's key: the key is another federation's",
        "BAD_CERTIFICATE": f"{place} cannot use this node's certificate: have a new key made for it, or a clock is "
        "wrong: there it may not be valid yet",
        "UNSUPPORTED_CERTIFICATE": f"{place} cannot use this node's certificate: have a new key made for it",
        "CERTIFICATE_UNKNOWN": f"{place} cannot use this node's certificate: have a new key made for it",
        "DECRYPT_ERROR": f"{place} does not know the authority that made this node's key: have a new key made for it",
        "CERTIFICATE_EXPIRED": f"this node's key has expired, says {place}: have a new one made (photon keys node); "
        "and where this machine says that it has not, set its clock",
        "CERTIFICATE_REVOKED": f"this node's key was revoked, says {place}: have a new one made (photon keys node)",
        "PROTOCOL_VERSION": f"{place} speaks another version of TLS: it is no gateway of Photon, or something between "
        "opens connections",
        "WRONG_VERSION_NUMBER": f"{place} does not speak TLS: is the port right?",
        "HTTP_REQUEST": f"{place} does not speak TLS: is the port right?",
    }
    return next((sentence for key, sentence in sentences.items() if _says_reason(error, (key,))), None)


def _says_reason(error: ssl.SSLError, reasons: tuple[str, ...]) -> bool:
    return (error.reason or "").upper().endswith(reasons)
