"""The layout of a run directory, in one place.

recipe.toml   the fully resolved recipe              metrics.jsonl  every event (photon.events)
run.json      the run's identity                     summary.json, report.html  what came out
tokenizer/    copy of the run's tokenizer            rounds/        committed global states (Aggregator)
nodes/<name>/ what in a real deployment stays at the owner
bases/        the newest base as nodes hold it, if link.down is lossy
model/        the result, Hugging Face format        logs/          output of worker processes
"""

from __future__ import annotations

import secrets
import stat
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from photon import __version__
from photon.durable import mode_of, only_process, write_atomic
from photon.errors import InputError, StateError


class Identity(BaseModel):
    """`run.json`: what every task, reply and state of a run is bound to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    created: float
    photon: str
    vocab_size: int
    recipe_sha256: str


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.toml"

    @property
    def metrics(self) -> Path:
        """All events."""
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        """The report for people."""
        return self.path / "report.html"

    @property
    def tokenizer(self) -> Path:
        """Hugging Face tokenizer folder."""
        return self.path / "tokenizer"

    @property
    def rounds(self) -> Path:
        """Committed global states."""
        return self.path / "rounds"

    @property
    def model(self) -> Path:
        """The exported model."""
        return self.path / "model"

    @property
    def logs(self) -> Path:
        """Output of worker processes."""
        return self.path / "logs"

    @property
    def bases(self) -> Path:
        """The newest base as this machine's nodes hold it, where the downlink sends differences."""
        return self.path / "bases"

    @property
    def operator(self) -> Path:
        """What a person tells the Aggregator while it runs."""
        return self.path / "operator"

    def node(self, name: str) -> Path:
        """What belongs to one owner."""
        return self.path / "nodes" / name

    def write_identity(self, vocab_size: int, run: str | None = None) -> Identity:
        """Give a run, whose recipe is written, its identity: a new one, or at a node that of the Aggregator's `run`."""
        identity = Identity(
            run=run or secrets.token_hex(8),
            created=time.time(),
            photon=__version__,
            vocab_size=vocab_size,
            recipe_sha256=sha256(self.recipe.read_bytes()).hexdigest(),
        )
        write_atomic(self.path / "run.json", identity.model_dump_json(indent=1) + "\n")
        return identity

    def identity(self) -> Identity:
        """The run's identity. Raises InputError if the folder is no run, StateError if it is damaged."""
        path = self.path / "run.json"
        try:
            if not all(stat.S_ISREG(mode_of(file)) for file in (path, self.recipe)):
                raise InputError(
                    f"{self.path} is not a run: it has no run.json and recipe.toml (`photon train` makes runs)"
                )
            return Identity.model_validate_json(path.read_bytes())
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror}; is the run another user's?") from None
        except ValidationError as error:
            raise StateError(f"{path} is damaged: {error.errors()[0]['msg']}") from None

    def changes(self) -> list[str]:
        """What differs from when the run began, a sentence each; none of it is refused, all of it should be known.

        Raises what `identity` raises.
        """
        identity = self.identity()
        changes = []
        if sha256(self.recipe.read_bytes()).hexdigest() != identity.recipe_sha256:
            changes.append(
                f"{self.recipe} was changed since the run began: from here on the run follows the new one, with the "
                "tokenizer and the text that were prepared for it then"
            )
        if identity.photon != __version__:
            changes.append(f"the run began with photon {identity.photon}, this is {__version__}: bits may differ")
        return changes

    def lock(self) -> AbstractContextManager[None]:
        """Hold the run for this process. Raises InputError if another one trains it; ends with the process."""
        return only_process(self.path / ".lock", f"{self.path} is being trained by another process")


def new_run_folder(recipe_name: str, given: Path | None) -> RunFolder:
    """Create `runs/<recipe>-<time>` or the folder asked for. Raises InputError rather than mix two runs."""
    if given is not None:
        try:
            given.mkdir(parents=True, exist_ok=True)
            is_empty = all(entry.name == ".lock" for entry in given.iterdir())
        except OSError as error:
            raise InputError(f"{given} cannot be a run's folder: {error.strerror}; choose another --run") from None
        if not is_empty:
            has_begun = (given / "run.json").exists()
            instead = f", or go on with --resume {given}" if has_begun else "; it holds no run that could be resumed"
            raise InputError(f"{given} is not empty: choose another --run{instead}")
        return RunFolder(given)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
        path = Path("runs") / f"{recipe_name}-{stamp}{suffix}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return RunFolder(path)
    raise InputError(f"runs/{recipe_name}-{stamp}: too many runs began this second")
