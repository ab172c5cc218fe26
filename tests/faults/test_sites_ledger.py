"""The ledger against what really crossed: a compressed federation, with a counting proxy in front of every node."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.faults.federations import finish, start
from tests.faults.proxy import Proxy
from tests.faults.sites import Sites, recipe_text, write_texts

from photon.link.body import whole_file
from photon.link.codec.notation import parse_pipeline
from photon.link.ledger import Traffic
from photon.link.tensors import iterate_tensors

pytestmark = [pytest.mark.sites, pytest.mark.timeout(900)]

OWNERS, ROUNDS, WIDTH = ("ada", "bob"), 6, 320
LINK = """
[link]
up = ["topk(density=0.05, chunk=256)", "int2"]
down = ["int8"]
"""


def wide(recipe: str) -> str:
    assert recipe.count("width = 32") == 1
    return recipe.replace("width = 32", f"width = {WIDTH}")


def local(folder: Path) -> dict[str, Any]:
    """summary.json of the same recipe and text on the local fabric."""
    write_texts(folder, OWNERS)
    recipe = folder / "local.toml"
    recipe.write_text(wide(recipe_text(folder, OWNERS, ROUNDS, with_text=True, extra=LINK)))
    code, output = finish(start("train", recipe, "--run", folder / "local"), 240.0)
    assert code == 0, output
    found: dict[str, Any] = json.loads((folder / "local" / "summary.json").read_text())
    return found


def test_the_ledger_is_what_crossed_and_a_compressed_run_is_the_same_everywhere(tmp_path: Path) -> None:
    here = local(tmp_path / "texts")
    with Sites(tmp_path / "sites", tmp_path / "texts", rounds=ROUNDS, owners=OWNERS, extra=LINK) as sites:
        sites.recipe.write_text(wide(sites.recipe.read_text()))
        sites.start_aggregator()
        with Proxy("127.0.0.1", sites.port) as ada, Proxy("127.0.0.1", sites.port) as bob:
            proxies = {"ada": ada, "bob": bob}
            for owner, proxy in proxies.items():
                sites.start_node(owner, port=proxy.port)
            sites.finish()
            assert sites.model_sha256() == here["model_sha256"]
            crossed = {owner: (proxy.bytes_down, proxy.bytes_up) for owner, proxy in proxies.items()}
        summary = json.loads((sites.run_folder / "summary.json").read_text())["link"]
        rounds = [
            {owner: Traffic.model_validate(traffic) for owner, traffic in event["round_link"].items()}
            for event in sites.rounds()
        ]
        accounts = json.loads((sites.run_folder / "exchange" / "traffic.json").read_text())

    # Bodies, to the byte: every round the node sent one update of just the size that the codec foretells, and got one
    # difference of the size foretold, but in the first round, where everybody makes the untrained model.
    model = dict(iterate_tensors(whole_file(sites.run_folder / "rounds" / f"{ROUNDS:06}" / "model.safetensors")))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.items()}
    dtypes = {name: tensor.dtype for name, tensor in model.items()}
    up = parse_pipeline(["topk(density=0.05, chunk=256)", "int2"]).body_size(shapes, dtypes)
    down = parse_pipeline(["int8"]).body_size(shapes, dtypes)
    assert up.is_exact
    assert down.is_exact
    for number, nodes in enumerate(rounds):
        for owner in OWNERS:
            assert nodes[owner].up.body == up.body_bytes
            assert nodes[owner].up.stages == up.stage_bytes
            assert nodes[owner].down.body == (down.body_bytes if number else 0)
    for owner in OWNERS:  # what the gateway moved of blobs; the tokenizer is one, too, and the final model a difference
        moved_up, moved_down = accounts[owner]["blob_up"], accounts[owner]["blob_down"]
        assert moved_up == ROUNDS * up.body_bytes
        assert moved_down >= ROUNDS * down.body_bytes
    assert summary["up"]["body"] == len(OWNERS) * ROUNDS * up.body_bytes
    assert summary["down"]["body"] == len(OWNERS) * ROUNDS * down.body_bytes

    # All bytes, to 1 %: handshakes, framing, questions and answers are in `sent`, as a proxy on the line counts them.
    # The last second of goodbyes is on no ledger.
    sent = summary["down"]["sent"], summary["up"]["sent"]
    for told, seen in zip(sent, (sum(crossed[owner][way] for owner in OWNERS) for way in (0, 1)), strict=True):
        assert told == pytest.approx(seen, rel=0.01)
    assert sent[0] > summary["down"]["encoded"] > summary["down"]["body"]
    assert sent[1] > summary["up"]["encoded"] > summary["up"]["body"]
    assert here["link"]["up"]["body"] == summary["up"]["body"]
    assert here["link"]["down"]["body"] == summary["down"]["body"]
