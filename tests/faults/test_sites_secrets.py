"""What no stranger can reach, and what no other site ever learns: against a federation that runs."""

from __future__ import annotations

import json
import re
import signal
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from tests.fabric.gateways import Site, ask, ask_over, connect, in_process, raw
from tests.faults.reader import Reader
from tests.faults.sites import TIMEOUT_S, Sites, write_texts

from photon.fabric.fleet import _CALLS
from photon.fabric.gateway import GatewayConfig

DEADLINE_S = 20.0

# What Flower's SuperLink answers beside the nine calls of a node.
FLOWERS = sorted(
    {path for _, path in PROTOBUF_REQUEST_TYPES if path.removeprefix("/v1/fleet/") not in _CALLS}
    | {"/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/health", "/v1/health", "/v1/responses"}
)
# The same place by other names: `{}` is a path behind /v1/.
TRICKS = [
    "/v1/fleet/../{}", "/v1/fleet/./../{}", "/v1/fleet/%2e%2e/{}", "/v1/fleet/%2E%2E/{}", "/v1/fleet/.%2e/{}",
    "/v1/fleet/..%2f{}", "/v1/fleet/..%252f{}", "/v1/fleet/..\\{}", "/v1/fleet/..;/{}", "/v1/fleet/pull-messages/../../{}",
    "/v1/fleet/pull-messages/%2e%2e/%2e%2e/{}", "//v1/{}", "/v1//{}", "/v1/./{}", "/V1/{}", "/v1/fleet//v1/{}",
    "/v1/fleet/%00/{}", "/v1/fleet/pull-messages%0d%0aX:/{}", "/v1/fleet/pull-messages%2f..%2f..%2f{}", "/%76%31/{}",
    "http://127.0.0.1/v1/{}", "https://127.0.0.1/v1/{}", "http://superlink/v1/{}", "/v1/run/../{}", "/v1/blobs/../{}",
    "/v1/fleet/{}", "/v1/fleet/fleet/../../{}", "\\v1\\{}", "/v1/{}/", "/v1/{}?/v1/fleet/pull-messages", "/v1/{}#/v1/fleet/",
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

    def log_message(self, format: str, *args: object) -> None:
        pass


class SiteBefore(Site):
    """A site whose gateway stands before the server on `superlink_port`."""

    superlink_port = 1

    @property
    def config(self) -> GatewayConfig:
        return super().config.model_copy(update={"superlink_port": self.superlink_port})


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
        thread.join(DEADLINE_S)


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


def test_nothing_of_flower_but_a_nodes_calls_reaches_the_superlink(tmp_path: Path) -> None:
    with open_superlink() as superlink:
        site = SiteBefore(tmp_path)
        site.superlink_port = superlink.server_address[1]
        with in_process(site):
            found = statuses_of_requests(site)
            smuggled = b"POST /v1/control/list-runs HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
            head = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n"
            for both in (
                head + b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                head + b"Content-Length: 5\r\nContent-Length: 0\r\n\r\n",
                head + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
                head + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n",
            ):
                answer = raw(site, both + smuggled)
                assert [int(line.split(b" ")[1]) for line in answer.split(b"\r\n") if line.startswith(b"HTTP/")] == [
                    400
                ]
            assert {target: seen for target, seen in found.items() if not all(400 <= one < 500 for one in seen)} == {}
            assert superlink.asked == []  # type: ignore[attr-defined]  # see _Superlink
            assert ask(site, "POST", "/v1/fleet/pull-messages").status == 200
            assert superlink.asked == [("POST", "/v1/fleet/pull-messages")]  # type: ignore[attr-defined]  # see above


# Against a federation


def refused_handshake(port: int, context: ssl.SSLContext) -> str:
    """What the gateway's alert says to a client with this context; no byte of an answer comes before it."""
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as plain:
        try:
            with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
                connection.sendall(b"GET /v1/run HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = connection.recv(1)
        except ssl.SSLError as error:
            return str(error.reason)
    raise AssertionError(f"it was answered with {answer!r}")


def context_of(bundle: Path | None) -> ssl.SSLContext:
    """A client that shows this certificate and does not look at the other end's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if bundle is not None:
        context.load_cert_chain(bundle)
    return context


def private_lines(*files: Path) -> list[bytes]:
    """The lines of base64 of private keys."""
    lines = []
    for file in files:
        for key in re.findall(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\n(.+?)-----END", file.read_bytes(), re.DOTALL):
            lines += [line for line in key.splitlines() if len(line) > 15]
    return lines


def spellings(secret: bytes) -> set[bytes]:
    """How a secret could be written without being meant to be hidden."""
    in_base64 = {b64encode(bytes(shift) + secret)[4 if shift else 0 : -4] for shift in range(3)}
    return {
        secret,
        secret.hex().encode(),
        quote(secret).encode(),
        json.dumps(secret.decode("latin-1"))[1:-1].encode(),
    } | {*in_base64}


def found_in(where: dict[str, bytes], secrets: dict[str, bytes]) -> list[tuple[str, str]]:
    return [
        (place, name)
        for place, data in where.items()
        for name, secret in secrets.items()
        if any(spelling in data for spelling in spellings(secret))
    ]


def files_under(*folders: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def wait_for(what: str, sites: Sites, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, f"{what}: it did not come to that\n{sites.story()}"
        time.sleep(0.1)


def plant(texts: Path) -> dict[str, bytes]:
    """Hide a word in the text of each owner, and another in the names of its files; what was hidden, by its place."""
    planted = {}
    for owner in ("ada", "bob", "cyd"):
        word, name = f"heirloom-{owner}-4f9c1e77", f"strongbox-{owner}-b81d20aa"
        for file in sorted((texts / owner).iterdir()):
            file.write_text(f"{word} " + file.read_text().replace(";", f" {word};"))
            file.rename(file.with_name(f"{name}-{file.name}"))
        planted |= {f"text of {owner}": word.encode(), f"file names of {owner}": name.encode()}
    return planted


def break_site(sites: Sites, owner: str) -> None:
    """Take a node's text away under it: tokens and all; its trainer ends, and cannot begin again."""
    for path in (sites.folder / "node-data" / owner).rglob("*"):
        if path.is_file():
            path.unlink()
    for child in sites.trainers(owner):
        child.kill()


@pytest.mark.sites
@pytest.mark.timeout(900)
def test_strangers_stay_out_and_secrets_stay_home(tmp_path: Path) -> None:
    texts = tmp_path / "vault-7c0e5d93"
    write_texts(texts, ("ada", "bob", "cyd"))
    secrets = plant(texts) | {"a folder": b"vault-7c0e5d93"}
    write_texts(tmp_path / "public", ("ada",))
    owners = ("ada", "bob", "cyd", "dan")
    extra = "quorum = 0.25\ngrace_s = 20.0"
    with Sites(tmp_path / "sites", texts, rounds=30, extra=extra, owners=owners) as sites:
        recipe = sites.recipe.read_text()
        sites.recipe.write_text(recipe.replace(str(texts / "ada"), str(tmp_path / "public" / "ada")))
        with (
            Reader(sites.port, sites.keys, "ada") as ada,
            Reader(sites.port, sites.keys, "bob") as bob,
            Reader(sites.port, sites.keys, "cyd") as cyd,
        ):
            sites.start_aggregator()
            for path in (texts / "bob").iterdir():
                path.unlink()
            for owner, reader in (("ada", ada), ("bob", bob), ("cyd", cyd)):
                sites.start_node(owner, port=reader.port)
            assert sites.nodes["bob"].wait(TIMEOUT_S) not in (0, None)
            sites.wait_for_round(2)
            break_site(sites, "ada")
            _strangers_stay_out(sites, tmp_path)
            revoked_is_shut_out(sites)
            wait_for("a failed task", sites, lambda: any("node reports" in said(one) for one in sites.rounds()))
            # Only nodes that failed are left: the run stops here, and what is on the disk is all there will be.
            assert sites.aggregator is not None
            sites.aggregator.send_signal(signal.SIGTERM)
            output, _ = sites.aggregator.communicate(timeout=TIMEOUT_S)
            sites.aggregator = None
            sent = {"ada sent": ada.sent, "bob sent": bob.sent, "cyd sent": cyd.sent}
            heard = {"ada heard": ada.received, "bob heard": bob.received, "cyd heard": cyd.received}
        print(output, sent.keys(), heard.keys(), secrets)


def said(one: dict[str, dict[str, str]]) -> str:
    return one["missing"].get("ada", "")


def revoked_is_shut_out(sites: Sites) -> None: ...


def _strangers_stay_out(sites: Sites, tmp_path: Path) -> None: ...
