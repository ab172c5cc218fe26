"""The documentation holds: links lead somewhere, commands parse, and the architecture page names what there is."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from photon.cli import app, split_words
from photon.errors import InputError
from photon.options import TOP, options_of, section_types
from photon.recipe import load_recipe, preset_names
from photon.shapes import SHAPES

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "photon"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Where a page says RUN, DIR or my-run.toml the reader puts something; the check puts a recipe that exists.
STAND_INS = {"RECIPE": "demo", "my-run.toml": "own-text", "my-recipe.toml": "own-text", "FOLDER/recipe.toml": "demo"}
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # click's, or the copy of it inside newer typer

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="docs/ is not part of an installed package")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks of these languages (`""`: none named)."""
    fenced = re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [body for language, body in fenced if language in languages]


def prose(text: str) -> str:
    """The page without comments and fenced blocks."""
    return re.sub(r"<!--.*?-->|^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`\n]+)`", prose(text))


# Links


def slugs(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in slugs(text if file == page else file.read_text("utf-8"))):
            yield target


@each_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    assert not list(broken_links(page.read_text(encoding="utf-8"), page))


def test_a_broken_link_is_noticed() -> None:
    page = "# One two\n[a](docs/no-such.md) [b](#one-two) [c](#three) [d](README.md#nowhere) [e](https://example.org)"
    assert list(broken_links(page, ROOT / "README.md")) == ["docs/no-such.md", "#three", "README.md#nowhere"]


# Command lines


def command_lines(text: str) -> Iterator[str]:
    """Lines of shell blocks that call photon, without prompts, comments and redirections."""
    for block in blocks(text, "", "bash", "sh", "console"):
        for line in block.splitlines():
            command = line.strip().removeprefix("$ ").removeprefix(".venv/bin/")
            if command.startswith("photon "):
                yield command


def words_of(line: str) -> list[str]:
    words = shlex.split(line, comments=True)[1:]
    return words[: words.index(">")] if ">" in words else words


def complaint(words: Sequence[str], complete: bool = True) -> str | None:
    """Why the command line cannot be run, None if it can; an incomplete one may lack its arguments."""
    command, name, rest = get_command(app), "photon", list(words)
    try:
        while hasattr(command, "commands"):
            if not rest:
                return "names no command" if complete else None
            if rest[0].startswith("-"):
                command.make_context(name, rest)
                return None
            name, *rest = rest
            if name not in command.commands:
                return f"there is no command {name}"
            command = command.commands[name]
        if not complete and not rest:
            return None
        parameters = command.make_context(name, rest).params
    except typer.Exit:  # --version, --help
        return None
    except USAGE_ERROR as error:
        return str(error)
    return recipe_complaint(name, parameters)


def recipe_complaint(name: str, parameters: dict[str, object]) -> str | None:
    """What is wrong with the recipe and the overrides of `train` and `data build`."""
    words = parameters.get("words") or []
    if name == "build":
        words = [parameters["recipe"], *(parameters["options"] or [])]  # type: ignore[misc]  # both are the command's
    words = list(words)  # a tuple, in some versions of click
    try:
        source, overrides = split_words(words)
        if name in ("train", "build") and not parameters.get("resume"):
            load_recipe(STAND_INS.get(source, source), overrides)
    except InputError as error:
        return str(error)
    return None


@each_page
def test_command_lines_can_be_run(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    wrong = {line: why for line in command_lines(text) if (why := complaint(words_of(line)))}
    inline = [span for span in spans(text) if re.match(r"photon [a-z-]", span)]
    wrong |= {span: why for span in inline if (why := complaint(words_of(span), complete=False))}
    assert not wrong


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("photon fly", "no command fly"),
        ("photon data fly", "no command fly"),
        ("photon train --fast", "--fast"),
        ("photon train demo node.leraning_rate=1", "leraning_rate"),
        ("photon train demo federation.tau=none", "tau"),
        ("photon train no-such-preset", "no-such-preset"),
        ("photon generate runs/demo", "prompt"),
        ("photon", "names no command"),
    ],
)
def test_a_wrong_command_line_is_noticed(line: str, why: str) -> None:
    assert why.lower() in (complaint(words_of(line)) or "").lower()


def test_the_readme_shows_its_commands() -> None:
    lines = list(command_lines((ROOT / "README.md").read_text(encoding="utf-8")))
    assert {words_of(line)[0] for line in lines} >= {"train", "presets", "evaluate", "generate", "export"}


@each_page
def test_make_targets_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    text = page.read_text(encoding="utf-8")
    lines = [line.strip() for block in blocks(text, "", "bash") for line in block.splitlines()] + spans(text)
    named = [line.split()[1] for line in lines if re.match(r"make [a-z]", line)]
    assert set(named) <= set(targets)


# Names


