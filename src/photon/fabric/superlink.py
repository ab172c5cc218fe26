"""Flower's SuperLink as a child that ends with its parent and does not fill the disk with what it says of requests."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from threading import Lock

from photon.fabric.flwr_internals import superlink_main
from photon.fabric.lifeline import end_with

MAX_LINES_A_MINUTE = 60
_MINUTE_S = 60.0


class FewLines(logging.Filter):
    """Lets so many lines a minute pass: Flower has one for each call that it refuses, and a node may make many."""

    def __init__(self) -> None:
        super().__init__()
        self._began, self._count = time.monotonic(), 0
        self._lock = Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write it. The first line of a later minute says how many were left out."""
        with self._lock:
            now = time.monotonic()
            if now - self._began >= _MINUTE_S:
                if self._count > MAX_LINES_A_MINUTE:
                    left_out = self._count - MAX_LINES_A_MINUTE
                    record.msg, record.args = f"{record.getMessage()} ({left_out} lines before it were left out)", ()
                self._began, self._count = now, 0
            self._count += 1
            return self._count <= MAX_LINES_A_MINUTE


def main() -> None:
    """Entry point of `python -m photon.fabric.superlink --socket FD -- ARGUMENTS OF flower-superlink`."""
    parser = argparse.ArgumentParser(description="Flower's SuperLink; started by photon aggregator")
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("arguments", nargs="*")
    parsed = parser.parse_args()
    os.set_inheritable(parsed.socket, False)
    end_with(parsed.socket)
    logging.getLogger("uvicorn.access").addFilter(lambda record: False)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    logging.getLogger("flwr").addFilter(FewLines())
    sys.argv = ["flower-superlink", *parsed.arguments]
    superlink_main()


if __name__ == "__main__":
    main()
