"""`nodes/<name>/site.json`: what one owner's machine knows about its own silo. The Aggregator never reads it."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from photon.config import Name, Recipe
from photon.data.shards import ShardReader
from photon.data.stream import Stream
from photon.link.tensors import sha256_hex
from photon.node.heldout import held_out
from photon.node.node import Site
from photon.node.replies import ReplyStore
from photon.node.state import NodeStore
from photon.parts.method import Method
from photon.recipe import dump_recipe

SITE_FILE = "site.json"


class SiteFile(BaseModel):
    """Where a node's shards are and how it samples them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    sources: list[Path]
    weights: list[float] | None
    batch_size: int
    trains: bool
    evaluates: bool
    device: str | None = None
    keeps_replies: bool = False  # a site beyond a network may be asked again for what it has finished


def open_site(file: SiteFile, folder: Path, recipe: Recipe) -> Site:
    """Open the shards and the state store of one node. Raises DataError on damaged shards."""
    length = recipe.data.sequence_length
    readers = [ShardReader(source) for source in file.sources]
    # Of a method by which a node may train on while its reply is on its way, the Aggregator may ask for a round more.
    rounds = 2 if file.keeps_replies and Method.of(recipe).holds_back else 1
    scored = [held_out(reader, length, recipe.evaluation.sequences) for reader in readers] if file.evaluates else []
    return Site(
        name=file.name,
        batch_size=file.batch_size,
        stream=Stream(readers, file.weights, length, recipe.seed, file.name),
        heldout=scored,
        store=NodeStore(folder / "state", recipe.checkpoint.keep_last + rounds - 1, recipe.checkpoint.keep_every),
        replies=ReplyStore(folder / "replies", sha256_hex(dump_recipe(recipe).encode()), rounds)
        if file.keeps_replies
        else None,
    )
