from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from photon.errors import WireError
from photon.link.codec.notation import parse_pipeline
from photon.link.codec.pipeline import Pipeline
from photon.link.difference import changed, rebuilt
from photon.link.tensors import decode_tensors, encode_tensors, sha256_hex, streamed_chunks
from photon.link.update import EMPTY_SHA256, Task
from photon.node.base import Bases, LacksBaseError

CODEC = parse_pipeline(["int4(block=32)"])
Model = dict[str, Tensor]


def model(seed: int) -> Model:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in (("w", (8, 20)), ("b", (20,)))}


def task(base: bytes, body: bytes, form: str = "whole", held: bytes = b"", codec: str = "exact") -> Task:
    return Task.model_validate(
        {
            "run": "r", "round": 3, "node": "ada", "nonce": "n", "evaluate": False, "sequential_step": 0, "tau": 1,
            "deadline_s": 1.0, "base_sha256": sha256_hex(base), "body_sha256": sha256_hex(body), "form": form,
            "held_sha256": sha256_hex(held) if held else EMPTY_SHA256, "codec": codec, "nodes": 2,
        }
    )  # fmt: skip


def difference(old: bytes, new: Model, codec: Pipeline = CODEC) -> tuple[bytes, bytes]:
    """(what travels, the base that both ends then hold)."""
    held = decode_tensors(old)
    wire = {name: codec.encode(new[name] - held[name], 1, None, {}).wire for name in new}
    return encode_tensors(wire), b"".join(streamed_chunks(new, changed(old, wire, codec, {})))


@pytest.fixture
def bases(tmp_path: Path) -> Bases:
    return Bases(tmp_path / "bases", CODEC, True, model(0))


def equal(ours: Model, theirs: bytes) -> bool:
    expected = decode_tensors(theirs)
    return ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)


def test_both_ends_hold_the_same_bits_after_twenty_lossy_rounds(bases: Bases) -> None:
    base = encode_tensors(model(0))
    assert equal(bases.receive(task(base, b"", "held"), b""), base)
    for seed in range(1, 21):
        body, after = difference(base, model(seed))
        assert equal(bases.receive(task(after, body, "difference", base, CODEC.name), body), after)
        base = after


def test_what_the_codec_left_out_of_one_difference_is_in_the_next(bases: Bases) -> None:
    """Of a model that stands still the base comes closer with each round, as far as float32 goes."""
    base, goal = encode_tensors(model(0)), model(9)
    errors = []
    for _ in range(12):
        _, base = difference(base, goal)
        errors.append(float((decode_tensors(base)["w"] - goal["w"]).abs().max()))
    assert errors[0] > 0.01
    assert errors[-1] < 1e-6


def test_a_node_without_the_base_before_asks_for_the_whole(tmp_path: Path) -> None:
    new = Bases(tmp_path / "bases", CODEC, True, model(5))  # another untrained model: as after a lost disk
    base = encode_tensors(model(0))
    body, after = difference(base, model(1))
    with pytest.raises(LacksBaseError, match="does not hold the base"):
        new.receive(task(after, body, "difference", base, CODEC.name), body)
    with pytest.raises(LacksBaseError):
        new.receive(task(base, b"", "held"), b"")
    assert equal(new.receive(task(after, after), after), after)
    body, later = difference(after, model(2))
    assert equal(new.receive(task(later, body, "difference", after, CODEC.name), body), later)


def test_a_base_that_rotted_on_disk_is_asked_for_again(bases: Bases, tmp_path: Path) -> None:
    base = encode_tensors(model(0))
    (file,) = (tmp_path / "bases").iterdir()
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 1
    file.write_bytes(damaged)
    body, after = difference(base, model(1))
    with pytest.raises(LacksBaseError, match="cannot be rebuilt"):
        bases.receive(task(after, body, "difference", base, CODEC.name), body)
    assert equal(bases.receive(task(after, after), after), after)


def test_two_bases_at_most_lie_on_disk(bases: Bases, tmp_path: Path) -> None:
    base = encode_tensors(model(0))
    for seed in range(1, 5):
        body, after = difference(base, model(seed))
        bases.receive(task(after, body, "difference", base, CODEC.name), body)
        assert len(list((tmp_path / "bases").iterdir())) == 2
        base = after


def test_an_exact_downlink_keeps_nothing_on_disk(tmp_path: Path) -> None:
    exact = Bases(tmp_path / "bases", parse_pipeline([]), False, model(0))
    base = encode_tensors(model(3))
    assert equal(exact.receive(task(base, base), base), base)
    assert not (tmp_path / "bases").exists()
    with pytest.raises(WireError, match="in a run whose downlink sends whole ones"):
        exact.receive(task(base, b"", "held"), b"")


@pytest.mark.parametrize("stages", [["zstd"], ["bf16"], ["svd(energy=0.7)"]], ids=" ".join)
def test_whole_models_come_through_the_codec(tmp_path: Path, stages: list[str]) -> None:
    codec, like = parse_pipeline(stages), model(4)
    wire = {name: codec.encode(tensor, 1, None, {}).wire for name, tensor in like.items()}
    body, base = encode_tensors(wire), b"".join(streamed_chunks(like, rebuilt(like, wire, codec, {})))
    receiver = Bases(tmp_path / "bases", codec, False, model(0))
    assert equal(receiver.receive(task(base, body, codec=codec.name), body), base)
    other = encode_tensors(model(6))
    with pytest.raises(WireError, match="decodes to another model"):
        receiver.receive(task(other, body, codec=codec.name), body)


def test_what_was_not_announced_is_refused(bases: Bases) -> None:
    base = encode_tensors(model(0))
    with pytest.raises(WireError, match="sha256 differs"):
        bases.receive(task(base, base), base[:-1])
    with pytest.raises(WireError, match="announced under two hashes"):
        bases.receive(task(encode_tensors(model(1)), base), base)
    body, after = difference(base, model(1))
    with pytest.raises(WireError, match=r"with codec 'int8', this node's recipe has 'int4\(block=32\)'"):
        bases.receive(task(after, body, "difference", base, "int8"), body)
