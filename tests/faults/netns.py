"""A long, lossy line of real packets on one machine: a network namespace at its far end, and this process between.

Both ends are TUN devices; every packet passes through here and may come late, or not at all. Unlike the proxy, which
ends connections, this leaves TCP to itself: it retransmits, backs off and at last gives up, as over a real line. The
kernel's own emulator (netem) is often not built in; this needs only root and /dev/net/tun.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from collections import deque
from typing import Literal, Self

Direction = Literal["up", "down"]  # up: from the namespace to this machine

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_TICK_S = 0.1
_LONGEST_PACKET = 2**16
_QUEUE_BYTES = 2**22  # what waits at one end of the line; what comes on top of it is lost, as at a router
_TCP, _SYN, _ACK = 6, 0x02, 0x10


def why_not() -> str:
    """Why this cannot be used here; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "there is no /dev/net/tun"
    if shutil.which("ip") is None:
        return "there is no `ip` (iproute2)"
    name = f"photon-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespace can be made: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


class LossyLine:
    """A namespace `name`, in which `command` runs a program, whose only way out is a line to `address` on this machine.

    A context manager. Which packets are lost is a function of `seed` and of how many came before.
    """

    def __init__(self, seed: int = 0) -> None:
        self.packets = {"up": 0, "down": 0}  # delivered
        self.lost = {"up": 0, "down": 0}
        self.name = f"photon-{os.getpid()}"
        block = os.getpid() % 2**14  # so that test processes side by side have networks of their own
        subnet, first = f"10.213.{block // 64}", block % 64 * 4
        self.address, self._far_address = f"{subnet}.{first + 1}", f"{subnet}.{first + 2}"
        self._lock = threading.Lock()  # guards all that follows
        self._loss, self._delay_s, self._bytes_per_s = 0.0, 0.0, 0.0
        self._vanishing = False
        self._known: set[int] = set()  # TCP ports at the far end
        self._forgotten: set[int] = set()
        self._random = random.Random(seed)
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._near, near_name = _tun("n")
        self._far, far_name = _tun("f")
        self._make_namespace(near_name, far_name)
        for direction, source, target in (("up", self._far, self._near), ("down", self._near, self._far)):
            self._start(direction, source, target)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def command(self) -> list[str]:
        """What stands before a command line that is to run at the far end."""
        return ["ip", "netns", "exec", self.name]

    def loses(self, share: float) -> None:
        """Lose this share of the packets, in each direction."""
        with self._lock:
            self._loss = share

    def delays(self, seconds: float) -> None:
        """Every packet comes so much later, one way."""
        with self._lock:
            self._delay_s = seconds

    def carries(self, bytes_per_s: float) -> None:
        """So many bytes a second in each direction; 0 = as many as come."""
        with self._lock:
            self._bytes_per_s = bytes_per_s

    def vanish(self) -> None:
        """From now on every packet is lost, and nobody is told."""
        with self._lock:
            self._vanishing = True

    def mend(self) -> None:
        """Packets come through again."""
        with self._lock:
            self._vanishing = False

    def forget(self) -> None:
        """What a router does that was switched off and on: connections of before lead nowhere, new ones do."""
        with self._lock:
            self._forgotten |= self._known
            self._known = set()

    def close(self) -> None:
        """End the threads, remove namespace and devices. Programs that still run in there lose their network."""
        self._closing.set()
        for thread in self._threads:
            thread.join(10 * _TICK_S)
        os.close(self._near)
        os.close(self._far)
        subprocess.run(["ip", "netns", "del", self.name], check=False)

    def _make_namespace(self, near: str, far: str) -> None:
        _ip("netns", "add", self.name)
        _ip("address", "add", f"{self.address}/30", "dev", near)
        _ip("link", "set", near, "mtu", "1500", "up")
        _ip("link", "set", far, "netns", self.name)
        _ip("-n", self.name, "address", "add", f"{self._far_address}/30", "dev", far)
        _ip("-n", self.name, "link", "set", far, "mtu", "1500", "up")
        _ip("-n", self.name, "link", "set", "lo", "up")

    def _start(self, direction: Direction, source: int, target: int) -> None:
        queue: deque[tuple[float, bytes]] = deque()
        changed = threading.Condition()
        for work, end in ((self._take, source), (self._hand_on, target)):
            thread = threading.Thread(target=work, args=(direction, end, queue, changed), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _take(
        self, direction: Direction, source: int, queue: deque[tuple[float, bytes]], changed: threading.Condition
    ) -> None:
        poll = select.poll()
        poll.register(source, select.POLLIN)
        free_at = 0.0
        while not self._closing.is_set():
            if not poll.poll(_TICK_S * 1000):
                continue
            packet = os.read(source, _LONGEST_PACKET)
            now = time.monotonic()
            with self._lock:
                lost = self._is_lost(direction, packet)
                delay_s, rate = self._delay_s, self._bytes_per_s
            waiting_s = max(0.0, free_at - now)
            if lost or (rate and waiting_s * rate > _QUEUE_BYTES):
                self.lost[direction] += 1
                continue
            free_at = now + waiting_s + (len(packet) / rate if rate else 0.0)
            with changed:
                queue.append((free_at + delay_s, packet))
                changed.notify()

    def _hand_on(
        self, direction: Direction, target: int, queue: deque[tuple[float, bytes]], changed: threading.Condition
    ) -> None:
        while not self._closing.is_set():
            with changed:
                wait_s = queue[0][0] - time.monotonic() if queue else _TICK_S
                if wait_s > 0:
                    changed.wait(min(wait_s, _TICK_S))
                    continue
                packet = queue.popleft()[1]
            with contextlib.suppress(OSError):  # the device is going down
                os.write(target, packet)
                self.packets[direction] += 1

    def _is_lost(self, direction: Direction, packet: bytes) -> bool:
        """Called with the lock."""
        port, flags = _tcp(packet, direction)
        if port:
            if flags & (_SYN | _ACK) == _SYN:  # a new connection, though it may have the number of an old one
                self._forgotten.discard(port)
            if port in self._forgotten:
                return True
            self._known.add(port)
        return self._vanishing or self._random.random() < self._loss


def _tcp(packet: bytes, direction: Direction) -> tuple[int, int]:
    """(port at the far end, TCP flags) of an IPv4 packet with TCP in it; (0, 0) of any other."""
    header = (packet[0] & 15) * 4
    if packet[0] >> 4 != 4 or packet[9] != _TCP or len(packet) < header + 14:
        return 0, 0
    source, target = struct.unpack_from("!HH", packet, header)
    return (source if direction == "up" else target), packet[header + 13]


def _tun(kind: str) -> tuple[int, str]:
    """(descriptor, name) of a new TUN device; it is gone when the descriptor is closed."""
    name = f"ph{os.getpid()}{kind}"
    handle = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(handle, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return handle, name


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
