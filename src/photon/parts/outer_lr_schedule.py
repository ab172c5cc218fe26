"""A schedule of the outer learning rate, over a stretch of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from photon.config import FederationConfig
from photon.parts.base import Moment, Part

Kind = Literal["linear", "cosine"]
_MOST = 1e6


@dataclass(frozen=True)
class OuterLrSchedule(Part):
    """`federation.outer_lr` until `begin`, then on the way to `last` times that, which holds from `end` on.

    `begin` and `end` are shares of the sequential steps.
    """

    last: float = 0.1
    begin: float = 0.0
    end: float = 1.0
    kind: Kind = "linear"

    def __post_init__(self) -> None:
        if not 0 <= self.last <= _MOST:
            raise ValueError(f"outer_lr_schedule: last is a share of federation.outer_lr, from 0 to {_MOST:g}")
        check_stretch("outer_lr_schedule", self.begin, self.end)

    def federation(self, federation: FederationConfig, moment: Moment) -> FederationConfig:
        """The rate of one round."""
        scale = between(1.0, self.last, stretch(moment, self.begin, self.end), self.kind)
        return federation.model_copy(update={"outer_lr": federation.outer_lr * scale})


def check_stretch(part: str, begin: float, end: float) -> None:
    """Raises ValueError unless these are shares of a run, one before the other."""
    if not 0 <= begin < end <= 1:
        raise ValueError(f"{part}: begin and end are shares of the run, begin before end")


def stretch(moment: Moment, begin: float, end: float) -> float:
    """How much of a stretch of the run lies behind, from 0 to 1."""
    return min(max((moment.done - begin) / (end - begin), 0.0), 1.0)


def between(first: float, last: float, share: float, kind: Kind) -> float:
    """The value at `share` of the way, from 0 to 1: on a line, or along half a period of the cosine."""
    way = share if kind == "linear" else 0.5 - 0.5 * math.cos(math.pi * share)
    return first + (last - first) * way


PART = OuterLrSchedule
