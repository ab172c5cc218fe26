"""Where a node keeps what is its own, and how a run is prepared there: text tokenised, folders laid out.

STATE/lock           one process at a time          STATE/flower.json     the id that Flower gave this node
STATE/data           tokenised text                 STATE/traffic.json    bytes of today, for the owner's cap
STATE/bases          the base of the open round     STATE/runs/<run>      a run folder: recipe, state, logs
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from photon.config import Name, Recipe
from photon.data.build import Progress, prepare
from photon.data.shards import ShardReader
from photon.durable import write_atomic
from photon.errors import WireError
from photon.fabric.card import MAX_TOKENIZER_BYTES, RunCard, unpack_tokenizer
from photon.fabric.site import SITE_FILE, SiteFile
from photon.link.body import whole_file
from photon.link.boot import MARKER, verify_after_boot
from photon.link.client import GatewayClient
from photon.link.tensors import sha256_hex
from photon.link.transfer import download
from photon.node.device import WorkerPlan, plan_workers
from photon.recipe import dump_recipe
from photon.runfolder import RunFolder
from photon.siteconfig import SiteConfig, node_recipe

_TOKENIZER_DEADLINE_S = 600.0


@dataclass(frozen=True)
class PreparedRun:
    """A run that this node can take part in."""

    run: str
    folder: RunFolder
    recipe: Recipe
    plan: WorkerPlan
    tokens_available: int


@dataclass(frozen=True)
class NodeHome:
    """Paths of one node's state folder."""

    path: Path

    @property
    def lock(self) -> Path:
        """Held by the node's process."""
        return self.path / "lock"

    @property
    def bases(self) -> Path:
        """Downloaded bases, by sha256."""
        return self.path / "bases"

    def open_base(self, sha256: str, *others: str) -> Path:
        """Where the base of this sha256 is, or will be; all but it and the `others` are removed. Raises OSError.

        What is there is what its name says: nothing that arrives is synced, so it is hashed once after a power cut.
        """
        self.bases.mkdir(parents=True, exist_ok=True)
        for old in self.bases.iterdir():
            if not old.name.startswith((sha256, *others, MARKER)):
                old.unlink(missing_ok=True)
        verify_after_boot(self.bases, "*")
        return self.bases / sha256

    def run(self, run: str) -> RunFolder:
        """What belongs to one run."""
        return RunFolder(self.path / "runs" / run)

    def last_id(self) -> int | None:
        """The id that Flower gave this node in an earlier life; None if it had none."""
        try:
            found = json.loads((self.path / "flower.json").read_bytes())["node_id"]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # not needed: without it, rejoining only takes longer
        return found if isinstance(found, int) else None

    def keep_id(self, node_id: int) -> None:
        """Remember the id for the next life, if the disk takes it: without it, rejoining only takes longer."""
        with suppress(OSError):
            write_atomic(self.path / "flower.json", json.dumps({"node_id": node_id}))

    def bytes_of(self, day: date) -> int:
        """Model bytes that crossed on this day, as far as they were written down."""
        try:
            return int(json.loads((self.path / "traffic.json").read_bytes()).get(day.isoformat(), 0))
        except (OSError, ValueError, TypeError, AttributeError, OverflowError):
            return 0

    def keep_bytes(self, day: date, count: int) -> None:
        """Write down this day's bytes; earlier days are dropped."""
        write_atomic(self.path / "traffic.json", json.dumps({day.isoformat(): count}))


def prepare_run(
    card: RunCard,
    recipe: Recipe,
    name: Name,
    site: SiteConfig,
    home: NodeHome,
    client: GatewayClient,
    report: Callable[[Progress], None],
) -> PreparedRun:
    """Fetch the tokenizer, tokenise the owner's text (or reuse it), and lay out the node's run folder.

    Raises ConfigError or DataError where the owner must act, WireError on what the Aggregator sent, LinkError.
    """
    own = node_recipe(recipe, name, site)
    folder = home.run(card.run)
    folder.path.mkdir(parents=True, exist_ok=True)
    _fetch_tokenizer(card, folder, client)
    data = own.data.model_copy(
        update={
            "dir": site.data or str(home.path / "data"),
            "tokenizer": str(folder.tokenizer.resolve()),
            "max_bytes_per_silo": site.max_bytes or own.data.max_bytes_per_silo,
        }
    )
    own = own.model_copy(update={"data": data})
    prepared = prepare(own, progress=report)
    silo = own.silo[0]
    sources = [source.resolve() for source in prepared.silos[name].sources]
    file = SiteFile(
        name=name,
        sources=sources,
        weights=silo.weights,
        batch_size=own.batch_size_of(silo),
        trains=True,
        evaluates=True,
        keeps_replies=True,
    )
    folder.node(name).mkdir(parents=True, exist_ok=True)
    write_atomic(folder.node(name) / SITE_FILE, file.model_dump_json(indent=1) + "\n")
    write_atomic(folder.recipe, dump_recipe(own))
    folder.write_identity(card.vocab_size, card.run)
    sequence = own.data.sequence_length
    tokens = sum(ShardReader(source).train_sequences(sequence) for source in sources) * sequence
    return PreparedRun(card.run, folder, own, plan_workers(own.node, 1)[0], tokens)


def _fetch_tokenizer(card: RunCard, folder: RunFolder, client: GatewayClient) -> None:
    if card.tokenizer_bytes > MAX_TOKENIZER_BYTES:
        raise WireError(f"a tokenizer of {card.tokenizer_bytes} bytes; {MAX_TOKENIZER_BYTES} are allowed")
    packed = folder.path / "tokenizer.blob"
    if packed.is_file() and sha256_hex(whole_file(packed)) != card.tokenizer_sha256:
        packed.unlink()  # nothing that arrives is synced: a power cut may have spoilt it
    download(client, card.tokenizer_sha256, packed, streams=1, deadline_s=_TOKENIZER_DEADLINE_S)
    folder.tokenizer.mkdir(exist_ok=True)
    for file, text in unpack_tokenizer(packed.read_bytes()).items():
        write_atomic(folder.tokenizer / file, text)
