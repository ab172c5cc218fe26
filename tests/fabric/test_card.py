"""A run card tells a node all that rounds need and nothing of anybody's text; a tokenizer is data files and no more."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import tiny_recipe

from photon.config import Recipe
from photon.errors import WireError
from photon.fabric.card import RunCard, pack_tokenizer, read_card, run_card, unpack_tokenizer
from photon.link.tensors import sha256_hex
from photon.recipe import dump_recipe

PRIVATE = "kept-at-home"  # a word that stands in everything that must not leave the Aggregator
FILES = {"tokenizer.json": '{"é": 1}', "tokenizer_config.json": "{}"}


def told(recipe: Recipe) -> RunCard:
    blob = pack_tokenizer(FILES)
    return run_card("ab12", "0.1", recipe, 300, blob, sha256_hex(blob))


def secretive() -> Recipe:
    """A recipe for one machine, full of what is nobody else's business."""
    silos: dict[str, dict[str, Any]] = {
        "ada": {
            "text": [f"/{PRIVATE}/a", f"/{PRIVATE}/b"],
            "weights": [1.0, 7.0625],
            "field": PRIVATE,
            "batch_size": 3,
        },
        "bob": {"text": [f"hf:{PRIVATE}/corpus"], "tau": 5, "device": "cuda:6"},
    }
    return tiny_recipe(
        silos,
        data={"dir": f"/{PRIVATE}/data", "tokenizer": f"/{PRIVATE}/tokenizer", "tokenizer_text": [f"/{PRIVATE}/t"]},
        track={"wandb": PRIVATE, "mlflow": f"https://{PRIVATE}/", "tensorboard": True},
    )


def test_a_card_names_no_text_path_or_silo_source() -> None:
    recipe = secretive()
    assert dump_recipe(recipe).count(PRIVATE) == 9  # it can fail: this is what is to be left out
    text = told(recipe).model_dump_json()
    assert PRIVATE not in text
    assert "7.0625" not in text  # how a silo is mixed tells how many sources it has
    assert "cuda:6" not in text


def test_a_card_does_not_say_where_the_aggregator_keeps_blobs() -> None:
    recipe = tiny_recipe(link={"fabric": "flower", "store": f"file:///{PRIVATE}"})
    assert PRIVATE not in told(recipe).model_dump_json()


def test_a_card_says_all_that_rounds_need() -> None:
    recipe = secretive()
    card, read = read_card(json.loads(told(recipe).model_dump_json()))
    assert (card.run, card.vocab_size, card.tokenizer_bytes) == ("ab12", 300, len(pack_tokenizer(FILES)))
    assert [silo.name for silo in read.silo] == ["ada", "bob"]
    assert [read.batch_size_of(silo) for silo in read.silo] == [3, 2]
    assert [read.tau_of(silo) for silo in read.silo] == [2, 5]
    assert all(silo.text == [] and silo.weights is None for silo in read.silo)
    for section in ("seed", "model", "node", "federation", "evaluation", "checkpoint"):
        assert getattr(read, section) == getattr(recipe, section), section
    kept = recipe.data.model_copy(update={"dir": "data", "tokenizer": "given", "tokenizer_text": []})
    assert read.data == kept


def test_a_card_that_is_told_is_the_same_told_again() -> None:
    card = told(secretive())
    again = read_card(card.model_dump())[1]
    assert told(again) == card


