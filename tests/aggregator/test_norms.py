"""The bound of update norms: liars meet it in every round, honest nodes never, and nobody drags it along."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support import Delivery, Federation, edited, tiny_recipe

from photon.aggregator import norms
from photon.aggregator.norms import (
    ENOUGH_NORMS,
    WINDOW_ROUNDS,
    NormBound,
    NormHistory,
    norm_of,
    remember,
    robust_bound,
    same_turns,
    warmup_share,
)
from photon.errors import ReplyRefusedError, RoundFailedError
from photon.fabric.base import Arrival
from photon.link.update import decode_message, expect_reply

Bound = Callable[[Sequence[float]], float]
BASE = {"w": torch.full((100,), 2.0)}  # norm 20
TAU = 20


def mean_bound(values: Sequence[float]) -> float:
    """A mutant: the same constants around mean and standard deviation, which a liar drags along."""
    return max(4 * mean(values), mean(values) + 12 * stdev(values))


def is_refused(bound: NormBound, norm: float, steps: int = TAU) -> bool:
    try:
        bound.verify(norm, steps)
    except ReplyRefusedError:
        return True
    return False


# --- the bound ------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.9, 1.1), min_size=4, max_size=20), st.data())
def test_a_minority_of_liars_moves_the_bound_no_further_than_honest_nodes_reach(
    honest: list[float], data: st.DataObject
) -> None:
    lies = data.draw(st.lists(st.floats(1e3, 1e9), min_size=1, max_size=(len(honest) - 1) // 2))
    assert robust_bound([*honest, *lies]) < 4 * 1.1 + 1
    assert mean_bound([*honest, *lies]) > 100


def test_the_bound_grows_with_how_different_nodes_really_are() -> None:
    assert robust_bound([1.0] * 9) == 4.0
    assert robust_bound([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(3 + 12 * 1.4826)


def test_who_always_goes_to_the_limit_does_not_raise_it() -> None:
    """Two of five nodes send what is just accepted, for 40 rounds: the limit stays, the mutant's explodes."""

    def limit_after(rounds: int, bound: Bound) -> float:
        history: NormHistory = (((1.0, TAU),) * 5, ((1.0, TAU),) * 5)
        rng = random.Random(3)
        for _ in range(rounds):
            limit = bound([norm for accepted in history for norm, _ in accepted])
            honest = [rng.uniform(0.9, 1.1) for _ in range(3)]
            history = remember(history, [(norm, TAU) for norm in [*honest, limit, limit]])
        return bound([norm for accepted in history for norm, _ in accepted])

    assert limit_after(40, robust_bound) < 5
    assert limit_after(40, mean_bound) > 1e6


# --- before enough is known -----------------------------------------------------------------------------------------


def test_until_enough_norms_are_known_the_base_bounds_an_update() -> None:
    few: NormHistory = (((1.0, TAU),) * (ENOUGH_NORMS - 1),)
    for history in ((), few):
        bound = NormBound(history, BASE, 0, 0)
        assert bound.limit(TAU) == pytest.approx(100 * norm_of(BASE)) == pytest.approx(2000)
        assert not is_refused(bound, 1999)
        assert is_refused(bound, 2001)
    assert NormBound((*few, ((1.0, TAU),)), BASE, 0, 0).limit(TAU) == pytest.approx(4)
    zeros = NormBound((), {"bias": torch.zeros(9)}, 0, 0)  # a fragment may be a bias that has not moved yet
    assert zeros.limit(TAU) == 300


def test_norms_that_are_all_zero_say_nothing() -> None:
    """A learning rate of zero; then one that is not. Zero itself is accepted."""
    bound = NormBound((((0.0, TAU),) * 9,), BASE, 0, 0)
    assert not is_refused(bound, 0.0)
    assert not is_refused(bound, 1.0)
    assert is_refused(bound, 2001)


def test_a_norm_that_is_no_number_is_refused() -> None:
    assert is_refused(NormBound((), BASE, 0, 0), float("nan"))
    assert is_refused(NormBound((((1.0, TAU),) * 9,), BASE, 0, 0), float("inf"))


