"""How long an update may be: a bound from the norms accepted in the last rounds, which no liar can drag along.

Honest norms differ, and for reasons that the Aggregator knows. Two of them are taken out before norms are compared:

- Warm-up. A step is proportional to its learning rate, so a norm is divided by the mean of the linear warm-up over
  the steps it was made in. Without that, the norms of a long warm-up triple from one round to the next. The decay
  after it needs nothing: honest norms then only shrink.
- Local steps. `s` steps that all point the same way give a norm that grows like `s`, a random walk one like `sqrt(s)`;
  an update that is scaled down to `link.max_update_norm`, or a node that has settled, gives one that does not grow.
  Which of them holds cannot be known and changes during training. So an update is refused only if it is too long under
  each of the three laws. If the truth is a power between two of them, nodes whose steps differ tenfold are at most
  10^(1/4) = 1.8 apart in the law that suits the longer update; with sqrt(s) alone it would be 3.2. Where all nodes
  take the same number of steps the three laws are one, and give a liar no room.

Where rounds exchange only some tensors, norms are compared with those of rounds that exchanged the same ones: another
fragment of the model is larger or smaller, and its values move more or less. A node that goes on with weights of its
own has trained a fragment for all rounds since its last turn, so their steps count.

What is left (text, batch size, chance) has the factor of the bound itself: 4 x the median, or more where the nodes
really are that different (12 robust standard deviations). Median and MAD (the median of distances from the median)
stay where they are as long as more than half of the norms are honest. Only norms of rounds before are used, so the
order in which replies arrive decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from functools import cached_property
from statistics import median

import torch
from torch import Tensor

from photon.errors import ReplyRefusedError

WINDOW_ROUNDS = 8
ENOUGH_NORMS = 6
_MOST_ROUNDS = 256  # that are remembered; what has its turn more rarely than that is bounded by the base alone
_TIMES_MEDIAN = 4.0
_DEVIATIONS = 12.0
_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_TIMES_BASE = 100.0
_PIECE_VALUES = 2**18
_LAWS = (0.0, 0.5, 1.0)  # powers of the local steps with which a norm may grow

# By round, oldest first: of each accepted update its norm at the full learning rate, and the local steps behind it.
NormHistory = tuple[tuple[tuple[float, int], ...], ...]


def robust_bound(values: Sequence[float]) -> float:
    """The largest value that still belongs to `values` (at least one): from their median and MAD."""
    middle = median(values)
    deviation = _MAD_TO_SIGMA * median([abs(value - middle) for value in values])
    return max(_TIMES_MEDIAN * middle, middle + _DEVIATIONS * deviation)


def warmup_share(first_step: int, steps: int, warmup_steps: int) -> float:
    """Mean of the linear warm-up, in (0, 1], over `steps` >= 1 sequential steps from the 0-based `first_step` on."""
    rising = min(max(warmup_steps - first_step, 0), steps)
    climbed = rising * first_step + rising * (rising + 1) / 2
    return (climbed / max(warmup_steps, 1) + steps - rising) / steps


def remember(history: NormHistory, accepted: Iterable[tuple[float, int]], period: int = 1) -> NormHistory:
    """The history with one more round, and without those that have left the window.

    `period` is the rounds after which what is exchanged begins anew: the window has room for each turn as often.
    """
    return (*history, tuple(accepted))[-min(WINDOW_ROUNDS * period, _MOST_ROUNDS) :]


def same_turns(
    history: NormHistory, round_index: int, period: int, exchanged: Callable[[int], Sequence[str]]
) -> tuple[NormHistory, int]:
    """Of the history of a run that stands before `round_index`, the rounds that exchanged the tensors of that round.

    Also how many rounds it is since the last of them, or since the run began. `exchanged` repeats after `period`.
    """
    first = round_index - len(history)
    turns = {turn: exchanged(turn) for turn in {index % period for index in range(first, round_index + 1)}}
    now = turns[round_index % period]
    rounds = [index for index in range(first, round_index) if turns[index % period] == now]
    alike = tuple(history[index - first] for index in rounds)
    return alike[-WINDOW_ROUNDS:], round_index - (rounds[-1] if rounds else -1)


def norm_of(tensors: Mapping[str, Tensor]) -> float:
    """L2 norm over all values, computed in float64."""
    return math.sqrt(sum(squares_of(tensor) for tensor in tensors.values()))


def squares_of(tensor: Tensor) -> float:
    """Sum of squares in float64, a piece at a time: of a large tensor a whole copy in float64 would be in memory."""
    flat = tensor.reshape(-1)
    return sum(
        float(flat[begin : begin + _PIECE_VALUES].to(torch.float64, copy=True).square_().sum())
        for begin in range(0, flat.numel(), _PIECE_VALUES)
    )


class NormBound:
    """The bound of one round. `base` are the weights that updates start from, `first_step` its sequential step.

    Behind an update are the steps of `rounds` rounds, from `first_step` on, as many in each as in this one.

    While fewer than ENOUGH_NORMS norms are known (or all of them are zero) an update may be 100 times as long as the
    base, of zeros as if they were ones: that stops what would destroy the model, no more.
    """

    def __init__(
        self, history: NormHistory, base: Mapping[str, Tensor], first_step: int, warmup_steps: int, rounds: int = 1
    ) -> None:
        self._rounds = rounds
        self._known = [entry for accepted in history for entry in accepted]
        self._base, self._first_step, self._warmup_steps = base, first_step, warmup_steps

    def since(self, first_step: int) -> NormBound:
        """The same for an update that was begun at another sequential step."""
        other = copy(self)
        other._first_step = first_step
        return other

    def limit(self, steps: int) -> float:
        """The longest update of `steps` >= 1 local steps that is accepted."""
        by_law = [bound * (steps * self._rounds) ** law for law, bound in self._bounds.items()]
        limit = max(by_law, default=0.0) * self._warmup_share(steps)
        return limit if limit > 0 else _TIMES_BASE * self._base_norm

    def verify(self, norm: float, steps: int) -> None:
        """Raises ReplyRefusedError if an update of `steps` local steps is too long."""
        limit = self.limit(steps)
        if not norm <= limit:
            raise ReplyRefusedError(
                f"its update of {steps} local steps has norm {norm:.4g}; {limit:.4g} is the most that "
                "federation.norm_bound allows in this round (if it is honest: false in the recipe, and resume)"
            )

    def entry(self, norm: float, steps: int) -> tuple[float, int]:
        """An accepted update as the history keeps it."""
        return norm / self._warmup_share(steps), steps * self._rounds

    @cached_property
    def _bounds(self) -> dict[float, float]:
        """By law, the bound of one step's update at the full learning rate; empty before enough norms are known."""
        if len(self._known) < ENOUGH_NORMS:
            return {}
        return {law: robust_bound([norm / steps**law for norm, steps in self._known]) for law in _LAWS}

    @cached_property
    def _base_norm(self) -> float:
        return norm_of(self._base) or math.sqrt(sum(tensor.numel() for tensor in self._base.values()))

    def _warmup_share(self, steps: int) -> float:
        return warmup_share(self._first_step, steps * self._rounds, self._warmup_steps)
