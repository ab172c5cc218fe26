"""Fragments against a plain loop in float64: K models, of which a fragment a round is averaged and stepped by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.crashes import steps_that_do_not_survive
from tests.support import CPU, Federation, Text, largest_difference, new_model, tiny_recipe, weights, without_timings
from torch import Tensor

from photon.aggregator.outer import OuterOptimizer
from photon.config import FederationConfig, Recipe
from photon.errors import ConfigError, RoundFailedError
from photon.fabric.base import Lost
from photon.link.tensors import sha256_hex
from photon.link.update import decode_message, expect_reply, expect_task
from photon.node.optimizers import build_optimizer
from photon.parts.fragments import Fragments, fragments_of
from photon.parts.method import Method

NODES = ("ada", "bob", "cyd")
MODEL = {"layers": 3}
# An epsilon well above the grid of the merge (2e-16): the root of a second moment of 1e-16 would show it.
ADAMW = {"optimizer": "adamw", "lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-4, "batch_size": 2}
NESTEROV = {"outer": "nesterov", "outer_lr": 0.7, "outer_momentum": 0.9}


def recipe(*parts: str, rounds: int = 7, **sections: Any) -> Recipe:
    federation = {"rounds": rounds, "parts": list(parts), **NESTEROV, **sections.pop("federation", {})}
    return tiny_recipe(
        model=MODEL,
        node={**ADAMW, **sections.pop("node", {})},
        federation=federation,
        evaluation={"every": 50},
        **sections,
    )


def by_hand(name: str, count: int, layout: str) -> int:
    """The fragments of three equal blocks, an embedding a fifth of one, and a last norm."""
    blocks = {
        ("strided", 2): (0, 1, 0),
        ("sequential", 2): (0, 0, 1),
        ("strided", 4): (0, 1, 2),
        ("strided", 1): (0, 0, 0),
    }
    if name.startswith("layers."):
        return blocks[layout, count][int(name.split(".")[1])]
    return count - 1  # it has fewest values


@dataclass(frozen=True)
class Plain:
    """What a plain loop is of. `absent` are (node, round); state of `kinds` is averaged with its weight."""

    count: int
    delay: int = 0
    mix: float = 0.5
    layout: str = "strided"
    mutant: str = ""
    absent: tuple[tuple[str, int], ...] = ()
    kinds: tuple[str, ...] = ()

    def has_turn(self, name: str, index: int) -> bool:
        """Whether round `index` exchanges the weight; no round before the first does."""
        return index >= 0 and index % self.count == by_hand(name, self.count, self.layout)

    def take(
        self, node: str, index: int, own: Mapping[str, Tensor], base: Mapping[str, Tensor], before: Mapping[str, Tensor]
    ) -> None:
        """`before`: what was merged without the round before, which with a delay nobody takes yet."""
        mix = 1 - self.mix if self.mutant == "mixed the other way" else self.mix
        for name, tensor in own.items():
            if (node, index - 1) in self.absent:
                tensor.copy_(before[name] if self.delay else base[name])
            elif self.has_turn(name, index - 1 - self.delay):
                tensor.copy_(mix * tensor + (1 - mix) * base[name] if self.delay else base[name])


def plain_loop(recipe: Recipe, plain: Plain) -> dict[str, Tensor]:
    """What is merged in the end."""
    federation, size = recipe.federation, recipe.node.batch_size
    models = {name: new_model(recipe, torch.float64) for name in NODES}
    own = {name: dict(model.named_parameters()) for name, model in models.items()}
    optimizers = {name: build_optimizer(model, recipe.node, CPU) for name, model in models.items()}
    base = {name: tensor.detach().clone() for name, tensor in own["ada"].items()}
    velocity = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    places, before = dict.fromkeys(NODES, 0), base
    for index in range(federation.rounds):
        present = [node for node in NODES if (node, index) not in plain.absent]
        starts = {}
        for node in present:
            with torch.no_grad():
                plain.take(node, index, own[node], base, before)
            starts[node] = {name: tensor.detach().clone() for name, tensor in own[node].items()}
            for _ in range(federation.tau):
                batch = torch.from_numpy(Text(node).batch(places[node], size))
                places[node] += size
                models[node].zero_grad()
                models[node].loss(batch[:, :-1], batch[:, 1:]).backward()
                optimizers[node].step()
        before = {name: tensor.clone() for name, tensor in base.items()}
        with torch.no_grad():
            for name in base:
                if not plain.has_turn(name, index):
                    velocity[name] *= federation.outer_momentum if plain.mutant == "momentum each round" else 1.0
                    continue
                is_wrong = plain.mutant == "from the round's start"
                deltas = [(starts[node] if is_wrong else base)[name] - own[node][name] for node in present]
                gradient = torch.stack(deltas).mean(0)
                velocity[name].mul_(federation.outer_momentum).add_(gradient)
                base[name] -= federation.outer_lr * (gradient + federation.outer_momentum * velocity[name])
                for kind in plain.kinds:
                    states = [optimizers[node].state[own[node][name]][kind] for node in present]
                    merged = torch.stack(states).mean(0)
                    for state in states:
                        state.copy_(merged)
    return base


def trained(folder: Path, recipe: Recipe) -> dict[str, Tensor]:
    state = Federation(folder, recipe, dtype=torch.float64).run()
    return {name: tensor for name, tensor in weights(state).items() if "/" not in name}


# --- the arithmetic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "plain"),
    [
        ("fragments(count=2)", Plain(2)),
        ("fragments(count=2, layout=sequential)", Plain(2, layout="sequential")),
        ("fragments(count=4, delay=1, mix=0)", Plain(4, 1, 0.0)),
        ("fragments(count=4, delay=1)", Plain(4, 1)),
        ("fragments(count=4, delay=2, mix=0)", Plain(4, 2, 0.0)),
        ("fragments(count=4, delay=2, mix=0.25)", Plain(4, 2, 0.25)),
        ("fragments(count=2, delay=1, mix=0.25)", Plain(2, 1, 0.25)),
    ],
)
def test_it_is_streaming_diloco(tmp_path: Path, part: str, plain: Plain) -> None:
    asked = recipe(part)
    ours = trained(tmp_path, asked)
    assert largest_difference(ours, plain_loop(asked, plain)) < 1e-8
    mutants = ["momentum each round", "from the round's start"]
    mutants += ["mixed the other way"] if plain.delay and plain.mix != 0.5 else []
    for mutant in mutants:
        assert largest_difference(ours, plain_loop(asked, replace(plain, mutant=mutant))) > 1e-5, mutant
    wrong = replace(plain, delay=(plain.delay + 1) % plain.count)
    assert largest_difference(ours, plain_loop(asked, wrong)) > 1e-5


@pytest.mark.parametrize("outer", [{"outer": "fedavg"}, NESTEROV])
@pytest.mark.parametrize("link", [{}, {"up": ["int4(block=32)"], "down": ["int8"]}])
def test_one_fragment_is_the_model_to_the_last_bit(tmp_path: Path, outer: dict[str, Any], link: dict[str, Any]) -> None:
    def ends_in(folder: str, *parts: str) -> str:
        """Four rounds: two turns of each of two fragments; momentum and what a codec left out from the second on."""
        asked = recipe(*parts, rounds=4, federation=outer, link=link)
        return Federation(tmp_path / folder, asked).run().model_sha256

    plain, one = ends_in("plain"), ends_in("one", "fragments(count=1)")
    assert plain == one != ends_in("two", "fragments(count=2)")


def test_of_equal_tensors_the_mixture_is_the_same_to_the_last_bit() -> None:
    tensor = torch.randn(10_000)
    for mix in (0.1, 0.3, 0.5, 0.9):
        assert torch.equal(Fragments(delay=1, mix=mix).start("w", tensor.clone(), tensor), tensor)
    assert not torch.equal(0.7 * tensor + 0.3 * tensor, tensor)  # the mutant


def test_optimizer_state_goes_with_its_weight(tmp_path: Path) -> None:
    asked = recipe("fragments(count=2)", "share")
    ours = trained(tmp_path, asked)
    assert largest_difference(ours, plain_loop(asked, Plain(2, kinds=("exp_avg", "exp_avg_sq")))) < 1e-8
    assert largest_difference(ours, plain_loop(asked, Plain(2))) > 1e-6


# --- who was not there -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0, 1])
def test_who_missed_a_round_takes_the_whole_base(tmp_path: Path, delay: int) -> None:
    asked = recipe(f"fragments(count=2, delay={delay}, mix=0.25)", federation={"quorum": 0.6})
    federation = Federation(tmp_path, asked, dtype=torch.float64, share_disk=False)
    infos = federation.fabric.infos
    federation.fabric.nodes = lambda: [  # type: ignore[method-assign]  # a network of its own for one test
        info for info in infos if not (info.name == "bob" and len(federation.rounds()) == 2)
    ]
    ours = weights(federation.run())
    plain = Plain(2, delay, 0.25, absent=(("bob", 2),))
    assert largest_difference(ours, plain_loop(asked, plain)) < 1e-8
    assert largest_difference(ours, plain_loop(asked, replace(plain, absent=()))) > 1e-5
    tasks = [expect_task(decode_message(message)) for node, message in federation.fabric.sent if node == "bob"]
    held = [(number, "held") for number in range(1 + delay)]  # what is held back has moved nothing yet
    assert [(task.round, task.form) for task in tasks if task.form != "difference"] == [*held, (3, "whole")]


# --- what it costs, and what comes out -------------------------------------------------------------------------------


def test_a_round_carries_a_fragment_both_ways(tmp_path: Path) -> None:
    def bodies(name: str, *parts: str) -> tuple[list[int], list[int]]:
        """Bytes of all bodies, round by round, up and down."""
        federation = Federation(tmp_path / name, recipe(*parts, rounds=8))
        federation.run()
        traffic = [list(event.round_link.values()) for event in federation.rounds()]
        return [sum(t.up.body for t in row) for row in traffic], [sum(t.down.body for t in row) for row in traffic]

    values = {name: parameter.numel() for name, parameter in new_model(recipe()).named_parameters()}
    (up, down), (part_up, part_down) = bodies("whole"), bodies("parts", "fragments(count=4)")
    sizes = [sum(values[name] for name in values if by_hand(name, 4, "strided") == index) for index in range(4)]
    header = 8 * 1024 * len(NODES)  # names and shapes, which in a model so small are as long as its weights
    for index in range(8):
        share = sizes[index % 4] / sum(values.values())
        assert abs(part_up[index] - share * up[index]) < header
        assert part_up[index] < 0.4 * up[index]
    assert part_down[0] == 0  # the untrained model is known
    assert max(part_down[1:]) < 0.4 * min(down[1:])
    assert sum(part_up) == pytest.approx(sum(up) / 4, rel=0.1)
    assert sum(part_down[1:]) == pytest.approx(sum(down[1:]) / 4, rel=0.15)


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_what_is_exported_is_what_was_merged_last_of_each_fragment(tmp_path: Path, delay: int) -> None:
    """With a delay it is merged a round later, when nobody could have taken it before; the last round merges all."""
    federation = Federation(tmp_path, recipe(f"fragments(count=4, delay={delay})", checkpoint={"keep_last": 10}))
    final, (*_, last) = weights(federation.run()), range(8)
    models = [weights(federation.store.load(None, number)) for number in range(last + 1)]
    for name, tensor in final.items():
        turns = [index for index in range(last) if index % 4 == by_hand(name, 4, "strided")]
        assert last - turns[-1] <= 4
        for number in range(1, last + 1):
            merged = {number - 1} if not delay else {number - 2, number - 1} if number == last else {number - 2}
            assert torch.equal(models[number][name], models[number - 1][name]) == merged.isdisjoint(turns)
        assert torch.equal(tensor, models[min(last, turns[-1] + 1 + bool(delay))][name])


def test_a_last_exchange_of_everything_would_go_nearly_as_far_again() -> None:
    """Why there is none. In 10 turns of 4 rounds each weights have got going; then one round's work is exchanged."""
    federation = FederationConfig.model_validate({"rounds": 40, "tau": 1, **NESTEROV})
    outer = OuterOptimizer([("w", torch.zeros(1))], federation)
    moved = [outer.step([("w", torch.full((1,), 4.0))]).moved_norm for _ in range(10)]
    flushed = outer.step([("w", torch.full((1,), 1.0))]).moved_norm
    assert flushed > 0.8 * moved[-1]  # for a quarter of the work


