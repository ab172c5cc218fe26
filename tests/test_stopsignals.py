"""SIGTERM is Ctrl-C inside the block, and what it was outside."""

from __future__ import annotations

import os
import signal

import pytest

from photon.stopsignals import sigterm_as_ctrl_c


def test_sigterm_means_ctrl_c_inside_and_what_it_meant_before_outside() -> None:
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        with pytest.raises(KeyboardInterrupt), sigterm_as_ctrl_c():
            os.kill(os.getpid(), signal.SIGTERM)
        assert told == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert told == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
