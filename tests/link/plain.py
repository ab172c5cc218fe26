"""A place that speaks plain HTTP: stands for a bucket, and for a gateway that names one."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DEADLINE_S = 30.0


@contextmanager
def plain_server(blobs: dict[str, bytes], ticks: list[str] | None = None) -> Iterator[int]:
    """A bucket and a small gateway in one: plain HTTP, what is PUT to /bucket/N stays in `blobs`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, data: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def note(self) -> None:
            if ticks is not None:
                ticks.append(
                    f"{self.command} {self.path} {self.headers.get('Range') or self.headers.get('Content-Range')}"
                )

        def do_GET(self) -> None:  # the library's name
            self.note()
            path = self.path.split("?")[0]
            if self.path.startswith("/v1/blobs/"):
                self.answer(200, blobs["location"])
            elif "expired" in self.path:
                self.answer(403, b"<Error><StringToSign>SIGNATURE</StringToSign></Error>")
            elif path in blobs and (match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))):
                low, high = int(match[1]), int(match[2]) + 1
                data = blobs[path]
                self.answer(206, data[low:high], Content_Range=f"bytes {low}-{high - 1}/{len(data)}")
            else:
                self.answer(404)

        def do_PUT(self) -> None:  # the library's name
            self.note()
            blobs[self.path.split("?")[0]] = self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(200)

        def do_POST(self) -> None:  # the library's name
            self.note()
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(200, b"{}" if self.path.endswith("finish") else blobs["location"])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(DEADLINE_S)
