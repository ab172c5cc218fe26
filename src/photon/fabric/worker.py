"""One worker process of the local fabric: one device, one model, one set of compiled graphs, many virtual nodes.

Speaks over an inherited socket (frames: `photon.fabric.process`): READY once, then tasks come in as serialised
messages, and progress and replies go out. Started by `photon.fabric.local`, with threads and allocator set in its
environment.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
import traceback
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from photon.config import Recipe
from photon.errors import PhotonError
from photon.events import NodeProgress
from photon.fabric.lifeline import end_with
from photon.fabric.process import LAST, PROGRESS, READY, REPLY, receive_message, send_message, send_written
from photon.fabric.site import SITE_FILE, SiteFile, open_site
from photon.link.update import Sealed, Serialised, decode_message, expect_task
from photon.model.build import build_model
from photon.node.base import Bases
from photon.node.device import WorkerPlan, configure_process
from photon.node.node import Node, Order, failure_reply
from photon.node.shared import shared_tensors
from photon.node.trainer import Trainer
from photon.parts.method import Method
from photon.recipe import load_recipe
from photon.runfolder import RunFolder

_PROGRESS_EVERY_S = 0.25


class Worker:
    """Answers tasks for any node whose site is on this machine; opens a node's text when it is first asked."""

    def __init__(self, run: RunFolder, plan: WorkerPlan) -> None:
        self.run, self.identity = run, run.identity()
        self.recipe: Recipe = load_recipe(run.recipe, of_node=True)
        length = self.recipe.data.sequence_length
        model = build_model(self.recipe.model, self.identity.vocab_size, length, self.recipe.seed)
        method = Method.of(self.recipe)
        self.trainer = Trainer(model, self.recipe.node, torch.device(plan.device), self.recipe.total_steps, method)
        shared = shared_tensors(self.trainer.model, self.trainer.optimizer, method.shared_state)
        self.bases = Bases.of_run(self.run.bases, self.recipe.link, shared, method.is_partial)
        self.nodes: dict[str, Node] = {}
        self.order: Order = "go"  # changed by signals, for the task at hand

    def give_order(self, order: Order) -> None:
        """How to go on with the task at hand; forgotten when the next one begins."""
        self.order = order

    def node(self, name: str) -> Node:
        """The virtual node of that name, opened on first use."""
        if name not in self.nodes:
            folder = self.run.node(name)
            site = open_site(SiteFile.model_validate_json((folder / SITE_FILE).read_bytes()), folder, self.recipe)
            self.nodes[name] = Node(self.identity.run, site, self.trainer, self.recipe, self.bases, lambda: self.order)
        return self.nodes[name]

    def answer(self, data: Serialised, connection: Connection) -> tuple[bytes, Sealed]:
        """(REPLY or LAST, the reply to a task). A node that fails says so.

        Errors of ours leave the worker as good as it was: every task brings its own weights and state. After any
        other (a device's own error, memory that ran out) nothing here is certain, so that reply is the last.
        """
        self.order = "go"
        name = expect_task(decode_message(data)).node
        last = 0.0

        def on_progress(progress: NodeProgress) -> None:
            nonlocal last
            if progress.state != "training" or time.monotonic() - last >= _PROGRESS_EVERY_S:
                last = time.monotonic()
                connection.send_bytes(PROGRESS + progress.model_dump_json().encode())

        try:
            return REPLY, self.node(name).handle(data, on_progress, partial(send_written, connection))
        except PhotonError as error:
            traceback.print_exc()
            return REPLY, failure_reply(data, name, f"{type(error).__name__}: {error}")
        except Exception as error:  # noqa: BLE001  # whatever went wrong in one node must not end the others
            traceback.print_exc()
            return LAST, failure_reply(data, name, f"{type(error).__name__}: {error}")


def serve(connection: Connection, worker: Worker) -> None:
    """Say READY, then answer tasks until the other end closes or an answer was the last."""
    try:
        connection.send_bytes(READY)
        kind = REPLY
        while kind == REPLY:
            kind, reply = worker.answer(receive_message(connection), connection)
            connection.send_bytes(kind)
            send_message(connection, reply)
            del reply  # an update is model-sized: not kept until the next one
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the Aggregator's process is gone: nothing is left to do


def main() -> None:
    """Entry point of `python -m photon.fabric.worker`."""
    parser = argparse.ArgumentParser(description="worker process of the local fabric; started by photon train")
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    os.set_inheritable(arguments.socket, False)  # what this process starts must not hold it open
    end_with(arguments.socket)
    plan = WorkerPlan(arguments.device, arguments.threads)
    configure_process(plan)
    worker = Worker(RunFolder(arguments.run), plan)
    signal.signal(signal.SIGTERM, lambda *_: worker.give_order("hand in"))
    signal.signal(signal.SIGUSR1, lambda *_: worker.give_order("drop"))
    serve(Connection(arguments.socket), worker)


if __name__ == "__main__":
    main()
