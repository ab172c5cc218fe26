"""The words for options: they must agree with what validation really accepts."""

from __future__ import annotations

import re
import tomllib
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError

from photon.config import Section
from photon.options import TOP, Option, hint, nearest, options_of, section_header, section_types, toml_text

TOML = st.recursive(
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=6,
)
ALL = [option for section in section_types() for option in options_of(section).values()]


@given(TOML)
def test_toml_text_reads_back_as_the_value_on_one_line(value: object) -> None:
    text = toml_text(value)
    assert tomllib.loads(f"x = {text}")["x"] == value
    assert "\n" not in text


@pytest.mark.parametrize("option", ALL, ids=lambda option: option.address)
def test_the_default_is_text_that_reads_back(option: Option) -> None:
    if option.required or option.default is None:
        assert option.default_text in ("required", "unset")
    else:
        value = tomllib.loads(f"x = {option.default_text}")["x"]
        assert value == (list(option.default) if isinstance(option.default, tuple) else option.default)


def _accepts(option: Option, value: object) -> bool:
    """Whether validation takes the value: no complaint about this option, whatever else may be missing."""
    try:
        section_types()[option.section].model_validate({option.key: value})
    except ValidationError as error:
        return all(complaint["loc"][:1] != (option.key,) for complaint in error.errors())
    return True


@pytest.mark.parametrize("option", ALL, ids=lambda option: option.address)
def test_the_words_agree_with_validation(option: Option) -> None:
    words = option.expected
    assert _accepts(option, True) == (words == "true or false")
    assert _accepts(option, "?!") == (words == "text" or words.startswith("a list of texts"))
    if words.startswith("one of "):
        choices = words.removeprefix("one of ").split(", ")
        assert all(_accepts(option, choice) for choice in choices)
        assert not _accepts(option, words)
    if "`auto`" in words:
        assert _accepts(option, "auto")
        assert not _accepts(option, "Auto")
    assert _accepts(option, 10**6 + 0.5) == (words.startswith("a number") and "<" not in words and "to" not in words)
    if words.startswith("an integer >= "):
        low = int(words.split()[3])
        assert _accepts(option, low)
        assert not _accepts(option, low - 1)
    if found := re.search(r"number.* from 0 to (\S+)", words):
        most = float(found[1])
        wrap = (lambda v: [v, v]) if "list of 2" in words else (lambda v: v)
        assert [_accepts(option, wrap(v)) for v in (-0.01, 0, most, 1.01 * most)] == [False, True, True, False]


def test_a_constraint_without_words_is_an_error_not_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strange(Section):
        size: Annotated[int, Field(multiple_of=3)] = 3

    monkeypatch.setattr("photon.options.section_types", lambda: {"strange": Strange})
    with pytest.raises(TypeError, match="no words for the constraint"):
        options_of("strange")


def test_sections_are_found_and_headed() -> None:
    headers = [section_header(name) for name in section_types() if name != TOP]
    assert headers == [
        "[model]", "[data]", "[node]", "[federation]", "[link]", "[evaluation]", "[checkpoint]", "[track]", "[[silo]]",
    ]  # fmt: skip
    assert all(issubclass(kind, BaseModel) for kind in section_types().values())
    assert options_of("silo")["tau"].address == "silo.NAME.tau"
    assert options_of(TOP)["seed"].address == "seed"


@pytest.mark.parametrize(
    ("word", "close"),
    [("batchsize", "batch_size"), ("Batch-Size", "batch_size"), ("tua", "tau"), ("rouns", "rounds"), ("zzz", None)],
)
def test_nearest(word: str, close: str | None) -> None:
    assert nearest(word, ["rounds", "tau", "batch_size"]) == close


def test_hint_lists_all_when_nothing_is_near() -> None:
    assert hint("zzz", ["a", "b"]) == "there are: a, b"
    assert hint("zzz", []) == "there are: none"
