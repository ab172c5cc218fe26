"""The blob store over a bucket (S3, GCS, Azure): model-sized bytes go past the Aggregator's machine, not through it.

Nodes hold no credentials of the bucket. The gateway signs a URL for each part that a node may read or write; such a
URL is good for one object, one method and a limited time. Below the store's URL, which is for one run alone:

    down/SHA256                a published blob, read in ranges
    up/NODE/SHA256/00000 ...   an upload, one object for each part, because a signed PUT replaces a whole object

Tickets, what is known of uploads, and fetched uploads lie in a local folder that round loop and gateway share.

Two limits, both of the signed PUT. It cannot bound the size of what is put: an oversized part is found and removed when
the upload is finished or begun again. And it cannot be called back: until it expires, with the ticket and after
`URL_VALID_S` at the latest, a node may still write the parts it was given. Neither reaches the merge, since `fetch`
reads what was declared and checks its sha256. The bucket should have a lifecycle rule that removes incomplete multipart
uploads, and what is older than a run: a process that was killed cannot.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError

from photon.errors import ConfigError
from photon.link.body import Body, FileBody, read_body, whole_file
from photon.link.partial import HashMismatchError, PartialError, PartialFile, replace_file
from photon.link.store import (
    BlobDamagedError,
    BlobError,
    BlobIncompleteError,
    BlobRefusedError,
    BlobStore,
    BlobTooLargeError,
    FolderStore,
    Location,
    Part,
)

if TYPE_CHECKING:
    from photon.link.bucket import Bucket

PART_BYTES = 64 * 2**20
URL_VALID_S = 3600
_MAX_PARTS = 512  # so that a Location stays near a MiB of JSON; beyond it the parts are larger
_CHUNK_BYTES = 8 * 2**20
_MAX_CHUNKS = 9_000  # S3 allows 10,000 in one multipart upload
_PIECE_BYTES = 2**20
_STREAMS = 4
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_Kind = Literal["begun", "finished"]


class _Upload(BaseModel):
    """Which upload of a node was begun, or is finished: a file of each kind, so one of each at most."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    sha256: str
    bytes: int


