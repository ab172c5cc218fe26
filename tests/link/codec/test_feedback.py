from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from photon.link.codec.feedback import Sent, encode_update, tensor_of
from photon.link.codec.notation import parse_pipeline
from photon.link.codec.pipeline import Pipeline

LOSSY = [
    ["bf16"],
    ["int4(block=32)"],
    ["int2"],
    ["sign"],
    ["topk(density=0.05, chunk=64)"],
    ["topk(density=0.05, chunk=64)", "int2"],
    ["topk(scope=global, density=0.05)"],
    ["lowrank(rank=1)", "int8"],
    ["svd(energy=0.5)", "zstd"],
]
SHAPES = {"matrix": (24, 16), "vector": (40,), "scalar": ()}


def updates(rounds: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(shape, generator=generator) * 0.01 for name, shape in SHAPES.items()} for _ in range(rounds)
    ]


def decoded(codec: Pipeline, sent: Sent) -> dict[str, Tensor]:
    return {
        name: codec.of(name).decode(wire, SHAPES[name], torch.float32).tensor.to(torch.float64)
        for name, wire in sent.wire.items()
    }


def conversation(codec: Pipeline, rounds: int, decay: float, forget: bool = False) -> tuple[dict[str, Tensor], ...]:
    """(sum of what went in, sum of what came out, the last residual); `forget` is the mutant without feedback."""
    inputs = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    outputs = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    state: dict[str, Tensor] = {}
    for index, update in enumerate(updates(rounds, 7)):
        for name, tensor in update.items():
            inputs[name] += tensor
        sent = encode_update(codec, dict(update), {} if forget else state, decay, f"run/node/{index}")
        state = sent.state
        for name, tensor in decoded(codec, sent).items():
            outputs[name] += tensor
    residual = {name: state[f"residual/{name}"].double() for name in SHAPES}
    return inputs, outputs, residual


@pytest.mark.parametrize("chain", LOSSY, ids=" ".join)
def test_nothing_is_lost_for_ever(chain: list[str]) -> None:
    inputs, outputs, residual = conversation(parse_pipeline(chain), 20, 1.0)
    for name in SHAPES:
        assert torch.allclose(outputs[name] + residual[name], inputs[name], atol=1e-6)


@pytest.mark.parametrize("chain", LOSSY[3:6], ids=" ".join)
def test_without_feedback_the_sum_is_wrong(chain: list[str]) -> None:
    inputs, outputs, residual = conversation(parse_pipeline(chain), 20, 1.0, forget=True)
    assert not torch.allclose(outputs["matrix"] + residual["matrix"], inputs["matrix"], atol=1e-3)


def test_a_decay_forgets_a_share_each_round() -> None:
    codec, state = parse_pipeline(["topk(density=0.05, chunk=64)"]), dict[str, Tensor]()
    expected = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for index, update in enumerate(updates(6, 3)):
        carried = {name: 0.9 * expected[name] + update[name] for name in SHAPES}
        sent = encode_update(codec, dict(update), state, 0.9, str(index))
        for name, tensor in decoded(codec, sent).items():
            expected[name] = carried[name] - tensor.float()
            assert torch.allclose(sent.state[f"residual/{name}"], expected[name], atol=1e-7)
        state = sent.state


def test_without_decay_nothing_is_kept_but_what_stages_remember() -> None:
    sent = encode_update(parse_pipeline(["topk(density=0.1)"]), updates(1, 1)[0], {}, 0.0, "s")
    assert not sent.state
    sent = encode_update(parse_pipeline(["lowrank(rank=2)"]), updates(1, 1)[0], {}, 0.0, "s")
    assert sent.state and not any(name.startswith("residual/") for name in sent.state)


