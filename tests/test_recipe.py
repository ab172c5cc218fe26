"""Recipes: presets, files, overrides, and the way back to TOML."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from photon.config import Recipe
from photon.errors import ConfigError
from photon.options import TOP, options_of, section_types, toml_text
from photon.recipe import dump_recipe, load_recipe, parse_recipe, preset_names, preset_text
from photon.shapes import SHAPES

PAPER = {"paper-125m": "llama-125m", "paper-1.3b": "llama-1b", "paper-3b": "llama-3b", "paper-7b": "llama-7b"}
SMALL = """
[federation]
rounds = 3
[[silo]]
name = "core"
text = "x"
[[silo]]
name = "site.a"
text = ["y"]
batch_size = 2
"""

texts = st.text(st.characters(codec="utf-8"), max_size=12)
rates = st.floats(0, 1e6)
counts = st.integers(1, 2**40)
fractions = st.floats(0, 1)


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    shape = draw(st.sampled_from(["", *SHAPES]))
    if shape:
        return {"preset": shape, **draw(st.fixed_dictionaries({}, optional={"layers": counts, "tied": st.booleans()}))}
    heads = draw(st.sampled_from([1, 2, 6, 8]))
    exact = {"heads": st.just(heads), "width": st.integers(1, 99).map(lambda pairs: heads * 2 * pairs)}
    optional = {
        "kv_heads": st.sampled_from([k for k in (1, 2, 3) if heads % k == 0]),
        "hidden": counts,
        "positions": st.sampled_from(["rope", "alibi", "learned"]),
        "rope_theta": st.floats(1e-3, 1e9),
        "hf": texts,
    }
    return draw(st.fixed_dictionaries(exact, optional=optional))


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    """Valid recipes as raw tables: any subset of a good spread of options."""
    optional = {
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True),
        "about": texts,
        "seed": st.integers(0, 2**63 - 1),
        "model": models(),
        "data": st.fixed_dictionaries(
            {}, optional={"dir": texts, "max_bytes_per_silo": counts, "vocab_size": st.just(257)}
        ),
        "node": st.fixed_dictionaries(
            {},
            optional={
                "lr": rates | st.integers(0, 10**6),
                "betas": st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=2),
                "micro_batch_size": counts | st.just("auto"),
                "device": st.sampled_from(["auto", "cuda:12", "mps"]),
                "total_steps": counts,
            },
        ),
        "federation": st.fixed_dictionaries(
            {}, optional={"tau": counts, "outer": st.sampled_from(["fedavg", "none"]), "nodes_per_round": st.just(1)}
        ),
        "link": st.fixed_dictionaries(
            {},
            optional={
                "max_update_norm": st.floats(1e-300, 1e300),
                "preset": st.sampled_from(["exact", "balanced", "tiny"]),
                "up": st.sampled_from([[], "int8", ["topk(density=0.1, chunk=64)", "int4(block=32)", "zstd(level=9)"]]),
                "down": st.sampled_from([["int2"], ["lowrank(rank=3)"], "zstd"]),
                "of": st.just("difference"),
                "exact_tensors": st.lists(texts, max_size=2),
                "up_feedback": st.one_of(st.floats(0, 1), st.just("rescale")),
                "down_feedback": st.floats(0, 1),
            },
        ),
        "evaluation": st.fixed_dictionaries({}, optional={"prompt": texts}),
        "track": st.fixed_dictionaries({}, optional={"tensorboard": st.booleans(), "wandb": texts}),
    }
    silo = st.fixed_dictionaries(
        {"name": st.sampled_from(["core", "net.a", "Docs-3"]), "text": st.lists(texts, min_size=1, max_size=3) | texts},
        optional={"batch_size": counts, "device": st.sampled_from(["auto", "cpu", "cuda:3"]), "field": texts},
    )
    silos = st.lists(silo, min_size=1, max_size=3, unique_by=lambda s: s["name"])
    return draw(st.fixed_dictionaries({"silo": silos}, optional=optional))


def small(*overrides: str) -> Recipe:
    return parse_recipe(SMALL, "small.toml", overrides)


# The way to TOML and back


def returns(recipe: Recipe, text: str) -> bool:
    try:
        return parse_recipe(text, "dump") == recipe
    except ConfigError:
        return False


@given(tables())
@settings(max_examples=60, deadline=None)
def test_a_dump_reads_back_as_the_same_recipe(table: dict[str, Any]) -> None:
    recipe = parse_recipe(tomli_w.dumps(table), "generated")
    text = dump_recipe(recipe)
    assert returns(recipe, text)
    assert dump_recipe(parse_recipe(text, "dump")) == text


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_and_dump_resolved(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.about.endswith(".")
    text = dump_recipe(recipe)
    assert returns(recipe, text)
    lines = text.splitlines()
    for section in section_types():  # every option is there, with its meaning
        for option in options_of(section).values():
            assert any(
                line.startswith((f"{option.key} = ", f"# {option.key} ="))
                and line.endswith(f"  # {option.description}")
                for line in lines
            ), option.address


def test_plausible_wrong_dumps_do_not_read_back() -> None:
    recipe = small("about='''say \"a\\b\" # c'''", "model.preset=llama-3b", "link.max_update_norm=1e-7")
    assert returns(recipe, dump_recipe(recipe))
    unescaped = dump_recipe(recipe).replace(toml_text(recipe.about), f'"{recipe.about}"')
    rounded = dump_recipe(recipe).replace("1e-07", f"{1e-7:.6f}")
    only_what_was_written = "\n".join(line for line in dump_recipe(recipe).splitlines() if "hidden" not in line)
    assert not returns(recipe, unescaped)
    assert not returns(recipe, rounded)
    assert returns(recipe, only_what_was_written)  # the shape still fills it in
    assert not returns(recipe, only_what_was_written.replace('preset = "llama-3b"', 'preset = ""'))


def test_unset_options_are_commented_out() -> None:
    lines = dump_recipe(small()).splitlines()
    assert any(line.startswith("# nodes_per_round =  # ") for line in lines)
    assert "nodes_per_round" not in tomllib.loads("\n".join(lines))["federation"]


# Overrides


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("seed=3", None, "seed", 3),
        ("name=try-2", None, "name", "try-2"),
        ("about=two words", None, "about", "two words"),
        ('about="7"', None, "about", "7"),
        ("about=x=y", None, "about", "x=y"),
        ("federation.tau=64", "federation", "tau", 64),
        (" federation.tau = 64 ", "federation", "tau", 64),
        ("federation.tau=1_000", "federation", "tau", 1000),
        ("node.lr=1e-3", "node", "lr", 1e-3),
        ("node.lr=1", "node", "lr", 1.0),
        ("node.betas=[0.9, 0.99]", "node", "betas", (0.9, 0.99)),
        ("node.device=cuda:1", "node", "device", "cuda:1"),
        ("node.micro_batch_size=auto", "node", "micro_batch_size", "auto"),
        ("data.tokenizer=../some/path", "data", "tokenizer", "../some/path"),
        ("model.qk_norm=true", "model", "qk_norm", True),
        ('track.wandb=""', "track", "wandb", ""),
    ],
)
def test_overrides(override: str, section: str | None, key: str, value: object) -> None:
    recipe = small(override)
    assert getattr(recipe if section is None else getattr(recipe, section), key) == value
    # Nothing else changed: undoing that one option gives the recipe as it was.
    if section is None:
        undone = recipe.model_copy(update={key: getattr(small(), key)})
    else:
        part = getattr(recipe, section).model_copy(update={key: getattr(getattr(small(), section), key)})
        undone = recipe.model_copy(update={section: part})
    assert undone == small()


def test_an_override_keeps_the_other_options_of_its_section() -> None:
    assert small("federation.tau=64").federation.rounds == 3


def test_later_overrides_win() -> None:
    assert small("federation.tau=64", "federation.tau=5").federation.tau == 5
    assert small("federation.tau=bad", "federation.tau=5").federation.tau == 5


def test_silos_are_addressed_by_name_even_with_dots() -> None:
    recipe = small("silo.core.batch_size=4", 'silo.site.a.text=["p", "q"]')
    assert [silo.batch_size for silo in recipe.silo] == [4, 2]
    assert [silo.text for silo in recipe.silo] == [["x"], ["p", "q"]]


def test_a_list_of_silos_replaces_all_and_can_be_refined() -> None:
    recipe = small("silo.core.tau=9", 'silo=[{name="new", text="t", tau=7}]', "silo.new.batch_size=3")
    assert [(s.name, s.text, s.tau, s.batch_size) for s in recipe.silo] == [("new", ["t"], 7, 3)]


def test_an_overriding_shape_replaces_the_written_one_but_not_other_overrides() -> None:
    written = SMALL + "[model]\nwidth = 96\nheads = 3\nqk_norm = true\n"
    plain = parse_recipe(written, "w", ["model.preset=mpt-125m"]).model
    assert (plain.width, plain.heads, plain.qk_norm) == (768, 12, False)
    mixed = parse_recipe(written, "w", ["model.layers=2", "model.preset=mpt-125m"]).model
    assert (mixed.width, mixed.layers) == (768, 2)
    # A resolved recipe writes every field; another shape must still take effect on it.
    resolved = dump_recipe(parse_recipe(written, "w", ["model.preset=llama-7b"]))
    assert parse_recipe(resolved, "r", ["model.preset=mpt-125m"]).model == plain
    # No shape at all: what is written stays.
    assert parse_recipe(written, "w", ["model.preset=''"]).model.width == 96


def test_a_written_shape_yields_to_fields_beside_it() -> None:
    model = parse_recipe(SMALL + '[model]\npreset = "mpt-125m"\nlayers = 3\n', "w").model
    assert (model.layers, model.width, model.positions) == (3, 768, "alibi")


# Files


def test_load_a_file(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode())  # as some editors on Windows save it
    assert load_recipe(path) == load_recipe(str(path)) == small()


def test_a_preset_name_wins_over_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "mine").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    assert load_recipe("demo").name == "demo"
    assert load_recipe("mine") == small()


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no preset and no file `paper-125`; did you mean `paper-125m`"):
        load_recipe("paper-125")
    with pytest.raises(ConfigError, match=r"none\.toml: no such file"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'about = "\xe9"')
    with pytest.raises(ConfigError, match="UTF-8"):
        load_recipe(tmp_path / "latin.toml")
    with pytest.raises(ConfigError, match="no preset `dem`; did you mean `demo`"):
        preset_text("dem")


# The presets' content


def test_the_presets_of_the_issue_exist() -> None:
    assert set(preset_names()) >= {"demo", "own-text", *PAPER, *PAPER.values()}


def test_presets_name_only_text_that_their_owners_hold() -> None:
    assert {source for silo in load_recipe("demo").silo for source in silo.text} == {
        f"builtin:{area}" for area in ("core", "net", "tools", "docs")
    }
    for name in [*PAPER, *PAPER.values()]:
        recipe = load_recipe(name)
        assert [silo.text for silo in recipe.silo] == [[f"text/{silo.name}"] for silo in recipe.silo]
        assert f"text/site-1 to text/site-{len(recipe.silo)}" in recipe.about


@pytest.mark.parametrize(("paper", "twin"), PAPER.items())
def test_a_twin_differs_in_the_model_alone(paper: str, twin: str) -> None:
    ours, theirs = load_recipe(paper), load_recipe(twin)
    own = {"name": theirs.name, "about": theirs.about, "model": theirs.model}
    assert ours.model_copy(update=own) == theirs
    assert ours.model != theirs.model


def test_the_papers_numbers() -> None:
    small_model = load_recipe("paper-125m")
    assert small_model.total_steps == 40_960 == 5_120 * 256 // small_model.node.batch_size
    assert small_model.node.warmup_steps == 100 * 256 // small_model.node.batch_size
    assert small_model.federation.tau == 128
    # size -> peak rate, batch, owners, rounds, schedule
    billions = {
        "paper-1.3b": (2e-4, 512, 8, 19, 24_800),
        "paper-3b": (1.6e-4, 512, 4, 26, 51_500),
        "paper-7b": (1.2e-4, 1024, 4, 22, 63_900),
    }
    for name, numbers in billions.items():
        recipe = load_recipe(name)
        node, federation = recipe.node, recipe.federation
        assert (node.lr, node.batch_size, recipe.nodes_per_round, federation.rounds, recipe.total_steps) == numbers
        assert (federation.tau, node.warmup_steps) == (500, 100)
    for name in PAPER:
        recipe = load_recipe(name)
        node = recipe.node
        assert (node.optimizer, node.betas, node.eps, node.weight_decay) == ("adamw", (0.9, 0.95), 1e-8, 0.0)
        assert (node.clip_norm, node.schedule, node.final_lr_fraction) == (1.0, "cosine", 0.1)
        assert (recipe.federation.outer, recipe.federation.outer_lr) == ("fedavg", 1.0)
        assert (recipe.data.sequence_length, recipe.data.vocab_size) == (2048, 50_368)
        assert recipe.model.preset == name.replace("paper", "mpt")


def test_nothing_of_the_top_is_a_section() -> None:
    assert set(options_of(TOP)) == {"name", "about", "seed"}
