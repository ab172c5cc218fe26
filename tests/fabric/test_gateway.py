"""What passes the public port: the run, blobs down, blobs up; what a hostile node cannot, and what a kill costs."""

from __future__ import annotations

import hashlib
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Thread

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fabric.gateways import (
    DEADLINE_S,
    STATUS,
    Site,
    allow,
    ask,
    begin,
    connect,
    finish,
    in_process,
    in_thread,
    put,
    raw,
    sha256,
    some_bytes,
)

from photon.fabric import gateway
from photon.fabric.gateway import visible_status
from photon.identity import Identity
from photon.link import transfer
from photon.link.body import whole_file
from photon.link.partial import SAVE_EVERY_S
from photon.link.transfer import download, upload

MIB = 2**20
DATA = some_bytes(3 * MIB, seed=1)
SHA = sha256(DATA)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    with in_thread(site):
        site.store.publish(SHA, DATA)
        yield site


@pytest.fixture
def own_site(tmp_path: Path) -> Site:
    """A site whose gateway the test starts itself."""
    return Site(tmp_path)


# The run


def test_a_node_sees_the_run_and_its_own_entry(site: Site) -> None:
    assert ask(site, "GET", "/v1/run").json == {"run": "r", "recipe": "x = 1"}
    assert ask(site, "GET", "/v1/status").json == {"run": "r", "round": 3, "nodes": {"ada": STATUS["nodes"]["ada"]}}


names = st.sampled_from(["ada", "bob", "run", "nodes", "eve"])


@given(
    names,
    st.dictionaries(names, st.dictionaries(names, st.integers())),
    st.dictionaries(st.text(max_size=5), st.integers()),
)
def test_no_status_shows_a_node_more_than_the_round_and_itself(
    name: str, nodes: dict[str, dict[str, int]], other: dict[str, int]
) -> None:
    status = other | {"run": "r", "round": 1, "nodes": nodes}
    seen = visible_status(Identity(name, "node", "1"), status)
    assert set(seen) == {"run", "round", "nodes"}
    assert seen["nodes"] == ({name: nodes[name]} if name in nodes else {})
    assert visible_status(Identity(name, "operator", "1"), status) == status
    assert visible_status(Identity(name, "node", "1"), {}) == {"nodes": {}}


def test_before_the_run_has_begun_there_is_nothing_yet(own_site: Site) -> None:
    (own_site.root / "run.json").unlink()
    (own_site.root / "status.json").write_text("{")
    with in_thread(own_site):
        for path in ("/v1/run", "/v1/status"):
            answer = ask(own_site, "GET", path)
            assert (answer.status, answer.json) == (503, {"error": "the run has not begun yet"})


def test_a_call_of_flower_is_handed_on_in_the_name_of_the_certificate(site: Site) -> None:
    answer = ask(site, "POST", "/v1/fleet/push-messages", b"body" * 1000, name="bob")
    assert answer.body == b"bob|push-messages|" + b"body" * 1000
    assert answer.headers["Content-Type"] == "application/x-echo"
    assert ask(site, "POST", "/v1/fleet/push-messages", bytes(gateway.MAX_CALL_BYTES)).status == 200
    assert ask(site, "POST", "/v1/fleet/push-messages", bytes(gateway.MAX_CALL_BYTES + 1)).status == 413


# Blobs down


def test_a_published_blob_is_served_whole_and_in_ranges(site: Site) -> None:
    location = ask(site, "GET", f"/v1/blobs/{SHA}").json
    assert location["bytes"] == len(DATA)
    whole = ask(site, "GET", f"/v1/blobs/{SHA}/data")
    assert (whole.status, whole.body) == (200, DATA)
    for header, low, high in (
        ("bytes=0-0", 0, 1),
        ("bytes=5-1048580", 5, 1048581),
        (f"bytes={len(DATA) - 2}-", -2, None),
    ):
        part = ask(site, "GET", f"/v1/blobs/{SHA}/data", Range=header)
        assert (part.status, part.body) == (206, DATA[low:high])
        first = low if low >= 0 else len(DATA) + low
        assert part.headers["Content-Range"] == f"bytes {first}-{first + len(part.body) - 1}/{len(DATA)}"
    assert ask(site, "GET", f"/v1/blobs/{SHA}/data", Range="bytes=3145720-99999999").body == DATA[3145720:]


