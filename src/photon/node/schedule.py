"""Learning-rate schedules, as pure functions of the global sequential step.

A round is an interruption of the exchange, not of the optimisation: step 31 of round 4 continues step 30, and a node
that sat out three rounds rejoins where the federation is. So nothing here remembers anything, and nothing restarts.
"""

from __future__ import annotations

import math

from photon.config import NodeConfig


def learning_rate_scale(step: int, node: NodeConfig, total_steps: int) -> float:
    """Share of the peak learning rate, in [0, 1], at the 0-based global sequential step `step`.

    Linear warm-up reaches the peak at step `warmup_steps - 1`. Then `constant` stays there; `cosine` falls along half a
    period over all that is left; `wsd` (warm-up, stable, decay) stays flat and falls linearly over the last
    `decay_fraction` of `total_steps`, though never before the warm-up is over. From `total_steps` on, both rest at
    `final_lr_fraction`.
    """
    if step < node.warmup_steps:
        return (step + 1) / node.warmup_steps
    if node.schedule == "constant":
        return 1.0
    if node.schedule == "cosine":
        progress = _progress(step, node.warmup_steps, total_steps)
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        flat_until = max(float(node.warmup_steps), total_steps * (1.0 - node.decay_fraction))
        remaining = 1.0 - _progress(step, flat_until, total_steps)
    return node.final_lr_fraction + (1.0 - node.final_lr_fraction) * remaining


def _progress(step: int, start: float, end: int) -> float:
    """How much of the decay from `start` to `end` lies behind `step`, in [0, 1]; an empty decay is over at once."""
    if step >= end:
        return 1.0
    if step <= start:
        return 0.0
    return (step - start) / (end - start)
