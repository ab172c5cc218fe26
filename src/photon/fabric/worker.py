"""One worker process of the local fabric: one device, one model, one set of compiled graphs, many virtual nodes.

Speaks over an inherited socket: tasks come in as serialised messages; `P` + progress (JSON) and `R`, followed by a
serialised reply, go out. Started by `photon.fabric.local`, with threads and allocator set in its environment.
"""

from __future__ import annotations

import argparse
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from photon.config import Recipe
from photon.events import NodeProgress
from photon.fabric.local import PROGRESS, REPLY
from photon.fabric.site import SITE_FILE, SiteFile, open_site
from photon.link.update import decode_message, expect_task
from photon.model.build import build_model
from photon.node.device import WorkerPlan, configure_process
from photon.node.node import Node, failure_reply
from photon.node.trainer import Trainer
from photon.recipe import load_recipe
from photon.runfolder import RunFolder

_IDLE_POLL_S = 10.0
_PROGRESS_EVERY_S = 0.25


class Worker:
    """Answers tasks for any node whose site is on this machine; opens a node's text when it is first asked."""

    def __init__(self, run: RunFolder, plan: WorkerPlan) -> None:
        self.run, self.identity = run, run.identity()
        self.recipe: Recipe = load_recipe(run.recipe)
        length = self.recipe.data.sequence_length
        model = build_model(self.recipe.model, self.identity.vocab_size, length, self.recipe.seed)
        self.trainer = Trainer(model, self.recipe.node, torch.device(plan.device), self.recipe.total_steps)
        self.nodes: dict[str, Node] = {}

    def node(self, name: str) -> Node:
        """The virtual node of that name, opened on first use."""
        if name not in self.nodes:
            folder = self.run.node(name)
            site = open_site(SiteFile.model_validate_json((folder / SITE_FILE).read_bytes()), folder, self.recipe)
            self.nodes[name] = Node(
                self.identity.run,
                site,
                self.trainer,
                self.recipe.node,
                self.recipe.link,
                self.recipe.evaluation.batch_size,
            )
        return self.nodes[name]

    def answer(self, data: bytes, connection: Connection) -> bytes:
        """The reply to a task; a node that fails says so instead of taking the worker down."""
        name = expect_task(decode_message(data)).node
        last = 0.0

        def on_progress(progress: NodeProgress) -> None:
            nonlocal last
            if progress.state != "training" or time.monotonic() - last >= _PROGRESS_EVERY_S:
                last = time.monotonic()
                connection.send_bytes(PROGRESS + progress.model_dump_json().encode())

        try:
            return self.node(name).handle(data, on_progress)
        except Exception as error:  # noqa: BLE001  # whatever went wrong in one node must not end the others
            traceback.print_exc()
            return failure_reply(data, name, f"{type(error).__name__}: {error}")


def serve(connection: Connection, worker: Worker) -> None:
    """Answer tasks until the other end closes."""
    while True:
        try:
            if not connection.poll(_IDLE_POLL_S):
                continue
            reply = worker.answer(connection.recv_bytes(), connection)
            connection.send_bytes(REPLY)
            connection.send_bytes(reply)
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
    plan = WorkerPlan(arguments.device, arguments.threads)
    configure_process(plan)
    serve(Connection(arguments.socket), Worker(RunFolder(arguments.run), plan))


if __name__ == "__main__":
    main()
