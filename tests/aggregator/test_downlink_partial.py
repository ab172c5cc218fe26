"""Of a model of which only some tensors have moved nothing else is told, and both ends keep the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.aggregator.test_downlink import Sender, link, model

from photon.aggregator.downlink import Downlink
from photon.link.tensors import decode_tensors, encode_tensors, sha256_hex
from photon.node.base import Bases, LacksBaseError


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("down", [[], ["zstd"], ["int4(block=32)"], ["lowrank(rank=1)", "int8"]], ids=" ".join)
def test_what_has_not_moved_is_not_told_and_keeps_its_bits(down: list[str], decay: float, tmp_path: Path) -> None:
    """Exact ones are then the weights; what a lossy codec left out waits until its tensor is told again."""
    config = link(down=down, down_feedback=decay)
    sender, receiver = Sender(config, is_partial=True), Bases.of_run(tmp_path / "a", config, model(0), is_partial=True)
    late = Bases.of_run(tmp_path / "b", config, model(0), is_partial=True)
    receiver.receive(sender.task(sender.tell("ada")), b"")
    sender.downlink.heard("ada", sender.sha256)
    for number in range(1, 9):
        told = ("w", "b")[number % 2]
        before, intended = decode_tensors(sender.base), {n: t.clone() for n, t in sender.weights.items()}
        intended[told] += 0.1 * model(number)[told]
        sender.move(number, told)
        base, told_ada = decode_tensors(sender.base), sender.tell("ada")
        assert decode_tensors(sender.downlink.message).keys() == {told}
        assert (told_ada.form, told_ada.body) == ("difference", sender.downlink.message)
        for name, tensor in base.items():
            assert torch.equal(tensor, before[name]) == (name != told)
            kept = decay * (intended[name] - tensor) if name == told else intended[name] - tensor
            assert torch.allclose(sender.weights[name] - tensor, kept, atol=1e-6)
            assert sender.downlink.is_lossy or torch.equal(tensor, sender.weights[name])
        assert encode_tensors(receiver.receive(sender.task(told_ada), told_ada.body)) == sender.base
        sender.downlink.heard("ada", sender.sha256)
        whole = sender.tell("bob")  # who is new, and never answers
        assert (whole.form, whole.codec) == ("whole", "exact")
        assert encode_tensors(late.receive(sender.task(whole), whole.body)) == sender.base
        again = Downlink(config, sender.downlink.export_state(sender.weights), is_partial=True)
        assert encode_tensors(again.memory) == encode_tensors(sender.downlink.memory)


def test_a_tensor_that_the_base_has_not_is_no_difference(tmp_path: Path) -> None:
    config = link()
    sender, receiver = Sender(config, is_partial=True), Bases.of_run(tmp_path, config, model(0), is_partial=True)
    sender.move(1, "w")
    task, body = sender.task(sender.tell("ada")), encode_tensors({"w": model(1)["w"], "strange": torch.zeros(2)})
    task = task.model_copy(
        update={
            "form": "difference",
            "held_sha256": sha256_hex(encode_tensors(model(0))),
            "body_sha256": sha256_hex(body),
        }
    )
    with pytest.raises(LacksBaseError, match="1 tensors that the base has not"):
        receiver.receive(task, body)
