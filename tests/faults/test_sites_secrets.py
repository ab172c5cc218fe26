"""What no stranger can reach, and what no other site ever learns: against a federation that runs."""

from __future__ import annotations

import re
import socket
import ssl
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import pytest
from tests.fabric.gateways import Site, ask, ask_over, connect, in_process, raw
from tests.faults.federations import finish, start
from tests.faults.reader import Reader
from tests.faults.sites import TIMEOUT_S, Sites, write_texts
from tests.faults.strangers import open_superlink, statuses_of_requests

from photon import certificates
from photon.fabric.gateway import GatewayConfig
from photon.keys import create_authority, issue_node, revoke

DEADLINE_S = 20.0


class SiteBefore(Site):
    """A site whose gateway stands before the server on `superlink_port`."""

    superlink_port = 1

    @property
    def config(self) -> GatewayConfig:
        return super().config.model_copy(update={"superlink_port": self.superlink_port})


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
                lines = raw(site, both + smuggled).split(b"\r\n")
                assert [line.split(b" ")[1] for line in lines if line.startswith(b"HTTP/")] == [b"400"]
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
    """How it could be written without being hidden: as it is, in hexadecimal, percent-encoded, in base64."""
    aligned = (b64encode(bytes(shift) + secret)[4 if shift else 0 :].rstrip(b"=")[:-1] for shift in range(3))
    return {secret, secret.hex().encode(), quote(secret).encode(), *aligned}


def found_in(where: Mapping[str, bytes], secrets: Mapping[str, bytes]) -> set[tuple[str, str]]:
    """(place, which secret) of every secret that stands in one of the places, in whatever spelling."""
    return {
        (place, name)
        for name, secret in secrets.items()
        for spelling in spellings(secret)
        for place, data in where.items()
        if spelling in data
    }


@pytest.mark.parametrize("before", [b"", b"1", b"12", b"123"])
def test_a_secret_is_found_however_it_is_written(before: bytes) -> None:
    secret = b"heirloom/4f9c1e77"
    for written in (secret, secret.hex().encode(), b"heirloom/4f9c1e77", b64encode(before + secret + b"and more")):
        assert found_in({"log": b"x" + written + b"y"}, {"it": secret}) == {("log", "it")}
    assert found_in({"log": b64encode(before + secret[::-1])}, {"it": secret}) == set()


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def plant(texts: Path, owners: Sequence[str]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Hide a word in the text of each owner, and another in the names of its files: (words, names)."""
    words = {f"text of {owner}": f"heirloom-{owner}-4f9c1e77".encode() for owner in owners}
    names = {f"file names of {owner}": f"strongbox-{owner}-b81d20aa".encode() for owner in owners}
    for owner in owners:
        word, name = words[f"text of {owner}"].decode(), names[f"file names of {owner}"].decode()
        for file in sorted((texts / owner).iterdir()):
            file.write_text(f"{word} " + file.read_text().replace(";", f" {word};"))
            file.rename(file.with_name(f"{name}-{file.name}"))
    return words, names


def break_site(sites: Sites, owner: str) -> None:
    """Take a node's tokens away under it; its trainer ends, and cannot begin again."""
    for path in (sites.folder / "node-data" / owner).rglob("*"):
        if path.is_file():
            path.unlink()
    trainer = sites.trainer(owner)
    if trainer is not None:
        trainer.kill()


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Sites], dict[str, Path]]:
    """Keys with which nobody gets in: of another authority, expired, and of a name that takes no part."""

    def make(sites: Sites) -> dict[str, Path]:
        elsewhere = tmp_path / "elsewhere"
        create_authority(elsewhere)
        found = {"another authority": issue_node(elsewhere, "ada"), "no part": issue_node(sites.keys, "eve")}
        with monkeypatch.context() as patch:
            long_ago = certificates.now() - timedelta(days=100)
            patch.setattr(certificates, "now", lambda: long_ago)
            found["expired"] = issue_node(sites.keys, "ada", days=1, out=tmp_path / "expired.key")
        return found

    return make