# --- both ends, and a resume -----------------------------------------------------------------------------------------

LINKS = [
    {},
    {"up": ["zstd"], "down": ["zstd"]},
    {"up": ["int4(block=32)"], "down": ["int4(block=32)", "zstd"]},
    {"up": ["lowrank(rank=1)", "int8"], "down": ["lowrank(rank=1)", "int8"], "down_feedback": 0.5, "up_feedback": 0.5},
    {"up": ["topk(scope=global)"], "down": ["topk(density=0.2)", "int4(rounding=stochastic)"], "down_feedback": 0.0},
]
PART = "fragments(count=2, delay=1)"


@pytest.mark.parametrize("link", LINKS, ids=str)
def test_both_ends_hold_the_same_bits(tmp_path: Path, link: dict[str, Any]) -> None:
    held: list[tuple[str, str]] = []

    def network(arrivals: list[Any]) -> list[tuple[float, Any]]:
        for arrival in arrivals:
            reply = expect_reply(decode_message(arrival.message))
            file = federation.bases[arrival.node] / f"{reply.base_sha256}.safetensors"
            held.append((reply.base_sha256, sha256_hex(file.read_bytes())))
        return [(0.0, arrival) for arrival in arrivals]

    asked = recipe(PART, link=link, checkpoint={"keep_last": 20})
    federation = Federation(tmp_path, asked, network, share_disk=False)
    federation.run()
    committed = [federation.store.load(None, number) for number in range(8)]
    hashes = [state.model_sha256 for state in committed]
    assert hashes[0] == hashes[1]  # the first round's merge is taken in with the second's
    assert len(set(hashes)) == 7
    assert held == [(digest, digest) for digest in hashes for _ in NODES]
    tasks = [expect_task(decode_message(message)) for _, message in federation.fabric.sent]
    assert {task.form for task in tasks[:6]} == {"held"}
    assert {task.form for task in tasks[6:]} == {"difference"}


