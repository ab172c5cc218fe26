"""Optional copies of a run's events in TensorBoard, Weights & Biases and MLflow. Each is one small class.

A sink refuses at once when its package is missing, and connects at the first event, so that a server that is down is
a failure of the sink (dropped by the Tracker), not of the run.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any, Protocol

from photon.errors import ConfigError
from photon.events import Evaluated, Event, RoundDone, RunFinished, RunStarted, Sampled


class Sink(Protocol):
    """Takes every event of a run, in order."""

    def write(self, event: Event) -> None:
        """Copy one event."""

    def close(self) -> None:
        """Flush and let go."""


def scalars(event: Event) -> dict[str, float]:
    """The numbers of an event under slash-separated names, as trackers draw them; empty if it has none."""
    if isinstance(event, Evaluated):
        named = {"heldout": event.pooled} | {f"heldout_{name}": scores for name, scores in event.silos.items()}
        return {
            f"{group}/{key}": value
            for group, scores in named.items()
            for key, value in scores.model_dump(exclude={"tokens"}).items()
        }
    if isinstance(event, RoundDone):
        keys = ("train_loss", "learning_rate", "merged_norm", "outer_norm", "tokens_per_second")
        values: dict[str, float] = {f"train/{key}": getattr(event, key) for key in keys}
        values |= {
            f"total/{key}": float(getattr(event, key)) for key in ("tokens", "bytes_up", "bytes_down", "seconds")
        }
        values |= {f"phase_s/{phase}": seconds for phase, seconds in event.phases_s.items()}
        values["round/missing"] = float(len(event.missing))
        for name, node in event.nodes.items():
            values |= {f"node_{name}/{key}": float(value) for key, value in node.model_dump().items()}
        return values
    return {}


class TensorBoardSink:
    """TensorBoard event files in `folder`, by sequential step."""

    def __init__(self, folder: Path) -> None:
        self._module = _require("torch.utils.tensorboard", "tensorboard", "track.tensorboard")
        self._folder = folder
        self._writer: Any = None

    def write(self, event: Event) -> None:
        """Scalars as scalars, samples as text."""
        if self._writer is None:
            # After a resume, hide what a lost round had written beyond the committed step.
            purge_step = event.first_step + 1 if isinstance(event, RunStarted) and event.first_round else None
            self._writer = self._module.SummaryWriter(log_dir=str(self._folder), purge_step=purge_step)
        if isinstance(event, Evaluated | RoundDone):
            for name, value in scalars(event).items():
                self._writer.add_scalar(name, value, event.sequential_step, walltime=event.time)
            self._writer.flush()
        elif isinstance(event, Sampled):
            # TensorBoard renders Markdown; an indented block shows the text as it is.
            block = "\n".join(f"    {line}" for line in (event.prompt + event.text).splitlines())
            self._writer.add_text("sample", block, event.round, walltime=event.time)

    def close(self) -> None:
        """Write out what is buffered."""
        if self._writer is not None:
            self._writer.close()


class WandbSink:
    """A Weights & Biases run named and identified by `run`; WANDB_MODE=offline keeps it in `folder`/wandb."""

    def __init__(self, project: str, run: str, folder: Path) -> None:
        self._wandb = _require("wandb", "wandb", "track.wandb")
        self._project, self._name, self._folder = project, run, folder
        self._run: Any = None

    def write(self, event: Event) -> None:
        """Scalars over `sequential_step`; the facts of the run as its config; samples as text."""
        if self._run is None:
            self._run = self._wandb.init(
                project=self._project, id=self._name, name=self._name, dir=str(self._folder), resume="allow"
            )
            # W&B's own step may never go back, but a resume does: draw everything over ours.
            self._run.define_metric("*", step_metric="sequential_step")
        if isinstance(event, RunStarted):
            self._run.config.update(event.model_dump(exclude={"time", "seconds"}), allow_val_change=True)
        elif isinstance(event, Evaluated | RoundDone):
            self._run.log({**scalars(event), "sequential_step": event.sequential_step})
        elif isinstance(event, Sampled):
            self._run.log({"sample": event.prompt + event.text})
        elif isinstance(event, RunFinished):
            self._run.summary["model_sha256"] = event.model_sha256

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()


class MlflowSink:
    """A run in the experiment `photon` of the tracking server or folder at `uri`; a resume finds it by its tag."""

    def __init__(self, uri: str, run: str) -> None:
        self._mlflow = _require("mlflow", "mlflow", "track.mlflow")
        self._uri, self._name = uri, run
        self._client: Any = None
        self._id = ""
        self._status = "KILLED"  # unless the run_finished event comes

    def write(self, event: Event) -> None:
        """Scalars as metrics by sequential step; the facts of the run as parameters; samples as artifacts.

        What a resumed run's recipe says otherwise is a tag, such as `photon.rounds`, beside the parameter.
        """
        if self._client is None:
            self._connect()
        if isinstance(event, RunStarted):
            facts = event.model_dump(include={"recipe", "nodes_per_round", "rounds", "tau", "parameters"})
            known = self._client.get_run(self._id).data
            for name, value in facts.items():
                if name not in known.params:
                    self._client.log_param(self._id, name, value)
                elif str(value) != known.params[name] or f"photon.{name}" in known.tags:
                    self._client.set_tag(self._id, f"photon.{name}", str(value))  # a parameter never changes there
        elif isinstance(event, Evaluated | RoundDone):
            metric = self._mlflow.entities.Metric
            stamp_ms, step = int(event.time * 1000), event.sequential_step
            metrics = [metric(name, value, stamp_ms, step) for name, value in scalars(event).items()]
            for start in range(0, len(metrics), 1000):  # the server's limit for one call
                self._client.log_batch(self._id, metrics=metrics[start : start + 1000])
        elif isinstance(event, Sampled):
            self._client.log_text(self._id, event.prompt + event.text, f"samples/round-{event.round}.txt")
        elif isinstance(event, RunFinished):
            self._client.set_tag(self._id, "model_sha256", event.model_sha256)
            self._status = "FINISHED"

    def close(self) -> None:
        """Mark the run finished, or killed if it did not reach its end."""
        if self._client is not None:
            self._client.set_terminated(self._id, self._status, end_time=int(time.time() * 1000))

    def _connect(self) -> None:
        client = self._mlflow.MlflowClient(tracking_uri=self._uri)
        experiment = client.get_experiment_by_name("photon")
        experiment_id = experiment.experiment_id if experiment else client.create_experiment("photon")
        found = client.search_runs([experiment_id], filter_string=f"tags.`photon.run` = '{self._name}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            client.update_run(self._id, status="RUNNING")
        else:
            tags = {"photon.run": self._name}
            self._id = client.create_run(experiment_id, run_name=self._name, tags=tags).info.run_id
        self._client = client


def _require(module: str, extra: str, option: str) -> Any:
    """Import an optional package. Raises ConfigError naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{option} is switched on, but its package is not installed ({error}). "
            f"Install it with: pip install 'photon-federated[{extra}]', or switch {option} off."
        ) from error
