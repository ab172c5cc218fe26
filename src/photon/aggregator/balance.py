"""Local steps by speed, so that the nodes of a round finish together (`federation.balance = "time"`).

Speeds are the nodes' own word: a node that claims to be faster than it is makes the others' work shorter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from photon.link.update import TrainingReport

_NEWEST_WEIGHT = 0.3  # half of what a node's speed was is forgotten after two reports


def local_steps(nodes: Iterable[str], tau: int, seconds_per_step: Mapping[str, float]) -> dict[str, int]:
    """tau for the fastest of `nodes`, for the others as many steps as they take in its time, at least one.

    A node that was never measured gets tau, and is nobody's standard.
    """
    asked = list(nodes)
    fastest = min((seconds_per_step[name] for name in asked if name in seconds_per_step), default=0.0)
    return {
        name: max(1, round(tau * fastest / seconds_per_step.get(name, fastest))) if fastest else tau for name in asked
    }


def measured(before: Mapping[str, float], reports: Mapping[str, TrainingReport]) -> dict[str, float]:
    """Seconds per local step by node: the exponential mean of its reports. A time that is not positive is no time."""
    after = dict(before)
    for name, report in sorted(reports.items()):
        if report.seconds > 0:
            newest = report.seconds / report.steps
            after[name] = newest + (1 - _NEWEST_WEIGHT) * (after.get(name, newest) - newest)
    return after
