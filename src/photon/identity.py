"""Who is who between machines: identities of one file, TLS that asks for them, and the list of those that are refused.

The name in a certificate is the node's identity: no message can claim another. Both sides speak TLS 1.3 and trust the
authority of their federation (`photon.keys`) alone, never the certificates of the operating system.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from photon import certificates
from photon.certificates import Bundle, Role, checked_name, load_bundle
from photon.errors import InputError, PhotonError, StateError

AGGREGATOR_FILE = "aggregator.pem"
REVOKED_FILE = "revoked.txt"
_SERIAL = re.compile(r"[1-9a-f][0-9a-f]{0,39}")  # any other spelling would never match: it is refused, not skipped


class AuthenticationError(PhotonError):
    """Whoever is on the other end of a connection did not show an identity that counts."""


@dataclass(frozen=True)
class Identity:
    """Who a certificate says its holder is. `serial` is lower-case hex without leading zeros."""

    name: str
    role: Role
    serial: str


def server_context(folder: Path) -> ssl.SSLContext:
    """The Aggregator's side: TLS 1.3 only, and a client must show a certificate of our authority.

    Who it is, `peer_identity` says; whether it still counts, `Revocations`. Raises InputError if the Aggregator's
    certificate is missing, damaged, expired or readable by others.
    """
    path = folder / AGGREGATOR_FILE
    bundle = load_bundle(path)
    if bundle.role != "aggregator":
        raise InputError(f"{path} is not the certificate of an Aggregator but of a {bundle.role}.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # a resumed session would not look at the client's certificate again
    return _harden(context, path, bundle)


def client_context(bundle: Path) -> ssl.SSLContext:
    """An owner's or operator's side: TLS 1.3 only, trusts only the authority in `bundle`, and checks the host's name.

    Raises InputError if the bundle is missing, damaged, expired, readable by others, or the Aggregator's own.
    """
    loaded = load_bundle(bundle)
    _identity(bundle, loaded)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # this protocol checks the host's name
    context.hostname_checks_common_name = False
    return _harden(context, bundle, loaded)


def bundle_identity(bundle: Path) -> Identity:
    """Whose bundle this is. Raises InputError, as `client_context` does except for one that expired."""
    return _identity(bundle, load_bundle(bundle))


def peer_identity(peercert: Mapping[str, object] | None) -> Identity:
    """Who is at the other end of a connection, from `SSLSocket.getpeercert()` on the Aggregator's side.

    Ask on every request: a certificate may expire while its connection stays open. Whether it was revoked, ask
    `Revocations`. Raises AuthenticationError for anything that is not the unexpired certificate of a node or operator.
    """
    if not peercert:
        raise AuthenticationError("the client showed no certificate: it needs a key made by photon keys node.")
    try:
        subject = peercert["subject"]
        if not isinstance(subject, tuple):
            raise TypeError
        role, name = certificates.role_and_name([pair for group in subject for pair in group])
        serial = f"{int(str(peercert['serialNumber']), 16):x}"
        not_after = ssl.cert_time_to_seconds(str(peercert["notAfter"]))
    except (KeyError, TypeError, ValueError):
        raise AuthenticationError("the client's certificate is not one of Photon's identities.") from None
    if role == "aggregator":
        raise AuthenticationError("the client shows the Aggregator's own certificate, which is no identity of a node.")
    if not_after <= certificates.now().timestamp():
        raise AuthenticationError(f"the certificate of {name} has expired: make a new one with photon keys node.")
    return Identity(name, role, serial)


class Revocations:
    """The list of refused certificates, read again whenever the file changed: a revocation holds at once."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / REVOKED_FILE
        self._read: tuple[tuple[int, ...], frozenset[str]] | None = None

    def is_revoked(self, serial: str) -> bool:
        """Whether this certificate is refused. Raises StateError if the list is damaged: then nobody is admitted."""
        try:
            stamp = _stamp(self._path.stat())
            if self._read is None or self._read[0] != stamp:
                with self._path.open("rb") as file:
                    stamp = _stamp(os.fstat(file.fileno()))
                    self._read = stamp, frozenset(self._parse(file.read()))
        except OSError as error:
            raise StateError(
                f"{self._path} cannot be read ({error.strerror}): nobody is admitted until it can."
            ) from None
        return serial.lower().lstrip("0") in self._read[1]

    def _parse(self, data: bytes) -> Iterator[str]:
        for number, line in enumerate(data.decode(errors="replace").splitlines(), start=1):
            words = line.split(" ")
            try:
                serial, name, when = words
                checked_name(name)
                datetime.fromisoformat(when)
            except ValueError:
                serial = ""
            if not _SERIAL.fullmatch(serial):
                raise StateError(
                    f"{self._path}, line {number} is not `serial name date`: nobody is admitted until it is mended."
                )
            yield serial


def _harden(context: ssl.SSLContext, path: Path, bundle: Bundle) -> ssl.SSLContext:
    """What both sides have in common."""
    certificates.check_dates(path, bundle)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=bundle.ca_pem)
    context.load_cert_chain(path)
    return context


def _identity(path: Path, bundle: Bundle) -> Identity:
    if bundle.role == "aggregator":
        raise InputError(f"{path} is the Aggregator's own: a node or operator needs a key of its own.")
    return Identity(bundle.name, bundle.role, bundle.serial)


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size
