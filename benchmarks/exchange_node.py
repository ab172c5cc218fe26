"""A node of `benchmarks.exchange` as a process of its own, as real nodes are.

Run as `python -m benchmarks.exchange_node URL KEY HOME BASE_SHA256 UPDATE UPDATE_SHA256 STREAMS`. Once it is
connected it says "ready", waits for a line, makes one exchange, says "done", and so on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from photon.identity import client_context
from photon.link.body import whole_file
from photon.link.client import GatewayClient
from photon.link.transfer import download, upload

DEADLINE_S = 300.0


def exchange(
    client: GatewayClient, home: Path, base_sha256: str, update: Path, update_sha256: str, streams: int
) -> None:
    """The node's part: the base comes down into `home`, the update goes up."""
    download(client, base_sha256, home / "base", streams=streams, deadline_s=DEADLINE_S)
    upload(client, update_sha256, whole_file(update), streams=streams, deadline_s=DEADLINE_S)


def main(url: str, key: str, home: str, base_sha256: str, update: str, update_sha256: str, streams: str) -> None:
    client = GatewayClient(url, client_context(Path(key)))
    client.json("GET", "/v1/run")
    print("ready", flush=True)
    for _ in sys.stdin:
        exchange(client, Path(home), base_sha256, Path(update), update_sha256, int(streams))
        print("done", flush=True)
        (Path(home) / "base").unlink()
        print("ready", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
