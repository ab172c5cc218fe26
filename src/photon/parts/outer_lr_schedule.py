"""A schedule of the outer learning rate, over the share of the run's sequential steps that lies behind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from photon.config import FederationConfig
from photon.parts.base import Moment, Part

Kind = Literal["linear", "cosine"]


@dataclass(frozen=True)
class OuterLrSchedule(Part):
    """From `federation.outer_lr` in the first round towards `last` times that, which the end of the run would have."""

    last: float = 0.1
    kind: Kind = "linear"

    def __post_init__(self) -> None:
        if self.last < 0:
            raise ValueError("outer_lr_schedule: last is a share of federation.outer_lr, at least 0")

    def federation(self, federation: FederationConfig, moment: Moment) -> FederationConfig:
        """The rate of one round."""
        scale = between(1.0, self.last, moment.done, self.kind)
        return federation.model_copy(update={"outer_lr": federation.outer_lr * scale})


def between(first: float, last: float, share: float, kind: Kind) -> float:
    """The value at `share` of the way, from 0 to 1: on a line, or along half a period of the cosine."""
    way = share if kind == "linear" else 0.5 - 0.5 * math.cos(math.pi * share)
    return first + (last - first) * way


PART = OuterLrSchedule
