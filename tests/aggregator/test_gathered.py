"""Gathered updates: what is read is what was kept, in one order, from files that are gone after the round."""

from __future__ import annotations

import itertools
import random
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support import Federation, tiny_recipe, weights
from torch import Tensor

from photon.aggregator import gathered as gathered_module
from photon.aggregator.gathered import Gathered
from photon.aggregator.record import Merged
from photon.aggregator.state import RoundStore
from photon.aggregator.updates import UpdateReader
from photon.config import LinkConfig
from photon.errors import StateError
from photon.link.codec.feedback import encode_update
from photon.link.tensors import encode_tensors
from photon.link.update import Message, Reply
from photon.parts.base import Updates
from photon.parts.median import Median

Model = dict[str, Tensor]
NODES = ("ada", "bob", "cyd", "dan", "eve")


def model(seed: int, dtype: torch.dtype = torch.float32) -> Model:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (9, 20), "b": (20,), "scalar": (), "none": (0, 3), "b/exp_avg": (20,), "deep": (2, 3, 7)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def plain_sum(updates: Updates) -> Iterator[tuple[str, Tensor]]:
    """A floating-point sum in the order of `updates`, which shows any change of it."""
    rows = [dict(updates.read(index)) for index in range(len(updates.weights))]
    for name, first in rows[0].items():
        total = torch.zeros_like(first)
        for row, weight in zip(rows, updates.weights, strict=True):
            total += weight * row[name]
        yield name, total


def gathered(folder: Path, updates: Mapping[str, Model], weights: Mapping[str, int] | None = None) -> Gathered:
    out = Gathered(folder / "spool", next(iter(updates.values())), plain_sum)
    for node, update in updates.items():
        out.keep(node, iter(update.items()), weights[node] if weights else 1)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_is_read_is_what_was_kept_as_often_as_one_likes(tmp_path: Path, dtype: torch.dtype) -> None:
    updates = {node: model(seed, dtype) for seed, node in enumerate(NODES)}
    kept = gathered(tmp_path, dict(reversed(updates.items())), {node: seed for seed, node in enumerate(NODES)})
    assert kept.weights == [0, 1, 2, 3, 4]
    for index, node in [*enumerate(NODES), *enumerate(NODES)]:
        read = dict(kept.read(index))
        assert list(read) == list(updates[node])
        for name, tensor in updates[node].items():
            assert read[name].dtype == dtype
            assert torch.equal(read[name], tensor)
            read[name].fill_(7.0)  # a mistake of a rule stays its own


def test_tensors_come_in_one_order_whatever_order_a_node_chose(tmp_path: Path) -> None:
    """Names are paired, not places: else a node could have its tensors merged with others of the same shape."""
    base, update = model(0), model(1)
    turned = dict(reversed(update.items()))
    updates = {"ada": update, "bob": turned}
    assert [name for name, _ in turned.items()] != list(base)
    kept = gathered(tmp_path, updates)
    assert encode_tensors(dict(kept.read(0))) == encode_tensors(dict(kept.read(1)))
    assert [name for name, _ in kept.read(1)] == list(update)


def test_the_order_of_arrival_changes_no_bit(tmp_path: Path) -> None:
    updates = {node: {name: tensor * 10.0**seed for name, tensor in model(seed).items()}
               for seed, node in enumerate(NODES)}  # fmt: skip
    weights = {node: 3**seed for seed, node in enumerate(NODES)}
    orders = random.Random(1).sample(list(itertools.permutations(NODES)), 8)
    results = set()
    for index, order in enumerate(orders):
        kept = gathered(tmp_path / str(index), {node: updates[node] for node in order}, weights)
        results.add(encode_tensors(dict(kept.result())))
    assert len(results) == 1

    class AsTheyCome:  # the mutant: kept in the order of arrival
        def __init__(self, order: tuple[str, ...]) -> None:
            self.order, self.weights = order, [weights[node] for node in order]

        def read(self, index: int) -> Iterator[tuple[str, Tensor]]:
            return iter(updates[self.order[index]].items())

    assert len({encode_tensors(dict(plain_sum(AsTheyCome(order)))) for order in orders}) > 1


@pytest.mark.parametrize("chain", [[], ["zstd"], ["topk(density=0.2)", "int4"], ["lowrank(rank=2)"]], ids=" ".join)
@pytest.mark.parametrize("of", ["difference", "weights"])
def test_every_codec_is_read_as_the_aggregator_reads_it(tmp_path: Path, chain: list[str], of: str) -> None:
    reader = UpdateReader.of(LinkConfig.model_validate({"up": chain, "of": of}))
    base = model(0)
    reply = Reply(
        run="r", round=0, node="ada", nonce="n", base_sha256="0" * 64, status="ok", codec=reader.codec.name
    )  # fmt: skip
    wire = encode_update(reader.codec, model(1), {}, 1.0, "seed").wire
    message = Message(reply, memoryview(encode_tensors(wire)))
    kept = Gathered(tmp_path / "spool", base, plain_sum)
    kept.keep("ada", reader.read(message, base), 1)
    assert encode_tensors(dict(kept.read(0))) == encode_tensors(dict(reader.read(message, base)))


