"""What stands around the Aggregator on its machine: SuperLink, gateway, blob store, and the files that they share.

RUN/exchange/       hub.json      ports and addresses       gateway.json  the gateway's configuration
                    secret        of this hub, 0600         run.json      the run card that nodes fetch
                    blobs/        what is in flight         status.json, traffic.json
The SuperLink's database holds nothing that cannot be said again: a new hub begins with a new one.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from photon import __version__
from photon.certificates import write_private
from photon.config import Recipe
from photon.durable import write_atomic
from photon.errors import FabricError, InputError
from photon.fabric.base import NodeInfo
from photon.fabric.card import RunCard, pack_tokenizer, run_card
from photon.fabric.flower import BlobPlane, FlowerFabric
from photon.fabric.flwr_internals import flower_environment, superlink_arguments
from photon.fabric.gateway import GatewayConfig
from photon.fabric.supervise import Child, free_port
from photon.fabric.traffic import read_traffic
from photon.link.object_store import open_store
from photon.link.store import BlobStore
from photon.link.tensors import sha256_hex
from photon.runfolder import RunFolder

_SECRET_BYTES = 32
_UP_DEADLINE_S = 60.0
_LOOK_S = 0.1
# How much text a node far away may have: nobody but its owner knows how many sources it is made of.
_UNKNOWN_SOURCES = 16


class HubFile(BaseModel):
    """`hub.json`: how the round loop finds what its supervisor has started."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    superlink_port: int = Field(ge=1, le=65535)
    host: str
    port: int = Field(ge=0, le=65535)
    keys: Path
    tokenizer_sha256: str


