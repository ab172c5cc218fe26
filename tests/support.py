"""A whole federation in one process: the real Aggregator, real LLM Nodes, and a network that tests make misbehave.

Only bytes pass between the two, as between continents. Time on the wire is made up (`InlineFabric.now`): a test may
let a node be six hours late and costs nothing, and no test depends on how fast the machine is.
"""

from __future__ import annotations

import heapq
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from photon.aggregator import assemble, exchange
from photon.aggregator.server import Aggregator
from photon.aggregator.state import GlobalState, Progress, RoundStore
from photon.config import Recipe
from photon.data.stream import Stream
from photon.errors import PhotonError
from photon.events import Evaluated, Event, RoundDone
from photon.fabric.base import Arrival, FabricEvent, NodeInfo
from photon.link.tensors import decode_tensors, encode_tensors, sha256_hex
from photon.link.update import Sealed, decode_message, encode_message, expect_reply
from photon.model.base import LanguageModel
from photon.model.build import build_model, load_weights, named_weights
from photon.node.base import Bases
from photon.node.heldout import HeldOut
from photon.node.node import Node, Site, failure_reply
from photon.node.optimizers import build_optimizer
from photon.node.shared import shared_tensors
from photon.node.state import NodeStore
from photon.node.trainer import Trainer
from photon.parts.method import Method
from photon.recipe import dump_recipe, parse_recipe
from photon.track import JsonlSink, Tracker, read_events, truncate_to

RUN = "run-of-a-test"
VOCAB, LENGTH = 13, 6
CPU = torch.device("cpu")
Delivery = tuple[float, FabricEvent]  # seconds from now, and what arrives then
Network = Callable[[list[Arrival]], list[Delivery]]
Handler = Callable[[bytes], bytes]
# Timings, and what follows from them, differ between two runs that are otherwise the same (a header's length does,
# by the digits of its seconds).
TIMINGS = {
    "time", "seconds", "tokens_per_second", "phases_s", "evaluation_seconds", "receive_s", "encode_s", "save_s",
    "round_bytes_up", "bytes_up",
}  # fmt: skip
WHOLE_MESSAGES = {"encoded", "sent"}


def tiny_recipe(silos: Sequence[str] | Mapping[str, Any] = ("ada", "bob", "cyd"), **sections: Any) -> Recipe:
    """Plain SGD on a decoder of 700 numbers. `silos` by name, with what differs there; `sections` change the rest."""
    own = silos if isinstance(silos, Mapping) else {name: {} for name in silos}
    base: dict[str, Any] = {
        "seed": 5,
        "model": {"layers": 1, "width": 8, "heads": 2, "hidden": 16},
        "data": {"sequence_length": LENGTH},
        "node": {
            "device": "cpu", "micro_batch_size": 64, "batch_size": 2, "optimizer": "sgd", "lr": 0.3,
            "clip_norm": 0.0, "weight_decay": 0.0, "schedule": "constant",
        },
        "federation": {"rounds": 2, "tau": 2},
        "evaluation": {"batch_size": 4},
        "silo": [{"name": name, "text": ["nowhere"], **changes} for name, changes in own.items()],
    }  # fmt: skip
    for section, changes in sections.items():
        base[section] = base.get(section, {}) | changes if isinstance(changes, Mapping) else changes
    return Recipe.model_validate(base)


def read_again(recipe: Recipe, *, of_node: bool = False) -> Recipe:
    """The recipe written down and read: with every check."""
    return parse_recipe(dump_recipe(recipe), "recipe.toml", of_node=of_node)


class Text:
    """A Data Source made of nothing: the sequence at a position is a pure function of (owner, position)."""

    def __init__(self, owner: str) -> None:
        self.seed = int.from_bytes(owner.encode())

    def batch(self, position: int, size: int) -> np.ndarray:
        """int64 [size, LENGTH + 1]."""
        places = range(position, position + size)
        rows = [np.random.default_rng([self.seed, place]).integers(0, VOCAB, LENGTH + 1) for place in places]
        return np.stack(rows)

    def epoch(self, position: int) -> float:
        """As if there were a hundred sequences."""
        return position / 100

    def heldout(self) -> list[HeldOut]:
        """Three sequences that training never reaches."""
        return [HeldOut(self.batch(10**6, 3), bytes_per_token=3.5, unigram_loss=2.5)]


def on_time(arrivals: list[Arrival]) -> list[Delivery]:
    """The network that does nothing wrong."""
    return [(0.0, arrival) for arrival in arrivals]