_NO_OPTIONS = {"py", "safetensors", "option"}  # `track.py`, `model.safetensors`, and `silo.NAME.option=...` in general


def unknown_options(text: str) -> Iterator[str]:
    """`section.option` in backticks, and keys of TOML blocks, that are no option."""
    sections = [name for name in section_types() if name != TOP]
    for span in spans(text):
        found = re.match(rf"({'|'.join(sections)})\.(?:NAME\.)?([a-z_]+)(?:$|[ =])", span)
        if found and found[2] not in {*options_of(found[1]), *_NO_OPTIONS}:
            yield span
    for block in blocks(text, "toml"):
        for section, value in tomllib.loads(block).items():
            if section in ("set", "tune"):  # a method's file
                yield from (address for address in value if list(unknown_options(f"`{address}`")))
                continue
            if section in ("title", "about", "cites"):
                continue
            tables = value if isinstance(value, list) else [value]
            keys = {key for table in tables if isinstance(table, dict) for key in table}
            known = options_of(section) if section in sections else {}
            yield from (f"{section}.{key}" for key in keys if key not in known)


@each_page
def test_options_presets_and_shapes_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not list(unknown_options(text))
    names = [span for span in spans(text) if re.fullmatch(r"(paper|llama|mpt)-[0-9.]+[mb]|demo|own-text", span)]
    assert set(names) <= {*preset_names(), *SHAPES}


def test_an_unknown_option_is_noticed() -> None:
    page = "`node.lr` `node.rate` `federation.outer = none` `federation.inner=x`\n```toml\n[link]\nupp = 1\n```\n"
    page += '```toml\ntitle = "A method"\n[set]\n"node.lr" = 1\n"node.late" = 2\n```\n'
    assert list(unknown_options(page)) == ["node.rate", "federation.inner=x", "link.upp", "node.late"]


@each_page
def test_files_named_in_backticks_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    files = [span for span in spans(text) if re.fullmatch(r"[\w./-]+\.(py|toml|md)", span) and "RUN" not in span]
    written_by_a_run = {"recipe.toml", "my-run.toml", "site.toml"}  # or by a person
    places = (ROOT, ROOT / "src", SOURCE, page.parent)
    missing = [name for name in files if not any((place / name).is_file() for place in places)]
    assert set(missing) <= written_by_a_run


# The architecture page


def unnamed_modules(text: str) -> list[str]:
    """Modules of the package that the page has no row for."""
    modules = (path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py") if path.name != "__init__.py")
    return sorted(module for module in modules if f"\n| `{module}` | " not in text)


def test_the_architecture_page_has_a_row_for_every_module_and_no_other() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert not unnamed_modules(text)
    rows = re.findall(r"^\| `([\w/]+\.py)` \| ", text, re.MULTILINE)
    assert [row for row in rows if not (SOURCE / row).is_file()] == []
    assert len(rows) == len(set(rows))
    assert unnamed_modules(text.replace("`link/ledger.py`", "`link/ledgers.py`")) == ["link/ledger.py"]


def imports(source: str) -> set[str]:
    """The first name below `photon` of everything that a module imports from the package, at any depth of it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "photon":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("photon."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("photon.")}
    return found


@pytest.mark.parametrize(
    ("part", "allowed"),
    [
        (
            "aggregator",
            {"aggregator", "config", "durable", "errors", "events", "fabric", "link", "parts", "stopwatch", "track"},
        ),
        ("node", {"node", "config", "data", "durable", "errors", "events", "link", "model", "parts", "stopwatch"}),
        ("parts", {"parts", "config", "errors", "notation"}),
        ("link", {"link", "config", "errors", "notation"}),
        ("data", {"data", "config", "errors"}),
        ("model", {"model", "config", "errors"}),
        ("config.py", set()),
    ],
)
def test_arrows_point_down_as_the_page_says(part: str, allowed: set[str]) -> None:
    files = [SOURCE / part] if part.endswith(".py") else sorted((SOURCE / part).rglob("*.py"))
    assert files
    for file in files:
        assert imports(file.read_text(encoding="utf-8")) <= allowed, file


@pytest.mark.parametrize(("library", "home"), [("flwr", "fabric/flwr_internals.py"), ("obstore", "link/bucket.py")])
def test_one_module_alone_imports_a_library_that_moves(library: str, home: str) -> None:
    found = set()
    for file in SOURCE.rglob("*.py"):
        if re.search(rf"^\s*(from|import) {library}\b", file.read_text(encoding="utf-8"), re.MULTILINE):
            found.add(file.relative_to(SOURCE).as_posix())
    assert found == {home}


def test_an_arrow_that_points_up_is_noticed() -> None:
    sources = ["from photon.node.node import Node", "import photon.node.state", "from photon import node"]
    sources.append("def late():\n    from photon.node import trainer\n")
    assert [imports(source) for source in sources] == [{"node"}] * 4