def test_a_tensor_is_memory_only_while_somebody_has_it(tmp_path: Path) -> None:
    """And a merge has one of each update at a time: instrumented on every tensor that is read."""
    alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
    most = 0

    class Watched(Gathered):
        def read(self, index: int) -> Iterator[tuple[str, Tensor]]:
            nonlocal most
            for name, tensor in super().read(index):
                alive.add(tensor.untyped_storage())
                most = max(most, len(alive))
                yield name, tensor
                del tensor

    updates = {node: model(seed) for seed, node in enumerate(NODES)}
    kept = Watched(tmp_path / "spool", updates["ada"], Median().merged)
    for node, update in updates.items():
        kept.keep(node, iter(update.items()), 1)
    merged = dict(kept.result())
    assert len(merged) == len(updates["ada"])
    assert len(NODES) - 1 <= most <= len(NODES)
    assert not alive
    most, kept = 0, Watched(tmp_path / "again", updates["ada"], plain_sum)  # the mutant, which reads all of them whole
    for node, update in updates.items():
        kept.keep(node, iter(update.items()), 1)
    dict(kept.result())
    assert most == len(NODES) * len(updates["ada"])


def test_the_files_are_gone_after_the_merge_and_what_a_crash_left_before_it(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    (spool / "ada.update").write_bytes(b"of a round that crashed")
    kept = gathered(tmp_path, {"ada": model(1), "bob": model(2)})
    assert sorted(path.name for path in spool.iterdir()) == ["ada.update", "bob.update"]
    result = kept.result()
    assert spool.exists()
    dict(result)
    assert not spool.exists()


def test_nothing_kept_and_a_full_disk_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing"):
        Gathered(tmp_path / "spool", {}, plain_sum).result()
    kept = Gathered(tmp_path / "spool", model(0), plain_sum)
    (tmp_path / "spool").rmdir()
    with pytest.raises(StateError, match="make room"):
        kept.keep("ada", iter(model(0).items()), 1)


def test_the_time_that_a_merge_takes_is_the_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def passing(seconds: float) -> None:
        nonlocal now
        now += seconds

    def slow() -> Iterator[tuple[str, Tensor]]:
        for name in ("a", "b"):
            passing(3.0)
            yield name, torch.zeros(1)

    monkeypatch.setattr("photon.stopwatch.time.monotonic", lambda: now)
    merged = Merged(merge_s=1.0)
    for _ in merged.timed(slow()):
        passing(10.0)  # the outer step
    assert merged.merge_s == 7.0


def test_a_round_leaves_nothing_behind_and_a_crash_is_cleaned_up_after(tmp_path: Path) -> None:
    recipe = tiny_recipe(federation={"rounds": 2, "parts": ["median"]})
    spool = tmp_path / "rounds" / ".pending-updates"
    spool.mkdir(parents=True)
    (spool / "ada.update").write_bytes(b"of a round that crashed")
    assert RoundStore(tmp_path / "rounds", 1, 0).spool == spool
    Federation(tmp_path, recipe).run()
    assert not list((tmp_path / "rounds").glob(".pending*"))
    other = tiny_recipe(federation={"rounds": 3})  # the mean, from here on
    spool.mkdir()
    Federation(tmp_path, other).run()
    assert not spool.exists()


def test_a_crash_in_the_middle_of_a_merge_costs_the_round_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(federation={"rounds": 3, "parts": ["geometric_median"]})
    undisturbed = Federation(tmp_path / "undisturbed", recipe).run()
    federation = Federation(tmp_path / "crashed", recipe)
    mapped, reads = gathered_module._mapped, itertools.count()
    in_all = 3 * 2 * len(weights(undisturbed)) * len(recipe.silo)  # rounds, passes, tensors, nodes

    def crashing(*arguments: Any) -> Tensor:
        if next(reads) == in_all // 2 + 5:  # of the second round's last pass, after the first tensors
            raise RuntimeError("the power is cut")
        return mapped(*arguments)

    monkeypatch.setattr(gathered_module, "_mapped", crashing)
    with pytest.raises(RuntimeError, match="power"):
        federation.run()
    assert federation.store.spool.exists()
    assert federation.store.rounds()[-1] == 1
    resumed = Federation(tmp_path / "crashed", recipe).run()
    assert resumed.model_sha256 == undisturbed.model_sha256
    assert not federation.store.spool.exists()
