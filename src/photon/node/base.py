"""The base that a task starts from: taken from the message whole, or rebuilt from the one before and a difference.

Only with a lossy downlink is a base kept on disk, in a file named by its hash. It is not made durable: whatever is
read from it is checked against that hash, and a node that lacks a base asks for the whole of it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from photon.config import LinkConfig
from photon.durable import Chunk
from photon.errors import PhotonError, WireError
from photon.link.body import Body, pieces, whole_file
from photon.link.codec.notation import parse_pipeline
from photon.link.codec.pipeline import EXACT, Pipeline
from photon.link.difference import changed, rebuilt
from photon.link.tensors import decode_tensors, sha256_hex, sha256_of_chunks, streamed_chunks, tensor_chunks
from photon.link.update import Task

_SUFFIX = ".safetensors"


class LacksBaseError(PhotonError):
    """The node does not hold the model that a task builds on; the Aggregator sends it whole."""


class Bases:
    """Bases of one machine's virtual nodes, in `folder` if the downlink sends differences.

    `codec` is the recipe's downlink; `model` the untrained model's tensors, the first base of every run, which no
    message need carry.
    """

    def __init__(self, folder: Path, codec: Pipeline, sends_differences: bool, model: Mapping[str, Tensor]) -> None:
        self._folder, self._codec, self._keeps = folder, codec, sends_differences
        self._like = {name: tensor.detach().to("meta") for name, tensor in model.items()}
        if self._keeps and not any(folder.glob(f"*{_SUFFIX}")):
            self._store(tensor_chunks(model), None)

    @classmethod
    def of_run(cls, folder: Path, link: LinkConfig, model: Mapping[str, Tensor], is_partial: bool = False) -> Bases:
        """As the recipe says; `is_partial`: a round may move only some tensors. Raises ConfigError on no such codec."""
        codec = parse_pipeline(link.down, "link.down", link.exact_tensors)
        return cls(folder, codec, is_partial or (link.of == "difference" and not codec.is_lossless), model)

    def receive(self, task: Task, body: Body) -> dict[str, Tensor]:
        """The base's tensors (read-only, on the CPU). Raises LacksBaseError, or WireError if it is not as announced."""
        if sha256_hex(body) != task.body_sha256:
            raise WireError(f"round {task.round}: the base received is not the one the task names (sha256 differs)")
        if task.form == "whole" and task.codec == EXACT.name:
            if task.body_sha256 != task.base_sha256:
                raise WireError(f"round {task.round}: the whole base is announced under two hashes")
            tensors = decode_tensors(body)
            if self._keeps:
                self._store(pieces(body), task.base_sha256)
            return tensors
        if task.form != "held" and task.codec != self._codec.name:
            raise WireError(
                f"round {task.round}: the base is written with codec {task.codec!r}, "
                f"this node's recipe has {self._codec.name!r}"
            )
        if task.form == "whole":
            return self._decoded(task, body)
        if not self._keeps:
            raise WireError(f"round {task.round}: a base that is not whole, in a run whose downlink sends whole ones")
        if task.form == "difference" and not self._path(task.base_sha256).is_file():
            self._rebuild(task, body)
        return self._held(task.base_sha256)

    def _decoded(self, task: Task, body: Body) -> dict[str, Tensor]:
        tensors = dict(rebuilt(self._like, decode_tensors(body), self._codec, {}))
        if sha256_of_chunks(tensor_chunks(tensors)) != task.base_sha256:
            raise WireError(f"round {task.round}: the base decodes to another model than the task names")
        return tensors

    def _rebuild(self, task: Task, body: Body) -> None:
        held = self._path(task.held_sha256)
        if not held.is_file():
            raise LacksBaseError(f"round {task.round}: this node does not hold the base {task.held_sha256}")
        try:
            tensors = changed(whole_file(held), decode_tensors(body), self._codec, {})
            self._store(streamed_chunks(self._like, tensors), task.base_sha256, keep=(task.held_sha256,))
        except (WireError, FileNotFoundError) as error:
            # A file that has rotted, or was removed by a neighbour that is a round ahead, shows itself here.
            held.unlink(missing_ok=True)
            raise LacksBaseError(f"round {task.round}: the base cannot be rebuilt: {error}") from error

    def _held(self, sha256: str) -> dict[str, Tensor]:
        path = self._path(sha256)
        try:
            file = whole_file(path)
            if sha256_hex(file) == sha256:
                return decode_tensors(file)
        except FileNotFoundError:
            pass
        path.unlink(missing_ok=True)
        raise LacksBaseError(f"this node does not hold the base {sha256}")

    def _store(self, chunks: Iterable[Chunk], sha256: str | None, keep: Iterable[str] = ()) -> None:
        """Write a base, one tensor in memory at a time, and remove the others. Raises WireError if its hash differs."""
        self._folder.mkdir(parents=True, exist_ok=True)
        pending = self._folder / f"pending-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            found = _write_hashed(pending, chunks)
            if sha256 is not None and found != sha256:
                raise WireError(f"it came out as {found}, announced was {sha256}")
            pending.rename(self._path(found))
        finally:
            pending.unlink(missing_ok=True)
        kept = {self._path(name) for name in (found, *keep)}
        for old in self._folder.glob(f"*{_SUFFIX}"):
            if old not in kept:
                old.unlink(missing_ok=True)

    def _path(self, sha256: str) -> Path:
        return self._folder / f"{sha256}{_SUFFIX}"


def _write_hashed(path: Path, chunks: Iterable[Chunk]) -> str:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in chunks:
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()
