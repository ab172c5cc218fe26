"""A child process that ends with its parent, however that one ends."""

from __future__ import annotations

import os
import select
import signal
from threading import Thread


def end_with(descriptor: int) -> None:
    """End this process, and what it started, as soon as the other end of the socket is closed.

    However the parent ends, its socket closes, and nothing that it started is left running. State is committed
    atomically, so that may happen at any instant.
    """

    def wait() -> None:
        poll = select.poll()
        poll.register(descriptor, 0)  # hang-up and error only; they need not be asked for
        poll.poll()
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    Thread(target=wait, name="photon-end-with", daemon=True).start()