@pytest.mark.parametrize(
    "header",
    [
        "bytes=0-1,5-6", "bytes=-5", "bytes=5-4", "bytes=3145728-", "bytes=99999999999-", "bytes=0-" + "9" * 30,
        "bits=0-1", "bytes=a-b", "bytes=0x0-1", "bytes= 0-1", "", "bytes=" + "0-1," * 1000,
    ],
)  # fmt: skip
def test_ranges_that_are_none_are_refused(site: Site, header: str) -> None:
    answer = ask(site, "GET", f"/v1/blobs/{SHA}/data", Range=header)
    assert answer.status == 416
    assert len(answer.body) < 200


@pytest.mark.parametrize(
    "path",
    [
        "../../keys/ca.key", "..%2f..%2fkeys%2fca.key", f"{SHA}/../../../keys/ca.key", f"{SHA}%00", f"{SHA}/data/",
        SHA.upper(),
        f"../up/bob/{SHA}", "%2e%2e/%2e%2e/keys/ca.key", f"/{SHA}", f"{SHA}/data%2f..%2f..%2f..",
    ],
)  # fmt: skip
def test_no_path_leads_out_of_the_published_blobs(site: Site, path: str) -> None:
    for target in (f"/v1/blobs/{path}", f"/v1/blobs/{path}/data", f"/v1/uploads/{path}/0"):
        received = raw(site, f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert received.split(b" ")[1] in (b"404", b"405", b"400")
        assert b"PRIVATE" not in received


def test_another_nodes_upload_cannot_be_read(site: Site) -> None:
    secret = b"what bob learnt"
    allow(site, "bob", 100)
    site.store.begin_upload("bob", sha256(secret), len(secret))
    site.store.incoming("bob", sha256(secret)).write(0, 0, secret)
    site.store.finish_upload("bob", sha256(secret))
    for path in (f"/v1/blobs/{sha256(secret)}", f"/v1/blobs/{sha256(secret)}/data"):
        answer = ask(site, "GET", path)
        assert (answer.status, answer.json) == (404, {"error": "no such blob is published"})
    assert begin(site, sha256(secret), len(secret)).status == 403  # nor is it ada's own by knowing its name
    site.store.discard("bob")


# Blobs up


@pytest.fixture
def ticket(site: Site) -> Iterator[None]:
    """Ada may upload as many bytes as DATA has; nothing of it stays."""
    allow(site, "ada", len(DATA))
    yield
    site.store.discard("ada")


def stored(site: Site) -> int:
    return sum(path.stat().st_size for path in (site.store.root / "up").rglob("*") if path.is_file())


def test_without_a_ticket_nothing_is_taken(site: Site) -> None:
    assert begin(site, SHA, len(DATA)).json == {"error": "no task asks for an upload of this node"}
    assert put(site, DATA, 0, len(DATA), SHA).status == 403
    assert finish(site, SHA).status == 403
    site.store.allow("ada", len(DATA), time.time() - 1)
    assert begin(site, SHA, len(DATA)).json == {"error": "the time for this upload is over"}
    assert stored(site) == 0


@pytest.mark.usefixtures("ticket")
def test_a_hundred_times_the_declared_size_does_not_reach_the_disk(site: Site) -> None:
    assert begin(site, SHA, 100 * len(DATA)).status == 413
    assert begin(site, SHA, 1000).status == 200
    assert put(site, DATA, 0, len(DATA), SHA).status == 404  # another total than declared
    assert put(site, DATA, 0, 1000, SHA).status == 413
    assert put(site, DATA, 0, 1000, SHA, Content_Range="bytes 0-999/1000").status == 400  # a longer body
    assert put(site, DATA[:1000], 0, 1000, SHA).status == 200
    assert put(site, DATA[:1000], 1000, 1000, SHA).status == 413
    assert stored(site) <= 1000 + 500  # and the sidecar


@pytest.mark.usefixtures("ticket")
def test_a_truncated_upload_is_kept_and_goes_on(site: Site) -> None:
    assert begin(site, SHA, len(DATA)).json["parts"][0]["done"] == 0
    head = (
        f"PUT /v1/uploads/{SHA}/0 HTTP/1.1\r\nHost: x\r\nContent-Length: {len(DATA)}\r\n"
        f"Content-Range: bytes 0-{len(DATA) - 1}/{len(DATA)}\r\n\r\n"
    )
    with closing(connect(site)) as connection:
        connection.connect()
        connection.sock.sendall(head.encode() + DATA[: 2 * MIB])
    deadline = time.monotonic() + DEADLINE_S
    while (done := begin(site, SHA, len(DATA)).json["parts"][0]["done"]) < 2 * MIB and time.monotonic() < deadline:
        time.sleep(0.01)
    assert done == 2 * MIB
    answer = finish(site, SHA)
    assert (answer.status, answer.json["error"]) == (409, f"{MIB} of {len(DATA)} bytes of {SHA} are missing")
    for wrong in (0, MIB, 2 * MIB + 1):
        answer = put(site, DATA[wrong:], wrong, len(DATA), SHA)
        assert (answer.status, answer.json["done"]) == (409, 2 * MIB)
    assert put(site, DATA[2 * MIB :], 2 * MIB, len(DATA), SHA).json == {"done": len(DATA)}
    assert finish(site, SHA).status == 200
    assert finish(site, SHA).status == 200  # as after an answer that was lost
    assert site.store.fetch("ada", SHA, len(DATA)).path.read_bytes() == DATA


@pytest.mark.usefixtures("ticket")
def test_one_flipped_bit_is_noticed(site: Site) -> None:
    begin(site, SHA, len(DATA))
    flipped = bytearray(DATA)
    flipped[MIB] ^= 4
    assert put(site, bytes(flipped), 0, len(DATA), SHA).status == 200
    answer = finish(site, SHA)
    assert answer.status == 422
    assert "expected " + SHA in answer.json["error"]
    assert stored(site) == 0


@pytest.mark.usefixtures("ticket")
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content_Range": ""}, 400),
        ({"Content_Range": "bytes 0-9/*"}, 400),
        ({"Content_Range": "bytes 9-0/10"}, 400),
        ({"Content_Range": "bytes -1-8/10"}, 400),
        ({"Content_Range": "bytes 0-9/10\t"}, 200),  # white space at the end is HTTP's
        ({"Content_Encoding": "gzip"}, 415),
        ({"Content_Encoding": "identity"}, 415),
        ({"Transfer_Encoding": "chunked"}, 411),
    ],
)
def test_odd_headers_of_an_upload_are_refused(site: Site, headers: dict[str, str], status: int) -> None:
    data = b"0123456789"
    begin(site, sha256(data), 10)
    assert put(site, data, 0, 10, sha256(data), **headers).status == status


