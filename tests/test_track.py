from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from photon.config import TrackConfig
from photon.display import PlainDisplay
from photon.errors import ConfigError, StateError
from photon.events import Event, NodeProgress, RoundDone, RunStarted, Sampled, parse_event
from photon.sinks import MlflowSink, TensorBoardSink, WandbSink, scalars
from photon.track import JsonlSink, Tracker, open_tracker, read_events, truncate_to

MakeEvents = Callable[..., list[Event]]


class Recorder:
    """A display and a sink that keeps what it is given."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.notes: list[str] = []
        self.seen: list[NodeProgress] = []
        self.closed = False

    def write(self, event: Event) -> None:
        self.events.append(event)

    def progress(self, progress: NodeProgress) -> None:
        self.seen.append(progress)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def data_progress(self, silo: str, phase: str, done_bytes: int, total_bytes: int | None, note: str) -> None:
        raise AssertionError("no data is prepared here")

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class FailingSink(Recorder):
    def __init__(self, after: int) -> None:
        super().__init__()
        self._after = after

    def write(self, event: Event) -> None:
        if len(self.events) == self._after:
            raise ConnectionResetError("the server hung up")
        super().write(event)


def written(path: Path, events: list[Event]) -> list[int]:
    """Write `events`; returns the offset after each."""
    sink = JsonlSink(path)
    offsets = []
    for event in events:
        sink.write(event)
        offsets.append(sink.sync())
    sink.close()
    return offsets


def test_events_are_read_back_in_order(make_events: MakeEvents, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    events = make_events()
    offsets = written(path, events)
    assert read_events(path) == events
    assert offsets[-1] == path.stat().st_size
    assert path.read_bytes().count(b"\n") == len(events)


def test_a_reader_sees_each_event_at_once_but_only_sync_makes_it_count(make_events: MakeEvents, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    events = make_events()
    sink = JsonlSink(path)
    sink.write(events[0])
    assert read_events(path) == events[:1]
    assert sink.offset() == 0
    assert sink.sync() == sink.offset() == path.stat().st_size
    sink.write(events[1])
    assert sink.offset() < path.stat().st_size
    sink.close()
    sink.close()
    assert sink.offset() == path.stat().st_size


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cut_anywhere_the_whole_lines_remain(make_events: MakeEvents, tmp_path: Path, data: st.DataObject) -> None:
    """A kill may leave any prefix of the file: what is read is what was whole, and a new sink goes on from there."""
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    events = make_events(rounds=2)
    offsets = written(path, events)
    length = data.draw(st.integers(0, offsets[-1]))
    path.write_bytes(path.read_bytes()[:length])
    whole = sum(offset <= length for offset in offsets)
    assert read_events(path) == events[:whole]
    written(path, events[-1:])
    assert read_events(path) == [*events[:whole], events[-1]]


def test_appending_behind_a_torn_line_without_cutting_it_would_lose_two_events(
    make_events: MakeEvents, tmp_path: Path
) -> None:
    """The mutant of the test above: plain append. The reader must notice, not skip."""
    path = tmp_path / "metrics.jsonl"
    events = make_events()
    written(path, events[:3])
    path.write_bytes(path.read_bytes()[:-10])
    with path.open("ab") as file:
        file.write(events[3].model_dump_json().encode() + b"\n")
    with pytest.raises(StateError, match=r"metrics\.jsonl line 3 is damaged"):
        read_events(path)


@pytest.mark.parametrize("damage", [b"", b"{}", b"not json", b'{"event":"round"}', b"\xff\xfe", b"[1]"])
def test_a_damaged_line_is_named(make_events: MakeEvents, tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, make_events())
    lines = path.read_bytes().split(b"\n")
    lines[4] = damage
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(StateError, match=r"metrics\.jsonl line 5 is damaged"):
        read_events(path)


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b", "\x1c"])
def test_only_newlines_part_lines(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "metrics.jsonl"
    sample = Sampled(time=1.0, seconds=0.0, round=0, prompt="", text=f"a{separator}b\r\nc")
    written(path, [sample, sample])
    assert read_events(path) == [sample, sample]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"metrics\.jsonl.*folder of a run"):
        read_events(tmp_path / "metrics.jsonl")


def test_truncate_drops_the_events_of_a_lost_round(make_events: MakeEvents, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    events = make_events()
    offsets = written(path, events)
    for kept in (len(events), 7, 3, 1):
        truncate_to(path, offsets[kept - 1])
        assert read_events(path) == events[:kept]
    truncate_to(path, 0)
    assert read_events(path) == []


def test_truncate_refuses_a_file_that_the_state_did_not_mean(make_events: MakeEvents, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    offsets = written(path, make_events())
    before = path.read_bytes()
    with pytest.raises(StateError, match="inside a line"):
        truncate_to(path, offsets[2] - 1)
    with pytest.raises(StateError, match="events are lost"):
        truncate_to(path, offsets[-1] + 1)
    assert path.read_bytes() == before
    truncate_to(tmp_path / "new.jsonl", 0)  # a run that wrote nothing yet
    with pytest.raises(StateError, match="events are lost"):
        truncate_to(tmp_path / "new.jsonl", 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_stops_the_run(make_events: MakeEvents) -> None:
    sink = JsonlSink.__new__(JsonlSink)
    sink.path = Path("/dev/full")
    sink._file = sink.path.open("ab", buffering=0)
    with pytest.raises(StateError, match=r"/dev/full.*training stops"):
        sink.write(make_events()[0])


def test_metrics_in_a_missing_folder_is_a_state_error(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot write"):
        JsonlSink(tmp_path / "nowhere" / "metrics.jsonl")


def test_a_failing_sink_is_reported_once_and_dropped(make_events: MakeEvents, tmp_path: Path) -> None:
    events = make_events()
    display, good, bad = Recorder(), Recorder(), FailingSink(after=2)
    with Tracker([bad, good], [display], JsonlSink(tmp_path / "metrics.jsonl")) as tracker:
        for event in events:
            tracker.write(event)
    assert read_events(tmp_path / "metrics.jsonl") == good.events == display.events == events
    assert bad.events == events[:2]
    assert len(display.notes) == 1
    assert "Failing failed and is switched off" in display.notes[0]
    assert "the server hung up" in display.notes[0]
    assert good.closed
    assert not bad.closed


def test_a_sink_that_fails_to_close_is_reported_and_metrics_are_closed(tmp_path: Path) -> None:
    class BadClose(Recorder):
        def close(self) -> None:
            raise RuntimeError("cannot finish")

    display, metrics = Recorder(), JsonlSink(tmp_path / "metrics.jsonl")
    Tracker([BadClose()], [display], metrics).close()
    assert len(display.notes) == 1
    with pytest.raises(ValueError, match="closed file"):
        metrics.sync()


def test_failing_metrics_are_fatal(make_events: MakeEvents) -> None:
    class Full(JsonlSink):
        def __init__(self) -> None:
            self.path = Path("metrics.jsonl")

        def write(self, event: Event) -> None:
            raise StateError("disk full")

    display = Recorder()
    with pytest.raises(StateError, match="disk full"):
        Tracker([], [display], Full()).write(make_events()[0])
    assert display.events == []  # nothing is shown that is not recorded


def test_a_lost_terminal_does_not_end_the_run(make_events: MakeEvents) -> None:
    class Gone(Recorder):
        def write(self, event: Event) -> None:
            raise OSError(errno.EIO, "terminal is gone")

    other = Recorder()
    tracker = Tracker([], [Gone(), other])
    for event in make_events():
        tracker.write(event)
    tracker.progress(NodeProgress(node="alice", round=1, state="training"))
    assert len(other.events) == len(make_events())
    assert [p.node for p in other.seen] == ["alice"]
    assert tracker.sync() == 0


@pytest.mark.parametrize(
    ("track", "module", "extra"),
    [
        (TrackConfig(tensorboard=True), "torch.utils.tensorboard", "tensorboard"),
        (TrackConfig(wandb="project"), "wandb", "wandb"),
        (TrackConfig(mlflow="file:mlruns"), "mlflow", "mlflow"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, track: TrackConfig, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ConfigError, match=rf"track\.{extra}.*pip install 'photon-federated\[{extra}\]'"):
        open_tracker(track, tmp_path, "run", Recorder())


def test_a_plain_run_tracks_without_optional_packages(make_events: MakeEvents, tmp_path: Path) -> None:
    display = Recorder()
    with open_tracker(TrackConfig(), tmp_path, "run", display) as tracker:
        tracker.write(make_events()[0])
        assert tracker.sync() == (tmp_path / "metrics.jsonl").stat().st_size
    assert display.events == make_events()[:1]


def test_scalars_cover_the_numbers_of_a_round(make_events: MakeEvents) -> None:
    events = make_events()
    named = scalars(next(e for e in events if isinstance(e, RoundDone)))
    assert {"train/train_loss", "total/bytes_up", "phase_s/nodes", "node_alice/update_norm"} <= set(named)
    assert all(type(value) is float for value in named.values())
    assert scalars(events[0]) == {}


@pytest.fixture
def tensorboard(tmp_path: Path) -> Any:
    """What TensorBoard itself makes of the folder, once `Reload` is called."""
    return pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(str(tmp_path))


def test_tensorboard_reads_back_what_was_written(make_events: MakeEvents, tensorboard: Any, tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    events = make_events(rounds=3, tau=16)
    for event in events:
        sink.write(event)
    sink.close()
    tensorboard.Reload()
    points = tensorboard.Scalars("train/train_loss")
    expected = [(e.sequential_step, e.train_loss) for e in events if isinstance(e, RoundDone)]
    assert [(p.step, pytest.approx(p.value)) for p in points] == expected
    assert [p.step for p in tensorboard.Scalars("heldout_alice/bits_per_byte")] == [0, 16, 32, 48]


def test_tensorboard_forgets_a_lost_round_alone(make_events: MakeEvents, tensorboard: Any, tmp_path: Path) -> None:
    """Rounds times tau is not where a run with a tau of its own for each round stands."""
    events = make_events(rounds=3, tau=16)
    start = next(event for event in events if isinstance(event, RunStarted))
    again = start.model_copy(update={"first_round": 2, "first_step": 32, "tau": 4})
    for batch in (events, [again]):
        sink = TensorBoardSink(tmp_path)
        for event in batch:
            sink.write(event)
        sink.close()
    tensorboard.Reload()
    assert [point.step for point in tensorboard.Scalars("train/train_loss")] == [16, 32]


class FakeWandb:
    """Records what a W&B run is told."""

    def __init__(self) -> None:
        self.opened: dict[str, Any] = {}
        self.logged: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str]] = []
        self.summary: dict[str, Any] = {}
        self.finished = 0
        self.config = SimpleNamespace(update=lambda facts, allow_val_change: self.summary.update(config=facts))

    def init(self, **options: Any) -> FakeWandb:
        self.opened = options
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


def test_wandb_draws_over_sequential_steps(
    monkeypatch: pytest.MonkeyPatch, make_events: MakeEvents, tmp_path: Path
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sink = WandbSink("project", "demo-1", tmp_path)
    assert fake.opened == {}  # connects at the first event, not before
    for event in make_events(rounds=2, tau=16):
        sink.write(event)
    sink.close()
    assert (fake.opened["project"], fake.opened["id"], fake.opened["resume"]) == ("project", "demo-1", "allow")
    assert fake.metrics == [("*", "sequential_step")]
    steps = [values["sequential_step"] for values in fake.logged if "train/train_loss" in values]
    assert steps == [16, 32]
    assert fake.summary["model_sha256"] == "ab" * 32
    assert fake.finished == 1


@pytest.mark.slow
def test_wandb_itself_works_offline(monkeypatch: pytest.MonkeyPatch, make_events: MakeEvents, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    sink = WandbSink("project", "demo-1", tmp_path)
    for event in make_events():
        sink.write(event)
    sink.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.slow
def test_mlflow_itself_keeps_one_run_over_a_resume(
    monkeypatch: pytest.MonkeyPatch, make_events: MakeEvents, tmp_path: Path
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the one store that needs neither a server nor a database
    uri = tmp_path.joinpath("mlruns").as_uri()
    events = make_events(rounds=3, tau=16)
    for part in (events[:4], events):  # the second sink is the resume
        sink = MlflowSink(uri, "demo-1")
        for event in part:
            sink.write(event)
        sink.close()
    client = mlflow.MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("photon").experiment_id])
    assert [(run.info.status, run.data.tags["model_sha256"]) for run in runs] == [("FINISHED", "ab" * 32)]
    history = client.get_metric_history(runs[0].info.run_id, "train/train_loss")
    assert {point.step for point in history} == {16, 32, 48}


def test_every_line_written_is_an_event(make_events: MakeEvents, tmp_path: Path) -> None:
    written(tmp_path / "metrics.jsonl", make_events())
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [parse_event(line).event for line in lines] == [event.event for event in make_events()]


def test_the_plain_display_is_a_display(make_events: MakeEvents, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream, open_tracker(TrackConfig(), tmp_path, "r", PlainDisplay(stream)) as t:
        for event in make_events():
            t.write(event)
    assert "round 6/6" in (tmp_path / "log").read_text()
