"""Fixtures of the tests that need a bucket."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.link import buckets
from tests.link.buckets import KEY_ID, SECRET, Made


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    with buckets.endpoint() as url:
        yield url


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return monkeypatch


@pytest.fixture
def made(endpoint: str, credentials: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> Made:
    credentials.setenv("AWS_ENDPOINT_URL", endpoint)
    return Made(f"s3://bucket/runs/{hashlib.sha256(request.node.name.encode()).hexdigest()[:16]}", tmp_path / "work")
