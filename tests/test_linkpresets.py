from __future__ import annotations

from pathlib import Path

import pytest

from photon.config import LinkConfig
from photon.errors import ConfigError
from photon.link.codec.notation import parse_pipeline
from photon.linkpresets import PRESETS, apply_link, codec_fields
from photon.recipe import dump_recipe, load_recipe, parse_recipe

SILOS = '[[silo]]\nname = "a"\ntext = "x"\n'


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_in_codecs_that_there_are(name: str) -> None:
    link = parse_recipe(f'link = "{name}"\n{SILOS}', "r").link
    assert link.preset == name
    assert {"up": link.up, "down": link.down} == {key: PRESETS[name][key] for key in ("up", "down")}
    assert set(PRESETS[name]) <= codec_fields() <= set(LinkConfig.model_fields)
    assert parse_pipeline(link.up).is_lossless == (name == "exact")


def test_the_three_ways_to_name_a_preset_are_one() -> None:
    written = parse_recipe(f'link = "tiny"\n{SILOS}', "r")
    assert written == parse_recipe(f'[link]\npreset = "tiny"\n{SILOS}', "r")
    assert written == parse_recipe(SILOS, "r", ["link=tiny"]) == parse_recipe(SILOS, "r", ["link.preset=tiny"])
    assert parse_recipe(dump_recipe(written), "again") == written


def test_what_is_given_beside_a_preset_wins() -> None:
    link = parse_recipe(f'[link]\npreset = "tiny"\nup = "int8"\n{SILOS}', "r").link
    assert (link.up, link.down) == (["int8"], PRESETS["tiny"]["down"])
    overridden = parse_recipe(SILOS, "r", ["link=tiny", 'link.down=["bf16", "zstd"]']).link
    assert (overridden.up, overridden.down) == (PRESETS["tiny"]["up"], ["bf16", "zstd"])


def test_an_overridden_preset_replaces_the_codecs_of_the_recipe_and_nothing_else() -> None:
    recipe = f'[link]\nup = ["int8"]\nup_feedback = 0.5\nfabric = "flower"\n{SILOS}'
    link = parse_recipe(recipe, "r", ["link=exact"]).link
    assert (link.up, link.up_feedback, link.fabric) == ([], 1.0, "flower")


def test_apply_link_leaves_its_argument_alone() -> None:
    given = {"preset": "balanced"}
    assert apply_link(given)["up"] == PRESETS["balanced"]["up"]
    assert given == {"preset": "balanced"}
    assert apply_link({"preset": 7}) == {"preset": 7}  # validation says what is wrong with it


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (['link.up=["topkk"]'], r"link\.up: there is no stage `topkk`; did you mean `topk`\?"),
        (['link.up=["int8(blok=64)"]'], r"link\.up: int8 has no parameter `blok`; did you mean `block`\?"),
        (['link.up=["int8(block=7)"]'], r"link\.up: block is 7: it must be a multiple of 8"),
        (['link.down=["zstd(level=high)"]'], r"link\.down: zstd: level must be an integer, not high"),
        (['link.down=["topk(scope=everywhere)"]'], r"link\.down: topk: scope must be one of chunk, tensor, global"),
        (['link.up=["int8(block=8, block=16)"]'], r"link\.up: int8: `block` is given twice"),
        (['link.up=["int8(64)"]'], r"link\.up: int8: `64` is no parameter; one is written name=value"),
        (['link.up=["int8("]'], r"link\.up: `int8\(` is no stage; one is written like topk"),
        (['link.up=["topk(density=nan)"]'], r"link\.up: topk: density must be a number, not nan"),
        (['link.up=["zstd", "int8"]'], r"link\.up: int8 stands behind zstd: a lossless stage comes last"),
        (['link.up=["lowrank", "topk(scope=global)"]'], r"link\.up: topk\(scope=global\) stands behind lowrank"),
        (["link.of=weights"], r"link\.of = weights is for lossy stages"),
        (['link.up=["sign"]', "link.of=weights", "link.up_feedback=rescale"], r"up_feedback = rescale .* differences"),
        (['link.up=["topk(scope=global)"]', "link.up_feedback=rescale"], r"rescale .* use topk with scope chunk or"),
        (["link.up_feedback=more"], r"link\.up_feedback=more: must be a number from 0 to 1 or `rescale`"),
        (["link=small"], r"link=small: must be one of exact, balanced, tiny"),
    ],
)
def test_codecs_that_there_are_not_are_refused_when_the_recipe_is_read(options: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_recipe(SILOS, "r", options)


@pytest.mark.parametrize("up", ['["topk(scope=tensor)"]', '["topk", "sign"]', '["lowrank"]', '["int4", "zstd"]', "[]"])
def test_updates_may_be_rescaled_where_each_tensor_is_encoded_by_itself(up: str) -> None:
    assert parse_recipe(SILOS, "r", [f"link.up={up}", "link.up_feedback=rescale"]).link.up_rescales
    assert parse_recipe(SILOS, "r", ['link.up=["topk(scope=global)"]', "link.up_feedback=0.9"]).link.up_decay == 0.9


def test_reading_an_exact_recipe_does_not_bring_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys; from photon.recipe import load_recipe; load_recipe('own-text'); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize(("way", "stages"), [("up", '["int4"]'), ("down", '["bf16"]'), ("up", '["int8", "zstd"]')])
def test_second_moments_are_not_shared_through_a_lossy_codec(way: str, stages: str) -> None:
    shares = ["node.optimizer=adamw", "federation.parts=share", f"link.{way}={stages}"]
    with pytest.raises(ConfigError, match=rf"link\.{way} is lossy, and federation\.parts share the second moment"):
        load_recipe("demo", shares)
    assert load_recipe("demo", [*shares, 'link.exact_tensors=["*/*_sq*"]'])
    assert load_recipe("demo", [*shares, "federation.parts=share(second=0)"])
    assert load_recipe("demo", [*shares, f'link.{way}=["zstd"]'])


@pytest.mark.parametrize("stages", ['["topk(density=0.1)"]', '["sign", "zstd"]', '["lowrank(rank=2)"]'])
def test_first_moments_are_not_shared_by_a_few_values_or_by_signs(stages: str) -> None:
    shares = [f"link.up={stages}", 'link.exact_tensors=["*/*_sq*"]']
    with pytest.raises(ConfigError, match=r"link\.up picks values or sends signs, .* first moment exp_avg, which"):
        load_recipe("demo", [*shares, "federation.parts=share"])
    assert load_recipe("demo", [*shares, 'federation.parts=["share(first=0, factored=true)"]'])
    assert load_recipe("demo", ["federation.parts=share", f"link.up={stages}", 'link.exact_tensors=["*/*"]'])


@pytest.mark.parametrize("preset", ["exact", "balanced", "tiny"])
def test_every_preset_goes_with_the_demo(preset: str) -> None:
    assert load_recipe("demo", [f"link={preset}"]).federation.parts