@pytest.mark.parametrize("part", [PART, "fragments(count=3)"])
@pytest.mark.parametrize("link", [LINKS[0], LINKS[3]], ids=["exact", "lossy"])
def test_a_resume_in_the_middle_shows_nowhere(tmp_path: Path, part: str, link: dict[str, Any]) -> None:
    def failing(arrivals: list[Any]) -> list[tuple[float, Any]]:
        number = expect_reply(decode_message(arrivals[0].message)).round
        return [(0.0, Lost(arrival.node, "power cut") if number == 4 else arrival) for arrival in arrivals]

    whole = Federation(tmp_path / "whole", recipe(part, link=link))
    expected = whole.run().model_sha256
    with pytest.raises(RoundFailedError):
        Federation(tmp_path / "parts", recipe(part, link=link), failing).run()
    resumed = Federation(tmp_path / "parts", recipe(part, link=link))
    assert resumed.run().model_sha256 == expected
    assert without_timings(resumed.rounds()) == without_timings(whole.rounds())


@pytest.mark.parametrize("link", LINKS[:3], ids=str)
@pytest.mark.parametrize(("before", "after"), [([], [PART]), ([PART], []), ([PART], ["fragments(count=3)"])])
def test_a_run_goes_on_with_other_fragments(
    tmp_path: Path, before: list[str], after: list[str], link: dict[str, Any]
) -> None:
    """What was written of one fragment is never told as the model."""
    Federation(tmp_path, recipe(*before, rounds=4, link=link)).run()
    federation = Federation(tmp_path, recipe(*after, link=link))
    federation.run()
    assert len(federation.rounds()) == 7
    assert not any(event.missing for event in federation.rounds())


