"""Certificates and the files they live in: made, read and checked. `photon.keys` says what they are for.

A bundle is one PEM file: a private key, its certificate, the authority's certificate, in this order. No error names
anything that was read from such a file but names, serials and dates.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import TypeAdapter

from photon.config import Name
from photon.durable import sync_folder
from photon.errors import InputError

Role = Literal["node", "operator"]
AnyRole = Literal["node", "operator", "aggregator"]

_ORGANIZATIONS: dict[str, AnyRole] = {
    "photon node": "node",
    "photon operator": "operator",
    "photon aggregator": "aggregator",
}
_NAME = TypeAdapter(Name)
_SKEW = timedelta(minutes=5)  # clocks of several sites differ by less
_MAX_FILE_BYTES = 2**20
_PEM = re.compile(rb"(-----BEGIN ([A-Z ]+)-----\r?\n.*?-----END \2-----\r?\n?)", re.DOTALL)
_LABEL = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}$)({_LABEL}\.)*(?![0-9]+$){_LABEL}", re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    certificate: x509.Certificate


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and checked: who it is for, and the certificates in it."""

    role: AnyRole
    name: str
    certificate: x509.Certificate
    ca: x509.Certificate

    @property
    def serial(self) -> str:
        """Lower-case hex without leading zeros, as everywhere in Photon."""
        return f"{self.certificate.serial_number:x}"

    @property
    def ca_pem(self) -> str:
        """The authority's certificate, as `ssl` wants it."""
        return _certificate_pem(self.ca).decode()


def now() -> datetime:
    """The time to the second, as certificates have it."""
    return datetime.now(UTC).replace(microsecond=0)


def checked_name(name: str) -> str:
    """`name`, if it can be a node's. Raises ValueError."""
    return _NAME.validate_python(name, strict=True)


def role_and_name(subject: Sequence[tuple[str, str]]) -> tuple[AnyRole, str]:
    """What a certificate's subject, pairs like ("commonName", "hospital"), says. Raises ValueError if not ours."""
    values = dict(subject)
    if len(subject) != 2 or set(values) != {"organizationName", "commonName"}:
        raise ValueError("a subject of Photon has an organization and a common name, nothing else")
    if values["organizationName"] not in _ORGANIZATIONS:
        raise ValueError("not an organization of Photon")
    return _ORGANIZATIONS[values["organizationName"]], checked_name(values["commonName"])


def subject_of(certificate: x509.Certificate) -> tuple[AnyRole, str]:
    """Role and name in a certificate. Raises ValueError if they are not ours."""
    names = {NameOID.COMMON_NAME: "commonName", NameOID.ORGANIZATION_NAME: "organizationName"}
    return role_and_name([(names.get(one.oid, ""), str(one.value)) for one in certificate.subject])


def subject_alternative(host: str) -> x509.GeneralName:
    """A DNS name or IP address under which a server is reached. Raises InputError."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if _HOST.fullmatch(host):
            return x509.DNSName(host.lower())
    raise InputError(f"{host!r} is neither a DNS name nor an IP address; give it without scheme, port or wildcard.")


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The DNS names and IP addresses that a certificate is for; none if it is no server's."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress)]


def make_authority(not_after: datetime) -> Pair:
    """A new authority: EC P-256, signed by itself, may sign no further authorities."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _subject("photon authority", f"photon authority {secrets.token_hex(4)}")
    builder = (
        _builder(name, name, key.public_key(), key.public_key(), not_after)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
    )
    return Pair(key, builder.sign(key, hashes.SHA256()))