@pytest.mark.usefixtures("ticket")
@pytest.mark.parametrize("part", ["1", "99999", "-1", "0x0", "..", "1/../0", "000000"])
def test_a_part_that_there_is_not_is_refused(site: Site, part: str) -> None:
    begin(site, SHA, len(DATA))
    assert put(site, b"x", 0, len(DATA), SHA, part).status == 404


@pytest.mark.usefixtures("ticket")
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b'{"bytes": -1}',
        b'{"bytes": 1.5}',
        b'{"bytes": "5"}',
        b'{"bytes": 5, "x": 1}',
        b"\xff",
        b"[" * 10**5,
    ],
)
def test_an_upload_begins_with_its_size(site: Site, body: bytes) -> None:
    assert ask(site, "POST", f"/v1/uploads/{SHA}", body).status == 400


def test_a_round_that_ends_while_an_upload_arrives_refuses_the_rest(site: Site) -> None:
    allow(site, "ada", len(DATA))
    begin(site, SHA, len(DATA))
    assert put(site, DATA[:MIB], 0, len(DATA), SHA).status == 200
    site.store.discard("ada")
    assert put(site, DATA[MIB:], MIB, len(DATA), SHA).status == 403
    allow(site, "ada", len(DATA))
    assert put(site, DATA[MIB:], MIB, len(DATA), SHA).status == 409
    assert begin(site, SHA, len(DATA)).json["parts"][0]["done"] == 0
    site.store.discard("ada")