BROKEN: dict[str, dict[str, Any]] = {
    "a field nobody knows": {"text": "/home"},
    "a run that is a path": {"run": "../../ab"},
    "a run in capitals": {"run": "AB"},
    "a run too long": {"run": "a" * 65},
    "no run": {"run": ""},
    "a hash that is none": {"tokenizer_sha256": "0" * 63},
    "a hash that is a path": {"tokenizer_sha256": "../" + "0" * 61},
    "a size as text": {"tokenizer_bytes": "7"},
    "a negative size": {"tokenizer_bytes": -1},
    "a recipe without end": {"recipe": "#" * (2**20 + 1)},
    "a recipe that is none": {"recipe": "silo = 7"},
    "a recipe with an unknown option": {"recipe": '[[silo]]\nname = "ada"\nrun_this = "rm"'},
    "a recipe without nodes": {"recipe": "seed = 1"},
    "no TOML": {"recipe": "["},
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_card_is_refused(what: str) -> None:
    card = told(tiny_recipe()).model_dump()
    read_card(card)
    with pytest.raises(WireError):
        read_card(card | BROKEN[what])


@settings(deadline=None)
@given(st.none() | st.text() | st.integers() | st.lists(st.integers()) | st.dictionaries(st.text(), st.text()))
def test_junk_is_no_card(answer: object) -> None:
    with pytest.raises(WireError, match="run card is malformed"):
        read_card(answer)


def test_another_version_is_asked_about() -> None:
    card = told(tiny_recipe()).model_dump()
    with pytest.raises(WireError, match="are both of one version"):
        read_card(card | {"recipe": card["recipe"].replace("tau =", "tua =")})


# --- the tokenizer ---------------------------------------------------------------------------------------------------

names = st.from_regex(r"[A-Za-z0-9_-]{1,64}\.(json|txt|model)", fullmatch=True)
contents = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(deadline=None)
@given(st.dictionaries(names, contents, min_size=1, max_size=16))
def test_a_tokenizer_arrives_as_it_was_packed(files: dict[str, str]) -> None:
    packed = pack_tokenizer(files)
    assert unpack_tokenizer(packed) == files
    assert pack_tokenizer(dict(reversed(files.items()))) == packed  # one sha256 for the same files


TRICKS = [
    "../tokenizer.json", "/etc/tokenizer.json", "a/tokenizer.json", "a\\tokenizer.json", "..json", ".json", "...json",
    "tokenizer.json/..", "tokenizer.json\x00", "tokenizer.py", "tokenizer.pyc", "tokenizer.json.py", "tokenizer.pkl",
    "tokenizer.safetensors", "tokenizer", "", ".", "..", "C:tokenizer.json", "~tokenizer.json", "tokenizér.json",
    "tokenizer .json", "a" * 65 + ".json", "tokenizer.JSON", "tokenizer.json ", " tokenizer.json",
]  # fmt: skip


@pytest.mark.parametrize("name", TRICKS)
def test_a_name_that_is_no_file_of_a_tokenizer_is_refused(name: str) -> None:
    with pytest.raises(WireError, match="which is no file of a tokenizer"):
        unpack_tokenizer(pack_tokenizer({**FILES, name: "{}"}))


def test_a_name_that_ends_in_a_new_line_is_refused() -> None:
    with pytest.raises(WireError, match="which is no file of a tokenizer"):
        unpack_tokenizer(pack_tokenizer({"tokenizer.json\n": "{}"}))


@settings(deadline=None)
@given(st.text(max_size=12), st.sampled_from(["/", "\\", "\x00", "..", ":"]), st.text(max_size=12))
def test_no_name_leads_out_of_its_folder(before: str, trick: str, behind: str) -> None:
    with pytest.raises(WireError):
        unpack_tokenizer(json.dumps({f"{before}{trick}{behind}.json": "{}"}).encode())


BLOBS = {
    "no JSON": b"{",
    "no text": b"\xff\xfe",
    "a list": b'["tokenizer.json"]',
    "a string": b'"tokenizer.json"',
    "null": b"null",
    "no file": b"{}",
    "a file that is no text": b'{"tokenizer.json": {"a": 1}}',
    "a file of bytes": b'{"tokenizer.json": [1, 2]}',
    "too many files": json.dumps({f"{number}.json": "" for number in range(17)}).encode(),
    "very deep": b"[" * 200_000,
}


@pytest.mark.parametrize("what", BLOBS)
def test_a_blob_that_is_no_tokenizer_is_refused(what: str) -> None:
    with pytest.raises(WireError, match="the tokenizer that came"):
        unpack_tokenizer(BLOBS[what])


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_refused(blob: bytes) -> None:
    with pytest.raises(WireError):
        unpack_tokenizer(blob)
