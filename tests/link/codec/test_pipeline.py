from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from photon.errors import WireError
from photon.link.codec.notation import parse_pipeline
from photon.link.codec.pipeline import EXACT, Pipeline, pipeline
from photon.link.tensors import encode_tensors

CHAINS = [
    [],
    ["zstd"],
    ["lz4(shuffle=false)"],
    ["bf16"],
    ["fp16", "zstd"],
    ["int8"],
    ["int4(block=32)", "lz4"],
    ["int2(rounding=stochastic)"],
    ["sign(block=64)"],
    ["topk(density=0.1, chunk=64)"],
    ["topk(density=0.1, chunk=64)", "int2(block=32)"],
    ["topk(scope=tensor, density=0.05)", "int4", "zstd"],
    ["topk(scope=global, density=0.05)", "bf16"],
    ["lowrank(rank=2)"],
    ["lowrank(rank=2)", "int8", "zstd"],
    ["svd(energy=0.8)", "fp16"],
    ["lowrank(rank=3)", "topk(density=0.5, chunk=16)", "int8"],
]
SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (7,), (64,), (65,), (33, 20), (5, 0), (3, 4, 5), (130, 17)]

chains = st.sampled_from(CHAINS)
shapes = st.sampled_from(SHAPES)
seeds = st.integers(0, 2**32)


def tensor_of(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def sent(codec: Pipeline, tensor: Tensor, seed: int = 1) -> Tensor:
    return codec.encode(tensor, seed, codec.survey(lambda: iter([("t", tensor)])), {}).wire


@settings(deadline=None, max_examples=150)
@given(chains, shapes, seeds, st.sampled_from([1e-30, 1e-6, 1.0, 1e6]))
def test_every_chain_gives_back_the_shape_within_its_size(
    chain: list[str], shape: tuple[int, ...], seed: int, scale: float
) -> None:
    codec, tensor = parse_pipeline(chain), tensor_of(shape, seed, scale)
    wire = sent(codec, tensor)
    decoded = codec.decode(wire, shape, torch.float32)
    assert decoded.tensor.shape == shape and decoded.tensor.dtype == torch.float32
    size = codec.size(shape, torch.float32)
    assert len(decoded.stage_bytes) == len(size.stage_bytes) == len(chain)
    assert all(found <= most for found, most in zip(decoded.stage_bytes, size.stage_bytes, strict=True))
    if chain:
        assert decoded.stage_bytes[-1] == wire.numel()
    if size.is_exact:
        assert decoded.stage_bytes == size.stage_bytes


@settings(deadline=None, max_examples=60)
@given(chains, shapes)
def test_zero_stays_zero(chain: list[str], shape: tuple[int, ...]) -> None:
    codec = parse_pipeline(chain)
    decoded = codec.decode(sent(codec, torch.zeros(shape)), shape, torch.float32).tensor
    assert torch.equal(decoded, torch.zeros(shape))


@settings(deadline=None, max_examples=60)
@given(chains, shapes, seeds)
def test_encoding_is_deterministic_and_leaves_the_tensor_alone(
    chain: list[str], shape: tuple[int, ...], seed: int
) -> None:
    codec, tensor = parse_pipeline(chain), tensor_of(shape, seed)
    before = tensor.clone()
    assert torch.equal(sent(codec, tensor, seed), sent(codec, tensor, seed))
    assert torch.equal(tensor, before)


@settings(deadline=None, max_examples=300)
@given(chains, st.sampled_from([s for s in SHAPES if prod(s) > 1]), seeds, st.data())
def test_no_damage_makes_a_decoder_crash_or_lie_about_the_shape(
    chain: list[str], shape: tuple[int, ...], seed: int, data: st.DataObject
) -> None:
    codec = parse_pipeline(chain)
    wire = sent(codec, tensor_of(shape, seed)).clone()
    if not chain:
        wire = torch.zeros(3, dtype=torch.uint8)
    match data.draw(st.sampled_from(["cut", "flip", "grow", "other shape"])):
        case "cut":
            wire = wire[: data.draw(st.integers(0, max(0, wire.numel() - 1)))].clone()
        case "flip":
            for _ in range(data.draw(st.integers(1, 4))):
                wire[data.draw(st.integers(0, wire.numel() - 1))] ^= data.draw(st.integers(1, 255))
        case "grow":
            wire = torch.cat([wire, torch.zeros(data.draw(st.integers(1, 40)), dtype=torch.uint8)])
        case "other shape":
            shape = data.draw(st.sampled_from(SHAPES))
    try:
        decoded = codec.decode(wire, shape, torch.float32).tensor
    except WireError:
        return
    assert decoded.shape == shape and decoded.dtype == torch.float32


@pytest.mark.parametrize("chain", [c for c in CHAINS if c], ids=" ".join)
def test_every_truncation_is_refused_or_keeps_the_shape(chain: list[str]) -> None:
    codec, shape = parse_pipeline(chain), (9, 11)
    wire = sent(codec, tensor_of(shape, 3))
    for size in range(wire.numel()):
        try:
            decoded = codec.decode(wire[:size].clone(), shape, torch.float32)
        except WireError:
            continue
        assert decoded.tensor.shape == shape


def test_a_stream_cannot_declare_more_than_there_is() -> None:
    codec = parse_pipeline(["topk(density=0.1, chunk=64)"])
    wire = sent(codec, tensor_of((64,), 1)).clone()
    wire[:8] = 255
    with pytest.raises(WireError, match=r"declares a stream of 18446744073709551615 bytes"):
        codec.decode(wire, (64,), torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_lossy_codecs_have_no_place_for_what_is_not_finite(value: float) -> None:
    tensor = torch.ones(100)
    tensor[41] = value
    with pytest.raises(WireError, match="NaN or infinity"):
        sent(parse_pipeline(["int8"]), tensor)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([[], ["zstd"], ["lz4"]]), st.binary(min_size=0, max_size=400), st.sampled_from(["f4", "bf2"]))
def test_lossless_keeps_every_bit_pattern(chain: list[str], raw: bytes, kind: str) -> None:
    dtype = torch.float32 if kind == "f4" else torch.bfloat16
    raw = raw[: len(raw) // dtype.itemsize * dtype.itemsize]
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    tensor = data.clone().view(dtype)
    codec = parse_pipeline(chain)
    decoded = codec.decode(sent(codec, tensor), tuple(tensor.shape), dtype).tensor
    assert torch.equal(decoded.view(torch.uint8), data)


def test_views_that_are_not_contiguous_are_encoded_by_value() -> None:
    codec = parse_pipeline(["int8"])
    tensor = tensor_of((40, 30), 5)
    assert torch.equal(sent(codec, tensor.T), sent(codec, tensor.T.contiguous()))


@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: " ".join(c) or "exact")
def test_the_size_of_a_body_is_foretold_to_the_byte(chain: list[str]) -> None:
    codec = parse_pipeline(chain)
    tensors = {f"layer.{index}": tensor_of(shape, index) for index, shape in enumerate(SHAPES)}
    survey = codec.survey(lambda: iter(tensors.items()))
    wire = {name: codec.encode(tensor, 1, survey, {}).wire for name, tensor in tensors.items()}
    size = codec.body_size(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()}, dict.fromkeys(tensors, torch.float32)
    )
    body = encode_tensors(wire)
    assert len(body) == size.body_bytes if size.is_exact else len(body) <= size.body_bytes
    assert list(size.stage_bytes) == list(codec.labels)


