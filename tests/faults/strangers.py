"""Everything of Flower's that is no node's business, and who would notice if it were reached."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from tests.fabric.gateways import Site, ask_over, connect, raw
from tests.faults.sites import Sites

from photon.fabric.fleet import _CALLS

# What Flower's SuperLink answers beside the nine calls of a node.
FLOWERS = sorted(
    {path for _, path in PROTOBUF_REQUEST_TYPES if path.removeprefix("/v1/fleet/") not in _CALLS}
    | {"/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/health", "/v1/health", "/v1/responses"}
)
# The same place by other names: `{}` is a path behind /v1/.
TRICKS = [
    "/v1/fleet/../{}", "/v1/fleet/./../{}", "/v1/fleet/%2e%2e/{}", "/v1/fleet/%2E%2E/{}", "/v1/fleet/.%2e/{}",
    "/v1/fleet/..%2f{}", "/v1/fleet/..%252f{}", "/v1/fleet/..\\{}", "/v1/fleet/..;/{}",
    "/v1/fleet/pull-messages/../../{}",
    "/v1/fleet/pull-messages/%2e%2e/%2e%2e/{}", "//v1/{}", "/v1//{}", "/v1/./{}", "/V1/{}", "/v1/fleet//v1/{}",
    "/v1/fleet/%00/{}", "/v1/fleet/pull-messages%0d%0aX:/{}", "/v1/fleet/pull-messages%2f..%2f..%2f{}", "/%76%31/{}",
    "http://127.0.0.1/v1/{}", "https://127.0.0.1/v1/{}", "http://superlink/v1/{}", "/v1/run/../{}", "/v1/blobs/../{}",
    "/v1/fleet/{}", "/v1/fleet/fleet/../../{}", "\\v1\\{}", "/v1/{}/", "/v1/{}?/v1/fleet/pull-messages",
    "/v1/{}#/v1/fleet/",
]  # fmt: skip
BEHIND = ("control/list-runs", "control/start-run", "runtime/acquire-task", "fleet/get-fab", "fleet/unregister-node")


class _Superlink(BaseHTTPRequestHandler):
    """Answers everything, as a SuperLink would that checks nothing, and remembers what it was asked."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.command, self.path))  # type: ignore[attr-defined]  # of our own server
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_HEAD = answer  # noqa: N815  # names of http.server

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def open_superlink() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Superlink)
    server.asked = []  # type: ignore[attr-defined]  # see _Superlink
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(20)


def statuses_of_requests(site: Site | Sites) -> dict[str, set[int]]:
    """HTTP statuses of everything of Flower's that is no node's business, asked for with a node's certificate."""
    found: dict[str, set[int]] = {}

    def ask_raw(method: str, target: str, head: str = "") -> None:
        request = f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n{head}\r\n"
        answer = raw(site, request.encode())  # type: ignore[arg-type]  # both have a port and keys
        found.setdefault(target, set()).add(int(answer.split(b" ")[1]) if answer else 400)

    with closing(connect(site)) as connection:  # type: ignore[arg-type]  # see above
        for path in FLOWERS:
            for method in ("POST", "GET"):
                found.setdefault(path, set()).add(ask_over(connection, method, path).status)
    for trick in TRICKS:
        for behind in BEHIND[:2]:
            ask_raw("POST", trick.format(behind))
    for behind in BEHIND:
        ask_raw("POST", "/v1/fleet/../" + behind)
        ask_raw("POST", "/", f"X-Original-URL: /v1/{behind}\r\nX-Rewrite-URL: /v1/{behind}\r\n")
        ask_raw("CONNECT", "127.0.0.1:1")
        ask_raw("OPTIONS", "*")
    return found