def check_strangers(sites: Sites, keys: Mapping[str, Path]) -> None:
    """Whatever they show, no byte is answered, or only that they are refused; their nodes end with a sentence."""
    assert "CERTIFICATE_REQUIRED" in refused_handshake(sites.port, context_of(None))
    assert "UNKNOWN_CA" in refused_handshake(sites.port, context_of(keys["another authority"]))
    assert "CERTIFICATE_EXPIRED" in refused_handshake(sites.port, context_of(keys["expired"]))
    assert "UNSUPPORTED_CERTIFICATE" in refused_handshake(sites.port, context_of(sites.keys / "aggregator.pem"))
    with socket.create_connection(("127.0.0.1", sites.port), timeout=DEADLINE_S) as plain:
        plain.sendall(b"GET /v1/run HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP" not in plain.recv(1000)
    asked = statuses_of_requests(sites)
    assert {target: seen for target, seen in asked.items() if not all(400 <= one < 500 for one in seen)} == {}
    sentences = {
        "another authority": "is not from the authority that made this node's key",
        "expired": "expired on",
        "no part": "eve takes no part in this run",
    }
    url = f"https://127.0.0.1:{sites.port}"
    (sites.folder / "nothing.toml").write_text(f'text = ["{sites.folder}"]\n')
    nodes = {
        name: start("node", "--keys", key, "--aggregator", url, "--silo", sites.folder / "nothing.toml", "--state",
                    sites.folder / f"home of {name}")
        for name, key in keys.items()
    }  # fmt: skip
    for name, node in nodes.items():
        code, output = finish(node, TIMEOUT_S)
        assert code != 0
        assert sentences[name] in " ".join(output.split())
        assert "Traceback" not in output


def check_revocation(sites: Sites, owner: str) -> None:
    """It holds for the next request on a connection that is open, and the node ends with a sentence."""
    with closing(connect(sites, owner)) as connection:
        assert ask_over(connection, "GET", "/v1/run").status == 200
        revoke(sites.keys, owner)
        answer = ask_over(connection, "GET", "/v1/run")
        assert (answer.status, "was revoked" in answer.json["error"]) == (403, True)
    assert sites.nodes[owner].wait(TIMEOUT_S) == 2
    last = sites.node_log(owner).read_text().splitlines()[-1]
    assert f"the certificate of {owner} was revoked" in last


@pytest.mark.sites
@pytest.mark.timeout(1200)
def test_strangers_stay_out_and_secrets_stay_home(
    tmp_path: Path, strangers: Callable[[Sites], dict[str, Path]]
) -> None:
    """Ada's tokens vanish in the run and bob's text before it; cyd is revoked, and gets a new key."""
    owners, vault = ("ada", "bob", "cyd"), "vault-7c0e5d93"
    texts = tmp_path / vault
    write_texts(texts, owners)
    words, names = plant(texts, owners)
    names["a folder"] = vault.encode()
    write_texts(tmp_path / "public", owners[:1])
    extra = "quorum = 0.3\nassemble_s = 30.0\ngrace_s = 20.0\ndeadline_s = 240.0"
    with Sites(tmp_path / "sites", texts, rounds=14, extra=extra, owners=owners) as sites:
        sites.recipe.write_text(sites.recipe.read_text().replace(str(texts), str(tmp_path / "public")))
        readers = {owner: Reader(sites.port, sites.keys, owner) for owner in owners}
        with readers["ada"], readers["bob"], readers["cyd"]:
            (texts / "bob").rename(texts / "gone")
            sites.start_aggregator()
            gateway_log = sites.run_folder / "logs" / "gateway.log"
            sites.wait_until(lambda: gateway_log.exists() and "listening" in gateway_log.read_text(), "the gateway")
            check_strangers(sites, strangers(sites))
            for owner, reader in readers.items():
                sites.start_node(owner, port=reader.port)
            assert sites.nodes["bob"].wait(TIMEOUT_S) == 2
            sites.wait_for_round(1)
            sites.wait_until(lambda: "ada" in sites.rounds()[-1]["nodes"], "ada takes part")
            break_site(sites, "ada")
            sites.wait_until(lambda: "node reports" in sites.rounds()[-1]["missing"].get("ada", ""), "ada's task fails")
            check_revocation(sites, "cyd")
            issue_node(sites.keys, "cyd")
            sites.start_node("cyd")
            output = sites.finish()
            sent = {f"what {owner} sent": reader.sent for owner, reader in readers.items()}
            heard = {f"what {owner} heard": reader.received for owner, reader in readers.items()}
        logs = {f"log of {owner}": sites.node_log(owner).read_bytes() for owner in owners}
        for home in sites.folder.glob("home-*"):
            logs |= {path: data for path, data in files_under(home).items() if path.endswith(".log")}
        kept = files_under(sites.run_folder)
        keys = private_lines(*sites.keys.glob("*.key"), *sites.keys.glob("*.pem"))
        keys += [kept.pop(str(sites.run_folder / "exchange" / "secret"))]
        private = {f"line {number} of the keys": key for number, key in enumerate(keys)}
        assert len(private) >= 6 * 3
        reached = kept | sent | heard | {"the Aggregator's output": output.encode()}

        # The secrets were there to be found, what was sent was read, and whatever failed was said.
        assert found_in(logs, names | words) == {("log of bob", "a folder")}
        assert {place for place, _ in found_in(files_under(texts), words)} == {
            str(path) for path in texts.rglob("*.txt")
        }
        assert b'"state":"ready"' in sent["what ada sent"]
        assert b"PUT /v1/uploads/" in sent["what ada sent"]
        assert b'"state":"preparing"' in sent["what bob sent"] or b"GET /v1/run" in sent["what bob sent"]
        assert b"the node's own log says more" in sent["what ada sent"]
        said = {one["missing"].get("ada", "") for one in sites.rounds()}
        assert any(re.fullmatch(r"the node reports: \w+; the node's own log says more", one) for one in said), said

        # None of them is anywhere but where its owner put it.
        assert found_in(reached, words | names) == set()
        assert found_in(reached | logs, private) == set()
        assert [name for name, data in sent.items() if b"node-data" in data or b"home-" in data] == []