def open_store(url: str, workspace: Path) -> BlobStore:
    """The store that a URL means. Raises ConfigError if it means none, or `obstore` is missing.

    "" or "gateway": a folder at `workspace` that the gateway serves; `file:///path`: such a folder elsewhere, on a
    shared file system; `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`: a bucket, with `workspace`
    for the local files. Credentials come from the environment (AWS_*, GOOGLE_*, AZURE_*). Nodes take plain http only on
    the same machine, so AWS_ALLOW_HTTP=true or AZURE_ALLOW_HTTP=true is for an emulator.
    """
    if url in ("", "gateway"):
        return FolderStore(workspace)
    split = urlsplit(url)
    if split.scheme == "file":
        if split.netloc not in ("", "localhost") or not split.path.strip("/"):
            raise ConfigError(f"{url} names no folder of this machine: write file:///path/of/the/folder.")
        try:
            return FolderStore(Path(unquote(split.path)))
        except OSError as error:
            raise ConfigError(f"{url} cannot hold blobs: {error.strerror} ({error.filename}).") from None
    answers = {os.environ.get(name, "").lower() for name in ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP")}
    return ObjectStore(url, workspace, allow_http=bool(answers & {"1", "true", "yes", "on"}))


class ObjectStore:
    """`BlobStore` over a bucket. One request takes `timeout_s` at most, and is repeated for `retry_s` at most.

    Methods that ask the bucket block, and raise BlobError if it does not answer. Raises ConfigError for a URL that
    names no bucket.
    """

    def __init__(
        self,
        url: str,
        workspace: Path,
        part_bytes: int = PART_BYTES,
        timeout_s: float = 300.0,
        retry_s: float = 120.0,
        allow_http: bool = False,
    ) -> None:
        self._bucket = _bucket(url, timeout_s, retry_s, allow_http)
        self._local = FolderStore(workspace)
        self._part_bytes = part_bytes

    # The round loop's side.

    def publish(self, sha256: str, body: Body) -> None:
        """See `BlobStore`. Streamed, a few chunks in memory at a time. Raises BlobError, also on another sha256."""
        key = _down_key(sha256)
        if self._bucket.size(key) == len(body):
            return
        chunk_bytes = max(_CHUNK_BYTES, -(-len(body) // _MAX_CHUNKS))
        chunks = _verified(body, sha256, chunk_bytes)
        if len(body) <= chunk_bytes:
            self._bucket.put(key, b"".join(chunks))
        else:
            self._bucket.put_chunks(key, chunks, chunk_bytes)

    def retract(self, sha256: str) -> None:
        """See `BlobStore`."""
        self._bucket.remove([_down_key(sha256)])

    def published(self) -> set[str]:
        """See `BlobStore`."""
        names = {key.rsplit("/", 1)[-1] for key in self._bucket.sizes("down")}
        return {name for name in names if _SHA256.fullmatch(name)}

    def allow(self, node: str, max_bytes: int, until: float) -> None:
        """See `BlobStore`."""
        self._local.allow(node, max_bytes, until)

    def fetch(self, node: str, sha256: str, size: int) -> FileBody:
        """See `BlobStore`. The first call downloads it; after a failure the next call goes on where that one stopped.

        Raises BlobDamagedError and removes the upload if its bytes are not what its sha256 says.
        """
        up = _up_key(node, sha256)
        finished = self._record(node, "finished")
        if finished is None or finished.sha256 != sha256:
            raise BlobError(f"{node} has not uploaded the blob {sha256} that it speaks of")
        if finished.bytes != size:
            raise BlobError(f"the blob {sha256} of {node} has {finished.bytes} bytes, {size} were announced")
        target = self._folder(node) / sha256
        try:
            if not target.is_file():
                self._download(up, PartialFile(target, sha256, size, self._bounds(size)))
            return whole_file(target)
        except HashMismatchError as error:
            self._record_path(node, "finished").unlink(missing_ok=True)
            self._bucket.remove(self._bucket.sizes(up))
            raise BlobDamagedError(f"the upload of {node} is not what it claims: {error}") from None
        except PartialError as error:
            raise BlobError(f"the blob {sha256} of {node} cannot be fetched: {error}") from None
        except OSError as error:
            raise BlobError(f"{target} cannot be written: {error.strerror}") from error

    def discard(self, node: str) -> None:
        """See `BlobStore`. If the bucket does not answer, the ticket and the local files are gone nevertheless."""
        self._local.discard(node)
        self._bucket.remove(self._bucket.sizes(f"up/{node}"))

    # The gateway's side.

    def locate(self, sha256: str) -> Location | None:
        """See `BlobStore`. All parts are ranges of one signed URL."""
        if not _SHA256.fullmatch(sha256):
            return None
        size = self._bucket.size(_down_key(sha256))
        if size is None:
            return None
        url = self._bucket.sign("GET", [_down_key(sha256)], URL_VALID_S)[0]
        return Location(bytes=size, parts=[Part(url=url, begin=low, end=high) for low, high in self._bounds(size)])

    def begin_upload(self, node: str, sha256: str, size: int) -> Location:
        """See `BlobStore`. A part is there whole or not at all. Raises BlobTooLargeError, BlobRefusedError, BlobError.

        The URLs expire with the ticket, and after `URL_VALID_S` at the latest: a node that needs longer begins again,
        and goes on.
        """
        ticket = self._local.ticket(node)
        if not 0 <= size <= ticket.max_bytes:
            raise BlobTooLargeError(f"an upload of {size} bytes is larger than the {ticket.max_bytes} that are allowed")
        upload = _Upload(sha256=sha256, bytes=size)
        expected = self._part_sizes(_up_key(node, sha256), size)
        finished = self._record(node, "finished")
        if finished != upload:
            self._write_record(node, "begun", upload)
        stored = self._bucket.sizes(f"up/{node}")
        # A finished upload of other bytes stays until this one is finished; every other remnant goes.
        kept = self._part_sizes(_up_key(node, finished.sha256), finished.bytes) if finished is not None else {}
        useful = {**kept, **expected}
        self._bucket.remove(key for key, found in stored.items() if found != useful.get(key))
        urls = self._bucket.sign("PUT", list(expected), min(URL_VALID_S, ticket.until - time.time()))
        parts = [
            Part(url=url, begin=low, end=high, done=high - low if stored.get(key) == high - low else 0)
            for url, key, (low, high) in zip(urls, expected, self._bounds(size), strict=True)
        ]
        return Location(bytes=size, parts=parts)

    def finish_upload(self, node: str, sha256: str) -> None:
        """See `BlobStore`: here the sizes are verified, the sha256 in `fetch`; doing it again changes nothing.

        Raises BlobIncompleteError if parts are missing, BlobTooLargeError if one is larger than was said (it is
        removed), BlobRefusedError without a valid ticket, BlobError.
        """
        self._local.ticket(node)
        up = _up_key(node, sha256)
        begun, finished = self._record(node, "begun"), self._record(node, "finished")
        if begun is None or begun.sha256 != sha256:
            if finished is not None and finished.sha256 == sha256:
                return
            raise BlobIncompleteError(f"the upload {sha256} was not begun, or has ended")
        expected, stored = self._part_sizes(up, begun.bytes), self._bucket.sizes(up)
        oversized = [key for key, found in stored.items() if found > expected.get(key, -1)]
        if oversized:
            self._bucket.remove(oversized)
            raise BlobTooLargeError(f"{len(oversized)} parts of {sha256} are larger than it said when it was begun")
        missing = sum(stored.get(key) != part_bytes for key, part_bytes in expected.items())
        if missing:
            raise BlobIncompleteError(f"{missing} of {len(expected)} parts of {sha256} are missing or short")
        self._write_record(node, "finished", begun)
        self._record_path(node, "begun").unlink(missing_ok=True)
        if finished is not None and finished.sha256 != sha256:
            (self._folder(node) / finished.sha256).unlink(missing_ok=True)
            self._bucket.remove(self._bucket.sizes(_up_key(node, finished.sha256)))

    def _bounds(self, size: int) -> list[tuple[int, int]]:
        """(begin, end) of the parts of a blob: a function of its size alone."""
        part_bytes = self._part_bytes
        while -(-size // part_bytes) > _MAX_PARTS:
            part_bytes *= 2
        return [(begin, min(size, begin + part_bytes)) for begin in range(0, size, part_bytes)]

    def _part_sizes(self, up: str, size: int) -> dict[str, int]:
        """Key of each part of an upload, in order, and the bytes that it must have."""
        return {_part_key(up, index): high - low for index, (low, high) in enumerate(self._bounds(size))}

    def _download(self, up: str, partial: PartialFile) -> None:
        """Fill `partial` from the objects of its parts, several at once, and have it verified."""

        def pull(index: int) -> None:
            low, high = partial.bounds[index]
            position = low + partial.done()[index]
            if position == high:
                return
            # Only what was declared is asked for: a node may have replaced the part since its size was verified.
            for piece in self._bucket.read(_part_key(up, index), position - low, high - low, _PIECE_BYTES):
                partial.write(index, position, piece)
                position += len(piece)

        try:
            with ThreadPoolExecutor(_STREAMS, thread_name_prefix="photon-fetch") as pool:
                for _ in pool.map(pull, range(len(partial.bounds))):
                    pass  # raises what a thread raised; parts that were not begun are then left
            partial.finish()
        finally:
            partial.close()

    def _folder(self, node: str) -> Path:
        return self._local.root / "up" / node  # which `FolderStore.discard` removes

    def _record_path(self, node: str, kind: _Kind) -> Path:
        return self._folder(node) / f"{kind}.json"

    def _record(self, node: str, kind: _Kind) -> _Upload | None:
        """A damaged record is none: the node begins its upload again, and finds its parts there."""
        try:
            return _Upload.model_validate_json(self._record_path(node, kind).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def _write_record(self, node: str, kind: _Kind, upload: _Upload) -> None:
        path = self._record_path(node, kind)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            replace_file(path, upload.model_dump_json())
        except OSError as error:
            raise BlobError(f"{path} cannot be written: {error.strerror}") from error


def _bucket(url: str, timeout_s: float, retry_s: float, allow_http: bool) -> Bucket:
    try:
        from photon.link.bucket import Bucket
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] != "obstore":
            raise
        raise ConfigError(f"{url} needs the library obstore: pip install 'photon-federated[objects]'.") from None
    return Bucket(url, timeout_s, retry_s, allow_http)


def _checked(sha256: str) -> str:
    if not _SHA256.fullmatch(sha256):
        raise BlobRefusedError(f"{sha256[:80]!r} is no sha256 in lower-case hexadecimal")
    return sha256


def _down_key(sha256: str) -> str:
    return f"down/{_checked(sha256)}"


def _up_key(node: str, sha256: str) -> str:
    if not _NAME.fullmatch(node):
        raise BlobRefusedError(f"{node[:80]!r} is no name of a node")
    return f"up/{node}/{_checked(sha256)}"


def _part_key(up: str, index: int) -> str:
    return f"{up}/{index:05d}"


def _verified(body: Body, sha256: str, chunk_bytes: int) -> Iterator[memoryview]:
    """The body in chunks, each in memory of its own; at the end BlobError if the sha256 was another."""
    digest = hashlib.sha256()
    for begin in range(0, len(body), chunk_bytes):
        chunk = read_body(body, begin, min(len(body), begin + chunk_bytes))
        digest.update(chunk)
        yield chunk
    if digest.hexdigest() != sha256:
        raise BlobError(f"a blob with sha256 {digest.hexdigest()} was to be published as {sha256}")
