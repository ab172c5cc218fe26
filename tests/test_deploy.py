"""What a site installs fits the program: its commands parse, its files load, and nobody is shown another's secrets."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.test_docs import ROOT, blocks, broken_links, complaint

from photon.recipe import load_recipe
from photon.siteconfig import Caps, SiteConfig, load_site, node_recipe

DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
NODES = ("library", "archive")

pytestmark = pytest.mark.skipif(not DEPLOY.is_dir(), reason="deploy/ is not part of an installed package")


def settings(unit: Path) -> dict[str, list[str]]:
    """The values of each key of a unit, in order."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text(encoding="utf-8").splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def photon_words(command: list[str]) -> list[str]:
    """What the command hands to `photon`: start-aggregator adds a recipe and a run folder to it."""
    if command[0].rpartition("/")[2] == "start-aggregator":
        return ["aggregator", command[1], "--run", command[2], *command[3:]]
    return command[1:]


# systemd


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_starts_a_command_that_there_is(unit: Path) -> None:
    (command,) = settings(unit)["ExecStart"]
    words = photon_words(command.split())
    assert complaint(words) is None
    assert complaint([*words, "--fast"]) is not None
    example = DEPLOY / "systemd" / ("node.env.example" if "@" in unit.name else "aggregator.env.example")
    given = re.findall(r"^([A-Z_]+)=", example.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(re.findall(r"\$\{(\w+)\}", command)) == sorted(given)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_lets_the_program_end_in_order_and_does_not_insist_on_a_refused_key(unit: Path) -> None:
    found = settings(unit)
    assert found["KillMode"] == ["mixed"]  # the default would end the trainer before it has handed in
    assert found["OOMPolicy"] == ["continue"]  # the default would stop all for one part that is started again
    assert "2" in found["RestartPreventExitStatus"][0].split()
    assert found["User"] == ["photon"] and found["NoNewPrivileges"] == ["yes"]


def test_the_start_script_begins_a_run_and_then_goes_on_with_it(tmp_path: Path) -> None:
    photon = tmp_path / "photon"
    photon.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    photon.chmod(0o755)

    def said(*words: str) -> list[str]:
        command = [DEPLOY / "start-aggregator", *words]
        environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout.splitlines() if done.returncode == 0 else [str(done.returncode)]

    run = tmp_path / "a run"
    rest = ["--keys", "keys", "--listen", "0.0.0.0:8443"]
    assert said("my recipe.toml", str(run), *rest) == ["aggregator", "my recipe.toml", "--run", str(run), *rest]
    run.mkdir()
    assert said("my recipe.toml", str(run), *rest)[1] == "my recipe.toml"  # a beginning that was cut off is none
    (run / "run.json").touch()
    assert said("my recipe.toml", str(run), *rest) == ["aggregator", "--resume", str(run), *rest]
    assert said("my recipe.toml") == ["2"]


# Containers


def services() -> dict[str, Any]:
    found = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    used = {name.split(":")[0] for service in found["services"].values() for name in service["volumes"]}
    assert {name for name in used if not name.startswith(".")} == set(found["volumes"])
    assert all((DEPLOY / name).is_file() for name in used if name.startswith("."))
    return dict(found["services"])


def exposed(found: dict[str, Any]) -> list[str]:
    """Which services could see what is not theirs, or be reached without need."""
    wrong = []
    for name, service in found.items():
        volumes = {volume.split(":")[0] for volume in service["volumes"]}
        others = {f"{node}-{kind}" for node in NODES for kind in ("key", "state") if name not in (node, f"{node}-key")}
        is_running = "profiles" not in service
        sees_too_much = volumes & others or (name in NODES and "authority" in volumes)
        if sees_too_much or (is_running and "ports" in service and name != "aggregator"):
            wrong.append(name)
        if not (service["read_only"] and service["cap_drop"] == ["ALL"] and "privileged" not in service):
            wrong.append(name)
    return wrong


def test_every_container_runs_a_command_that_there_is() -> None:
    found = services()
    assert set(found) == {"authority", "aggregator", *NODES, *(f"{node}-key" for node in NODES)}
    for service in found.values():
        assert complaint(photon_words([*service.get("entrypoint", ["photon"]), *service["command"]])) is None
    addresses = {word for node in NODES for word in found[node]["command"] if "https://" in word}
    assert addresses == {"--aggregator=https://aggregator:8443"}
    assert "aggregator" in found["authority"]["command"]  # the host that the certificate is for


def test_no_container_sees_what_is_anothers() -> None:
    found = services()
    assert not exposed(found)
    for mutant in ("authority:/authority", "archive-key:/other", "archive-state:/other"):
        changed = copy.deepcopy(found)
        changed["library"]["volumes"].append(mutant)
        assert exposed(changed) == ["library"]


def test_the_image_is_made_of_files_that_are_let_in() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY ((?!--from).*) \S+$", text, re.MULTILINE) for word in line.split()]
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore and set(copied) == allowed
    assert all((ROOT / name).exists() for name in copied)
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["10001:10001"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", text)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])


# Recipe and sites


def test_the_recipe_takes_the_nodes_as_their_sites_are() -> None:
    recipe = load_recipe(str(DEPLOY / "two-sites.toml"))
    assert [silo.name for silo in recipe.silo] == list(NODES)
    assert not any(silo.text for silo in recipe.silo)
    assert recipe.data.tokenizer_text
    for name in NODES:
        site = load_site(DEPLOY / "sites" / f"{name}.toml")
        assert site.name == name
        assert node_recipe(recipe, name, site).silo[0].text == site.text


def test_the_recipe_in_the_guide_is_this_one() -> None:
    (shown,) = blocks((ROOT / "docs" / "how-to" / "two-machines.md").read_text(encoding="utf-8"), "toml")
    recipe = tomllib.loads((DEPLOY / "two-sites.toml").read_text(encoding="utf-8"))
    recipe.pop("about")
    assert tomllib.loads(shown) == recipe


def test_the_site_template_shows_every_option(tmp_path: Path) -> None:
    text = (DEPLOY / "site.toml").read_text(encoding="utf-8")
    assert load_site(DEPLOY / "site.toml") == SiteConfig(text=["/srv/text"])
    path = tmp_path / "site.toml"
    path.write_text(re.sub(r"^# (?=\w+ = )", "", text, flags=re.MULTILINE))
    site = load_site(path)
    assert site.model_fields_set == set(SiteConfig.model_fields)
    assert site.caps.model_fields_set == set(Caps.model_fields)


def test_the_page_leads_somewhere() -> None:
    page = DEPLOY / "README.md"
    text = page.read_text(encoding="utf-8")
    assert not list(broken_links(text, page))
    named = re.findall(r"deploy/[\w./@-]+", text)
    assert len(named) >= 5 and all((ROOT / name).exists() for name in named)
