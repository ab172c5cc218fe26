"""A bucket of S3, GCS or Azure as `object_store.py` needs it: the only module that imports `obstore`.

Keys are relative to the prefix of the URL. Every request has a deadline. All methods raise BlobError.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Literal
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import AzureStore, GCSStore, S3Store, from_url

from photon.errors import ConfigError
from photon.link.store import BlobError

_SCHEMES = ("s3", "gs", "az")
_CONNECT_S = 10.0
_SILENCE_S = 60.0
_MAX_RETRIES = 8
_BATCH = 1000
_STREAMS = 4


class Bucket:
    """Objects below a URL, `s3://bucket/prefix`. Safe in any thread, not across a fork: its connections have threads.

    One request takes `timeout_s` at most, its body included, and is not repeated later than `retry_s` after the first.
    Making one sends nothing. Raises ConfigError for a URL that names no bucket.
    """

    def __init__(self, url: str, timeout_s: float, retry_s: float, allow_http: bool) -> None:
        split = urlsplit(url)
        if "@" in split.netloc or split.query or split.fragment:  # not repeated: it may hold a password
            raise ConfigError(
                "a bucket is given as SCHEME://BUCKET/PREFIX and no more: credentials stay in the environment."
            )
        if split.scheme not in _SCHEMES or not split.netloc:
            raise ConfigError(
                f"{url!r} is no store of blobs: expected gateway, file:///folder, s3://bucket/prefix, "
                "gs://bucket/prefix or az://container/prefix."
            )
        try:
            store = from_url(
                url,
                client_options={
                    "timeout": timedelta(seconds=timeout_s),
                    "read_timeout": timedelta(seconds=min(timeout_s, _SILENCE_S)),
                    "connect_timeout": timedelta(seconds=min(timeout_s, _CONNECT_S)),
                    "allow_http": allow_http,
                },
                retry_config={"max_retries": _MAX_RETRIES, "retry_timeout": timedelta(seconds=retry_s)},
            )
        except (BaseError, OSError, ValueError) as error:
            raise ConfigError(
                f"{url} cannot be used: {_first_line(error)}. Check AWS_*, GOOGLE_* or AZURE_* in the environment."
            ) from None
        assert isinstance(store, S3Store | GCSStore | AzureStore)  # noqa: S101  # the schemes above mean nothing else
        self.url = url
        self._store = store

    def size(self, key: str) -> int | None:
        """Bytes of an object, None if there is none."""
        with self._explained(f"{key} cannot be looked up"):
            try:
                found = self._store.head(key)
            except FileNotFoundError:
                return None
            return int(found["size"])

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every object below `folder`; `up/ada` does not mean `up/ada2`."""
        with self._explained(f"{folder} cannot be listed"):
            batches = self._store.list(folder, chunk_size=_BATCH)
            return {entry["path"]: entry["size"] for batch in batches for entry in batch}

    def put(self, key: str, data: bytes) -> None:
        """Store a small object with one request."""
        with self._explained(f"{key} cannot be stored"):
            self._store.put(key, data, use_multipart=False)

    def put_chunks(self, key: str, chunks: Iterator[memoryview], chunk_bytes: int) -> None:
        """Store an object of any size, a few chunks in memory at a time.

        It appears whole at the end. What `chunks` raises comes through, and then nothing appears.
        """
        with self._explained(f"{key} cannot be stored"):
            self._store.put(key, chunks, chunk_size=chunk_bytes, max_concurrency=_STREAMS)

    def read(self, key: str, begin: int, end: int, piece_bytes: int) -> Iterator[bytes]:
        """Bytes `begin` to `end` of an object, and no more, in pieces; broken connections are resumed within."""
        with self._explained(f"{key} cannot be read"):
            yield from self._store.get(key, options={"range": (begin, end)}).stream(piece_bytes)

    def remove(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are not there do not matter."""
        every = list(keys)
        with self._explained("objects cannot be removed"):
            for start in range(0, len(every), _BATCH):
                batch = every[start : start + _BATCH]
                try:
                    self._store.delete(batch)
                except FileNotFoundError:  # GCS and Azure mind an absent one, and may have stopped there
                    for key in batch:
                        with suppress(FileNotFoundError):
                            self._store.delete(key)

    def sign(self, method: Literal["GET", "PUT"], keys: list[str], valid_s: float) -> list[str]:
        """A URL for each key with which anybody may do `method` on it, for `valid_s`, rounded down, but 1 at least."""
        with self._explained("URLs cannot be signed"):
            return list(obstore.sign(self._store, method, keys, timedelta(seconds=max(1, int(valid_s)))))

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turn what the library raises into a BlobError."""
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            line = _first_line(error)
            denied = isinstance(error, PermissionDeniedError | UnauthenticatedError)
            denied = denied or re.search(r"code: 40[13]\b", line) is not None  # of a listing, a general error is made
            advice = ". The credentials in the environment do not allow it" if denied else ""
            raise BlobError(f"{what} in {self.url}: {line}{advice}") from None


def _first_line(error: Exception) -> str:
    """What an error of the library says to people; the lines below it are for its developers."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return line[:400].rstrip(" .:-")