def make_certificate(
    ca: Pair, role: AnyRole, name: str, not_after: datetime, hosts: Sequence[x509.GeneralName] = ()
) -> Pair:
    """A new key and its certificate: the Aggregator's may only serve (as `hosts`), the others may only be clients."""
    key = ec.generate_private_key(ec.SECP256R1())
    organization = next(text for text, meaning in _ORGANIZATIONS.items() if meaning == role)
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if role == "aggregator" else ExtendedKeyUsageOID.CLIENT_AUTH
    subject = _subject(organization, name)
    builder = (
        _builder(subject, ca.certificate.subject, key.public_key(), ca.key.public_key(), not_after)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    return Pair(key, builder.sign(ca.key, hashes.SHA256()))


def bundle_pem(pair: Pair, ca: Pair) -> bytes:
    """The content of a bundle."""
    return _key_pem(pair.key) + _certificate_pem(pair.certificate) + _certificate_pem(ca.certificate)


def write_authority(ca: Pair, key_path: Path, certificate_path: Path) -> None:
    """Store a new authority; its certificate last, so that where it is, the rest is. Raises InputError."""
    write_private(key_path, _key_pem(ca.key))
    write_private(certificate_path, _certificate_pem(ca.certificate))


def load_authority(key_path: Path, certificate_path: Path) -> Pair:
    """Read what `write_authority` stored. Raises InputError if it is missing, damaged or readable by others."""
    return _parse(key_path, read_private(key_path) + read_file(certificate_path), certificates=1)[0]


def load_bundle(path: Path) -> Bundle:
    """Read and check a bundle, whether or not it has expired.

    Raises InputError if it is missing, readable by group or others, not a bundle, or signed by another authority.
    """
    pair, (ca,) = _parse(path, read_private(path), certificates=2)
    certificate = pair.certificate
    try:
        certificate.verify_directly_issued_by(ca)
        role, name = subject_of(certificate)
    except (ValueError, TypeError, InvalidSignature):
        raise _damaged(path) from None
    return Bundle(role, name, certificate, ca)


def check_dates(path: Path, bundle: Bundle) -> None:
    """Raise InputError if the bundle in `path` does not count today."""
    remedy = {
        "node": f"ask the Aggregator's operator for a new key (photon keys node {bundle.name} DIR)",
        "operator": "make a new one with photon keys operator DIR",
        "aggregator": "renew it with photon keys aggregator DIR",
    }[bundle.role]
    if bundle.role != "node" and bundle.ca.not_valid_after_utc <= now():
        remedy = "its authority has, too; make a new one with photon keys init, and hand out new keys"
    for one in (bundle.certificate, bundle.ca):
        if one.not_valid_after_utc <= now():
            raise InputError(
                f"{path} expired on {one.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, "
                f"and here it is {now():%Y-%m-%d %H:%M} UTC: {remedy}."
            )
        if one.not_valid_before_utc > now():
            raise InputError(
                f"{path} counts from {one.not_valid_before_utc:%Y-%m-%d %H:%M} UTC only, "
                f"and here it is {now():%Y-%m-%d %H:%M} UTC: set this machine's clock."
            )


def read_file(path: Path) -> bytes:
    """The content of a small regular file. Raises InputError."""
    return _read(path, private=False)


def read_private(path: Path) -> bytes:
    """The same; also refuses a file that group or others may read or write."""
    return _read(path, private=True)


def write_private(path: Path, data: bytes, *, replace: bool = False) -> None:
    """Write a file for its owner only (0600), durably; with `replace`, a reader sees the old content or the new.

    Raises InputError if the file exists and is not to be replaced, or cannot be written.
    """
    target = path.with_name(f".pending-{path.name}-{secrets.token_hex(4)}") if replace else path
    try:
        # Never wider than 0600, not even for an instant; and a name that is there already, be it a link, is refused.
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise InputError(f"{path} exists and is not overwritten: remove it, or name another file.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}.") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            target.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        target.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written: {error.strerror}.") from None


def _read(path: Path, private: bool) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a pipe, say, on which one could wait for ever
            raise InputError(f"{path} is not a file.")
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if private and status.st_mode & 0o077:
                raise InputError(
                    f"{path} holds a private key and others on this machine may read it "
                    f"(mode {stat.S_IMODE(status.st_mode):04o}): chmod 600 {path}"
                )
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    if len(data) > _MAX_FILE_BYTES:
        raise InputError(f"{path} is larger than {_MAX_FILE_BYTES} bytes: it is no file of keys.")
    return data


def _parse(path: Path, data: bytes, certificates: int) -> tuple[Pair, list[x509.Certificate]]:
    """A private key, its certificate, and the certificates after it."""
    blocks = _PEM.findall(data)
    if [label for _, label in blocks] != [b"PRIVATE KEY"] + [b"CERTIFICATE"] * certificates:
        raise _damaged(path)
    try:
        key = serialization.load_pem_private_key(blocks[0][0], password=None)
        first, *others = [x509.load_pem_x509_certificate(block) for block, _ in blocks[1:]]
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != first.public_key():
            raise ValueError
    except (ValueError, TypeError, UnsupportedAlgorithm):  # their texts may quote the file: ours does not
        raise _damaged(path) from None
    return Pair(key, first), others


def _damaged(path: Path) -> InputError:
    return InputError(f"{path} is damaged or no file of keys: use an untouched copy, or ask for a new one.")


def _subject(organization: str, name: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization), x509.NameAttribute(NameOID.COMMON_NAME, name)]
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    issuer_public: ec.EllipticCurvePublicKey,
    not_after: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now() - _SKEW)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_public), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
