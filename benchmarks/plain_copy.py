"""The yardstick of `benchmarks.exchange`: a file streamed over plain HTTP, no TLS, no hash, from disk to disk.

A server of the standard library with threads and large buffers: on a loopback it moved more bytes per second than any
asynchronous server that was tried. Run it as `python -m benchmarks.plain_copy FOLDER`; it prints its port.
"""

from __future__ import annotations

import http.client
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PIECE_BYTES = 2**20


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder = Path()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the library's own name
        pass

    def do_GET(self) -> None:  # the library's own name
        path = self.folder / Path(self.path).name
        self.send_response(200)
        self.send_header("Content-Length", str(path.stat().st_size))
        self.end_headers()
        buffer = memoryview(bytearray(PIECE_BYTES))
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                self.connection.sendall(buffer[:count])

    def do_PUT(self) -> None:  # the library's own name
        left, buffer = int(self.headers["Content-Length"]), memoryview(bytearray(PIECE_BYTES))
        with (self.folder / f"{Path(self.path).name}.received").open("wb", buffering=0) as file:
            while left:
                count = self.rfile.readinto1(buffer[: min(left, PIECE_BYTES)])
                file.write(buffer[:count])
                left -= count
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()


def get(port: int, name: str, target: Path) -> None:
    """Copy a file of the server's folder into `target`."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", f"/{name}")
    response, buffer = connection.getresponse(), memoryview(bytearray(PIECE_BYTES))
    with target.open("wb", buffering=0) as file:
        while count := response.readinto(buffer):
            file.write(buffer[:count])
    connection.close()


def put(port: int, name: str, source: Path) -> None:
    """Copy `source` into the server's folder."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.putrequest("PUT", f"/{name}")
    connection.putheader("Content-Length", str(source.stat().st_size))
    connection.endheaders()
    buffer = memoryview(bytearray(PIECE_BYTES))
    with source.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            assert connection.sock is not None
            connection.sock.sendall(buffer[:count])
    assert connection.getresponse().read() == b""
    connection.close()


if __name__ == "__main__":
    _Handler.folder = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
