"""`site.toml`: what one owner decides about its own node. It stays at the owner; nobody else ever reads it."""

from __future__ import annotations

import re
import tomllib
from datetime import datetime
from pathlib import Path

from pydantic import Field, ValidationError, field_validator

from photon.config import Auto, Device, Name, NodeConfig, Positive, Recipe, Section, SiloConfig
from photon.errors import ConfigError
from photon.options import hint

_HOURS = re.compile(r"^([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)$")
_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*(B|kB|MB|GB|TB)$")
_LEAST = 'it holds at least `text = ["/path/to/text"]`'
_RECIPE_SECTIONS = frozenset({"model", "federation", "silo"})
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Caps(Section):
    """What the owner grants at most."""

    bytes_per_day: str = Field("", description="Model bytes in both directions, such as 40GB; empty = no limit.")
    hours: list[str] = Field([], description="When it may train, local time, such as 20:00-06:00; empty = always.")
    max_update_norm: float | None = Field(None, gt=0, description="Scale the update down to this L2 norm.")

    @field_validator("hours")
    @classmethod
    def _readable(cls, value: list[str]) -> list[str]:
        for span in value:
            if not _HOURS.match(span):
                raise ValueError(f"hours are written HH:MM-HH:MM, not {span!r}")
        return value

    @field_validator("bytes_per_day")
    @classmethod
    def _is_size(cls, value: str) -> str:
        if value and not _SIZE.match(value):
            raise ValueError(f"a size is written like 500MB or 40GB, not {value!r}")
        return value

    @property
    def daily_bytes(self) -> int | None:
        """`bytes_per_day` as a number; None without a limit."""
        found = _SIZE.match(self.bytes_per_day)
        return int(float(found[1]) * _UNITS[found[2]]) if found else None

    def is_open(self, when: datetime) -> bool:
        """Whether the owner lets the node train at this local time."""
        minute = when.hour * 60 + when.minute
        return not self.hours or any(_within(span, minute) for span in self.hours)


class SiteConfig(Section):
    """One owner's node: its text, its hardware, its limits."""

    name: Name | None = Field(None, description="Must be the name in the key file, if given.")
    text: list[str] = Field(min_length=1, description="Sources: globs or folders, hf:..., or builtin:area.")
    weights: list[float] | None = Field(None, description="Sampling weight of each source; default by size.")
    field: str = Field("text", description="Field that holds the text in .jsonl and .parquet files.")
    data: str = Field("", description="Folder for its tokenised text; default inside the state folder.")
    max_bytes: Positive | None = Field(None, description="Read so much of its text.")
    batch_size: Positive | None = Field(None, description="Sequences per local step, at most the recipe's.")
    micro_batch_size: Positive | Auto = Field("auto", description="Sequences per forward pass.")
    device: Device = Field("auto", description="auto, cpu, mps, cuda or cuda:N.")
    threads: Positive | Auto = Field("auto", description="CPU threads.")
    streams: int = Field(4, ge=1, le=16, description="Connections that one transfer uses.")
    caps: Caps = Caps()

    @field_validator("text", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


def load_site(path: Path) -> SiteConfig:
    """Read site.toml. Raises ConfigError that names each problem."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; {_LEAST}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from None
    if _RECIPE_SECTIONS & table.keys():
        raise ConfigError(f"{path} is a recipe, which is the Aggregator's; a site has a file of its own; {_LEAST}")
    try:
        return SiteConfig.model_validate(table)
    except ValidationError as error:
        problems = []
        for found in error.errors(include_url=False):
            place = ".".join(str(part) for part in found["loc"]) or "site.toml"
            known = list(Caps.model_fields) if place.startswith("caps.") else list(SiteConfig.model_fields)
            advice = f"; {hint(place.rpartition('.')[2], known)}" if found["type"] == "extra_forbidden" else ""
            problems.append(f"{path}: {place}: {found['msg'].removeprefix('Value error, ')}{advice}")
        raise ConfigError("\n".join(problems)) from None


def node_recipe(recipe: Recipe, name: Name, site: SiteConfig) -> Recipe:
    """The run's recipe with the owner's decisions in it. Raises ConfigError where they cannot be followed."""
    silo = next((silo for silo in recipe.silo if silo.name == name), None)
    if silo is None:
        names = ", ".join(silo.name for silo in recipe.silo)
        raise ConfigError(f"the run has no node called {name!r}; its nodes are {names}. Ask the Aggregator's operator")
    allowed = recipe.batch_size_of(silo)
    if site.batch_size is not None and site.batch_size > allowed:
        raise ConfigError(
            f"site.toml: batch_size = {site.batch_size}, the run allows this node {allowed}; "
            f"lower it, or ask the Aggregator's operator for silo.{name}.batch_size"
        )
    try:
        own = SiloConfig(
            name=silo.name,
            text=site.text,
            weights=site.weights,
            field=site.field,
            batch_size=site.batch_size or allowed,
            tau=silo.tau,
        )
    except ValidationError as error:
        raise ConfigError(f"site.toml: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    hardware = {
        "device": site.device,
        "threads": site.threads,
        "workers": 1,
        "micro_batch_size": recipe.node.micro_batch_size if site.micro_batch_size == "auto" else site.micro_batch_size,
    }
    if recipe.link.of == "weights" and site.caps.max_update_norm is not None:
        raise ConfigError("site.toml: caps.max_update_norm cannot be kept: this run sends weights, not differences")
    norms = [norm for norm in (recipe.link.max_update_norm, site.caps.max_update_norm) if norm is not None]
    return recipe.model_copy(
        update={
            "silo": [own],
            "node": NodeConfig.model_validate(recipe.node.model_dump() | hardware),
            "link": recipe.link.model_copy(update={"max_update_norm": min(norms) if norms else None}),
            "federation": recipe.federation.model_copy(update={"nodes_per_round": None}),
        }
    )


def _within(span: str, minute: int) -> bool:
    found = _HOURS.match(span)
    if found is None:
        return False
    begin, end = int(found[1]) * 60 + int(found[2]), int(found[3]) * 60 + int(found[4])
    if begin == end:
        return True  # all day
    return begin <= minute < end if begin < end else minute >= begin or minute < end
