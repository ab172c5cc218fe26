"""A round's updates, kept until all are there: for merges that have to see them together.

Each update is decoded once, as it arrives, and written to a file of its own, tensor after tensor. A tensor that is read
is a mapping of its stretch of the file: the kernel brings in what is looked at, and may drop it again. So the memory of
its own that a merge takes is one piece of each update (`photon.parts.pieces`); what is mapped, a tensor of each, counts
as resident too while there is room. The files take as much disk as the exact model for each update, whatever the codec,
and none after the round. What a node uploaded would take less, but may be gone by then, has to be decoded in whole
tensors each time it is read, and stands in an order of the node's own choosing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from photon.errors import StateError
from photon.parts.base import Updates

_ALIGNMENT_BYTES = 64

Rule = Callable[[Updates], Iterator[tuple[str, Tensor]]]


class Gathered:
    """Implements `Updates`, sorted by node: the order of arrival changes no bit of what is merged.

    `folder` is for this round alone, and what a crash left in it is removed. `like` has the tensors of every update, in
    the order in which they are read.
    """

    def __init__(self, folder: Path, like: Mapping[str, Tensor], rule: Rule) -> None:
        self._folder, self._rule = folder, rule
        self._like = {name: (tensor.shape, tensor.dtype) for name, tensor in like.items()}
        self._begins, self._size = _places(like)
        self._weights: dict[str, int] = {}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True)

    def keep(self, node: str, update: Iterable[tuple[str, Tensor]], weight: int) -> None:
        """Keep one node's update (all names, in any order) with its weight in the merge.

        Raises StateError if the disk does not take it.
        """
        path = self._path(node)
        try:
            with path.open("xb") as file:
                for name, tensor in update:
                    file.seek(self._begins[name])
                    file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
                file.truncate(self._size)
        except OSError as error:
            raise StateError(
                f"{path} cannot be written: {error.strerror}. federation.parts has a merge that keeps the updates of "
                f"a round on disk, {self._size} bytes each: make room and resume."
            ) from error
        self._weights[node] = weight

    @property
    def weights(self) -> list[int]:
        """See `Updates`."""
        return [self._weights[node] for node in sorted(self._weights)]

    def read(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """See `Updates`. Writing into a tensor does not change the file."""
        path = self._path(sorted(self._weights)[index])
        for name, (shape, dtype) in self._like.items():
            yield name, _mapped(path, self._begins[name], shape, dtype)

    def result(self) -> Iterator[tuple[str, Tensor]]:
        """The merged pseudo-gradient by name, a tensor at a time; after the last one the files are removed.

        Raises ValueError if nothing was kept.
        """
        if not self._weights:
            raise ValueError("nothing was kept")
        return self._merged()

    def _merged(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._rule(self)
        shutil.rmtree(self._folder)

    def _path(self, node: str) -> Path:
        return self._folder / f"{node}.update"


def _places(like: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
    """Where each tensor begins in a file, and where the last one ends, in bytes."""
    begins, end = {}, 0
    for name, tensor in like.items():
        begins[name] = -(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        end = begins[name] + tensor.numel() * tensor.element_size()
    return begins, end


def _mapped(path: Path, begin: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor that lies in a file, mapped copy-on-write for as long as somebody has it."""
    if not (size := shape.numel() * dtype.itemsize):  # there is no mapping of nothing
        return torch.empty(shape, dtype=dtype)
    data = np.memmap(path, dtype=np.uint8, mode="c", offset=begin, shape=(size,))
    return torch.from_numpy(data).view(dtype).view(shape)
