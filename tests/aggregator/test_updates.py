"""What is read of an update: pseudo-gradients for every codec, a refusal for all else, and never more than a tensor."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import RUN, Federation, local_sgd, tiny_recipe, untrained, weights
from torch import Tensor

from photon.aggregator.updates import UpdateReader, header_bytes_of, largest_update
from photon.config import LinkConfig, Recipe
from photon.errors import ReplyRefusedError, WireError
from photon.link import body as body_module
from photon.link.body import whole_file
from photon.link.codec.feedback import encode_update
from photon.link.tensors import encode_tensors, iterate_tensors
from photon.link.update import Message, Reply, decode_message, expect_reply

Model = dict[str, Tensor]
Arrays = dict[str, np.ndarray]
CHAINS = [
    [], ["zstd"], ["bf16"], ["int4(block=32)", "lz4"], ["topk(density=0.2)"], ["topk(scope=global)", "int2", "zstd"],
    ["sign"], ["lowrank(rank=2)", "int8"], ["svd(energy=0.6)", "fp16", "zstd"],
]  # fmt: skip


def model(seed: int, dtype: torch.dtype = torch.float32) -> Model:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (9, 20), "b": (20,), "scalar": (), "none": (0, 3), "deep": (2, 3, 7)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def reader(up: Iterable[str] = (), of: str = "difference", **options: Any) -> UpdateReader:
    return UpdateReader.of(LinkConfig.model_validate({"up": list(up), "of": of} | options))


def wire_of(by: UpdateReader, update: Model) -> Model:
    return encode_update(by.codec, dict(update), {}, 1.0, "seed").wire


def message(by: UpdateReader, wire: Mapping[str, Tensor], codec: str | None = None) -> Message:
    reply = Reply(
        run="r", round=0, node="ada", nonce="n", base_sha256="0" * 64, status="ok",
        codec=by.codec.name if codec is None else codec,
    )  # fmt: skip
    return Message(reply, memoryview(encode_tensors(wire)))


def read(by: UpdateReader, wire: Mapping[str, Tensor], base: Model, codec: str | None = None) -> Model:
    return dict(by.read(message(by, wire, codec), base))


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", CHAINS, ids=" ".join)
def test_what_is_read_is_what_the_codec_keeps_of_the_update(chain: list[str]) -> None:
    by, base, update = reader(chain), model(0), model(1)
    wire, stages = wire_of(by, update), dict[str, int]()
    found = dict(by.read(message(by, wire), base, stages))
    kept = {n: by.codec.decode(wire[n], tuple(base[n].shape), torch.float32).tensor for n in base}
    assert encode_tensors(found) == encode_tensors(kept)
    assert list(stages) == list(by.codec.labels)
    if chain:
        assert stages[by.codec.labels[-1]] == sum(tensor.numel() for tensor in wire.values())
    if by.codec.is_lossless:
        assert encode_tensors(found) == encode_tensors(update)


@pytest.mark.parametrize("chain", CHAINS, ids=" ".join)
def test_of_weights_the_pseudo_gradient_is_the_base_less_what_came(chain: list[str]) -> None:
    by, base, local = reader(chain, "weights"), model(0), model(1)
    wire = wire_of(by, local)
    found = read(by, wire, base)
    kept = read(reader(chain), wire, base)
    for name in base:
        assert torch.equal(found[name], base[name] - kept[name])
    assert not torch.equal(found["w"], kept["w"] - base["w"])  # the mutant: the other sign
    assert not torch.equal(found["w"], kept["w"])  # the mutant: weights taken for a difference


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chain", [[], ["zstd"], ["int8"]], ids=" ".join)
def test_it_comes_in_the_dtype_of_the_base(chain: list[str], dtype: torch.dtype) -> None:
    by, update = reader(chain), model(1, dtype)
    found = read(by, wire_of(by, update), model(0, dtype))
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert all(torch.allclose(found[name].double(), update[name].double(), atol=0.05) for name in update)


def test_tensors_that_the_recipe_excepts_are_read_exactly() -> None:
    by, base, update = reader(["int2", "zstd"], exact_tensors=["b", "d*"]), model(0), model(1)
    found = read(by, wire_of(by, update), base)
    equal = {name for name in base if torch.equal(found[name], update[name])}
    assert equal >= {"b", "deep"}
    assert "w" not in equal


# --- what is refused -------------------------------------------------------------------------------------------------


def test_another_codec_is_refused_by_its_name_before_anything_is_read() -> None:
    by, base = reader(["int8"]), model(0)
    for name in ("exact", "int4", "int8(block=64)", "int8 | zstd", ""):
        with pytest.raises(ReplyRefusedError, match="the recipe says 'int8'"):
            next(by.read(Message(message(by, {}, name).header, memoryview(b"")), base))


@pytest.mark.parametrize("chain", CHAINS, ids=" ".join)
def test_other_tensors_than_the_model_s_are_refused(chain: list[str]) -> None:
    by, base = reader(chain), model(0)
    wire = wire_of(by, model(1))
    with pytest.raises(ReplyRefusedError, match="lacks 1 tensors, first 'w'"):
        read(by, {name: tensor for name, tensor in wire.items() if name != "w"}, base)
    with pytest.raises(ReplyRefusedError, match="lacks 5 tensors, first 'b'"):
        read(by, {}, base)
    with pytest.raises(ReplyRefusedError, match=r"unknown tensor 'back\.door'"):
        read(by, wire | {"back.door": wire["w"]}, base)
    with pytest.raises((ReplyRefusedError, WireError)):
        read(by, wire | {"w": wire["b"], "b": wire["w"]}, base)


def test_a_stream_that_is_too_long_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by, base = reader(["int4", "zstd"]), model(0)
    wire = wire_of(by, model(1))
    long = wire | {"b": torch.zeros(10**6, dtype=torch.uint8)}
    (tmp_path / "body").write_bytes(encode_tensors(long))
    read_bytes = 0
    original = body_module.read_body

    def counted(data: Any, begin: int, end: int) -> memoryview:
        nonlocal read_bytes
        read_bytes += end - begin
        return original(data, begin, end)

    monkeypatch.setattr("photon.link.tensors.read_body", counted)
    received = Message(message(by, {}).header, whole_file(tmp_path / "body"))
    most = by.codec.most_bytes((20,), torch.float32)
    with pytest.raises(ReplyRefusedError, match=rf"'b' takes 1000000 bytes; int4 \| zstd makes {most} at most"):
        list(by.read(received, base))
    assert read_bytes < 2000
    (tmp_path / "body").write_bytes((10**6).to_bytes(8, "little") + b" " * 10**6)
    with pytest.raises(WireError, match=f"a header {header_bytes_of(base)} at most"):
        list(by.read(Message(received.header, whole_file(tmp_path / "body")), base))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_noise_in_an_update_is_refused_or_read_as_the_tensors_of_the_model(data: st.DataObject) -> None:
    """In any chain: nothing but a refusal, or numbers of the right shape."""
    by, base = reader(data.draw(st.sampled_from(CHAINS))), model(0)
    wire = {name: tensor.clone() for name, tensor in wire_of(by, model(1)).items()}
    name = data.draw(st.sampled_from(sorted(name for name, tensor in wire.items() if tensor.numel())))
    noise = data.draw(st.none() | st.binary(max_size=60))
    if by.codec.labels and noise is not None:
        wire[name] = torch.tensor(list(noise), dtype=torch.uint8)
    else:
        raw = wire[name].view(-1).view(torch.uint8)
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, raw.numel() - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read(by, wire, base)
    except (ReplyRefusedError, WireError):
        return
    assert {name: tensor.shape for name, tensor in found.items()} == {n: tensor.shape for n, tensor in base.items()}


# --- how much of it is in memory -------------------------------------------------------------------------------------


def alive_at_once(updates: Iterator[tuple[str, Tensor]], keep: bool = False) -> int:
    """The most tensors that are alive when one is given."""
    refs: list[weakref.ref[Tensor]] = []
    kept: list[Tensor] = []
    most = 0
    gc.freeze()  # what there was before, a million objects of torch's modules, is not searched each time
    try:
        for _, tensor in updates:
            refs.append(weakref.ref(tensor))
            if keep:
                kept.append(tensor)
            gc.collect()
            most = max(most, sum(ref() is not None for ref in refs))
    finally:
        gc.unfreeze()
    return most


@pytest.mark.parametrize("of", ["difference", "weights"])
@pytest.mark.parametrize("chain", CHAINS, ids=" ".join)
def test_one_tensor_of_an_update_is_held_at_a_time(chain: list[str], of: str, tmp_path: Path) -> None:
    by, base = reader(chain, of), {f"w{i}": torch.randn(30, 40) for i in range(6)}
    (tmp_path / "body").write_bytes(encode_tensors(wire_of(by, {name: t.clone() for name, t in base.items()})))
    received = Message(message(by, {}).header, whole_file(tmp_path / "body"))
    assert alive_at_once(by.read(received, base)) == 1
    assert alive_at_once(by.read(received, base), keep=True) == 6  # it can fail


# --- FedDLR ----------------------------------------------------------------------------------------------------------

ENERGY = 0.6


def truncated(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """U, S, V of the smallest rank that keeps ENERGY of the squared singular values; None where it saves nothing."""
    if matrix.ndim != 2:
        return None
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    shares = np.cumsum(values**2) / np.sum(values**2)
    rank = int(np.argmax(shares >= ENERGY)) + 1
    if rank * sum(matrix.shape) >= matrix.size:
        return None
    return left[:, :rank], values[:rank], right[:rank]


def cut(matrix: np.ndarray) -> np.ndarray:
    """T of the paper: the matrix of lower rank, in full."""
    factors = truncated(matrix)
    return matrix.astype(np.float64) if factors is None else factors[0] * factors[1] @ factors[2]


def mean_of_factors(matrices: list[np.ndarray]) -> np.ndarray:
    """A mutant: the server averages U, S and V."""
    found = [factors for factors in map(truncated, matrices) if factors is not None]
    if len(found) < len(matrices):
        return np.asarray(np.mean([cut(matrix) for matrix in matrices], axis=0))
    rank = min(len(values) for _, values, _ in found)
    left, values, right = (
        np.mean(parts, axis=0) for parts in zip(*((u[:, :rank], s[:rank], v[:rank]) for u, s, v in found), strict=True)
    )
    return np.asarray(left * values @ right)


def locals_of(recipe: Recipe, base: Model, round_index: int) -> list[Arrays]:
    """Every node's weights after its local steps, from plain loops."""
    steps = round_index * recipe.federation.tau * recipe.node.batch_size
    updates = [local_sgd(recipe, base, silo.name, steps) for silo in recipe.silo]
    return [{name: base[name].double().numpy() - update[name] for name in base} for update in updates]


