"""Flower's SuperLink as a child that ends with its parent and does not fill the disk with a line for every request."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from photon.fabric.flwr_internals import superlink_main
from photon.fabric.lifeline import end_with


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
    sys.argv = ["flower-superlink", *parsed.arguments]
    superlink_main()


if __name__ == "__main__":
    main()
