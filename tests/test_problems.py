"""What a user reads when a recipe is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from photon.errors import ConfigError
from photon.options import options_of, section_types
from photon.problems import shorten
from photon.recipe import parse_recipe

SILO = '[[silo]]\nname = "core"\ntext = "x"\n'
INTEGER = "must be an integer >= 1"


def complaints(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(text, "recipe.toml", overrides)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[node]\nbatchsize = 4", "[node] has no option `batchsize`; did you mean `batch_size`?"),
        ("[node]\ntau = 4", "[node] has no option `tau`; it belongs in [federation] or [[silo]]"),
        ("[node]\nrounds = 4", "[node] has no option `rounds`; it belongs in [federation]"),
        ("[node]\nseed = 4", "[node] has no option `seed`; it belongs at the top, before the first section"),
        (
            "[link]\nzzz = 4",
            "[link] has no option `zzz`; there are: fabric, store, preset, up, down, of, exact_tensors, up_feedback, "
            "down_feedback, max_update_norm",
        ),
        ("[nodes]\nlr = 1", "there is no section `nodes`; did you mean [node]?"),
        ("[[silos]]\nname = 'x'", "there is no section `silos`; did you mean [[silo]]?"),
        ("[node]\nlr = 'x'", '[node] lr = "x": must be a number from 0 to 1e+06 (peak learning rate (AdamW/SGD part))'),
        ("[node]\nlr = nan", "[node] lr = nan: must be a number from 0 to 1e+06 (peak learning rate (AdamW/SGD part))"),
        ("[federation]\ntau = 0", f"[federation] tau = 0: {INTEGER} (local steps between exchanges)"),
        ("[federation]\ntau = 2.0", f"[federation] tau = 2.0: {INTEGER} (local steps between exchanges)"),
        (
            "[federation]\nweighting = 'token'",
            '[federation] weighting = "token": must be one of tokens, uniform; did you mean `tokens`? '
            "(weight of an update in the merge)",
        ),
        (
            "[node]\nthreads = 'many'",
            f'[node] threads = "many": {INTEGER} or `auto` (CPU threads per process; auto = cores // workers)',
        ),
        (
            "[node]\nbetas = [0.9, 1.5]",
            "[node] betas = [0.9, 1.5]: must be a list of 2 numbers, each >= 0 and < 1.0 (AdamW's betas)",
        ),
        (
            "[node]\nbetas = [0.9]",
            "[node] betas = [0.9]: must be a list of 2 numbers, each >= 0 and < 1.0 (AdamW's betas)",
        ),
        ("[[node]]\nlr = 1", "[node] must be one section with options below it, not [{lr = 1}]"),
        ("[model]\npreset = 'mpt-3'", "there is no shape `mpt-3`; did you mean `mpt-3b`?"),
        ("[model]\npreset = 3", "[model] preset = 3: must be text (name of a shape"),
        ("[model]\nheads = 3", "model.heads = 3 must divide model.width = 128"),
        ("[node]\nlr = 1" + "0" * 400, "node.lr: an integer must fit into 64 bits"),
        ("[[silo]]\ntext = 'b'", "[[silo]] number 2 has no `name` (owner = node = silo)"),
        ("[[silo]]\nname = 'b'\ntext = 'x'\ntau = 0", f"silo b tau = 0: {INTEGER} (overrides federation.tau)"),
        ("[[silo]]\nname = 'b'\ntext = 'x'\nlr = 1", "[[silo]] has no option `lr`; it belongs in [node]"),
        ("[[silo]]\nname = 'Core'\ntext = 'x'", "silo names must differ (also in more than case): core, Core"),
    ],
)
def test_one_mistake_one_sentence(text: str, expected: str) -> None:
    (line,) = complaints(SILO + text)
    assert line.startswith(f"recipe.toml: {expected}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "there is no [[silo]]; every owner of text needs one, with a `name` and its `text`"),
        ("lr = 1\n" + SILO, "there is no option `lr`; it belongs in [node]"),
        ("sede = 1\n" + SILO, "there is no option `sede`; did you mean `seed`?"),
        ("node = 1\n" + SILO, "[node] must be one section with options below it, not 1"),
        ("silo = 1", "[[silo]] must be written with double brackets, at least once, one for each owner, not 1"),
        ("silo = []", "[[silo]] must be written with double brackets, at least once, one for each owner, not []"),
        ('[silo]\nname = "x"', "[[silo]] must be written with double brackets"),
        ("silo = [1]", "[[silo]] must be written with double brackets"),
        ("seed = 1\n\nlr =\n", "not valid TOML: Invalid value (at line 3, column 5)"),
        ("seed = 1\nseed = 2\n", "not valid TOML: Cannot overwrite a value (at line 2"),
        ("seed = 1" + "0" * 5000, "not valid TOML: "),
    ],
)
def test_mistakes_of_the_whole(text: str, expected: str) -> None:
    (line,) = complaints(text)
    assert line.startswith(f"recipe.toml: {expected}")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("federation.tau=0", f"{INTEGER} (local steps between exchanges)"),
        ("node.lr=fast", "must be a number from 0 to 1e+06 (peak learning rate (AdamW/SGD part))"),
        ("node.betas=[1,2]", "must be a list of 2 numbers, each >= 0 and < 1.0 (AdamW's betas)"),
        ("node.betas=[1,2", "the value is not valid TOML: Unclosed array"),
        ("node.batchsize=4", "[node] has no option `batchsize`; did you mean `batch_size`?"),
        ("nod.lr=4", "there is no section `nod`; did you mean [node]?"),
        ("a.b.lr=4", "there is no section `a.b`; there are: [model], [data]"),
        ("lr=4", "there is no option `lr`; it belongs in [node]"),
        ("node=4", "names a whole section; name one option of it: node.OPTION=..."),
        ("federation.tau", "must have the form option=value, for example federation.tau=64"),
        ("=4", "must have the form option=value"),
        ("node.lr=", 'has no value; empty text is written ""'),
        ("about=a\tb\0", "holds a character that cannot be printed"),
        ("data.dir=\udcff", "holds a character that cannot be printed"),
        ("data.dir=2024-01-01", "must be text (folder for the tokenizer"),
        ("silo.cor.tau=2", "there is no silo `cor`; did you mean `core`?"),
        ("silo.tau=2", "must name the owner: silo.NAME.tau=..."),
        ("silo.core.tua=2", "[[silo]] has no option `tua`; did you mean `tau`?"),
        ("silo.core.tau=0", f"{INTEGER} (overrides federation.tau)"),
        ("silo.core.weights=[1,2]", "silo core: 2 weights for 1 sources"),
        ('silo=[{name="z",text="t",tau=0}]', f"silo z tau = 0: {INTEGER} (overrides federation.tau)"),
        ("silo=[]", "[[silo]] must be written with double brackets"),
        ("model.preset=lama-1b", "there is no shape `lama-1b`; did you mean `llama-1b`?"),
    ],
)
def test_mistakes_in_overrides_name_the_override(override: str, expected: str) -> None:
    (line,) = complaints(SILO, override)
    if override == "silo.core.weights=[1,2]":  # a rule between two options, only one of which was overridden
        assert line == f"recipe.toml: {expected}"
    else:
        assert line.startswith(f"override {shorten(override)}: {expected}")


def test_an_override_of_a_section_that_is_none() -> None:
    (line,) = complaints("node = 3\n" + SILO, "node.lr=1")
    assert line == "override node.lr=1: cannot be applied, because `node` is not a section of options in the recipe"


def test_a_new_list_of_silos_takes_the_blame_from_overrides_of_the_old() -> None:
    (line,) = complaints(SILO, "silo.core.tau=3", 'silo=[{name="z", text="t", tau=0}]')
    assert line.startswith('override silo=[{name="z", text="t", tau=0}]: silo z tau = 0: ')


@pytest.mark.parametrize("bound", [2**63, -(2**63) - 1])
def test_integers_end_where_toml_does(bound: int) -> None:
    (line,) = complaints(SILO + f"[data]\nmax_bytes_per_silo = {bound}")
    assert line == "recipe.toml: data.max_bytes_per_silo: an integer must fit into 64 bits"
    inside = parse_recipe(SILO + f"[data]\nmax_bytes_per_silo = {2**63 - 1}", "recipe.toml")
    assert inside.data.max_bytes_per_silo == 2**63 - 1


def test_all_problems_are_listed_at_once() -> None:
    text = SILO + "[node]\nlr = 'x'\nbatchsize = 1\n[federation]\ntau = 0\nrounds = 0\n[model]\npreset = 'x1'\n"
    lines = complaints(text, "data.vocab_size=3", "federation.tau=-1")
    assert len(lines) == 6
    assert all(line.startswith(("recipe.toml: ", "override ")) for line in lines)
    assert any(line.startswith("override federation.tau=-1: ") for line in lines)
    assert not any("tau = 0" in line for line in lines)  # overridden, and so no problem of the file


def test_long_values_are_cut_to_a_line() -> None:
    (line,) = complaints(SILO + f"[federation]\ntau = '{'x' * 500}'")
    assert len(line) < 200
    assert shorten("a\n  b") == "a b"


names = st.sampled_from([*section_types(), *(key for section in section_types() for key in options_of(section)), "x"])
leaves: st.SearchStrategy[Any] = (
    st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(st.characters(codec="utf-8"), max_size=5)
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4), max_leaves=12
)


@given(st.dictionaries(names, values, max_size=5), st.lists(st.text(max_size=20), max_size=2))
@settings(max_examples=200, deadline=None)
def test_no_recipe_however_wrong_brings_anything_but_sentences(table: dict[str, Any], overrides: list[str]) -> None:
    try:
        parse_recipe(tomli_w.dumps(table), "recipe.toml", overrides)
    except ConfigError as error:
        assert all(line.startswith(("recipe.toml: ", "override ")) for line in str(error).split("\n"))