# The process


def test_a_gateway_killed_in_the_middle_of_an_upload_costs_a_few_mib(
    own_site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(transfer, "_FIRST_PAUSE_S", 0.1)
    data = some_bytes(80 * MIB, seed=3)
    (tmp_path / "blob").write_bytes(data)
    allow(own_site, "ada", len(data))
    moved: list[int] = []
    with in_process(own_site) as process:

        def kill(count: int) -> None:
            time.sleep(count / (20 * MIB))  # two streams of 20 MiB/s: progress is written down 4 times a second
            moved.append(count)
            if sum(moved) > 60 * MIB:
                process.kill()

        def send() -> None:
            body = whole_file(tmp_path / "blob")
            upload(own_site.client(), sha256(data), body, streams=2, deadline_s=60, on_bytes=kill)

        sending = Thread(target=send)
        sending.start()
        assert process.wait(DEADLINE_S) == -signal.SIGKILL
    with in_thread(own_site):  # another one in its place
        sending.join(60)
        assert not sending.is_alive()
    assert own_site.store.fetch("ada", sha256(data), len(data)).path.read_bytes() == data
    # Beside what the kill may cost, what the kernel held of two connections; starting anew would cost 60 MiB more.
    assert sum(moved) <= len(data) + 40 * MIB * SAVE_EVERY_S + 24 * MIB


def test_memory_of_the_gateway_does_not_grow_with_a_blob(own_site: Site, tmp_path: Path) -> None:
    size, block = 200 * MIB, some_bytes(MIB, seed=4)
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        for number in range(200):
            file.write(number.to_bytes(4, "big") + block[4:])
    with source.open("rb") as file:
        sha = hashlib.file_digest(file, "sha256").hexdigest()
    own_site.store.publish(sha, whole_file(source))
    allow(own_site, "ada", size)
    with in_process(own_site) as process:
        client = own_site.client()
        client.json("GET", "/v1/run")
        memory = psutil.Process(process.pid).memory_info
        before, highest = memory().rss, 0

        def watch(_: int) -> None:
            nonlocal highest
            highest = max(highest, memory().rss)

        assert download(client, sha, target, streams=4, deadline_s=60, on_bytes=watch) == size
        assert upload(client, sha, whole_file(target), streams=4, deadline_s=60, on_bytes=watch) == size
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    account = own_site.traffic()["ada"]
    assert (account["blob_up"], account["blob_down"]) == (size, size)
    assert highest - before < 40 * MIB
    assert len(own_site.store.fetch("ada", sha, size)) == size


def test_the_process_ends_with_its_supervisor(own_site: Site) -> None:
    ours, its = socket.socketpair()
    with its, in_process(own_site, "--socket", str(its.fileno()), pass_fds=[its.fileno()]) as process:
        its.close()
        assert own_site.client().json("GET", "/v1/run")["run"] == "r"
        ours.close()
        assert process.wait(DEADLINE_S) != 0


@pytest.mark.parametrize("fault", ["keys", "config", "port"])
def test_a_process_that_cannot_start_says_why(own_site: Site, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    (own_site.root / "secret").write_bytes(b"s" * 32)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = own_site.config.model_dump_json()
        if fault == "keys":
            (own_site.keys / "aggregator.pem").unlink()
        elif fault == "config":
            config = config.replace("nodes", "odes")
        else:
            config = config.replace('"port":0', f'"port":{taken.getsockname()[1]}')
        (own_site.root / "gateway.json").write_text(config)
        monkeypatch.setattr(sys, "argv", ["gateway", "--config", str(own_site.root / "gateway.json")])
        with pytest.raises(SystemExit, match={"keys": "aggregator.pem", "config": "odes", "port": "in use"}[fault]):
            gateway.main()