def test_exact_codecs_keep_nothing_and_change_nothing() -> None:
    update = updates(1, 2)[0]
    for chain in ([], ["zstd"]):
        codec = parse_pipeline(chain)
        sent = encode_update(codec, dict(update), {}, 1.0, "s")
        assert not sent.state
        assert all(torch.equal(tensor.float(), update[name]) for name, tensor in decoded(codec, sent).items())


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([[], *LOSSY, ["int2(rounding=stochastic)"]]), st.floats(1e-4, 1.0), st.integers(0, 100))
def test_what_is_decoded_is_never_longer_than_the_limit(chain: list[str], limit: float, seed: int) -> None:
    codec, state = parse_pipeline(chain), dict[str, Tensor]()
    for index, update in enumerate(updates(3, seed)):
        sent = encode_update(codec, dict(update), state, 1.0, str(index), limit)
        state = sent.state
        norm = sum(float(tensor.square().sum()) for tensor in decoded(codec, sent).values()) ** 0.5
        assert norm <= limit * (1 + 1e-5)


def test_random_choices_differ_by_tensor_and_message() -> None:
    codec = parse_pipeline(["int2(rounding=stochastic)"])
    update = {"a": torch.linspace(-1, 1, 500), "b": torch.linspace(-1, 1, 500)}
    first, again, later = (
        encode_update(codec, dict(update), {}, 0.0, seed).wire for seed in ("r/n/1", "r/n/1", "r/n/2")
    )
    assert torch.equal(first["a"], again["a"])
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], later["a"])


@pytest.mark.parametrize("chain", [["lowrank(rank=1)", "int8"], ["topk(density=0.2)", "int4"], ["int8"]], ids=" ".join)
def test_what_is_not_sent_keeps_its_state_and_nothing_is_lost(chain: list[str]) -> None:
    """One tensor a round in turn: all that was decoded and the residuals are the sum of all that was to be sent."""
    codec, shapes = parse_pipeline(chain), {"w": (12, 9), "w/exp_avg": (12, 9)}
    state: dict[str, Tensor] = {}
    sums = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for index in range(12):
        name, other = list(shapes)[:: 1 if index % 2 else -1]
        update = torch.randn(shapes[name], generator=torch.Generator().manual_seed(index))
        sent = encode_update(codec, {name: update.clone()}, state, 1.0, f"{index}")
        assert list(sent.wire) == [name]
        sums[name] += update - codec.of(name).decode(sent.wire[name], shapes[name], torch.float32).tensor
        for key, kept in state.items():
            assert tensor_of(key) in shapes
            assert tensor_of(key) != other or torch.equal(kept, sent.state[key])
        state = sent.state
    for name in shapes:
        assert torch.allclose(sums[name], state[f"residual/{name}"], atol=1e-5)


def test_another_codec_leaves_nothing_of_the_last_ones_memory() -> None:
    update = {name: torch.randn(12, 9) for name in ("w", "b")}
    state = encode_update(parse_pipeline(["lowrank(rank=1)"]), dict(update), {}, 0.0, "0").state
    assert {tensor_of(key) for key in state} == {"w", "b"}
    after = encode_update(parse_pipeline(["int8"]), {"w": update["w"]}, state, 0.0, "1").state
    assert {tensor_of(key) for key in after} == {"b"}


ENERGY_TAKERS = [
    ["sign"],
    ["int2"],
    ["topk(density=0.2)", "sign"],
    ["topk(scope=tensor, density=0.2)"],
    ["lowrank(rank=4)"],
]


@pytest.mark.parametrize("chain", ENERGY_TAKERS, ids=" ".join)
def test_rescaled_what_is_decoded_goes_as_far_along_the_update(chain: list[str]) -> None:
    codec = parse_pipeline([*chain, "zstd"], exact_tensors=["scalar"])
    update = updates(1, 5)[0]
    shares = {}
    for rescale in (True, False):
        out = decoded(codec, encode_update(codec, dict(update), {}, 0.0, "s", rescale=rescale))
        shares[rescale] = {name: float((out[name] * own).sum() / own.square().sum()) for name, own in update.items()}
        assert torch.equal(out["scalar"].float(), update["scalar"])
    for name in ("matrix", "vector"):
        assert shares[True][name] == pytest.approx(1.0, abs=0.02)
    assert min(shares[False].values()) < 0.95  # the mutant: as it is


