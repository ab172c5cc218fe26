"""What an owner decides is read as it was written, and holds: hours, bytes, and no larger batch than the run allows."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.support import read_again, tiny_recipe

from photon.errors import ConfigError
from photon.parts.method import Method, part_class, part_names
from photon.recipe import preset_text
from photon.siteconfig import Caps, SiteConfig, load_site, node_recipe

DAY = 24 * 60
minutes = st.integers(0, DAY - 1)


def at(minute: int) -> datetime:
    return datetime(2026, 3, 1) + timedelta(minutes=minute)


def clock(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"


def site(folder: Path, text: str) -> SiteConfig:
    path = folder / "site.toml"
    path.write_text(text)
    return load_site(path)


# --- hours -----------------------------------------------------------------------------------------------------------


def open_minutes(spans: list[tuple[int, int]]) -> set[int]:
    """By walking the clock: from each beginning on, minute by minute, until the end comes (again: that is all day)."""
    found = set()
    for begin, end in spans:
        minute = begin
        while True:
            found.add(minute)
            minute = (minute + 1) % DAY
            if minute == end:
                break
    return found


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(minutes, minutes), min_size=1, max_size=3))
@example([(0, 0)])
@example([(DAY - 1, 0)])
def test_hours_are_those_of_a_clock_also_across_midnight(spans: list[tuple[int, int]]) -> None:
    caps = Caps(hours=[f"{clock(begin)}-{clock(end)}" for begin, end in spans])
    assert {minute for minute in range(DAY) if caps.is_open(at(minute))} == open_minutes(spans)


def test_a_night_is_open_at_night() -> None:
    caps = Caps(hours=["20:00-06:00"])
    told = {clock(minute): caps.is_open(at(minute)) for minute in (0, 359, 360, 720, 1199, 1200, 1439)}
    assert told == {
        "00:00": True, "05:59": True, "06:00": False, "12:00": False, "19:59": False, "20:00": True, "23:59": True,
    }  # fmt: skip
    assert caps.is_open(datetime(2026, 3, 1, 5, 59, 59, 999_999))  # to the end of the last minute


def test_without_hours_it_is_always_open() -> None:
    assert all(Caps().is_open(at(minute)) for minute in range(DAY))


@pytest.mark.parametrize("span", ["20:00", "24:00-06:00", "8:00-9:00", "20:60-21:00", "20:00 - 06:00", "", "a-b"])
def test_hours_that_are_none_are_refused_by_name(span: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"site\.toml: caps\.hours: hours are written HH:MM-HH:MM, not"):
        site(tmp_path, f'text = "x"\n[caps]\nhours = ["10:00-11:00", "{span}"]')


# --- sizes -----------------------------------------------------------------------------------------------------------

UNITS = {"B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4}


@settings(deadline=None)
@given(st.integers(0, 9999), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " ", "  "]))
def test_a_size_is_decimal_as_networks_are_sold(number: int, unit: str, space: str) -> None:
    assert Caps(bytes_per_day=f"{number}{space}{unit}").daily_bytes == number * UNITS[unit]
    assert unit == "B" or number == 0 or Caps(bytes_per_day=f"{number}{unit}").daily_bytes != number  # it can fail


def test_a_size_may_have_a_fraction_and_none_is_no_limit() -> None:
    assert Caps(bytes_per_day="1.5GB").daily_bytes == 1_500_000_000
    assert Caps(bytes_per_day="0B").daily_bytes == 0  # nothing at all, which is not the same as no limit
    assert Caps().daily_bytes is None


@pytest.mark.parametrize("size", ["40", "40GiB", "40 gb", "-1GB", "GB", "1e3MB", "40GB a day", ".5GB", "1,5GB"])
def test_a_size_that_is_none_is_refused_by_name(size: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"caps\.bytes_per_day: a size is written like 500MB or 40GB, not"):
        site(tmp_path, f'text = "x"\n[caps]\nbytes_per_day = "{size}"')


# --- the file --------------------------------------------------------------------------------------------------------


def test_everything_an_owner_may_say_is_read(tmp_path: Path) -> None:
    found = site(
        tmp_path,
        '\ufeffname = "ada"\ntext = ["/a", "/b"]\nweights = [1, 3]\nfield = "body"\ndata = "/d"\nmax_bytes = 5\n'
        'batch_size = 2\nmicro_batch_size = 1\ndevice = "cuda:1"\nthreads = 3\nstreams = 8\n'
        '[caps]\nbytes_per_day = "1MB"\nhours = ["01:00-02:00"]\nmax_update_norm = 1\n',
    )
    assert found == SiteConfig(
        name="ada", text=["/a", "/b"], weights=[1.0, 3.0], field="body", data="/d", max_bytes=5, batch_size=2,
        micro_batch_size=1, device="cuda:1", threads=3, streams=8,
        caps=Caps(bytes_per_day="1MB", hours=["01:00-02:00"], max_update_norm=1.0),
    )  # fmt: skip


def test_one_text_needs_no_list(tmp_path: Path) -> None:
    assert site(tmp_path, 'text = "/a"').text == ["/a"]


WRONG = {
    "text": "text = []",
    "text.1": 'text = ["a", 7]',
    "batch_size": 'text = "a"\nbatch_size = 0',
    "threads": 'text = "a"\nthreads = "many"',
    "streams": 'text = "a"\nstreams = 17',
    "device": 'text = "a"\ndevice = "tpu"',
    "name": 'text = "a"\nname = "../ada"',
    "max_bytes": 'text = "a"\nmax_bytes = 1.5',
    "caps.max_update_norm": 'text = "a"\n[caps]\nmax_update_norm = 0',
    "caps": 'text = "a"\ncaps = 7',
    "batch_sizes: .*did you mean `batch_size`": 'text = "a"\nbatch_sizes = 2',
    "caps.hour: .*did you mean `hours`": 'text = "a"\n[caps]\nhour = []',
    "caps.batch_size: .*there are: bytes_per_day, hours, max_update_norm": 'text = "a"\n[caps]\nbatch_size = 1',
}


@pytest.mark.parametrize("key", WRONG)
def test_what_is_wrong_is_named_with_its_key(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/site\.toml: {key}"):
        site(tmp_path, WRONG[key])


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as found:
        site(tmp_path, 'streams = 0\ntexts = "a"\n[caps]\nhours = ["x"]')
    lines = str(found.value).splitlines()
    keys = {line.split(": ")[1] for line in lines}
    assert keys == {"text", "streams", "texts", "caps.hours"}
    assert len(lines) == len(keys)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such file; it holds at least `text ="):
        load_site(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match=r"site\.toml: cannot be read as TOML"):
        site(tmp_path, "text = [")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        load_site(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'text = "caf\xe9"')
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        load_site(tmp_path / "latin.toml")
    with pytest.raises(ConfigError, match=r"is a recipe, .* a site has a file of its own; it holds at least `text ="):
        site(tmp_path, preset_text("demo"))


# --- the owner's recipe ----------------------------------------------------------------------------------------------

RUN = tiny_recipe({"ada": {"text": [], "batch_size": 4, "tau": 3}, "bob": {"text": []}})


# Of parts that do not go with plain FedAvg by SGD: how they are written, and what they need.
_NESTEROV = {"federation": {"outer": "nesterov"}}
_ADAMW = {"node": {"optimizer": "adamw"}}
PARTS_OF_A_SITE: dict[str, tuple[str, dict[str, Any]]] = {
    "fedlalr": ("fedlalr", _ADAMW | {"federation": {"weighting": "uniform"}}),
    "momentum_warmup": ("momentum_warmup", _NESTEROV),
    "outer_momentum_schedule": ("outer_momentum_schedule", _NESTEROV),
    "share": ("share(second=2)", _ADAMW),
    "slow_momentum": ("slow_momentum(beta=0.95)", _ADAMW),
    "stale": ("stale", {"federation": {"quorum": 0.5}}),
    "tau_ramp": ("tau_ramp(first=1)", {}),
    "trimmed_mean": ("trimmed_mean(share=0.3)", {}),
}


def test_the_owner_puts_its_own_in_and_leaves_the_rest(tmp_path: Path) -> None:
    own = node_recipe(RUN, "ada", SiteConfig(text=["/mine"], field="body", device="cpu", threads=3))
    (silo,) = own.silo
    assert (silo.name, silo.text, silo.field) == ("ada", ["/mine"], "body")
    assert (own.batch_size_of(silo), own.tau_of(silo)) == (4, 3)
    assert (own.node.workers, own.node.threads) == (1, 3)
    assert own.total_steps == RUN.total_steps  # the schedule is the run's, whoever trains
    hardware = {"device", "threads", "workers", "micro_batch_size"}
    assert own.node.model_dump(exclude=hardware) == RUN.node.model_dump(exclude=hardware)
    for section in ("seed", "model", "data", "evaluation", "checkpoint"):
        assert getattr(own, section) == getattr(RUN, section), section
    assert not any("bob" in str(silo) for silo in own.silo)


@pytest.mark.parametrize(("wanted", "expected"), [(None, 4), (1, 1), (4, 4)])
def test_a_batch_up_to_what_the_run_allows(wanted: int | None, expected: int) -> None:
    own = node_recipe(RUN, "ada", SiteConfig(text=["/mine"], batch_size=wanted))
    assert own.batch_size_of(own.silo[0]) == expected


@pytest.mark.parametrize(("name", "allowed"), [("ada", 4), ("bob", 2)])
def test_a_larger_batch_is_refused(name: str, allowed: int) -> None:
    """More tokens a step would weigh more in the merge than the operator granted."""
    with pytest.raises(ConfigError, match=f"batch_size = {allowed + 1}, the run allows this node {allowed}; .*{name}"):
        node_recipe(RUN, name, SiteConfig(text=["/mine"], batch_size=allowed + 1))


def test_the_shorter_update_norm_holds() -> None:
    def norm(run: float | None, owner: float | None) -> float | None:
        recipe = tiny_recipe(["ada"], link={"max_update_norm": run} if run else {})
        return node_recipe(
            recipe, "ada", SiteConfig(text=["/m"], caps=Caps(max_update_norm=owner))
        ).link.max_update_norm

    assert [norm(None, None), norm(2.0, None), norm(None, 3.0), norm(2.0, 3.0), norm(3.0, 2.0)] == [
        None, 2.0, 3.0, 2.0, 2.0,
    ]  # fmt: skip


@pytest.mark.parametrize("name", part_names())
def test_a_site_can_read_a_recipe_of_any_part(name: str) -> None:
    """It knows one owner, itself; what a part needs of all of them, it cannot see."""
    text, changes = PARTS_OF_A_SITE.get(name, (name, {}))
    sections = {"federation": {"rounds": 4, "parts": [text]} | changes.get("federation", {})}
    run = tiny_recipe("abcd", **changes | sections)
    read_again(run)  # as the Aggregator reads it
    own = node_recipe(run, "b", SiteConfig(text=["/mine"]))
    assert read_again(own, of_node=True) == own
    assert [type(part).__name__ for part in Method.of(own).parts] == [part_class(name).__name__]


def test_a_sampled_run_becomes_a_recipe_of_one_node() -> None:
    recipe = tiny_recipe(["ada", "bob", "cyd"], federation={"nodes_per_round": 2})
    assert node_recipe(recipe, "bob", SiteConfig(text=["/m"])).nodes_per_round == 1


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("eve", {}, "no node called 'eve'; its nodes are ada, bob. Ask"),
        ("ada", {"weights": [1.0]}, r"site\.toml: silo ada: 1 weights for 2 sources"),
        ("ada", {"weights": [0.0, 0.0]}, r"site\.toml: silo ada: weights must be >= 0 and not all zero"),
    ],
)
def test_what_cannot_be_followed_says_why(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        node_recipe(RUN, name, SiteConfig(text=["/a", "/b"], **changes))
