"""A federation whose models and updates go through a bucket: the same model, and no node holds a credential."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.faults.sites import Sites, undisturbed
from tests.link import buckets
from tests.link.buckets import KEY_ID, SECRET, needs_bucket

pytestmark = [pytest.mark.sites, pytest.mark.timeout(900), needs_bucket]
ROUNDS = 2


@pytest.fixture
def endpoint() -> Iterator[str]:
    with buckets.endpoint() as url:
        yield url


def test_the_bulk_goes_through_a_bucket(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = undisturbed(tmp_path / "texts", ROUNDS)
    store = '[link]\nstore = "s3://bucket/federation"'
    with Sites(tmp_path / "sites", tmp_path / "texts", rounds=ROUNDS, extra=store) as sites:
        with monkeypatch.context() as credentials:  # at the Aggregator alone
            credentials.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
            credentials.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
            credentials.setenv("AWS_REGION", "us-east-1")
            credentials.setenv("AWS_ENDPOINT_URL", endpoint)
            credentials.setenv("AWS_ALLOW_HTTP", "true")
            sites.start_aggregator()
        assert "AWS_SECRET_ACCESS_KEY" not in os.environ
        for owner in sites.owners:
            sites.start_node(owner)
        sites.finish()
        assert sites.model_sha256() == sha256
        logs = [*sites.folder.glob("node-*.log"), *(sites.run_folder / "logs").glob("*.log")]
        assert not [log for log in logs if SECRET in log.read_text(errors="replace")]
        accounts = json.loads((sites.run_folder / "exchange" / "traffic.json").read_text())
        assert set(accounts) == set(sites.owners)
        for account in accounts.values():
            assert account["blob_up"] == account["blob_down"] == 0  # no blob's byte passed the gateway
            assert account["sent_up"] > 0  # but questions and answers did
