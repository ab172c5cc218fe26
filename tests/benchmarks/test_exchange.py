"""Neither side of `exchange` writes over a file that is there."""

from __future__ import annotations

import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from unittest import mock

from benchmarks import exchange, plain_copy


def test_a_plain_copy_writes_new_files_in_every_turn(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"x" * 3_000_000)
    server = ThreadingHTTPServer(("127.0.0.1", 0), plain_copy._Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with mock.patch.object(plain_copy._Handler, "folder", tmp_path):
            exchange._plain_turn(server.server_address[1], tmp_path, base)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert list(tmp_path.iterdir()) == [base]