def tampering(node: str, change: Callable[[bytes], bytes]) -> Network:
    """Every update of `node` is changed on its way; replies with scores alone are not."""

    def changed(arrival: Arrival) -> Arrival:
        trained = expect_reply(decode_message(arrival.message)).training is not None
        return Arrival(node, change(arrival.message)) if trained and arrival.node == node else arrival

    def network(arrivals: list[Arrival]) -> list[Delivery]:
        return [(0.0, changed(arrival)) for arrival in arrivals]

    return network


class InlineFabric:
    """Real nodes behind the fabric protocol. `network` decides what becomes of the replies to each broadcast."""

    def __init__(self, handlers: Mapping[str, Handler], infos: list[NodeInfo], network: Network = on_time) -> None:
        self.handlers, self.infos, self.network = dict(handlers), infos, network
        self.now = 0.0
        self.slots = len(infos)
        self.sent: list[tuple[str, bytes]] = []
        self.received: list[tuple[str, bytes]] = []
        self.abandoned: list[str] = []
        self.foretells = False
        self.foretold: list[tuple[str, bytes]] = []
        self._tasks: list[tuple[str, bytes]] = []
        self._coming: list[tuple[float, int, FabricEvent]] = []
        self._ticket = itertools.count()

    def nodes(self) -> list[NodeInfo]:
        """All of them."""
        return self.infos

    def send(self, node: str, message: Sealed) -> None:
        """Keep the task until the Aggregator waits for an answer."""
        self.sent.append((node, message.joined()))
        self._tasks.append((node, message.joined()))

    def foretell(self, node: str, message: Sealed) -> None:
        """Remember it."""
        self.foretold.append((node, message.joined()))

    def receive(self, timeout_s: float) -> FabricEvent | None:
        """The next event that the network lets through within `timeout_s`; the clock moves, nobody waits."""
        if self._tasks:
            tasks, self._tasks = self._tasks, []
            arrivals = [Arrival(node, self.handlers[node](message)) for node, message in tasks]
            for delay_s, event in self.network(arrivals):
                heapq.heappush(self._coming, (self.now + delay_s, next(self._ticket), event))
        if not self._coming or self._coming[0][0] > self.now + timeout_s:
            self.now += timeout_s
            return None
        at, _, event = heapq.heappop(self._coming)
        self.now = max(self.now, at)
        if isinstance(event, Arrival):
            self.received.append((event.node, event.message))
        return event

    def abandon(self, node: str) -> None:
        """Remember it; the answer may still come, to try the Aggregator."""
        self.abandoned.append(node)

    def carried(self) -> None:
        """Nothing: there is no network."""

    def close(self) -> None:
        """Nothing to stop."""


class Federation:
    """What `photon.run` puts together, in one process. A second one on the same folder resumes the first.

    Nodes are those of one machine, or without `share_disk` each has a machine of its own.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        network: Network = on_time,
        *,
        dtype: torch.dtype = torch.float32,
        share_trainer: bool = True,
        share_disk: bool = True,
        sites: Mapping[str, Site] | None = None,
        infos: list[NodeInfo] | None = None,
    ) -> None:
        keep = recipe.checkpoint
        self.folder, self.recipe, self.dtype = folder, recipe, dtype
        self.sites = sites or {silo.name: self._site(silo.name) for silo in recipe.silo}
        trainer = self._trainer()
        self.bases = {name: folder / "bases" / ("" if share_disk else name) for name in self.sites}
        method = Method.of(recipe)
        untold = decode_tensors(untrained(recipe, dtype).payload)
        self.nodes = {
            name: Node(
                RUN,
                site,
                trainer if share_trainer else self._trainer(),
                recipe,
                Bases.of_run(self.bases[name], recipe.link, untold, method.is_partial),
            )
            for name, site in self.sites.items()
        }
        infos = infos or [NodeInfo(name, site.batch_size * LENGTH) for name, site in self.sites.items()]
        self.fabric = InlineFabric({name: _handler(node) for name, node in self.nodes.items()}, infos, network)
        self.store = RoundStore(folder / "rounds", keep.keep_last, keep.keep_every)
        state = self.store.load(RUN) if self.store.rounds() else untrained(recipe, dtype)
        folder.mkdir(parents=True, exist_ok=True)
        truncate_to(folder / "metrics.jsonl", state.progress.metrics_bytes)
        self.tracker = Tracker([], [], JsonlSink(folder / "metrics.jsonl"))
        self.aggregator = Aggregator(recipe, self.fabric, self.store, self.tracker, state, folder / "operator")

    def run(self) -> GlobalState:
        """All rounds that are left, on the fabric's clock."""
        clock = SimpleNamespace(monotonic=lambda: self.fabric.now)
        # A crash is an exception here, not a power cut: what was written can be read, flushed to the disk or not.
        with (
            mock.patch.object(exchange, "time", clock),
            mock.patch.object(assemble, "time", clock),
            mock.patch.object(os, "fsync"),
            self.tracker,
        ):
            return self.aggregator.run()

    def events(self) -> list[Event]:
        """Everything recorded, read back from metrics.jsonl."""
        return read_events(self.folder / "metrics.jsonl")

    def rounds(self) -> list[RoundDone]:
        """The rounds that were recorded."""
        return [event for event in self.events() if isinstance(event, RoundDone)]

    def evaluations(self) -> list[Evaluated]:
        """The held-out scores that were recorded."""
        return [event for event in self.events() if isinstance(event, Evaluated)]

    def _site(self, name: str) -> Site:
        silo = next(silo for silo in self.recipe.silo if silo.name == name)
        keep, text = self.recipe.checkpoint, Text(name)
        store = NodeStore(self.folder / "nodes" / name / "state", keep.keep_last, keep.keep_every)
        return Site(name, self.recipe.batch_size_of(silo), cast(Stream, text), text.heldout(), store)

    def _trainer(self) -> Trainer:
        model, method = new_model(self.recipe, self.dtype), Method.of(self.recipe)
        return Trainer(model, self.recipe.node, CPU, self.recipe.total_steps, method)


