"""What a bucket's URLs allow, and what becomes of a bucket that breaks, is silent, or says no."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, parse_qsl, quote, urlsplit

import pytest
from tests.link.buckets import KEY_ID, PART, SECRET, Gateway, Made, Way, grown, needs_bucket, read, sha256_of

from photon.link.body import whole_file
from photon.link.object_store import URL_VALID_S, ObjectStore
from photon.link.store import BlobError, BlobRefusedError
from photon.link.transfer import upload

pytestmark = needs_bucket


# URLs


def signed_by(secret: str, method: str, url: str) -> str:
    """The signature that a URL must carry, by the rules of AWS (Signature Version 4, query string)."""
    parts = urlsplit(url)
    query = [(name, value) for name, value in parse_qsl(parts.query) if name != "X-Amz-Signature"]
    values = dict(query)
    canonical = "&".join(f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}" for name, value in sorted(query))
    asked = f"{method}\n{parts.path}\n{canonical}\nhost:{parts.netloc}\n\nhost\nUNSIGNED-PAYLOAD"
    scope = values["X-Amz-Credential"].split("/", 1)[1]
    text = f"AWS4-HMAC-SHA256\n{values['X-Amz-Date']}\n{scope}\n{sha256_of(asked.encode())}"
    key = f"AWS4{secret}".encode()
    for word in scope.split("/"):
        key = hmac.digest(key, word.encode(), "sha256")
    return hmac.digest(key, text.encode(), "sha256").hex()


def test_a_url_is_good_for_one_object_one_method_and_a_while(made: Made) -> None:
    body = os.urandom(2 * PART)
    name = sha256_of(body)
    made.loop.publish(name, body)
    down = made.gateway.locate(name)
    assert down is not None
    made.loop.allow("ada", len(body), time.time() + 100)
    up = made.gateway.begin_upload("ada", name, len(body))
    for method, url, longest_s in (
        ("GET", down.parts[0].url, URL_VALID_S),
        ("PUT", up.parts[0].url, 100),
        ("PUT", up.parts[1].url, 100),
    ):
        values = {key: value for key, [value] in parse_qs(urlsplit(url).query).items()}
        assert SECRET not in url
        assert 0 < int(values["X-Amz-Expires"]) <= longest_s
        signature = values["X-Amz-Signature"]
        assert signature == signed_by(SECRET, method, url)
        # The check can fail: another method, object, time or secret has another signature.
        assert signature != signed_by(SECRET, {"GET": "PUT", "PUT": "DELETE"}[method], url)
        assert signature != signed_by(SECRET, method, url.replace(name, "0" * 64))
        assert signature != signed_by(SECRET, method, url.replace("Expires=", "Expires=9"))
        assert signature != signed_by(KEY_ID, method, url)
    made.loop.allow("ada", len(body), time.time() + 10 * URL_VALID_S)
    assert f"X-Amz-Expires={URL_VALID_S}&" in made.gateway.begin_upload("ada", name, len(body)).parts[0].url


def test_the_other_clouds_sign_too(credentials: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Signing sends nothing, so it is seen without their servers."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    from photon.link.bucket import Bucket

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    account = {"type": "service_account", "client_id": "1", "client_email": "a@b", "token_uri": "https://localhost"}
    (tmp_path / "account.json").write_text(json.dumps({**account, "private_key": pem, "private_key_id": "1"}))
    credentials.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    credentials.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    credentials.setenv("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0c2VjcmV0")
    for url, place in (
        ("gs://bucket/run", "https://storage.googleapis.com/bucket/run/up/ada/00000?"),
        ("az://container/run", "https://account.blob.core.windows.net/container/run/up/ada/00000?"),
    ):
        [signed] = Bucket(url, 1.0, 1.0, False).sign("PUT", ["up/ada/00000"], 60.0)
        assert signed.startswith(place)
        assert "c2VjcmV0" not in signed
        assert "PRIVATE" not in signed


# Broken connections, silence and refusal


@pytest.mark.parametrize("heals_at_once", [True, False])
def test_a_fetch_goes_on_where_the_connection_broke(
    made: Made, endpoint: str, credentials: pytest.MonkeyPatch, heals_at_once: bool
) -> None:
    body = os.urandom(8 * 2**20)
    layout = {"part_bytes": 2**22}
    made.gateway = made.store(**layout)
    name = made.uploaded("ada", body)
    with Way(endpoint, 6 * 2**20) as way:
        way.heals_at_once = heals_at_once
        credentials.setenv("AWS_ENDPOINT_URL", way.url)
        store = made.store(retry_s=0.2, **layout)
        if not heals_at_once:
            with pytest.raises(BlobError, match="cannot be read"):
                store.fetch("ada", name, len(body))
            way.breaks_after_bytes = float("inf")
        assert read(store.fetch("ada", name, len(body))) == body
        # Of each of two parts, what was under way is lost: a piece and what the sockets held. Anew it were 14 MiB.
        assert len(body) < way.carried_bytes < len(body) + 4 * 2**20


def test_a_bucket_that_does_not_answer_is_an_error_and_not_a_wait(
    credentials: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        credentials.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        store = ObjectStore("s3://bucket/run", tmp_path, timeout_s=0.1, retry_s=0.1, allow_http=True)
        store.allow("ada", 10, time.time() + 60)
        for call in (
            lambda: store.publish(sha256_of(b""), b""),
            lambda: store.retract("a" * 64),
            store.published,
            lambda: store.locate("a" * 64),
            lambda: store.begin_upload("ada", "a" * 64, 5),
            lambda: store.finish_upload("ada", "a" * 64),
            lambda: store.discard("ada"),
        ):
            with pytest.raises(BlobError, match="s3://bucket/run"):
                call()
        with pytest.raises(BlobRefusedError, match="no task asks"):  # it was given up, whatever the bucket says
            store.begin_upload("ada", "a" * 64, 5)


class Denying(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(403)

    def log_message(self, *_: object) -> None:
        pass


def test_an_error_says_what_to_do_and_no_secret(credentials: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Denying)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        host = f"http://127.0.0.1:{server.server_address[1]}"
        credentials.setenv("AWS_ENDPOINT_URL", host)
        credentials.setenv("AZURE_STORAGE_ENDPOINT", f"{host}/account")
        credentials.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
        credentials.setenv("AZURE_STORAGE_SAS_TOKEN", f"sv=2023-11-03&sp=rl&sig={SECRET}")
        for url in ("s3://bucket/run", "az://container/run"):
            store = ObjectStore(url, tmp_path, timeout_s=2, retry_s=1, allow_http=True)
            with pytest.raises(BlobError, match="credentials in the environment do not allow it") as raised:
                store.published()
            assert SECRET not in str(raised.value)
            assert "\n" not in str(raised.value)
            assert raised.value.__cause__ is None  # a traceback must not show all that the library said
            assert raised.value.__suppress_context__
    finally:
        server.shutdown()
        server.server_close()


# Memory


def test_memory_does_not_grow_with_the_blob(made: Made, tmp_path: Path) -> None:
    size = 160 * 2**20
    with (tmp_path / "file").open("wb") as file:
        file.truncate(size)
    body = whole_file(tmp_path / "file")
    with (tmp_path / "file").open("rb") as file:
        name = hashlib.file_digest(file, "sha256").hexdigest()
    made.gateway = made.loop = made.store(part_bytes=2**24)
    node = Gateway(made.gateway, "ada")
    made.allow("ada", size)
    upload(node, name, body, streams=2, deadline_s=60)
    made.gateway.finish_upload("ada", name)
    with grown() as grown_bytes:
        made.loop.publish(name, body)
        assert len(made.loop.fetch("ada", name, size)) == size
    assert max(grown_bytes) < size / 2, max(grown_bytes) / 2**20
