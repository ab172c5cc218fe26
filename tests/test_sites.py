"""The centralised baseline is the federation's twin: as many tokens per round, in the same mixture, on one model."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import LENGTH, VOCAB, Federation, largest_difference, new_model, tiny_recipe, weights
from torch import Tensor

from photon.config import Recipe
from photon.data.build import SiloData
from photon.data.manifest import FILE_NAME, Manifest, Origin, ShardFile, Split
from photon.data.shards import ShardReader
from photon.data.stream import Stream
from photon.errors import ConfigError
from photon.fabric.site import SiteFile, open_site
from photon.model.build import named_weights
from photon.sites import POOLED, node_infos, plan_sites, sites_again

SIZES = {"ada": [40], "bob": [90, 30], "cyd": [15]}  # training sequences of each source
OWN: dict[str, dict[str, Any]] = {
    "ada": {"batch_size": 1},
    "bob": {"batch_size": 3, "tau": 4, "text": ["x", "y"], "weights": [1.0, 3.0]},
    "cyd": {"batch_size": 2, "tau": 1},
}


def shards(folder: Path, sequences: int, seed: int) -> Path:
    """A shard folder of random tokens."""
    folder.mkdir(parents=True)
    splits = {}
    for name, count in (("train", sequences * LENGTH + 1), ("heldout", 4 * LENGTH + 1)):
        data = np.random.default_rng([seed, len(name)]).integers(0, VOCAB, count).astype("<u2").tobytes()
        (folder / f"{name}-00000.bin").write_bytes(data)
        file = ShardFile(name=f"{name}-00000.bin", tokens=count, sha256=hashlib.sha256(data).hexdigest())
        splits[name] = Split(documents=1, tokens=count, bytes=4 * count, files=[file])
    origin = Origin(
        source="x", field="text", fingerprint="0", heldout_fraction=0.1, sequence_length=LENGTH, max_bytes=None
    )
    manifest = Manifest(
        dtype="uint16", tokenizer_sha256="0" * 64, vocab_size=VOCAB, end_of_text=0, origin=origin,
        train=splits["train"], heldout=splits["heldout"], unigram_loss=2.5, notes=[],
    )  # fmt: skip
    (folder / FILE_NAME).write_text(manifest.model_dump_json())
    return folder


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SiloData]:
    root = tmp_path_factory.mktemp("data")
    return {
        name: SiloData(name, root / name, [shards(root / name / str(i), size, i) for i, size in enumerate(sizes)])
        for name, sizes in SIZES.items()
    }


def both(federation: Mapping[str, Any] | None = None) -> tuple[Recipe, Recipe]:
    """The same recipe as a federation and as its baseline."""
    options = {"rounds": 3, "tau": 2, **(federation or {})}
    federated = tiny_recipe(OWN, federation=options)
    return federated, tiny_recipe(OWN, federation={**options, "outer": "none"})


def open_run(folder: Path, recipe: Recipe, silos: Mapping[str, SiloData]) -> tuple[Federation, list[SiteFile]]:
    files = plan_sites(recipe, silos)
    sites = {file.name: open_site(file, folder / "nodes" / file.name, recipe) for file in files}
    return Federation(folder, recipe, sites=sites, infos=node_infos(recipe, files)), files


def test_a_federation_has_one_site_per_silo(silos: dict[str, SiloData]) -> None:
    federated, _ = both()
    files = plan_sites(federated, silos)
    assert [file.name for file in files] == ["ada", "bob", "cyd"]
    assert all(file.trains and file.evaluates for file in files)
    assert [file.batch_size for file in files] == [1, 3, 2]
    assert [file.sources for file in files] == [silos[file.name].sources for file in files]
    assert all(source.is_absolute() for file in files for source in file.sources)
    assert [info.tokens_per_step for info in node_infos(federated, files)] == [LENGTH, 3 * LENGTH, 2 * LENGTH]


@pytest.mark.parametrize("outer", ["fedavg", "none"])
def test_sites_follow_a_recipe_that_was_changed_but_for_their_text(silos: dict[str, SiloData], outer: str) -> None:
    began = tiny_recipe(OWN, federation={"tau": 2, "outer": outer})
    files = plan_sites(began, silos)
    assert sites_again(began, files) == files
    ada = {"batch_size": 5, "device": "cpu", "text": ["elsewhere"]}
    changed = tiny_recipe(OWN | {"ada": ada, "bob": OWN["bob"] | {"weights": [2.0, 1.0]}}, federation={"outer": outer})
    assert sites_again(changed, files) == plan_sites(changed, silos) != files
    longer = tiny_recipe(OWN | {"ada": {"text": ["x", "y"], "weights": [1.0, 1.0]}}, federation={"outer": outer})
    with pytest.raises(ConfigError, match=r"silo ada: 2 weights, but its text was prepared as 1 source"):
        sites_again(longer, files)


def test_the_baseline_trains_once_and_scores_as_the_federation_does(silos: dict[str, SiloData], tmp_path: Path) -> None:
    federated, pooled = both()
    files = plan_sites(pooled, silos)
    assert {file.name: (file.trains, file.evaluates) for file in files} == {
        "ada": (False, True), "bob": (False, True), "cyd": (False, True), POOLED: (True, False),
    }  # fmt: skip
    runs = [open_run(tmp_path / name, recipe, silos)[0] for name, recipe in (("f", federated), ("p", pooled))]
    for run in runs:
        run.run()
    ours, theirs = (run.evaluations() for run in runs)
    assert ours[0].silos == theirs[0].silos  # the same untrained model, the same held-out text
    assert [event.pooled.tokens for event in ours] == [event.pooled.tokens for event in theirs]


def test_the_baseline_trains_as_many_tokens_per_round(silos: dict[str, SiloData], tmp_path: Path) -> None:
    """1 x 2 + 3 x 4 + 2 x 1 = 16 sequences a round, at the same sequential steps."""
    runs = [open_run(tmp_path / str(i), recipe, silos)[0] for i, recipe in enumerate(both())]
    for run in runs:
        run.run()
    for ours, theirs in zip(*(run.rounds() for run in runs), strict=True):
        assert ours.round_tokens == theirs.round_tokens == 16 * LENGTH
        assert (ours.tokens, ours.sequential_step) == (theirs.tokens, theirs.sequential_step)
        assert list(theirs.nodes) == [POOLED]


def test_the_baseline_mixes_the_sources_as_the_federation_does(silos: dict[str, SiloData], tmp_path: Path) -> None:
    """Over rounds that are enough for whole cycles, every source gives both the same number of sequences."""
    federated, pooled = both()
    _, files = open_run(tmp_path, pooled, silos)
    rounds = 40
    expected: Counter[Path] = Counter()
    for silo, file in zip(federated.silo, plan_sites(federated, silos), strict=True):
        readers = [ShardReader(source) for source in file.sources]
        stream = Stream(readers, file.weights, LENGTH, 5, file.name)
        position = rounds * federated.batch_size_of(silo) * federated.tau_of(silo)
        expected.update(dict(zip(file.sources, stream.counts(position).tolist(), strict=True)))
    file = files[-1]
    readers = [ShardReader(source) for source in file.sources]

    def taken(shares: list[float] | None) -> Counter[Path]:
        counts = Stream(readers, shares, LENGTH, 5, POOLED).counts(rounds * 16)
        return Counter(dict(zip(file.sources, counts.tolist(), strict=True)))

    assert sum(expected.values()) == rounds * 16
    assert taken(file.weights) == expected
    assert taken(None) != expected  # mutants: by size, and every source alike
    assert taken([1.0] * 4) != expected


def plain_loop(recipe: Recipe, site: SiteFile, steps: int) -> dict[str, Tensor]:
    model, size = new_model(recipe), site.batch_size
    stream = Stream([ShardReader(source) for source in site.sources], site.weights, LENGTH, recipe.seed, site.name)
    for step in range(steps):
        batch = torch.from_numpy(stream.batch(step * size, size))
        model.zero_grad()
        model.loss(batch[:, :-1], batch[:, 1:]).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(recipe.node.lr * parameter.grad)
    return named_weights(model)


def test_the_baseline_is_a_plain_training_loop(silos: dict[str, SiloData], tmp_path: Path) -> None:
    """Rounds, messages and the outer step leave nothing but float32 rounding: theta - (theta - local)."""
    _, pooled = both()
    federation, files = open_run(tmp_path, pooled, silos)
    trained = weights(federation.run())
    by_hand = plain_loop(pooled, files[-1], 6)
    assert largest_difference(trained, by_hand) < 1e-6
    assert largest_difference(trained, plain_loop(pooled, files[-1], 5)) > 1e-3  # one step less
    assert largest_difference(trained, plain_loop(pooled, files[0], 6)) > 1e-3  # one owner's text alone


def test_the_configured_outer_rate_does_not_touch_the_baseline(silos: dict[str, SiloData], tmp_path: Path) -> None:
    digests = set()
    for rate in (1.0, 0.1):
        _, pooled = both({"outer_lr": rate})
        digests.add(open_run(tmp_path / str(rate), pooled, silos)[0].run().model_sha256)
    assert len(digests) == 1


sizes = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=3, max_size=3)


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(1, 6))
def test_any_mix_of_batches_and_steps_is_matched_to_half_a_sequence_per_step(
    silos: dict[str, SiloData], sizes: list[tuple[int, int]], tau: int
) -> None:
    own = {name: {"batch_size": batch, "tau": steps} for name, (batch, steps) in zip(SIZES, sizes, strict=True)}
    own["bob"]["text"] = ["x", "y"]
    recipe = tiny_recipe(own, federation={"tau": tau, "outer": "none"})
    pooled = plan_sites(recipe, silos)[-1]
    sequences = [batch * steps for batch, steps in sizes]
    assert abs(pooled.batch_size * tau - sum(sequences)) <= max(tau / 2, tau - sum(sequences))
    assert pooled.weights is not None
    ada, bob_large, bob_small, cyd = pooled.weights
    assert [ada, bob_large + bob_small, cyd] == pytest.approx(sequences, rel=1e-12)
    assert bob_large / bob_small == pytest.approx(3.0, rel=1e-12)  # a silo without weights mixes by size


def test_a_baseline_of_a_sampled_federation_trains_as_many_tokens(silos: dict[str, SiloData], tmp_path: Path) -> None:
    options = {"nodes_per_round": 1, "rounds": 1}
    recipes = [tiny_recipe(list(SIZES), federation={**options, "outer": outer}) for outer in ("fedavg", "none")]
    one_each = {name: SiloData(name, silo.folder, silo.sources[:1]) for name, silo in silos.items()}
    runs = [open_run(tmp_path / str(i), recipe, one_each)[0] for i, recipe in enumerate(recipes)]
    ours, theirs = (run.run().progress.tokens for run in runs)
    assert ours == theirs


def test_the_baseline_of_dealt_text_takes_from_every_share_alike(silos: dict[str, SiloData], tmp_path: Path) -> None:
    """With `data.partition = "iid"` a node has one source, its share; the baseline mixes those as the nodes train."""
    options = {"rounds": 3, "tau": 2}
    made = [
        tiny_recipe(list(SIZES), data={"partition": "iid"}, federation={**options, "outer": outer})
        for outer in ("fedavg", "none")
    ]
    shares = {name: SiloData(name, silo.folder, silo.sources[:1]) for name, silo in silos.items()}
    runs = [open_run(tmp_path / str(i), recipe, shares) for i, recipe in enumerate(made)]
    (ours, files), (theirs, with_pooled) = runs
    assert [(file.weights, len(file.sources)) for file in files] == [(None, 1)] * 3
    pooled = with_pooled[-1]
    stream = Stream([ShardReader(source) for source in pooled.sources], pooled.weights, LENGTH, 5, POOLED)
    assert stream.counts(3 * 2 * 6).tolist() == [12, 12, 12]  # rounds x tau x three batches of two
    assert ours.run().progress.tokens == theirs.run().progress.tokens
    assert [event.pooled.tokens for event in ours.evaluations()] == [e.pooled.tokens for e in theirs.evaluations()]
