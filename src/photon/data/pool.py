"""The pool: the documents of all silos, dealt among the nodes by a hash of their content (`data.partition = "iid"`).

For studies on one machine alone: here text leaves its owner. A document goes to each of P nodes with probability 1/P,
whoever owned it and in whatever order it is read. Equal texts go to the same node. What is held out was decided
before, source by source, as by owner.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from photon.data.atomic import new_folder
from photon.data.manifest import Origin
from photon.data.shards import ShardWriter
from photon.data.split import Encoded
from photon.data.tokenizer import Tokenizer
from photon.errors import DataError

_HASH_BITS = 64


@dataclass(frozen=True)
class Share:
    """One node's part of the pool: its shard folder, and what the manifest says of it."""

    node: str
    folder: Path
    origin: Origin


def dealt_to(text: str, nodes: int) -> int:
    """The place, from 0 to `nodes` - 1, of the node that a document goes to: decided by its content alone.

    A hash of its own: that of the split is small for all that is held out, which would go to the first nodes.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=_HASH_BITS // 8, person=b"photon deal").digest()
    return int.from_bytes(digest) * nodes >> _HASH_BITS


def write_shares(
    pool: Iterable[tuple[Encoded, bool]],
    shares: Mapping[int, Share],
    nodes: int,
    tokenizer: Tokenizer,
    notes: Sequence[str],
) -> None:
    """Deal `pool` (documents, and whether each is held out) among `nodes`, and write the `shares` by place.

    The pool is read once and nothing of it is kept; two files per share are open meanwhile. A place without a share is
    passed over: its folder is there already. If this raises, nothing of the shares that were not finished is there.
    `notes` is read after the last document. DataError names the node whose share is too small.
    """
    with ExitStack() as folders:
        temporary = {place: folders.enter_context(new_folder(share.folder)) for place, share in shares.items()}
        with ExitStack() as files:
            writers = {
                place: files.enter_context(ShardWriter(folder, tokenizer)) for place, folder in temporary.items()
            }
            for item, held in pool:
                writer = writers.get(dealt_to(item.document.text, nodes))
                if writer is not None:
                    writer.write(item, held)
        for place, writer in writers.items():
            try:
                writer.finish(shares[place].origin, notes)
            except DataError as error:
                raise DataError(
                    f"silo {shares[place].node}, its share of the pool: {error}, or deal it among fewer silos"
                ) from error
