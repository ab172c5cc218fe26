"""The operator's folder of keys: a small certificate authority that issues, renews and revokes.

Every owner gets one file with its private key, its certificate and the authority's certificate. What these are for,
`photon.identity` says.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from photon import certificates
from photon.certificates import AnyRole, Pair, checked_name, load_bundle, read_file, write_private
from photon.config import Name
from photon.durable import mode_of
from photon.errors import InputError, StateError
from photon.identity import AGGREGATOR_FILE, REVOKED_FILE, Revocations

DEFAULT_HOSTS = ("localhost", "127.0.0.1")
AUTHORITY_DAYS = 1825
NODE_DAYS = 365
MAX_DAYS = 7300
RESERVED_NAMES = ("aggregator", "ca", "operator")  # their files are in the folder already
OPERATOR_FILE = "operator.key"
_CA_KEY, _CA_CERTIFICATE, _ISSUED_FILE = "ca.key", "ca.crt", "issued.jsonl"
_LOCK_DEADLINE_S = 10.0


class Issued(BaseModel):
    """One certificate the authority made. A name may have several: renewed, or revoked and issued again."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Name
    role: AnyRole
    serial: str = Field(pattern=r"^[0-9a-f]{1,40}$")
    not_after: AwareDatetime
    revoked: bool = Field(False, exclude=True)  # filled in from revoked.txt, never stored here


def create_authority(folder: Path, hosts: Sequence[str] = DEFAULT_HOSTS, days: int = AUTHORITY_DAYS) -> None:
    """Fill `folder` (new or empty; mode 0700) with an authority, the Aggregator's certificate and an operator's bundle.

    `hosts` are the DNS names and IP addresses under which nodes will reach the Aggregator. Raises InputError.
    """
    if not hosts:
        raise InputError("give at least one host name or IP address under which nodes reach the Aggregator.")
    names = [certificates.subject_alternative(host) for host in hosts]
    not_after = certificates.now() + _length(days)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"{folder} is not empty, and keys are never overwritten: name a new folder.")
        folder.chmod(0o700)
    except OSError as error:
        raise InputError(f"{folder} cannot be used for keys: {error.strerror}.") from None
    ca = certificates.make_authority(not_after)
    write_private(folder / REVOKED_FILE, b"")
    write_private(folder / _ISSUED_FILE, b"")
    server = certificates.make_certificate(ca, "aggregator", "aggregator", not_after, names)
    _issue(folder, ca, server, folder / AGGREGATOR_FILE)
    _issue(folder, ca, certificates.make_certificate(ca, "operator", "operator", not_after), folder / OPERATOR_FILE)
    certificates.write_authority(ca, folder / _CA_KEY, folder / _CA_CERTIFICATE)


def issue_node(folder: Path, name: str, days: int | None = None, out: Path | None = None) -> Path:
    """Write the bundle of node `name` to `out` (default DIR/NAME.key; mode 0600) and return where it is.

    `days` defaults to a year, or to the authority's last day if that is earlier. A file is only replaced if it is a
    revoked or expired bundle of the same name. Raises InputError, StateError.
    """
    path = folder / f"{_node_name(name)}.key" if out is None else out
    with _locked(folder):
        ca = certificates.load_authority(folder / _CA_KEY, folder / _CA_CERTIFICATE)
        not_after = _end(folder, ca, days)
        if days is None:
            not_after = min(not_after, certificates.now() + timedelta(days=NODE_DAYS))
        _issue_client(folder, ca, certificates.make_certificate(ca, "node", name, not_after), path)
    return path


def issue_operator(folder: Path, out: Path | None = None) -> Path:
    """Write another operator's bundle to `out` (default DIR/operator.key; mode 0600) and return where it is.

    It counts as long as the authority. A file is only replaced if it is a revoked or expired bundle of an operator.
    Raises InputError, StateError.
    """
    path = folder / OPERATOR_FILE if out is None else out
    with _locked(folder):
        ca = certificates.load_authority(folder / _CA_KEY, folder / _CA_CERTIFICATE)
        pair = certificates.make_certificate(ca, "operator", "operator", _end(folder, ca, None))
        _issue_client(folder, ca, pair, path)
    return path


def renew_aggregator(folder: Path, hosts: Sequence[str] = (), days: int | None = None) -> list[str]:
    """Put a new key and certificate in the Aggregator's place and return its hosts; every other key stays as it is.

    `hosts` default to those of the certificate that is there, `days` to the authority's last day. The certificate
    before cannot be called back: whoever has a copy of it can pose as the Aggregator until it expires. Raises
    InputError, StateError.
    """
    with _locked(folder):
        issued(folder)  # a damaged record is not added to
        hosts = hosts or _present_hosts(folder)
        names = [certificates.subject_alternative(host) for host in hosts]
        ca = certificates.load_authority(folder / _CA_KEY, folder / _CA_CERTIFICATE)
        pair = certificates.make_certificate(ca, "aggregator", "aggregator", _end(folder, ca, days), names)
        _issue(folder, ca, pair, folder / AGGREGATOR_FILE, replace=True)
    return list(hosts)


def revoke(folder: Path, name: str) -> list[str]:
    """Refuse every certificate issued to `name` so far; gives the serials that were not refused before.

    Raises InputError if `name` has none or is the Aggregator, StateError if the folder is damaged.
    """
    with _locked(folder):
        entries = issued(folder)
        if name == "aggregator":
            raise InputError(
                "the Aggregator's own certificate cannot be revoked: nodes trust what the authority signed. "
                "If others may have it, make a new authority with photon keys init, and hand out new keys."
            )
        if not any(one.name == name for one in entries):
            known = ", ".join(sorted({one.name for one in entries} - {"aggregator"}))
            raise InputError(f"{folder} has issued no certificate to {name!r}; it has to: {known}.")
        serials = [one.serial for one in entries if one.name == name and not one.revoked]
        if serials:
            path, when = folder / REVOKED_FILE, certificates.now().isoformat()
            lines = "".join(f"{serial} {name} {when}\n" for serial in serials)
            write_private(path, _lines(path) + lines.encode(), replace=True)
    return serials


