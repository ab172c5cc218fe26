"""One whole run with real processes, and everything that can be asked of it afterwards."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from tests.faults.federations import OWNERS, run, run_here, write_recipe

from photon.aggregator.state import RoundStore
from photon.errors import InputError
from photon.evaluate import continue_text, evaluate_run, export_run
from photon.events import Evaluated, RoundDone, Sampled
from photon.recipe import load_recipe
from photon.run import write_results
from photon.runfolder import RunFolder
from photon.summary import Summary
from photon.track import read_events


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("federation"), rounds=4)


@pytest.fixture(scope="module")
def finished(recipe: Path) -> RunFolder:
    """A run of three owners, two of them sampled each round, one with a batch and a tau of its own."""
    text = recipe.read_text().replace("[federation]\n", "[federation]\nnodes_per_round = 2\n", 1)
    own = text.replace('name = "bob"\n', 'name = "bob"\nbatch_size = 3\ntau = 2\n')
    path = recipe.with_name("unequal.toml")
    path.write_text(own)
    folder = RunFolder(recipe.parent / "run")
    code, output = run("train", path, "--run", folder.path)
    assert code == 0, output
    assert str(folder.report) in output
    assert str(folder.model) in output
    return folder


def test_the_folder_holds_what_the_documentation_says(finished: RunFolder) -> None:
    names = {entry.name for entry in finished.path.iterdir() if not entry.name.startswith(".")}
    assert names == {
        "recipe.toml", "run.json", "metrics.jsonl", "summary.json", "report.html", "tokenizer", "rounds", "nodes",
        "model", "logs",
    }  # fmt: skip
    assert sorted(entry.name for entry in (finished.path / "nodes").iterdir()) == sorted(OWNERS)


def test_what_is_shared_is_not_changed_in_mid_run(finished: RunFolder, tmp_path: Path) -> None:
    """Nobody has the moments that a `share` put in later is to exchange."""
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(finished.path, folder.path)
    recipe = folder.recipe.read_text()
    changed = recipe.replace("parts = []", 'parts = ["share"]').replace("rounds = 4", "rounds = 5")
    folder.recipe.write_text(changed)
    code, output = run_here("train", "--resume", folder.path)
    assert code == 1, output
    said = "has shared no optimizer state since it began, and its recipe now says exp_avg, exp_avg_sq, momentum_buffer"
    assert said in output
    folder.recipe.write_text(recipe)
    assert RoundStore(folder.path / "rounds", 1, 0).load(folder.identity().run).progress.round == 4  # nothing is lost


def test_a_batch_size_that_was_changed_holds_from_the_resume_on(finished: RunFolder, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(finished.path, folder.path)
    recipe = folder.recipe.read_text().replace("\nbatch_size = 2 ", "\nbatch_size = 1 ", 1)
    recipe = recipe.replace("\nworkers = 2 ", "\nworkers = 1 ")  # the second's start-up shows nothing here
    folder.recipe.write_text(recipe.replace("rounds = 4", "rounds = 5"))
    code, output = run_here("train", "--resume", folder.path)
    assert code == 0, output
    last = [event for event in read_events(folder.metrics) if isinstance(event, RoundDone)][-1]
    tokens_of = {"ada": 1 * 4 * 32, "bob": 3 * 2 * 32, "cyd": 1 * 4 * 32}
    assert {name: node.tokens for name, node in last.nodes.items()} == {name: tokens_of[name] for name in last.nodes}


def test_the_same_kinds_of_other_weights_are_told_apart(recipe: Path, tmp_path: Path) -> None:
    """Muon has second moments of the embedding and the norms alone, AdamW of every weight."""
    folder = RunFolder(tmp_path / "run")
    shares = ('federation.parts=["share(first=0)"]', "federation.rounds=1", "node.optimizer=muon", "node.workers=1")
    code, output = run_here("train", recipe, *shares, "--run", folder.path)
    assert code == 0, output
    folder.recipe.write_text(folder.recipe.read_text().replace('optimizer = "muon"', 'optimizer = "adamw"'))
    code, output = run_here("train", "--resume", folder.path)
    assert code == 1, output
    told = re.search(r"node.optimizer: .* shared exp_avg_sq of (\d+) weights .* now says exp_avg_sq of (\d+) w", output)
    assert told is not None, output
    assert int(told[1]) < int(told[2])


def test_the_summary_adds_up(finished: RunFolder) -> None:
    summary = Summary.model_validate_json((finished.path / "summary.json").read_text())
    rounds = [event for event in read_events(finished.metrics) if isinstance(event, RoundDone)]
    tokens_of = {"ada": 2 * 4 * 32, "bob": 3 * 2 * 32, "cyd": 2 * 4 * 32}
    for event in rounds:
        assert {name: node.tokens for name, node in event.nodes.items()} == {n: tokens_of[n] for n in event.nodes}
        assert len(event.nodes) == 2
    assert summary.status == "finished"
    assert summary.rounds == 4
    assert summary.sequential_steps == 16
    assert summary.nodes == 3
    assert summary.tokens == sum(event.round_tokens for event in rounds)
    payload = summary.parameters * 4
    assert summary.payload_bytes == payload
    assert summary.bytes_ddp == 2 * payload * 16 * 2
    # Up: an update for each sampled node. Down: the base to each, to who only scores it (rounds 0 and 2), and the last.
    assert 8 * payload < summary.bytes_up < 8 * payload * 1.2
    assert (8 + 2 + 3) * payload < summary.bytes_down < (8 + 2 + 3) * payload * 1.2
    weights = finished.rounds / "000004" / "model.safetensors"
    assert summary.model_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert summary.after is not None
    assert set(summary.after.silos) == set(OWNERS)


def test_evaluate_repeats_the_last_score(finished: RunFolder) -> None:
    last = [event for event in read_events(finished.metrics) if isinstance(event, Evaluated)][-1]
    pooled, silos = evaluate_run(finished, [], None)
    assert math.isclose(pooled.loss, last.pooled.loss, rel_tol=1e-6)
    assert math.isclose(pooled.bits_per_byte, last.pooled.bits_per_byte, rel_tol=1e-6)
    assert all(math.isclose(silos[name].loss, last.silos[name].loss, rel_tol=1e-6) for name in OWNERS)


def test_evaluate_scores_given_text_to_its_last_token(finished: RunFolder, tmp_path: Path) -> None:
    from photon.run import load_trained

    text = "ada 4 of 3 things; bob 7 of 2 things; " * 9
    (tmp_path / "text.txt").write_text(text)
    pooled, _ = evaluate_run(finished, [str(tmp_path / "text.txt")], None)
    loaded, model, _ = load_trained(finished)
    ids = [*loaded.tokenizer.encode(text), loaded.tokenizer.end_of_text]
    assert pooled.tokens == len(ids) - 1
    nats = 0.0
    for start in range(0, len(ids) - 1, 32):
        window = torch.tensor([ids[start : start + 33]])
        with torch.no_grad():
            scores = model.logits(window[:, :-1]).log_softmax(-1)
        nats -= float(scores.gather(-1, window[:, 1:, None]).sum())
    assert math.isclose(pooled.loss, nats / (len(ids) - 1), rel_tol=1e-5)
    assert math.isclose(
        pooled.bits_per_byte, nats / math.log(2) / (len(text) * (len(ids) - 1) / len(ids)), rel_tol=1e-5
    )


def test_an_earlier_round_is_there_too(finished: RunFolder, tmp_path: Path) -> None:
    """As the error on a damaged one says: ask for another with --round."""
    rounds = RoundStore(finished.path / "rounds", 2, 0).rounds()
    assert rounds[-1] == 4
    newest, earlier = (evaluate_run(finished, [], None, round_index)[0].loss for round_index in (None, rounds[-2]))
    assert evaluate_run(finished, [], None, 4)[0].loss == newest < earlier
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(finished.path, folder.path)
    (model,) = (folder.path / "rounds" / "000004").glob("model*")
    data = model.read_bytes()
    model.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    code, output = run_here("export", folder.path, tmp_path / "model")
    assert code == 1
    assert f"Other committed rounds: {rounds[:-1]}; ask for one with --round N" in " ".join(output.split())
    code, output = run_here("export", folder.path, tmp_path / "model", "--round", rounds[-2])
    assert code == 0, output
    assert (tmp_path / "model" / "config.json").is_file()


def test_scores_stand_beside_the_pattern_that_was_given(finished: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ada 4 of 3 things; bob 7 of 2 things; " * 9)
    pattern = f"{tmp_path}/[a-z].txt"
    code, output = run_here("evaluate", finished.path, "--data", pattern)
    assert code == 0, output
    assert pattern in "".join(line.split("│")[1].strip() for line in output.splitlines() if "│" in line)


def test_records_may_hold_their_text_in_another_field(finished: RunFolder, tmp_path: Path) -> None:
    text, records = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("ada 4 of 3 things; " * 9)
    records.write_text(json.dumps({"id": 1, "body": text.read_text()}))
    code, output = run_here("evaluate", finished.path, "--data", records)
    assert code == 2
    said = " ".join(output.split())
    assert "line 1: no field 'text'; fields here: 'id', 'body'" in said
    assert "--field" in said
    code, output = run_here("evaluate", finished.path, "--data", records, "--field", "body")
    assert code == 0, output
    assert evaluate_run(finished, [str(records)], None, field="body")[0] == evaluate_run(finished, [str(text)], None)[0]


def test_a_prompt_that_is_no_text_is_refused(finished: RunFolder) -> None:
    with pytest.raises(InputError, match="character 3 of the prompt is not UTF-8"):
        continue_text(finished, "hi\udcff", 4, 1.0, 0, 0)


def test_generation_follows_its_seed(finished: RunFolder) -> None:
    texts = [continue_text(finished, "ada", 24, 1.0, 0, seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_exported_model_is_the_trained_one(finished: RunFolder, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from photon.run import load_trained

    export_run(finished, tmp_path / "model")
    loaded, model, _ = load_trained(finished)
    text = "bob 7 of 2 things;"
    for folder in (tmp_path / "model", finished.model):
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer(text)["input_ids"] == loaded.tokenizer.encode(text)
        ids = torch.tensor([loaded.tokenizer.encode(text)])
        with torch.no_grad():
            assert (theirs(ids).logits - model.logits(ids)).abs().max() < 1e-5


def test_results_can_be_written_again(finished: RunFolder) -> None:
    before = (finished.path / "summary.json").read_bytes(), finished.report.read_bytes()
    write_results(finished)
    assert ((finished.path / "summary.json").read_bytes(), finished.report.read_bytes()) == before


def test_the_recipe_in_the_folder_is_the_one_that_ran(finished: RunFolder, recipe: Path) -> None:
    ours = load_recipe(finished.recipe)
    assert ours == load_recipe(recipe.with_name("unequal.toml"))
    assert finished.changes() == []
    text = finished.recipe.read_text()
    finished.recipe.write_text(text + "\n# edited\n")
    assert "was changed since the run began" in finished.changes()[0]
    finished.recipe.write_text(text)


def test_samples_before_and_after(finished: RunFolder) -> None:
    samples = [event for event in read_events(finished.metrics) if isinstance(event, Sampled)]
    assert [sample.round for sample in samples] == [0, 4]


def test_the_baseline_trains_the_same_tokens_in_one_place(recipe: Path) -> None:
    folder = recipe.parent / "baseline"
    code, output = run_here("train", recipe, "federation.outer=none", "node.workers=1", "--run", folder)
    assert code == 0, output
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["nodes"] == 1
    assert summary["tokens"] == 4 * 4 * 3 * 2 * 32  # rounds x tau x owners x batch x sequence
    assert summary["sequential_steps"] == 16
    assert summary["bytes_ratio"] is None
    assert set(summary["after"]["silos"]) == set(OWNERS)