# --- honest nodes ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(1, 60), st.integers(0, 200))
def test_the_warm_up_share_is_the_mean_over_the_steps(first: int, steps: int, warmup: int) -> None:
    rates = [min(1.0, (step + 1) / warmup) if warmup else 1.0 for step in range(first, first + steps)]
    assert warmup_share(first, steps, warmup) == pytest.approx(mean(rates))


def honest_norm(first: int, steps: int, warmup: int, law: float, chance: float) -> float:
    """What a node's norm does: proportional to the learning rate, a power of the steps, and chance."""
    return warmup_share(first, steps, warmup) * steps**law * chance


def refusals(taus: Sequence[int], law: float, warmup: int, seed: int, step: int = TAU) -> int:
    """Honest updates refused in 30 rounds."""
    rng, history, refused = random.Random(seed), (), 0
    for t in range(30):
        bound, accepted = NormBound(history, BASE, t * step, warmup), []
        for tau in taus:
            norm = honest_norm(t * step, tau, warmup, law, rng.lognormvariate(0, 0.15))
            if is_refused(bound, norm, tau):
                refused += 1
            else:
                accepted.append(bound.entry(norm, tau))
        history = remember(history, accepted)
    return refused


@pytest.mark.parametrize("from_round", [0, 5])
def test_a_millionfold_update_is_refused_from_the_first_round_on(from_round: int) -> None:
    """By the bound alone, whatever other checks there are; and the liar's norms never enter the history."""
    history: NormHistory = ()
    for t in range(8):
        bound = NormBound(history, BASE, t * TAU, 100)
        norms_of_round = [honest_norm(t * TAU, TAU, 100, 0.5, chance) for chance in (0.8, 1.0, 1.2, 1.1)]
        if t >= from_round:
            norms_of_round[0] *= 1e6
        assert [is_refused(bound, norm) for norm in norms_of_round] == [t >= from_round, False, False, False]
        history = remember(history, [bound.entry(norm, TAU) for norm in norms_of_round if not is_refused(bound, norm)])


CROWDS = {
    "one ten times slower": [200] * 7 + [20],
    "one ten times faster": [20] * 7 + [200],
    "half and half": [20] * 4 + [200] * 4,
    "all paces": [20, 35, 60, 80, 110, 140, 170, 200],
    "two nodes": [20, 200],
}


