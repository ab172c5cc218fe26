"""`photon plan`: the commands that the documentation shows, as a person runs them, and every mistake told."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
from typer.testing import CliRunner

from photon import plan_measured
from photon.cli_plan import add_plan, with_nodes
from photon.devices import DEVICES, DISK_BYTES_PER_S, assumed_speed, device_named, device_speed
from photon.errors import InputError
from photon.plan_sweep import DEFAULTS, parse_sweep
from photon.plan_units import bandwidth_bits_per_s, bandwidth_text, time_s, time_text
from photon.recipe import load_recipe, parse_recipe

app = typer.Typer()
add_plan(app)
app.command(name="another")(lambda: None)  # with one command alone typer takes no name


def output(line: str, *more: str) -> str:
    """What it says; of the demo without its parts, unless others are named, so that bytes are those of the weights."""
    words = line.split()
    is_named = any("parts" in word or word == "--method" for word in (*words, *more))
    plain = [] if words[0] != "demo" or is_named else ["federation.parts=[]"]
    arguments = ["plan", words[0], *plain, *words[1:], *more]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def planned(line: str, *more: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output(line, *more, "--json"))
    return found


def refused(line: str) -> str:
    result = CliRunner().invoke(app, ["plan", *line.split()])
    assert isinstance(result.exception, InputError)
    return str(result.exception)


# Hours of training, exchange and all, then of the central run; ratios of wall time and of training; Gbit/s.
TABLE = {
    "paper-1.3b": ("17.95", "0.019", "17.97", "6.53", "20.22", "26.76", "0.67", "2.75", "17.7"),
    "paper-3b": ("25.08", "0.046", "25.12", "16.10", "40.48", "56.59", "0.44", "1.56", "45.1"),
    "paper-7b": ("95.49", "0.098", "95.58", "50.71", "97.25", "147.97", "0.646", "1.88", "21.7"),
}


@pytest.mark.parametrize("preset", TABLE)
def test_the_papers_table_from_one_command_each(preset: str) -> None:
    plan = planned(f"{preset} --paper")
    base = plan["baseline"]
    numbers = [
        *(seconds / 3600 for seconds in (plan["train_s"], plan["exchange_s"], plan["total_s"])),
        *(seconds / 3600 for seconds in (base["compute_s"], base["exchange_s"], base["total_s"])),
        plan["total_s"] / base["total_s"],
        base["compute_ratio"],
        plan["break_even"]["bits_per_s"] / 1e9,
    ]
    for number, text in zip(numbers, TABLE[preset], strict=True):
        assert abs(number - float(text)) <= 0.51 * 10 ** -len(text.partition(".")[2]), (number, text)


EXPLICIT = (
    "paper-7b --parameters 6658859008 --bytes-per-parameter 2 --steps-per-second 0.032 --topology ring "
    "--bandwidth 10Gbps --latency 0s --ideal --baseline-steps 21908 --baseline-steps-per-second 0.12"
)


def test_the_papers_inputs_spelled_out_are_the_same() -> None:
    assert planned(EXPLICIT) == planned("paper-7b --paper")


def test_the_papers_inputs_give_way_to_a_nodes_speed() -> None:
    tokens_per_step = 1024 * 2048
    given = planned(f"paper-7b --paper --tokens-per-second {0.064 * tokens_per_step}")
    assert given["train_s"] == pytest.approx(planned("paper-7b --paper --steps-per-second 0.064")["train_s"])
    assert given["train_s"] == pytest.approx(planned("paper-7b --paper")["train_s"] / 2)
    assert "A100" in " ".join(planned("paper-7b --paper --device a100")["assumptions"])
    assert "give one" in refused("paper-7b --paper --tokens-per-second 5 --steps-per-second 5")


def test_our_own_7b_differs_by_its_fewer_parameters_alone() -> None:
    paper, ours = planned("paper-7b --paper"), planned("paper-7b --paper --parameters 6649024512")
    ratio = 6649024512 / 6658859008
    assert ours["baseline"]["exchange_s"] == pytest.approx(ratio * paper["baseline"]["exchange_s"])
    assert ours["train_s"] == paper["train_s"]


def test_a_plan_says_everything() -> None:
    text = output("demo --bandwidth 100Mbps --price-device 2.5 --price-traffic 0.05")
    for word in ("1.31M parameters", "optimizer", "Aggregator", "a day", "upload", "per-step training", "pays up to",
                 "tau for 90 %", "money", "1.1 to 1.9 times", "assumed", "5,250,888 bytes"):  # fmt: skip
        assert word in text


@pytest.mark.parametrize(
    ("words", "told"),
    [("federation.tau=2", " 60 steps"), ("federation.tau=16", " 480 steps"), ("--compute-ratio 2.75", " 174.55 steps")],
)
def test_whole_steps_of_per_step_training_are_whole_numbers(words: str, told: str) -> None:
    assert f"training in{told}" in output(f"demo {words}")


def test_a_model_that_devices_share_is_said_to_fit() -> None:
    """128 GB beside `a device has 85.9 GB` would read as if they did not."""
    assert "DOES NOT FIT: a device has 85.9 GB" in output("paper-7b --device h100")
    assert "fits: shared by devices that have 85.9 GB each" in output("paper-7b --device h100 --devices-per-node 8")
    assert " a device has 85.9 GB" in output("paper-125m --device h100 --devices-per-node 8")


def test_at_most_is_said_where_a_lossless_stage_decides() -> None:
    text = output("demo", 'link.up=["int8", "zstd"]', "link.down=int8")
    lines = {line.split("  ")[0]: line for line in text.partition("A round")[0].splitlines()}
    assert "at most" in lines["a node's round, up"]
    assert "at most" not in lines["a node's round, down"]
    assert "at most" in lines["the run"]


def test_options_change_what_they_say() -> None:
    base = planned("demo --tokens-per-second 5000")
    assert base["memory"]["fits"] is None
    assert planned("demo --tokens-per-second 5000 --nodes 9")["nodes"] == 9
    assert planned("demo --steps-per-second 4")["phases_s"]["train"] == pytest.approx(16 / 4)
    assert planned("demo --tokens-per-second 5000 --at-once 2")["phases_s"]["train"] == 2 * base["phases_s"]["train"]
    assert planned("demo --tokens-per-second 5000 --control 9s --latency 0s")["phases_s"]["control"] == 9
    assert planned("demo --mfu 0.84 --devices-per-node 2")["train_s"] == pytest.approx(planned("demo")["train_s"] / 4)
    assert planned("demo federation.tau=64 --device a100")["tau"] == 64
    slow_up = planned("demo --bandwidth 10Mbps --bandwidth-down 1Gbps --aggregator-bandwidth 10Gbps --latency 0s")
    whole_s, saving_s = 5_250_888 * 8 / 10e6, slow_up["phases_s"]["save"] - 5_250_888 / DISK_BYTES_PER_S
    assert slow_up["phases_s"]["upload"] == pytest.approx(whole_s - saving_s)  # the rest is hidden behind it
    assert slow_up["phases_s"]["download"] == pytest.approx(5_250_888 * 8 / 1e9)
    assert planned("paper-7b --device 4090")["memory"]["fits"] is False
    assert planned("demo --compute-ratio 2")["baseline"]["steps"] == 240
    assert planned("demo --ideal --latency 0s")["break_even"] == {
        "bits_per_s": None, "always": True, "from_bits_per_s": None,
    }  # fmt: skip


def test_a_federation_that_trains_less_is_said_to_pay_from_a_bandwidth_on() -> None:
    said = output("demo --ideal --latency 0s --compute-ratio 0.6 federation.tau=1")
    assert re.search(r"pays +from [0-9.]+ Tbit/s on", said)
    between = output("demo --ideal --latency 0s --compute-ratio 0.9 federation.tau=4")
    assert re.search(r"pays, exchange hidden +to [0-9.]+ Tbit/s, from [0-9.]+ Tbit/s on", between)


def test_a_recipe_that_trains_in_one_place_is_no_federation_to_plan() -> None:
    """It was given the bytes and rounds of one, which it never exchanges."""
    assert "no federation to plan. Leave it out" in refused("demo federation.outer=none")


def test_a_sweep_is_a_table_and_json() -> None:
    assert [line.split()[0] for line in output("demo --sweep tau=16..100").splitlines()[-4:]] == [
        "16",
        "32",
        "64",
        "100",
    ]
    sweep = planned("demo --sweep tau=16..100")["sweep"]
    assert [point["value"] for point in sweep["points"]] == [16, 32, 64, 100]
    assert sweep["points"][0]["utilisation"] < sweep["points"][-1]["utilisation"]


@pytest.mark.parametrize("sweep", [None, *DEFAULTS])
def test_a_page_stands_alone(tmp_path: Path, sweep: str | None) -> None:
    path = tmp_path / "plan.html"
    output("demo --out", str(path), *(["--sweep", sweep] if sweep else []))
    page = path.read_text("utf-8")
    assert "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<svg") == (2 if sweep else 4)
    assert "<script" not in page


def test_the_path_of_a_page_is_printed_whole(tmp_path: Path) -> None:
    path = tmp_path / ("a-long-name-" * 12) / "[draft].svg"
    path.parent.mkdir()
    assert output("demo --out", str(path)).endswith(f"{path}\n")


def test_a_picture_alone_is_well_formed(tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    output("demo --sweep bandwidth=1Mbps..1Gbps --out", str(path))
    svg = ElementTree.fromstring(path.read_text("utf-8"))  # noqa: S314 - our own file
    named = "{http://www.w3.org/2000/svg}"
    assert len(svg.findall(f"{named}path")) == 3
    for circle in svg.iter(f"{named}circle"):
        assert 0 <= float(circle.get("cx", "nan")) <= 560
        assert 0 <= float(circle.get("cy", "nan")) <= 300


MISTAKES = {
    "demo --device h1000": "h100",
    "demo --bandwidth fast": "--bandwidth is a bandwidth such as",
    "demo --latency 50": "--latency is a time such as",
    "demo --utilisation 1": "below 1",
    "demo --mfu 0": "--mfu must be above 0",
    "demo --tokens-per-second 5 --steps-per-second 5": "give one",
    "demo --device cpu --tokens-per-second 5": "stand for it",
    "demo --paper": "paper-7b",
    "demo --sweep rounds=1..2": "tau or bandwidth",
    "demo --sweep tau=8..4": "A below B",
    "demo --sweep tau=8": "tau=16..512",
    "demo --sweep bandwidth=2Gbps..1Gbps": "upwards",
    "demo --out plan.pdf": ".html or .svg",
    "demmo": "demo",
    "demo link.up=int5": "int",
    "paper-7b --device measured": "name a device instead",
    "demo --out nowhere/plan.html": "--out nowhere/plan.html: there is no folder nowhere",
    f"demo --out {__file__}/plan.svg": "there is no folder",
    "demo --latency 1e308s": "--latency is a time such as 50ms or 0.1s, at most 1000h",
    "demo --control 1e9h": "--control is a time such as",
    "demo --bandwidth 1e-300bps": "from 1bps to 1000Tbps",
    "demo --sweep bandwidth=1bps..1e300bps": "from 1bps to 1000Tbps",
    "demo --mfu 1e300": "--mfu must be above 0, from 1e-06 to 1, not 1e+300",
    "demo --tokens-per-second 1e-320": "--tokens-per-second must be above 0",
    "demo --steps-per-second nan": "--steps-per-second must be above 0",
    "demo --bytes-per-parameter 1e308": "--bytes-per-parameter must be above 0, from 1e-06 to 1000",
    "demo --compute-ratio 1e308": "--compute-ratio must be above 0",
    "demo --baseline-steps 1e-320": "--baseline-steps must be above 0",
    "demo --price-device nan": "--price-device is at most",
    f"demo --sweep tau=1..{'9' * 5000}": "A below B, at most 1,000,000,000, not '1..999",
}


@pytest.mark.parametrize("line", MISTAKES, ids=lambda line: line[:60])
def test_mistakes_are_told(line: str) -> None:
    said = refused(line)
    assert MISTAKES[line] in said
    assert len(said) < 400


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "plan.html").mkdir()
    assert "plan.html cannot be written: " in refused(f"demo --out {tmp_path / 'plan.html'}")


@pytest.mark.parametrize(
    "words",
    [
        "--latency 1000h --control 1000h", "--bandwidth 1bps --bytes-per-parameter 1000", "--bandwidth 1000Tbps",
        "--mfu 1e-6", "--mfu 1 --devices-per-node 1000000", "--tokens-per-second 1e-3", "--tokens-per-second 1e15",
        "--steps-per-second 1e-9", "--steps-per-second 1e9", "--bytes-per-parameter 1e-6", "--compute-ratio 1e-3",
        "--compute-ratio 1000", "--baseline-steps 1e15 --baseline-steps-per-second 1e-9", "--at-once 1000000",
        "--parameters 1000000000000000 --bandwidth 1bps --price-traffic 1e12 --price-device 1e12",
        "--sweep bandwidth=1bps..1000Tbps", "--sweep tau=1..1000000000", "--utilisation 0.9999999999999999",
    ],
)  # fmt: skip
def test_at_the_ends_of_what_is_allowed_a_plan_is_still_made(words: str) -> None:
    plan = planned(f"demo {words}")
    assert all(math.isfinite(value) for value in plan.values() if isinstance(value, float))
    assert plan["round_s"] > 0
    output(f"demo {words}")


def test_units() -> None:
    for text, bits in {
        "10Mbps": 1e7,
        "1 Gbit/s": 1e9,
        "125MB/s": 1e9,
        "8kb/s": 8e3,
        "2.5Gbps": 2.5e9,
        "1e3bps": 1e3,
    }.items():
        assert bandwidth_bits_per_s(text, "--x") == bits
    for text in ("", "10", "0Mbps", "-1Mbps", "1..2Mbps", "1e999bps", "5 parsec"):
        with pytest.raises(InputError, match="--x is a bandwidth"):
            bandwidth_bits_per_s(text, "--x")
    assert [time_s(text, "--x") for text in ("50ms", "0s", "2 min", "1h", "500us")] == [0.05, 0, 120, 3600, 5e-4]
    with pytest.raises(InputError, match="--x is a time"):
        time_s("1e999s", "--x")
    assert [bandwidth_text(bits) for bits in (21.72e9, 1e6, 5.0)] == ["21.7 Gbit/s", "1.00 Mbit/s", "5.00 bit/s"]
    shown = [time_text(s) for s in (0, 0.0831, 12.5, 240, 95.58 * 3600, 20 * 86400)]
    assert shown == ["0", "83.1 ms", "12.5 s", "4.00 min", "95.6 h", "20.0 days"]


def test_a_sweep_ends_where_it_was_told_to() -> None:
    asked = parse_sweep("bandwidth=10Mbps..10Gbps")
    assert asked.values[0] == 1e7
    assert asked.values[-1] == pytest.approx(1e10)
    assert len(asked.values) == 13
    assert len(parse_sweep("bandwidth=1bps..1000Tbps").values) == 25


def test_devices() -> None:
    for device in DEVICES.values():
        assert 0 < device.mfu < 1
        assert device.source
    h100 = device_named("H100")
    speed = device_speed(h100, 2, None, 1e9)
    assert speed.tokens_per_s == pytest.approx(2 * 989e12 * h100.mfu / 1e9)
    assert speed == assumed_speed(speed.tokens_per_s)


def test_more_nodes_are_like_the_last() -> None:
    recipe = parse_recipe(
        '[[silo]]\nname = "a"\n[[silo]]\nname = "b"\nbatch_size = 7\n', "t", ["federation.nodes_per_round=1"]
    )
    grown = with_nodes(recipe, 4)
    assert [recipe.batch_size_of(silo) for silo in grown.silo] == [8, 7, 7, 7]
    assert grown.nodes_per_round == 4
    assert len({silo.name for silo in grown.silo}) == 4
    assert with_nodes(recipe, 1).silo == recipe.silo[:1]


def test_this_machine_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for limit in ("TRAIN_LIMIT_S", "STEP_LIMIT_S", "STAGE_LIMIT_S"):
        monkeypatch.setattr(plan_measured, limit, 0.05)
    overrides = ["model.layers=1", "data.vocab_size=300", "data.sequence_length=16", "node.device=cpu"]
    overrides += ["link.up=int8", "federation.parts=[]"]
    said: list[str] = []
    found = plan_measured.measure(load_recipe("demo", overrides), said.append)
    rates = [getattr(found.speed, name) for name in found.speed.__dataclass_fields__ if name != "at_once"]
    assert all(0 < rate < math.inf for rate in rates)
    assert found.told.startswith("measured here")
    assert len(said) == 3
    assert not list(tmp_path.iterdir())


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys, photon.cli_plan, photon.planner, photon.devices; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_parts_change_bytes_rounds_and_memory() -> None:
    plain, share = planned("demo"), planned("demo", 'federation.parts=["share(first=2, second=3)"]')
    size, most = share["bytes"]["node_up_bytes"], share["bytes"]["node_largest_up_bytes"]
    assert plain["bytes"]["node_up_bytes"] < size < most
    assert share["bytes"]["run_up_bytes"] == pytest.approx(share["rounds"] * share["nodes"] * size)
    assert share["memory"]["aggregator_bytes"] > plain["memory"]["aggregator_bytes"]
    assert share["memory"]["node_main_memory_bytes"] > plain["memory"]["node_main_memory_bytes"]
    text = output("demo", 'federation.parts=["share(first=2, second=3)", "fedprox"]')
    for word in ("mean over the run", "largest round", "node, device: parts", "in turn"):
        assert word in text


def test_a_tau_that_varies_is_walked_through() -> None:
    ramp = planned("demo", "federation.parts=tau_ramp(first=8)")
    assert (ramp["least_tau"], ramp["most_tau"], ramp["mean_tau"]) == (8, 24, 16)
    assert "8 to 24 (mean 16.0) local steps" in output("demo", "federation.parts=tau_ramp(first=8)")
    assert ramp["train_s"] == pytest.approx(planned("demo")["train_s"])
    assert "tau follows" in " ".join(planned("demo", "federation.parts=tau_by_agreement")["assumptions"])
    assert "tau follows" not in " ".join(ramp["assumptions"])


def test_drop_outs_are_planned_in_the_mean() -> None:
    plain, thinned = planned("demo"), planned("demo federation.dropout=0.5")
    share = (4 * 0.5 + 0.5**4) / 4
    assert thinned["bytes"]["run_up_bytes"] == pytest.approx(share * plain["bytes"]["run_up_bytes"])
    assert thinned["tokens"] == pytest.approx(share * plain["tokens"], rel=0.01)
    assert "federation.dropout" in " ".join(thinned["assumptions"])


def test_a_sweep_leaves_out_what_parts_do_not_allow(tmp_path: Path) -> None:
    sweep = planned("demo --sweep tau=8..512", "federation.parts=fragments(count=4)")["sweep"]
    assert [point["value"] for point in sweep["points"]] == [8, 16, 32, 64, 128]  # 480 steps: 4 rounds of 128
    result = CliRunner().invoke(app, ["plan", "demo", "--sweep", "tau=256..512", "federation.parts=fragments(count=4)"])
    assert "it takes 4 rounds to exchange every weight once" in str(result.exception)
    output("demo --out", str(tmp_path / "plan.html"), "federation.parts=fragments(count=4)")


def test_a_sweep_ends_with_the_run(tmp_path: Path) -> None:
    sweep = planned("demo --sweep tau=16..2000")["sweep"]
    assert [point["value"] for point in sweep["points"]] == [16, 32, 64, 128, 256]  # the run has 480 steps
    assert {point["tokens"] for point in sweep["points"]} == {480 * 4 * 4 * 256}
    assert planned("demo --sweep tau=1..480")["sweep"]["points"][-1]["value"] == 480
    assert "tau=481..600 lies beyond the run: it is over after 480 local steps" in refused("demo --sweep tau=481..600")
    short = "demo federation.rounds=1 federation.tau=4 node.warmup_steps=0"
    output(short, "--out", str(tmp_path / "short.html"))
    assert (tmp_path / "short.html").read_text("utf-8").count("<svg") == 2  # over bandwidth alone
    assert "tau=8..1024 lies beyond the run" in refused(f"{short} --out {tmp_path / 'short.svg'}")
    output("demo --out", str(tmp_path / "demo.html"))
    page = (tmp_path / "demo.html").read_text("utf-8")
    assert "training, 256:" in page
    assert "training, 512:" not in page


def test_parameters_alone_have_no_fragments() -> None:
    found = planned("demo --parameters 1000000 --bytes-per-parameter 2", "federation.parts=share(second=0)")
    assert 2_000_000 < found["bytes"]["node_up_bytes"] <= 4_000_000
    assert "has one tensor" in refused("demo --parameters 1000000 federation.parts=fragments")


def test_a_method_is_laid_over_the_recipe_as_train_lays_it() -> None:
    eager = planned("demo --method eager-diloco --bandwidth 10Mbps")
    assert eager["tau"] == planned("demo")["tau"]
    assert eager["hidden_s"] > 0
    assert eager["round_s"] == pytest.approx(sum(eager["phases_s"].values()) - eager["hidden_s"])
    plain = planned("demo --method diloco --bandwidth 10Mbps")
    assert plain["hidden_s"] == 0
    assert plain["round_s"] > eager["round_s"]
    assert planned("demo --method streaming-diloco")["rounds"] == 4 * planned("demo")["rounds"]
    assert "beside each other" in output("demo --method eager-diloco --bandwidth 10Mbps")
    assert "beside each other" not in output("demo --method diloco --bandwidth 10Mbps")
    assert "no method" in refused("demo --method nonsense")