@dataclass(frozen=True)
class Hub:
    """The hub of one run."""

    folder: RunFolder

    @property
    def path(self) -> Path:
        """RUN/exchange."""
        return self.folder.path / "exchange"

    @property
    def secret(self) -> Path:
        """Of this hub alone: nodes' keys at the SuperLink follow from it."""
        return self.path / "secret"

    @property
    def status(self) -> Path:
        """How far the run is, for `photon status`."""
        return self.path / "status.json"

    @property
    def traffic(self) -> Path:
        """Blob bytes of each node, as the gateway counts them."""
        return self.path / "traffic.json"

    def store_url(self, recipe: Recipe) -> str:
        """Where blobs wait: beside the gateway, or a place for this run alone under `link.store`."""
        return f"{recipe.link.store.rstrip('/')}/{self.folder.identity().run}" if recipe.link.store else ""

    def open_store(self, recipe: Recipe) -> BlobStore:
        """The run's blob store. Raises what opening it raises."""
        return open_store(self.store_url(recipe), self.path / "blobs")

    def prepare(self, recipe: Recipe, keys: Path, host: str, port: int) -> HubFile:
        """Write all that the parts need, and publish the tokenizer. Raises what opening the store raises."""
        identity = self.folder.identity()
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.chmod(0o700)
        for stale in self.path.glob("superlink.db*"):
            stale.unlink()
        if not self.secret.exists():
            write_private(self.secret, secrets.token_bytes(_SECRET_BYTES), replace=True)  # all of it, or none
        files = {file.name: file.read_text("utf-8") for file in self.folder.tokenizer.iterdir() if file.is_file()}
        tokenizer = pack_tokenizer(files)
        tokenizer_sha256 = sha256_hex(tokenizer)
        self.open_store(recipe).publish(tokenizer_sha256, tokenizer)
        card = run_card(identity.run, __version__, recipe, identity.vocab_size, tokenizer, tokenizer_sha256)
        write_atomic(self.path / "run.json", card.model_dump_json(indent=1))
        hub = HubFile(
            superlink_port=free_port(), host=host, port=port, keys=keys.resolve(), tokenizer_sha256=tokenizer_sha256
        )
        gateway = GatewayConfig(
            host=host,
            port=port,
            keys=hub.keys,
            store=self.store_url(recipe),
            workspace=self.path / "blobs",
            nodes=[silo.name for silo in recipe.silo],
            run_file=self.path / "run.json",
            status_file=self.status,
            superlink_port=hub.superlink_port,
            fleet_secret_file=self.secret,
        )
        write_atomic(self.path / "gateway.json", gateway.model_dump_json(indent=1))
        write_atomic(self.path / "hub.json", hub.model_dump_json(indent=1))
        return hub

    def read(self) -> HubFile:
        """What `prepare` wrote. Raises InputError if there is nothing."""
        try:
            return HubFile.model_validate_json((self.path / "hub.json").read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}/hub.json cannot be read: start photon aggregator ({error})") from None

    def children(self) -> list[Child]:
        """The SuperLink and the gateway, as processes to be kept alive."""
        hub, logs = self.read(), self.folder.logs
        superlink = superlink_arguments(hub.superlink_port, self.path / "superlink.db", self.secret)
        module = [sys.executable, "-m"]
        return [
            Child(
                "superlink",
                [*module, "photon.fabric.superlink", "--", *superlink],
                logs / "superlink.log",
                flower_environment(os.environ, self.path / "flower"),
            ),
            Child(
                "gateway",
                [*module, "photon.fabric.gateway", "--config", str(self.path / "gateway.json")],
                logs / "gateway.log",
            ),
        ]

    def gateway_address(self, deadline_s: float = _UP_DEADLINE_S) -> tuple[str, int]:
        """Where the gateway listens, once it does: it may have chosen a free port. Raises FabricError."""
        log, end = self.folder.logs / "gateway.log", time.monotonic() + deadline_s
        while time.monotonic() < end:
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            said = [line for line in lines if line.startswith(("listening on ", "---"))]
            if said and said[-1].startswith("listening on "):
                host, _, port = said[-1].removeprefix("listening on ").rpartition(":")
                return host, int(port)
            time.sleep(_LOOK_S)
        tail = " | ".join(log.read_text(errors="replace").splitlines()[-3:]) if log.exists() else "it wrote nothing"
        raise FabricError(f"the gateway does not come up; {log} ends: {tail}")

    def open_fabric(self, recipe: Recipe, payload_bytes: int, note: Callable[[str], None]) -> FlowerFabric:
        """The fabric of this run, over the SuperLink and the store of this hub, for a model of `payload_bytes`."""
        hub = self.read()
        card = RunCard.model_validate_json((self.path / "run.json").read_bytes())
        return FlowerFabric(
            card.run,
            card.recipe_sha256,
            f"127.0.0.1:{hub.superlink_port}",
            self.secret.read_bytes(),
            remote_infos(recipe),
            BlobPlane(self.open_store(recipe), payload_bytes, frozenset({hub.tokenizer_sha256}), self._sent),
            note,
        )

    def _sent(self) -> dict[str, tuple[int, int]]:
        """What the gateway has counted; nothing while its file is damaged, as after a power cut."""
        try:
            accounts = read_traffic(self.traffic)
        except ValidationError:
            return {}
        return {node: (traffic.sent_down, traffic.sent_up) for node, traffic in accounts.items()}

    def remove_leftovers(self) -> None:
        """After a finished run: what was in flight is of no use any more."""
        shutil.rmtree(self.path / "blobs", ignore_errors=True)
        for name in ("superlink.db", "superlink.db-wal", "superlink.db-shm"):
            (self.path / name).unlink(missing_ok=True)


def remote_infos(recipe: Recipe) -> Collection[NodeInfo]:
    """What the Aggregator believes of each node before it has met any: its name, and the most it can count."""
    length = recipe.data.sequence_length
    return [
        NodeInfo(
            silo.name,
            tokens_per_step=recipe.batch_size_of(silo) * length,
            evaluation_tokens=recipe.evaluation.sequences * length * (len(silo.text) or _UNKNOWN_SOURCES),
        )
        for silo in recipe.silo
    ]