def farthest(ours: Mapping[str, Tensor], theirs: Arrays) -> float:
    return max(float(np.abs(ours[name].double().numpy() - theirs[name]).max()) for name in ours)


def test_feddlr_is_a_recipe(tmp_path: Path) -> None:
    """Both ways T of the matrix; the server averages the rebuilt matrices: theta' = T(mean_k T(theta_k))."""
    stage = f"svd(energy={ENERGY})"
    recipe = tiny_recipe(
        link={"of": "weights", "up": [stage], "down": [stage], "up_feedback": 0.0, "down_feedback": 0.0},
        federation={"rounds": 2, "outer": "fedavg", "outer_lr": 1.0},
        checkpoint={"keep_last": 3},
    )
    federation = Federation(tmp_path, recipe)
    base = weights(untrained(recipe))
    federation.run()
    for number in (0, 1):
        local = locals_of(recipe, base, number)
        assert sum(truncated(matrix) is not None for matrix in local[0].values()) >= 3  # it does cut
        mean = {name: np.mean([cut(node[name]) for node in local], axis=0) for name in base}
        after = weights(federation.store.load(None, number + 1))
        assert farthest(after, {name: cut(matrix) for name, matrix in mean.items()}) < 1e-5
        assert farthest(after, mean) > 1e-3  # the mutant: uploads alone are cut
        factors = {name: cut(mean_of_factors([node[name] for node in local])) for name in base}
        assert farthest(after, factors) > 1e-3
        whole = {name: cut(np.mean([node[name] for node in local], axis=0)) for name in base}
        assert farthest(after, whole) > 1e-3  # the mutant: downloads alone are cut
        base = after