@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize("law", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_honest_nodes_of_any_pace_are_never_refused(crowd: str, law: float) -> None:
    for warmup in (0, 50, 600, 2000):
        for seed in range(3):
            assert refusals(CROWDS[crowd], law, warmup, seed) == 0


@pytest.mark.parametrize(
    ("laws", "law", "crowd"),
    [
        ((0.0,), 1.0, "one ten times faster"),  # norms as they come
        ((1.0,), 0.0, "one ten times slower"),  # norms per step
        ((0.5,), 1.0, "one ten times faster"),  # per root of the steps: 3.2 of the 4 that there are
        ((0.5,), 0.0, "one ten times slower"),
    ],
)
def test_one_law_alone_refuses_honest_nodes(
    laws: tuple[float, ...], law: float, crowd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutants, one for each single way to compare nodes that took different numbers of steps."""
    monkeypatch.setattr(norms, "_LAWS", laws)
    assert sum(refusals(CROWDS[crowd], law, 0, seed) for seed in range(10)) > 0


def test_norms_that_do_not_know_of_the_warm_up_refuse_honest_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: in a long warm-up the second round's norms are three times the first's, and more with other paces."""
    crowd = CROWDS["one ten times faster"]
    assert refusals(crowd, 0.75, 2000, 1) == 0
    monkeypatch.setattr(NormBound, "_warmup_share", lambda *_: 1.0)
    assert refusals(crowd, 0.75, 2000, 1) > 0


def test_the_same_steps_everywhere_leave_no_room_between_the_laws() -> None:
    history: NormHistory = (((3.0, TAU),) * 8,)
    assert NormBound(history, BASE, 1000, 0).limit(TAU) == pytest.approx(12)


def test_the_window_forgets() -> None:
    history: NormHistory = ()
    for t in range(20):
        history = remember(history, [(float(t), 1)])
    assert history == tuple(((float(t), 1),) for t in range(20 - WINDOW_ROUNDS, 20))


# --- fragments ------------------------------------------------------------------------------------------------------

# How long one step's update of each fragment is: a few norms move far, a large embedding hardly.
SCALES = (1.0, 30.0, 1.0, 0.02, 1.0, 1.0, 1.0, 1.0)


def fragment_refusals(
    law: float, share: float = 1.0, own_turns: bool = True, counts_rounds: bool = True, liar: float = 1.0
) -> tuple[int, int]:
    """Updates refused of honest nodes, and of one that multiplies its own: 8 nodes, 8 fragments, 80 rounds.

    In each round a `share` of the nodes takes part; who did not the round before, begins with the base.
    """
    rng, history, refused = random.Random(7), (), [0, 0]
    count, warmup, since = len(SCALES), 300, dict.fromkeys(range(8), 0)
    for t in range(80):
        period = count if own_turns else 1
        known, rounds = same_turns(history, t, period, lambda turn: (f"{turn % count}",) if own_turns else ("all",))
        rounds = rounds if counts_rounds else 1
        bound = NormBound(known, BASE, max(0, t - rounds + 1) * TAU, warmup, rounds)
        accepted = []
        for node in range(8):
            if rng.random() > share:
                since[node] = t + 1
                continue
            begun = max(since[node], t - count + 1, 0)
            honest = honest_norm(begun * TAU, (t + 1 - begun) * TAU, warmup, law, rng.lognormvariate(0, 0.15))
            norm = 0.01 * honest * SCALES[t % count] * (liar if node == 0 and t >= 16 else 1.0)
            if is_refused(bound, norm):
                refused[node == 0] += 1
            else:
                accepted.append(bound.entry(norm, TAU))
        history = remember(history, accepted, period)
    return refused[0], refused[1]


@pytest.mark.parametrize("share", [1.0, 0.9, 0.7, 0.5])
@pytest.mark.parametrize("law", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_honest_fragments_are_never_refused(law: float, share: float) -> None:
    assert fragment_refusals(law, share) == (0, 0)


def test_whoever_lengthens_his_fragments_is_refused_in_each_round() -> None:
    assert fragment_refusals(0.5, liar=20.0) == (0, 64)


def test_fragments_compared_with_each_other_or_without_their_rounds_are_refused() -> None:
    """The mutants. One history for all; and as if behind each update were one round, in the first turns and later."""
    assert fragment_refusals(0.5, own_turns=False, counts_rounds=False)[0] > 20
    assert fragment_refusals(1.0, counts_rounds=False)[0] > 5


def test_with_one_turn_the_history_is_what_it_was() -> None:
    history: NormHistory = tuple(((float(t), 1),) for t in range(8))
    assert same_turns(history, 30, 1, lambda turn: ("w", "b")) == (history, 1)
    assert remember(history, [(9.0, 1)]) == (*history[1:], ((9.0, 1),))


def test_turns_are_told_apart_by_what_was_exchanged() -> None:
    """Weights each round, moments each third: rounds 2, 5, 8 are of one kind, all others of the other."""
    history: NormHistory = tuple(((float(t), 1),) for t in range(10))
    known, rounds = same_turns(history, 10, 3, lambda turn: ("w", "m") if turn == 2 else ("w",))
    assert ([accepted[0][0] for accepted in known], rounds) == ([0, 1, 3, 4, 6, 7, 9], 1)
    known, rounds = same_turns((*history, ()), 11, 3, lambda turn: ("w", "m") if turn == 2 else ("w",))
    assert ([accepted[0][0] for accepted in known], rounds) == ([2, 5, 8], 3)
    for t in range(700):
        history = remember(history, [(float(t), 1)], 50)
    assert len(history) == 256  # however rare a turn is


# --- in a federation ------------------------------------------------------------------------------------------------

QUORUM = {"quorum": 0.5, "suspend_after": 0}
SILOS = ["ada", "bob", "cyd", "dan"]


def longer(factor: float, from_round: int = 0, node: str = "ada") -> Callable[[list[Arrival]], list[Delivery]]:
    """`node` multiplies its update, from some round on."""

    def network(arrivals: list[Arrival]) -> list[Delivery]:
        return [(0.0, changed(arrival)) for arrival in arrivals]

    def changed(arrival: Arrival) -> Arrival:
        reply = expect_reply(decode_message(arrival.message))
        if arrival.node != node or reply.training is None or reply.round < from_round:
            return arrival
        message = edited(arrival.message, lambda update: {name: value * factor for name, value in update.items()})
        return Arrival(node, message)

    return network


@pytest.mark.parametrize(
    ("factor", "from_round", "options", "reason"),
    [
        (1e6, 0, {}, "beyond 1024"),  # the coarser check comes first, with or without the bound
        (1e6, 5, {}, "beyond 1024"),
        (2e3, 0, {"outer_lr": 0.5}, "federation.norm_bound"),
        (100.0, 5, {}, "federation.norm_bound"),
    ],
)
def test_a_liar_is_refused_in_the_first_round_and_in_a_later_one(
    factor: float, from_round: int, options: dict[str, object], reason: str, tmp_path: Path
) -> None:
    recipe = tiny_recipe(SILOS, federation={"rounds": 6, **QUORUM, **options})
    federation = Federation(tmp_path, recipe, longer(factor, from_round))
    federation.run()
    for event in federation.rounds():
        lies = event.round > from_round
        assert ("ada" in event.missing) == lies
        assert "ada" not in event.missing or reason in event.missing["ada"]
        assert set(event.nodes) == set(SILOS) - ({"ada"} if lies else set())


def test_a_fragment_that_is_too_long_is_refused_and_no_honest_one(tmp_path: Path) -> None:
    options = {"rounds": 8, "parts": ["fragments(count=2)"], **QUORUM}
    federation = Federation(tmp_path, tiny_recipe(SILOS, federation=options), longer(50.0, 4))
    federation.run()
    assert [sorted(event.missing) for event in federation.rounds()] == [[]] * 4 + [["ada"]] * 4
    assert all("federation.norm_bound" in event.missing["ada"] for event in federation.rounds()[4:])
    assert len(federation.aggregator.progress.norms) == 8


def test_without_the_bound_such_a_liar_is_believed(tmp_path: Path) -> None:
    recipe = tiny_recipe(SILOS, federation={"rounds": 6, **QUORUM, "norm_bound": False})
    federation = Federation(tmp_path, recipe, longer(100.0, 5))
    federation.run()
    assert federation.rounds()[-1].missing == {}


def test_the_baseline_is_not_bounded(tmp_path: Path) -> None:
    """Its one node is everybody's; a bound could only end it."""
    recipe = tiny_recipe(["ada"], federation={"rounds": 7, "outer": "none"})
    federation = Federation(tmp_path, recipe, longer(100.0, 6))
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr("photon.aggregator.assemble.POOLED", "ada")
        assert federation.run().progress.round == 7


def test_a_resumed_run_knows_the_norms_of_the_rounds_before(tmp_path: Path) -> None:
    def recipe(rounds: int) -> object:
        return tiny_recipe(SILOS, federation={"rounds": rounds, "quorum": 1.0})

    Federation(tmp_path, recipe(3)).run()
    resumed = Federation(tmp_path, recipe(4), longer(100.0))
    assert len(resumed.aggregator.progress.norms) == 3
    with pytest.raises(RoundFailedError, match=r"round 3: . of 4 nodes.*ada: refused: .*norm_bound .*honest: false"):
        resumed.run()
    assert resumed.store.load(None).progress == Federation(tmp_path, recipe(4)).aggregator.progress