def _handler(node: Node) -> Handler:
    """As a worker process answers: a node that fails says so."""

    def handle(message: bytes) -> bytes:
        try:
            return node.handle(message, lambda progress: None).joined()
        except PhotonError as error:
            return failure_reply(message, node.site.name, f"{type(error).__name__}: {error}").joined()

    return handle


def new_model(recipe: Recipe, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The untrained model of a recipe; the same every time."""
    return build_model(recipe.model, VOCAB, LENGTH, recipe.seed).to(dtype)


def untrained(recipe: Recipe, dtype: torch.dtype = torch.float32) -> GlobalState:
    """The state before round 0."""
    model, method = new_model(recipe, dtype), Method.of(recipe)
    optimizer = method.optimizer(build_optimizer(model, recipe.node, CPU))
    return GlobalState(Progress(RUN), encode_tensors(shared_tensors(model, optimizer, method.shared_state)), {})


def local_sgd(recipe: Recipe, base: Mapping[str, Tensor], node: str, position: int) -> dict[str, np.ndarray]:
    """A node's pseudo-gradient, float64, from a plain loop."""
    silo = next(silo for silo in recipe.silo if silo.name == node)
    model, size = new_model(recipe, torch.float64), recipe.batch_size_of(silo)
    load_weights(model, base)
    for step in range(recipe.tau_of(silo)):
        batch = torch.from_numpy(Text(node).batch(position + step * size, size))
        model.zero_grad()
        model.loss(batch[:, :-1], batch[:, 1:]).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(recipe.node.lr * cast(Tensor, parameter.grad))
    return {name: (base[name].double() - local).numpy() for name, local in named_weights(model).items()}


def weights(state: GlobalState) -> dict[str, Tensor]:
    """The global model by name."""
    return decode_tensors(state.payload)


def largest_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Over all values of all tensors, which must have the same names."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


def edited(
    message: bytes, tensors: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None = None, **changes: Any
) -> bytes:
    """A reply with other header fields (`training={...}` changes single fields of the report) or other tensors.

    Nothing is validated, so that a test can write what no honest node would.
    """
    received = decode_message(message)
    reply = expect_reply(received)
    for part in ("training", "evaluation"):
        report = getattr(reply, part)
        if report is not None and isinstance(changes.get(part), Mapping):
            changes[part] = report.model_copy(update=changes[part])
    body = bytes(received.body)
    if tensors is not None:
        body = encode_tensors(tensors({name: value.clone() for name, value in decode_tensors(body).items()}))
    return encode_message(reply.model_copy(update={"body_sha256": sha256_hex(body)} | changes), body)


def without_timings(value: Any, key: str = "") -> Any:
    """An event as plain data, less what differs between two equal runs."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, Mapping):
        # What went up, in whole messages: their headers are as long as the digits of their seconds.
        without = TIMINGS | (WHOLE_MESSAGES if key == "up" else frozenset())
        return {name: without_timings(item, name) for name, item in value.items() if name not in without}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [without_timings(item) for item in value]
    return value