def test_stages_stand_in_one_order() -> None:
    for chain, message in (
        (["zstd", "int8"], "int8 stands behind zstd: a lossless stage comes last"),
        (["int8", "topk"], "topk stands behind int8: what chooses numbers comes before what rounds them"),
        (["topk(density=0.5)", "topk(density=0.50)"], r"topk\(density=0.5\) is written twice"),
        (["int8", "int4"], "int4 stands behind int8: numbers are rounded once"),
    ):
        with pytest.raises(Exception, match=message):
            parse_pipeline(chain)
    assert pipeline([]) == EXACT and EXACT.name == "exact" and EXACT.is_lossless
    assert parse_pipeline(["topk(density=0.1)", "int8"]).name == "topk(density=0.1) | int8"


@pytest.mark.parametrize("chain", [["int4"], ["topk(density=0.1, chunk=64)", "int2", "zstd"], ["zstd"]], ids=" ".join)
def test_tensors_named_exact_lose_nothing_and_sizes_know_it(chain: list[str]) -> None:
    codec = parse_pipeline(chain, exact_tensors=["embed_*", "norm.weight"])
    tensors = {
        name: tensor_of((40, 8), index) for index, name in enumerate(("embed_in", "norm.weight", "norm.weights"))
    }
    survey = codec.survey(lambda: iter(tensors.items()))
    wire = {name: codec.of(name).encode(tensor, 1, survey, {}).wire for name, tensor in tensors.items()}
    back = {name: codec.of(name).decode(wire[name], (40, 8), torch.float32).tensor for name in tensors}
    assert torch.equal(back["embed_in"], tensors["embed_in"])
    assert torch.equal(back["norm.weight"], tensors["norm.weight"])
    assert torch.equal(back["norm.weights"], tensors["norm.weights"]) == codec.is_lossless
    size = codec.body_size(dict.fromkeys(tensors, (40, 8)), dict.fromkeys(tensors, torch.float32))
    body = encode_tensors(wire)
    assert len(body) == size.body_bytes if size.is_exact else len(body) <= size.body_bytes


def test_a_survey_leaves_exact_tensors_out() -> None:
    codec = parse_pipeline(["topk(scope=global, density=0.1)"], exact_tensors=["huge"])
    small = [("small", torch.linspace(0.1, 1.0, 100))]
    assert codec.survey(lambda: small) == codec.survey(lambda: [*small, ("huge", torch.full((500,), 1e6))])