@pytest.mark.parametrize("link", [LINKS[0], LINKS[3]], ids=["exact", "lossy"])
def test_a_crash_at_any_step_leaves_no_trace(tmp_path: Path, link: dict[str, Any]) -> None:
    told: list[set[str]] = []

    def look(again: Federation) -> None:
        told.append({expect_task(decode_message(message)).form for _, message in again.fabric.sent})

    sections = {"link": link, "model": MODEL, "federation": {"parts": [PART]}}
    assert list(steps_that_do_not_survive(tmp_path, look, begin=2, **sections)) == []
    assert set().union(*told) == {"difference"}
    assert len(told) >= 30


# --- the layout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["blocks.", "layers.", "model.layers.", "transformer.h.", "bert.encoder.layer."])
def test_blocks_stay_together_strided_or_in_sequence(prefix: str) -> None:
    shapes = {f"{prefix}{index}.{name}": (4, 4) for index in range(12) for name in ("mlp.up", "attention.layers.0.q")}
    shapes |= {"embed.weight": (10, 3), "head.weight": (20, 3), "norm.weight": (3,), "norm.weight/exp_avg": (3,)}
    strided, sequential = fragments_of(shapes, 4, "strided"), fragments_of(shapes, 4, "sequential")
    for index in range(12):
        assert {strided[name] for name in shapes if name.startswith(f"{prefix}{index}.")} == {index % 4}
        assert {sequential[name] for name in shapes if name.startswith(f"{prefix}{index}.")} == {index // 3}
    assert (strided["head.weight"], strided["embed.weight"], strided["norm.weight"]) == (0, 1, 2)
    part = Fragments()
    assert [n for n in part.exchanged(shapes, 6) if not n.startswith(prefix)] == ["norm.weight", "norm.weight/exp_avg"]
    assert sorted(n for index in range(4) for n in part.exchanged(shapes, 8 + index)) == sorted(shapes)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.lists(st.integers(1, 500), max_size=5), st.randoms())