# --- error feedback --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("up", [["int2"], ["topk(density=0.1)", "int4"], ["lowrank(rank=1)"], ["sign"]], ids=" ".join)
def test_all_that_was_decoded_and_what_is_left_is_all_that_was_learnt(up: list[str], tmp_path: Path) -> None:
    """sum of decoded updates + residual = sum of pseudo-gradients, of every node, after every round."""
    recipe = tiny_recipe(
        ["ada", "bob"], link={"up": up}, federation={"rounds": 4}, checkpoint={"keep_last": 9}, node={"lr": 0.1}
    )
    federation = Federation(tmp_path, recipe)
    federation.run()
    by = UpdateReader.of(recipe.link)
    bases = [weights(federation.store.load(None, number)) for number in range(5)]
    for node in ("ada", "bob"):
        learnt = {name: np.zeros(tensor.shape) for name, tensor in bases[0].items()}
        decoded = {name: np.zeros(tensor.shape) for name, tensor in bases[0].items()}
        replies = [decode_message(data) for sender, data in federation.fabric.received if sender == node]
        replies = [reply for reply in replies if expect_reply(reply).training is not None]
        assert len(replies) == 4
        for number, reply in enumerate(replies):
            position = number * recipe.federation.tau * recipe.node.batch_size
            for name, gradient in local_sgd(recipe, bases[number], node, position).items():
                learnt[name] += gradient
            for name, tensor in by.read(reply, bases[number]):
                decoded[name] += tensor.double().numpy()
            left = federation.sites[node].store.load(RUN, node, number + 1).link
            total = {name: torch.from_numpy(decoded[name]) + left[f"residual/{name}"].double() for name in decoded}
            assert farthest(total, learnt) < 1e-5
        assert farthest({name: torch.from_numpy(value) for name, value in decoded.items()}, learnt) > 1e-3


def test_a_residual_is_never_sent_to_anybody(tmp_path: Path) -> None:
    """What a message holds beside the tensors of the model is nothing."""
    federation = Federation(tmp_path, tiny_recipe(link={"up": ["lowrank(rank=1)"]}))
    federation.run()
    names = set(weights(federation.aggregator.state()))
    for _, data in federation.fabric.received:
        body = decode_message(data).body
        if len(body):
            assert {name for name, _ in iterate_tensors(body)} == names


@pytest.mark.parametrize("stages", [*CHAINS, ["topk(density=1.0)"], ["topk(density=1.0)", "zstd"]], ids=str)
def test_no_update_is_longer_than_the_largest(stages: list[str]) -> None:
    """Some are longer than the tensors themselves: all values, and where they stand."""
    link = LinkConfig(up=stages)
    base = encode_tensors(model(1))
    sent = encode_update(UpdateReader.of(link).codec, model(2), {}, 1.0, "seed").wire
    assert len(encode_tensors(sent)) <= largest_update(link, base)
    large = encode_tensors({"w": torch.zeros(500, 400)})
    assert (largest_update(link, large) > len(large)) == (stages[:1] == ["topk(density=1.0)"])
