"""A tau that follows the agreement of the last round: the rule, and that a run keeps its sequential steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support import Federation, read_again, tiny_recipe

from photon.config import FederationConfig, Recipe
from photon.errors import ConfigError
from photon.events import RoundDone
from photon.parts.base import Moment
from photon.parts.method import Method
from photon.parts.tau_by_agreement import TauByAgreement


def recipe(*parts: str, rounds: int = 5, tau: int = 2, **sections: Any) -> Recipe:
    return tiny_recipe(federation={"rounds": rounds, "tau": tau, "parts": list(parts)}, **sections)


@pytest.mark.parametrize(
    ("agreement", "before", "after"),
    [(0.6, 4, 8), (0.9, 16, 16), (0.59, 4, 4), (0.2, 4, 4), (0.19, 4, 2), (-0.5, 2, 2), (0.1, 5, 2), (None, 8, 8)],
)
def test_tau_doubles_above_and_halves_below(agreement: float | None, before: int, after: int) -> None:
    part = TauByAgreement(low=0.2, high=0.6, least=2, most=16)
    federation = FederationConfig(rounds=100, tau=3)
    assert part.federation(federation, Moment(5, 20, 300, agreement, before)).tau == after
    assert part.federation(federation, Moment(0, 0, 300)).tau == 3


def told_by_record(part: TauByAgreement, rounds: list[RoundDone], tau: int, total: int) -> list[int]:
    """What the rule makes of the cosines that the run recorded."""
    found, done = [], 0
    for event in rounds:
        found.append(min(tau, total - done))
        done += found[-1]
        pairs = [row[column] for index, row in enumerate(event.cosine) for column in range(index)]
        cosine = sum(pairs) / len(pairs)
        tau = 2 * tau if cosine >= part.high else tau // 2 if cosine < part.low else tau
        tau = min(max(tau, part.least), part.most)
    return found


@pytest.mark.parametrize(("part", "fewer"), [(TauByAgreement(-1, -1, 1, 8), True), (TauByAgreement(1, 1, 1, 8), False)])
def test_a_run_keeps_its_steps_in_fewer_or_more_rounds(tmp_path: Path, part: TauByAgreement, fewer: bool) -> None:
    asked = recipe(f"tau_by_agreement(low={part.low}, high={part.high}, most=8)")
    federation = Federation(tmp_path, asked)
    state = federation.run()
    steps = [event.nodes["ada"].steps for event in federation.rounds()]
    assert state.progress.sequential_step == asked.federation.sequential_steps == sum(steps)
    assert (len(steps) < 5) is fewer
    assert (len(steps) > 5) is not fewer
    assert steps == told_by_record(part, federation.rounds(), 2, 10)
    assert federation.evaluations()[-1].round == state.progress.round


def test_it_goes_on_after_a_stop_as_if_there_had_been_none(tmp_path: Path) -> None:
    """Both the agreement and tau of the last round are committed: between any two rounds the run may stop."""
    asked = recipe("tau_by_agreement(low=0.3, high=0.5, most=8)", rounds=8)
    whole = Federation(tmp_path / "whole", asked)
    sha256, rounds = whole.run().model_sha256, whole.rounds()
    assert len({event.nodes["ada"].steps for event in rounds}) > 1
    for stop in range(1, len(rounds)):
        begun = Federation(tmp_path / str(stop), asked)
        begun.aggregator._commit()
        for _ in range(stop):
            begun.aggregator._round()
            begun.aggregator._commit()
        again = Federation(tmp_path / str(stop), asked)
        assert again.run().model_sha256 == sha256
        assert [e.sequential_step for e in again.rounds()] == [e.sequential_step for e in rounds]


def test_what_cannot_be_is_refused() -> None:
    for parameters in ({"low": 0.5, "high": 0.4}, {"high": 1.5}, {"least": 0}, {"least": 4, "most": 2}):
        with pytest.raises(ValueError, match="tau_by_agreement"):
            TauByAgreement(**parameters)
    with pytest.raises(ConfigError, match="begins with"):
        Method.of(recipe("tau_by_agreement(least=4)"))
    with pytest.raises(ConfigError, match="two nodes"):
        read_again(tiny_recipe(["ada"], federation={"parts": ["tau_by_agreement"]}))
    with pytest.raises(ConfigError, match="tau of its own"):
        Method.of(tiny_recipe({"ada": {"tau": 1}, "bob": {}}, federation={"parts": ["tau_by_agreement"]}))