def test_every_weight_has_one_turn_whatever_the_order_of_names(
    blocks: int, count: int, others: list[int], random: Any
) -> None:
    shapes: dict[str, tuple[int, ...]] = {f"layers.{index}.w": (100,) for index in range(blocks)}
    shapes |= {f"o{index}": (size,) for index, size in enumerate(others)}
    names = random.sample(sorted(shapes), len(shapes))
    for layout in ("strided", "sequential"):
        if blocks + len(others) < count:
            with pytest.raises(ConfigError, match="too many"):
                fragments_of(shapes, count, layout)
            continue
        found = fragments_of(shapes, count, layout)
        assert found == fragments_of({name: shapes[name] for name in names}, count, layout)
        assert set(found.values()) == set(range(count))
        sizes = [sum(shapes[name][0] for name in found if found[name] == index) for index in range(count)]
        assert max(sizes) - min(sizes) <= max([100, *others])  # no move of one tensor or block would even them out


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["count=0", "count=2, delay=2", "delay=-1", "mix=1", "mix=-0.1", "layout=random"])
def test_what_cannot_be_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="fragments"):
        Method.of(recipe(f"fragments({wrong})"))


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="it takes 8 rounds to exchange every weight once, and the run may be over af"
    ):
        Method.of(recipe("fragments(count=8)"))
    Method.of(recipe("fragments(count=4)", "tau_by_agreement(most=3)"))  # 14 steps: 2, 3, 3, 3, 3
    with pytest.raises(
        ConfigError, match="it takes 4 rounds to exchange every weight once, and the run may be over af"
    ):
        Method.of(recipe("fragments(count=4)", "tau_by_agreement"))  # 2, 4, 8
    with pytest.raises(ConfigError, match="common divisor"):
        Method.of(recipe("fragments(count=4)", "share(first=3, second=6)"))
    Method.of(recipe("fragments(count=4)", "share(first=3, second=9)"))
    with pytest.raises(ConfigError, match="keep"):
        Method.of(recipe("fragments(count=4)", "share", node={"optimizer_state": "reset"}))
    with pytest.raises(ConfigError, match="weights"):
        Method.of(recipe("fragments(count=4)", link={"of": "weights", "up": ["int8"]}))
    with pytest.raises(ConfigError, match="3 blocks and 2 tensors outside them leave 1"):
        Federation(tmp_path, recipe("fragments(count=6)"))
