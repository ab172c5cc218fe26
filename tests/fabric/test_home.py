"""A node's folder: what it remembers is worth nothing to others, and a run is prepared from what the gateway tells."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
from tests.fabric.gateways import Site, in_thread
from tests.support import tiny_recipe

from photon.config import Recipe
from photon.data.build import Progress
from photon.data.shards import ShardReader
from photon.data.tokenizer import train_tokenizer
from photon.errors import ConfigError, DataError, PhotonError, WireError
from photon.fabric.card import MAX_TOKENIZER_BYTES, RunCard, pack_tokenizer, read_card, run_card
from photon.fabric.home import NodeHome, PreparedRun, prepare_run
from photon.fabric.process import REPLY, WRITTEN
from photon.fabric.site import SITE_FILE, SiteFile, open_site
from photon.fabric.worker import Worker
from photon.link import boot
from photon.link.boot import MARKER
from photon.link.client import LinkRefusedError
from photon.link.partial import partial_names
from photon.link.tensors import encode_tensors, sha256_hex
from photon.link.update import Sealed, Task, decode_message, encode_message, expect_reply
from photon.model.build import named_weights
from photon.recipe import load_recipe
from photon.siteconfig import SiteConfig

RUN = "ab12cd34"
TODAY = date(2026, 3, 1)
JUNK = [b"", b"{", b"[]", b"7", b"null", b"\xff\xfe", b'"x"', b'{"node_id": "7"}', b'{"2026-03-01": null}']


# --- what it remembers -----------------------------------------------------------------------------------------------


def test_an_id_is_remembered(tmp_path: Path) -> None:
    home = NodeHome(tmp_path)
    assert home.last_id() is None
    for number in (0, 7, 2**63):
        home.keep_id(number)
        assert NodeHome(tmp_path).last_id() == number


def test_the_bytes_of_a_day_are_remembered_and_no_other_day_has_any(tmp_path: Path) -> None:
    home = NodeHome(tmp_path)
    assert home.bytes_of(TODAY) == 0
    home.keep_bytes(TODAY, 2**40)
    assert NodeHome(tmp_path).bytes_of(TODAY) == 2**40
    assert [home.bytes_of(TODAY + timedelta(days=days)) for days in (-1, 1)] == [0, 0]
    home.keep_bytes(TODAY + timedelta(days=1), 5)
    assert [home.bytes_of(TODAY + timedelta(days=days)) for days in (0, 1)] == [0, 5]


@pytest.mark.parametrize("content", JUNK)
def test_a_damaged_note_is_none_and_the_next_one_mends_it(content: bytes, tmp_path: Path) -> None:
    home = NodeHome(tmp_path)
    for name in ("flower.json", "traffic.json"):
        (tmp_path / name).write_bytes(content)
    assert home.last_id() is None
    assert home.bytes_of(TODAY) == 0
    home.keep_id(3)
    home.keep_bytes(TODAY, 4)
    assert (home.last_id(), home.bytes_of(TODAY)) == (3, 4)


def test_nothing_that_it_keeps_lies_elsewhere(tmp_path: Path) -> None:
    home = NodeHome(tmp_path)
    assert {path.parent for path in (home.lock, home.bases, home.run(RUN).path.parent)} == {tmp_path}


def test_the_base_of_the_open_round_is_kept_and_those_of_others_are_not(tmp_path: Path) -> None:
    home, old, new = NodeHome(tmp_path), sha256_hex(b"old"), sha256_hex(b"new")
    for path in partial_names(home.open_base(old)):
        path.touch()
    home.open_base(old).write_bytes(b"old")
    assert home.open_base(old).read_bytes() == b"old"
    assert {path.name for path in home.bases.iterdir()} == {old, f"{old}.partial", f"{old}.progress", MARKER}
    assert not home.open_base(new).exists()
    assert {path.name for path in home.bases.iterdir()} == {MARKER}


def test_a_base_that_a_power_cut_has_spoilt_is_fetched_again(tmp_path: Path) -> None:
    home, sha256 = NodeHome(tmp_path), sha256_hex(b"base")
    home.open_base(sha256).write_bytes(bytes(4))
    with mock.patch.object(boot, "_is_whole", side_effect=AssertionError("hashed in every round")):
        assert home.open_base(sha256).exists()
    with mock.patch.object(boot, "this_boot", return_value="another start"):
        assert not home.open_base(sha256).exists()


# --- preparing a run -------------------------------------------------------------------------------------------------


def tokenizer_blob(folder: Path) -> bytes:
    folder.mkdir()
    tokenizer = train_tokenizer({"x": ["of many things, and of few; " * 20]}, 270)
    tokenizer.save(folder)
    return pack_tokenizer({path.name: path.read_text("utf-8") for path in folder.iterdir()})


class Made:
    """A gateway that serves a tokenizer, an owner's text, and the node's folder."""

    def __init__(self, root: Path, site: Site, blob: bytes) -> None:
        self.root, self.site, self.blob = root, site, blob
        self.text = root / "text"
        self.text.mkdir()
        for number in range(12):
            (self.text / f"{number}.txt").write_text(f"{number} of many things, and of few; " * 15)
        self.home = NodeHome(root / "home")
        self.told: list[Progress] = []

    def recipe(self, **sections: Any) -> Recipe:
        return tiny_recipe(
            {"ada": {"text": [], "batch_size": 3}, "bob": {"text": []}},
            **({"data": {"sequence_length": 16, "heldout_fraction": 0.3}} | sections),
        )

    def prepare(self, recipe: Recipe | None = None, site: SiteConfig | None = None, **changes: Any) -> PreparedRun:
        blob = changes.pop("blob", self.blob)
        sha256 = sha256_hex(blob)
        self.site.store.publish(sha256, blob)
        card = run_card(RUN, "0.1", recipe or self.recipe(), 300, blob, sha256).model_dump() | changes
        read, its = read_card(RunCard.model_validate(card).model_dump())
        own = site or SiteConfig(text=[str(self.text)], threads=1)
        return prepare_run(read, its, "ada", own, self.home, self.site.client(), self.told.append)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, bytes]]:
    root = tmp_path_factory.mktemp("gateway")
    site = Site(root)
    with in_thread(site):
        yield site, tokenizer_blob(root / "tokenizer")


@pytest.fixture
def made(served: tuple[Site, bytes], tmp_path: Path) -> Made:
    return Made(tmp_path, *served)


def test_a_run_is_prepared_from_card_tokenizer_and_own_text(made: Made) -> None:
    prepared = made.prepare()
    folder = made.home.run(RUN)
    assert prepared.run == RUN
    assert (prepared.folder.path, prepared.plan.threads) == (folder.path, 1)
    identity = folder.identity()
    assert (identity.run, identity.vocab_size) == (RUN, 300)
    assert load_recipe(folder.recipe) == prepared.recipe

    file = SiteFile.model_validate_json((folder.node("ada") / SITE_FILE).read_bytes())
    assert (file.name, file.batch_size, file.trains, file.evaluates, file.keeps_replies) == ("ada", 3, True, True, True)
    assert all(source.is_absolute() and source.is_relative_to(made.home.path / "data") for source in file.sources)
    site = open_site(file, folder.node("ada"), prepared.recipe)
    assert site.replies is not None
    assert (site.replies._keep, site.store._keep_last) == (1, prepared.recipe.checkpoint.keep_last)
    # Of a method by which it may be a round ahead of the Aggregator, it keeps what that may ask for again.
    changes = {"parts": ["eager"], "outer": "nesterov"}
    eager = prepared.recipe.model_copy(update={"federation": prepared.recipe.federation.model_copy(update=changes)})
    ahead = open_site(file, folder.node("ada"), eager)
    assert ahead.replies is not None
    assert (ahead.replies._keep, ahead.store._keep_last) == (2, prepared.recipe.checkpoint.keep_last + 1)
    assert site.stream.batch(0, 3).shape == (3, 17)
    assert len(site.heldout[0].sequences) > 0
    (reader,) = map(ShardReader, file.sources)
    assert prepared.tokens_available == reader.train_sequences(16) * 16 > 0
    assert reader.manifest.train.bytes + reader.manifest.heldout.bytes == sum(
        path.stat().st_size for path in made.text.iterdir()
    )


def test_a_worker_follows_a_recipe_that_needs_more_owners_than_its_own(made: Made) -> None:
    silos = {"ada": {"text": [], "batch_size": 3}, "bob": {"text": []}, "cyd": {"text": []}}
    data = {"sequence_length": 16, "heldout_fraction": 0.3}
    prepared = made.prepare(tiny_recipe(silos, data=data, federation={"parts": ["median"]}))
    node = Worker(prepared.folder, prepared.plan).node("ada")
    assert (node.site.name, node.method.merged is not None) == ("ada", True)


def test_a_worker_says_where_its_update_lies_before_it_replies(made: Made) -> None:
    prepared = made.prepare()
    worker = Worker(prepared.folder, prepared.plan)
    base = encode_tensors(named_weights(worker.trainer.model))
    sha256 = sha256_hex(base)
    task = Task(
        run=RUN, round=0, node="ada", nonce="n", base_sha256=sha256, body_sha256=sha256, evaluate=False,
        sequential_step=0, tau=2, nodes=2, deadline_s=60.0,
    )  # fmt: skip
    frames: list[bytes] = []
    connection = cast(Connection, SimpleNamespace(send_bytes=frames.append))
    kind, reply = worker.answer(encode_message(task, base), connection)
    (written,) = [json.loads(frame[1:]) for frame in frames if frame[:1] == WRITTEN]
    assert (kind, written["sha256"]) == (REPLY, expect_reply(decode_message(Sealed(reply.head, b""))).body_sha256)
    assert sha256_hex(Path(written["body"]["path"]).read_bytes()) == written["sha256"]


def test_the_text_is_tokenised_once(made: Made) -> None:
    first = made.prepare()
    assert {"tokenize", "done"} & {step.phase for step in made.told}
    made.told.clear()
    assert made.prepare() == first
    assert [step.phase for step in made.told if step.silo == "ada"] == ["reuse"]
    (made.text / "more.txt").write_text("of more things; " * 30)  # it can fail: other text is not reused
    assert made.prepare().tokens_available > first.tokens_available


def test_the_owner_says_where_tokens_lie_and_how_much_is_read(made: Made) -> None:
    whole = made.prepare().tokens_available
    site = SiteConfig(text=[str(made.text)], data=str(made.root / "elsewhere"), max_bytes=2000)
    prepared = made.prepare(site=site)
    file = SiteFile.model_validate_json((prepared.folder.node("ada") / SITE_FILE).read_bytes())
    assert all(source.is_relative_to(made.root / "elsewhere") for source in file.sources)
    assert prepared.tokens_available < whole / 2


def test_two_sources_are_mixed_as_the_owner_says(made: Made) -> None:
    site = SiteConfig(text=[str(made.text / "1.txt"), str(made.text)], weights=[1.0, 3.0])
    recipe = made.recipe(data={"sequence_length": 6, "heldout_fraction": 0.01})
    prepared = made.prepare(recipe, site)
    file = SiteFile.model_validate_json((prepared.folder.node("ada") / SITE_FILE).read_bytes())
    assert (len(file.sources), file.weights) == (2, [1.0, 3.0])


OWNERS_MISTAKES: dict[str, tuple[dict[str, Any], type[PhotonError], str]] = {
    "no such text": ({"text": ["/nowhere/at/all"]}, DataError, "/nowhere/at/all"),
    "a larger batch": ({"batch_size": 4}, ConfigError, "the run allows this node 3"),
}


@pytest.mark.parametrize("what", OWNERS_MISTAKES)
def test_what_the_owner_must_mend_is_said(what: str, made: Made) -> None:
    changes, kind, words = OWNERS_MISTAKES[what]
    with pytest.raises(kind, match=words):
        made.prepare(site=SiteConfig.model_validate({"text": [str(made.text)]} | changes))
    assert not (made.home.run(RUN).path / "run.json").exists()  # a run is there only once it is whole


def test_a_tokenizer_that_is_too_large_is_not_fetched(made: Made) -> None:
    with pytest.raises(WireError, match=rf"{MAX_TOKENIZER_BYTES + 1} bytes; {MAX_TOKENIZER_BYTES} are allowed"):
        made.prepare(tokenizer_bytes=MAX_TOKENIZER_BYTES + 1)
    assert not list(made.home.path.rglob("tokenizer.blob*"))


def test_a_tokenizer_that_a_power_cut_has_spoilt_is_fetched_again(made: Made) -> None:
    first = made.prepare()
    (packed,) = made.home.path.rglob("tokenizer.blob")
    packed.write_bytes(bytes(len(made.blob)))
    assert made.prepare() == first
    assert packed.read_bytes() == made.blob


def test_a_tokenizer_that_names_a_place_writes_nothing(made: Made) -> None:
    blob = json.dumps({"tokenizer.json": "{}", "../../../evil.json": "{}"}).encode()
    with pytest.raises(WireError, match=r"holds '\.\./\.\./\.\./evil\.json'"):
        made.prepare(blob=blob)
    assert not list(made.root.rglob("*.json"))


def test_a_tokenizer_that_is_not_published_is_refused(made: Made) -> None:
    with pytest.raises(LinkRefusedError, match="no such blob is published"):
        made.prepare(tokenizer_sha256="0" * 64)