def test_why_recipes_with_one_threshold_for_all_tensors_are_not_rescaled() -> None:
    """Of few large values kept of the vector its scale is large, and then many more are: several times too far."""
    shares = {}
    for scope in ("global", "tensor"):
        codec, update = parse_pipeline([f"topk(scope={scope}, density=0.2)"]), updates(1, 5)[0]
        update["vector"] *= 0.7
        out = decoded(codec, encode_update(codec, dict(update), {}, 0.0, "s", rescale=True))["vector"]
        shares[scope] = float((out * update["vector"]).sum() / update["vector"].square().sum())
    assert shares["tensor"] == pytest.approx(1.0, abs=0.02)
    assert shares["global"] > 2


@pytest.mark.parametrize("chain", [["sign(block=128)"], ["topk(density=0.1, chunk=512)", "sign"]], ids=" ".join)
def test_what_nodes_have_in_common_comes_through_whole_when_rescaled(chain: list[str]) -> None:
    """Updates are a small common part and noise of each node's own. The mean over many nodes shows what arrives."""
    codec, generator = parse_pipeline(chain), torch.Generator().manual_seed(1)
    common = 0.3 * torch.randn(512, generator=generator)
    arrived = {}
    for rescale in (True, False):
        total = torch.zeros(512)
        for node in range(600):
            update = {"w": common + torch.randn(512, generator=generator)}
            wire = encode_update(codec, update, {}, 0.0, str(node), rescale=rescale).wire["w"]
            total += codec.decode(wire, (512,), torch.float32).tensor
        arrived[rescale] = float(total @ common / (600 * common @ common))
    assert arrived[True] == pytest.approx(1.0, abs=0.08)
    assert arrived[False] < 0.75  # the mutant: signs of a tenth of the values, or of all, with nothing made up for


def test_next_to_nothing_is_not_blown_up() -> None:
    codec = parse_pipeline(["topk(density=0.002, chunk=1000)"])
    update = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    out = codec.decode(
        encode_update(codec, {"w": update.clone()}, {}, 0.0, "s", rescale=True).wire["w"], (1000,), torch.float32
    ).tensor
    assert float(out.abs().max() / update.abs().max()) == pytest.approx(4.0)
    assert torch.count_nonzero(out) == 2
    zeros = encode_update(codec, {"w": torch.zeros(1000)}, {}, 0.0, "s", rescale=True)
    assert torch.count_nonzero(codec.decode(zeros.wire["w"], (1000,), torch.float32).tensor) == 0


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(LOSSY), st.floats(1e-4, 1.0), st.integers(0, 100))
def test_rescaled_updates_keep_to_the_limit(chain: list[str], limit: float, seed: int) -> None:
    codec = parse_pipeline(chain)
    sent = encode_update(codec, updates(1, seed)[0], {}, 0.0, "s", limit, rescale=True)
    assert sum(float(tensor.square().sum()) for tensor in decoded(codec, sent).values()) ** 0.5 <= limit * (1 + 1e-5)


def test_rescaling_bears_the_largest_and_the_smallest_numbers() -> None:
    codec = parse_pipeline(["sign(block=8)"])
    for size in (1e30, 1e-30):
        update = size * torch.tensor([1.0, 2.0, 3.0, 10.0, 1.0, 1.0, 1.0, 1.0])
        wire = encode_update(codec, {"w": update.clone()}, {}, 0.0, "s", rescale=True).wire["w"]
        out = codec.decode(wire, (8,), torch.float32).tensor.double() / size
        assert float(out @ (update.double() / size)) == pytest.approx(118.0, rel=0.01)  # 1 + 4 + 9 + 100 + 4
