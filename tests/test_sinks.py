"""A copy of a run's events goes on over a resume, whatever the resume changed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest

from photon.display import PlainDisplay
from photon.events import Event, RunStarted
from photon.sinks import MlflowSink
from photon.track import Tracker

MakeEvents = Callable[..., list[Event]]


class FakeMlflow:
    """A module and its client that keep one run, and refuse to change a parameter as MLflow does."""

    def __init__(self) -> None:
        self.params: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.metrics: list[tuple[str, int]] = []
        self.entities = SimpleNamespace(Metric=lambda name, value, stamp_ms, step: (name, step))
        self.run = SimpleNamespace(info=SimpleNamespace(run_id="1"), data=self)
        self.created = False

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None

    def MlflowClient(self, tracking_uri: str) -> FakeMlflow:  # noqa: N802 - MLflow's name
        return self

    def get_experiment_by_name(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(experiment_id="0")

    def search_runs(self, *_: object, **__: object) -> list[SimpleNamespace]:
        return [self.run] if self.created else []

    def create_run(self, *_: object, **__: object) -> SimpleNamespace:
        self.created = True
        return self.run

    def get_run(self, run_id: str) -> SimpleNamespace:
        return self.run

    def log_param(self, run_id: str, key: str, value: object) -> None:
        if self.params.setdefault(key, str(value)) != str(value):
            raise ValueError(f"Changing param values is not allowed. Param with key={key!r} was already logged")

    def set_tag(self, run_id: str, key: str, value: object) -> None:
        self.tags[key] = str(value)

    def log_batch(self, run_id: str, metrics: list[tuple[str, int]]) -> None:
        self.metrics += metrics


def test_mlflow_goes_on_where_a_resume_changed_the_recipe(
    monkeypatch: pytest.MonkeyPatch, make_events: MakeEvents
) -> None:
    """It refuses another value of a parameter: the rest of the run was not tracked."""
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    events = make_events(rounds=3, tau=16)
    start = next(event for event in events if isinstance(event, RunStarted))
    for rounds in (start.rounds, 9, start.rounds):
        said = StringIO()
        tracker = Tracker([MlflowSink("file:x", "demo-1")], [PlainDisplay(said)])
        for event in [start.model_copy(update={"rounds": rounds}), *events[1:]]:
            tracker.write(event)
        tracker.close()
        assert "failed" not in said.getvalue()
        assert fake.tags.get("photon.rounds", str(start.rounds)) == str(rounds)
    assert fake.params["rounds"] == str(start.rounds)
    assert fake.metrics.count(("train/train_loss", 48)) == 3