def issued(folder: Path) -> list[Issued]:
    """Every certificate the authority in `folder` made, oldest first. Raises InputError, StateError."""
    path, revocations = folder / _ISSUED_FILE, Revocations(folder)
    _check_folder(folder, path)
    found = []
    for number, line in enumerate(read_file(path).splitlines(), start=1):
        try:
            one = Issued.model_validate_json(line)
        except ValidationError:
            raise StateError(f"{path}, line {number} is damaged: restore the file from a copy.") from None
        found.append(one.model_copy(update={"revoked": revocations.is_revoked(one.serial)}))
    return found


def _node_name(name: str) -> str:
    try:
        checked_name(name)
    except ValueError:
        raise InputError(
            f"{name!r} cannot be the name of a node: letters, digits, `_`, `.` and `-`, at most 64, "
            "and the first a letter or digit."
        ) from None
    if name.lower() in RESERVED_NAMES:
        raise InputError(f"{name} cannot be the name of a node; these are taken: {', '.join(RESERVED_NAMES)}.")
    return name


def _length(days: int) -> timedelta:
    if not 1 <= days <= MAX_DAYS:
        raise InputError(f"{days} days: a certificate counts for 1 to {MAX_DAYS} days.")
    return timedelta(days=days)


def _end(folder: Path, ca: Pair, days: int | None) -> datetime:
    """When a certificate ends that is made now for `days`, or for as long as its authority: never after that."""
    now, end = certificates.now(), ca.certificate.not_valid_after_utc
    if end <= now:
        raise InputError(f"the authority in {folder} expired on {end:%Y-%m-%d}: make a new one with photon keys init.")
    if days is None:
        return end
    if now + _length(days) > end:
        raise InputError(
            f"the authority in {folder} ends on {end:%Y-%m-%d}, before {days} days are over: fewer --days."
        )
    return now + _length(days)


def _present_hosts(folder: Path) -> list[str]:
    """Under which names the Aggregator is reached so far."""
    path = folder / AGGREGATOR_FILE
    try:
        hosts = certificates.hosts_of(load_bundle(path).certificate)
    except InputError as error:
        raise InputError(f"{error} Or give the Aggregator's hosts with --host: then it is not needed.") from None
    if not hosts:
        raise InputError(f"{path} is no server's certificate: give the Aggregator's hosts with --host.")
    return hosts


def _is_dead(path: Path, name: str, entries: Sequence[Issued]) -> bool:
    """Whether the file is a bundle of `name` that no longer counts, so that nothing is lost with it."""
    try:
        serial = load_bundle(path).serial
    except InputError:
        return False
    mine = [one for one in entries if (one.name, one.serial) == (name, serial)]
    return any(one.revoked or one.not_after <= certificates.now() for one in mine)


def _issue_client(folder: Path, ca: Pair, pair: Pair, path: Path) -> None:
    """Record and write the bundle of a node or operator; a file that may still count is not overwritten."""
    _, name = certificates.subject_of(pair.certificate)
    entries, replace = issued(folder), os.path.lexists(path)
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is no folder: make it, or name another place with --out.")
    if replace and not _is_dead(path, name, entries):
        raise InputError(
            f"{path} exists and is not overwritten. Name another file with --out, or remove it; "
            f"if others may have it, photon keys revoke {name} {folder} comes first."
        )
    _issue(folder, ca, pair, path, replace=replace)


def _issue(folder: Path, ca: Pair, pair: Pair, path: Path, *, replace: bool = False) -> None:
    """Record a new certificate, then write its bundle to `path`."""
    role, name = certificates.subject_of(pair.certificate)
    end, record = pair.certificate.not_valid_after_utc, folder / _ISSUED_FILE
    entry = Issued(name=name, role=role, serial=f"{pair.certificate.serial_number:x}", not_after=end)
    # Recorded first: whatever happens then, no certificate is out there that cannot be revoked.
    write_private(record, _lines(record) + entry.model_dump_json().encode() + b"\n", replace=True)
    write_private(path, certificates.bundle_pem(pair, ca), replace=replace)


def _lines(path: Path) -> bytes:
    """What a file of lines holds; the last one is ended, as an editor may not have done."""
    data = read_file(path)
    return data if not data or data.endswith(b"\n") else data + b"\n"


def _check_folder(folder: Path, file: Path) -> None:
    """Raises InputError unless the folder has this file, which every folder of keys has."""
    try:
        is_there = stat.S_ISREG(mode_of(file))
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}; it is its owner's alone.") from None
    if not is_there:
        raise InputError(f"{folder} is no folder of keys; photon keys init {folder} makes one.")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One change of the folder at a time. Raises InputError if it is no folder of keys or stays busy."""
    _check_folder(folder, folder / _CA_CERTIFICATE)
    try:
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise InputError(f"{folder} cannot be written to: {error.strerror}.") from None
    try:
        deadline = time.monotonic() + _LOCK_DEADLINE_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise InputError(
                        f"another photon keys is at work in {folder}: try again when it is done."
                    ) from None
                time.sleep(0.02)
        yield
    finally:
        os.close(handle)  # releases the lock
