"""What a comparison has to run: for each method, seed and tuning point a complete recipe and its content's key."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from photon.compare_tune import Point, points_of
from photon.config import Recipe
from photon.data.build import without_built
from photon.data.sources import expanded, open_source
from photon.errors import DataError, InputError
from photon.estimate import tokens_per_round
from photon.method import NO_SETTINGS, Method, Settings, apply_method, is_factor, setting_value
from photon.options import nearest
from photon.readable import one_line
from photon.recipe import load_recipe

_SCALES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_TOKENS = re.compile(r"(?:tokens=)?(\d+(?:\.\d+)?)([kKmMbB]?)")
Text = Mapping[str, Any]  # see `photon.data.sources.Source.identity`
_MOST_TOKENS = 1e15
_KEY_LETTERS = 12
_SCHEDULE = ("node.warmup_steps", "node.total_steps")  # options in sequential steps


@dataclass(frozen=True)
class Request:
    """What is asked for. `tune` is the number of points that each method gets, the method as it stands among them."""

    source: str
    overrides: tuple[str, ...]
    methods: tuple[Method, ...]
    budget_tokens: int | None = None
    seeds: int = 1
    tune: int = 1


@dataclass(frozen=True)
class Job:
    """One run. `key` is the same for the same recipe and text; `point` says what tuning changed, empty for nothing."""

    method: str
    seed: int
    point: str
    recipe: Recipe
    key: str

    @property
    def name(self) -> str:
        """Of its run folder."""
        return f"{self.method}-s{self.seed}-{self.key}"


@dataclass(frozen=True)
class MethodPlan:
    """One method: the points that are tried with the first seed. Without tuning there is one."""

    method: Method
    points: tuple[Point, ...]
    default: Recipe  # with the first seed

    def label(self, point: Point) -> str:
        """What the point changes, as people read it."""
        return point.label(self.default)


@dataclass(frozen=True)
class ComparePlan:
    """The whole comparison, before anything runs. `tokens` is what each run is to train on, `texts` what it reads."""

    request: Request
    base: Recipe
    tokens: int
    seeds: tuple[int, ...]
    methods: tuple[MethodPlan, ...]
    texts: tuple[Text, ...]

    @property
    def tuning(self) -> list[Job]:
        """All points of all methods with the first seed; none without tuning."""
        if self.request.tune < 2:
            return []
        return [self.job(plan, point, self.seeds[0]) for plan in self.methods for point in plan.points]

    def runs(self, plan: MethodPlan, point: Point) -> list[Job]:
        """The runs that are compared: this point with every seed."""
        return [self.job(plan, point, seed) for seed in self.seeds]

    def job(self, plan: MethodPlan, point: Point, seed: int) -> Job:
        """One run."""
        recipe = _settled(self.request, plan.method, self.base, seed, point.settings)
        return Job(plan.method.name, seed, plan.label(point), recipe, recipe_key(recipe, self.texts))

    @property
    def key(self) -> str:
        """Of all jobs that are known before any has run."""
        known = [*self.tuning, *(job for plan in self.methods for job in self.runs(plan, plan.points[0]))]
        return hashlib.sha256(" ".join(f"{job.method}:{job.key}" for job in known).encode()).hexdigest()[:_KEY_LETTERS]


def make_plan(request: Request) -> ComparePlan:
    """Work out every recipe. Raises ConfigError or InputError for whatever cannot be run or compared."""
    names = [method.name for method in request.methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"method {', '.join(twice)} is named twice")
    base = load_recipe(request.source, request.overrides)
    if request.budget_tokens is not None:
        if any(override.replace(" ", "").startswith("federation.rounds=") for override in request.overrides):
            raise InputError("--budget and federation.rounds say the same: give one of them")
        rounds = _rounds_for(base, request.budget_tokens)
        base = load_recipe(request.source, [*request.overrides, f"federation.rounds={rounds}"])
    plans = []
    for method in request.methods:
        default = _settled(request, method, base, base.seed, NO_SETTINGS)
        plans.append(MethodPlan(method, tuple(points_of(method, default, request.tune)), default))
    seeds = tuple(base.seed + index for index in range(request.seeds))
    return ComparePlan(request, base, run_tokens(base), seeds, tuple(plans), tuple(texts_of(base, Path.cwd())))


def notes_of(plan: ComparePlan) -> list[str]:
    """What a reader must know of how the comparison was put together, a sentence each."""
    notes = []
    overridden = {override.partition("=")[0].strip() for override in plan.request.overrides}
    for one in plan.methods:
        taken = sorted(overridden & {a for a, value in one.method.settings.items() if not is_factor(value)})
        if taken:
            notes.append(f"{one.method.name} would set {', '.join(taken)}; the command line's value stands.")
        tokens = run_tokens(one.default)
        if tokens != plan.tokens:
            notes.append(f"{one.method.name} trains on {tokens:,} tokens: whole rounds come no nearer.")
    by_key: dict[str, list[str]] = {}
    for one in plan.methods:
        by_key.setdefault(recipe_key(one.default), []).append(one.method.name)
    notes += [f"{' and '.join(names)} are the same recipe here." for names in by_key.values() if len(names) > 1]
    wanted = plan.request.budget_tokens
    if wanted is not None and wanted != plan.tokens:
        notes.append(f"Asked for {wanted:,} tokens; whole rounds make {plan.tokens:,}.")
    schedule = plan.base.node.total_steps
    steps = plan.base.federation.rounds * plan.base.federation.tau
    if schedule is not None and schedule != steps:
        notes.append(f"The schedule is of {schedule:,} steps (node.total_steps), the run of {steps:,}.")
    return notes


def parse_budget(text: str) -> int:
    """`tokens=8M`, `2.5B`, `500k`, `1000000` as a number of tokens. Raises InputError."""
    found = _TOKENS.fullmatch(text.strip())
    wanted = float(found[1]) * _SCALES[found[2].lower()] if found else 0.0
    if wanted > _MOST_TOKENS:
        raise InputError(f"--budget is at most {_MOST_TOKENS:g} tokens, not {one_line(text, 60)}")
    tokens = round(wanted)
    if tokens < 1:
        close = nearest(text.partition("=")[0], ["tokens"]) if "=" in text else None
        raise InputError(f"--budget is written like tokens=8M, not {text!r}" + (f"; {close}=..." if close else ""))
    return tokens


def recipe_key(recipe: Recipe, texts: Sequence[Text] = ()) -> str:
    """A hash of every option but `name` and `about`, which change nothing in a run, and of the texts that it reads."""
    content: object = recipe.model_dump(mode="json", exclude={"name", "about"})
    if texts:
        content = [content, *texts]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:_KEY_LETTERS]


def texts_of(recipe: Recipe, here: Path) -> list[Text]:
    """What makes every text that lies in files the same as last time, as `photon.data.build` knows it: size and time.

    Relative paths start at `here`. Hub datasets and built-in text are known by name alone, and what is not there is
    left to the run, which refuses it.
    """
    data = here / expanded(recipe.data.dir)
    named = [(spec, silo.field) for silo in recipe.silo for spec in silo.text]
    named += [(spec, "text") for spec in recipe.data.tokenizer_text]
    found: list[Text] = []
    for spec, field in named:
        if spec.startswith(("builtin:", "hf:")):
            continue
        with suppress(DataError):
            source = without_built(open_source(spec, field, here), data)
            # The same from wherever the command is called, if the recipe's path is.
            root = Path(here.anchor) if expanded(spec).is_absolute() else here
            found.append(source.identity(root))
    return found


def run_tokens(recipe: Recipe) -> int:
    """Tokens that the whole run trains on if every node answers."""
    return recipe.federation.rounds * _round_tokens(recipe)


def _round_tokens(recipe: Recipe) -> int:
    if recipe.federation.outer != "none":
        return tokens_per_round(recipe)
    # The one trainer's batch is a whole number (see `photon.sites`).
    tau, length = recipe.federation.tau, recipe.data.sequence_length
    sequences = sum(recipe.batch_size_of(silo) * recipe.tau_of(silo) for silo in recipe.silo)
    return max(1, round(sequences * recipe.nodes_per_round / len(recipe.silo) / tau)) * tau * length


def _rounds_for(recipe: Recipe, tokens: int) -> int:
    """The number of rounds that comes nearest."""
    return max(1, round(tokens / _round_tokens(recipe)))


def _settled(request: Request, method: Method, base: Recipe, seed: int, point: Settings) -> Recipe:
    """The recipe of one run: as many rounds as come nearest to the base's tokens, whatever the method's batch and tau.

    The schedule counts sequential steps and keeps its shape over those of the run. What the method says of it holds for
    the steps that the method comes to by itself; what it leaves alone was said of the base's.
    """
    overrides: Sequence[str] = [*request.overrides, f"seed={seed}", f"federation.rounds={base.federation.rounds}"]
    recipe = apply_method(method, request.source, overrides, point)
    alone = apply_method(method, request.source, overrides) if point else recipe
    rounds = _rounds_for(recipe, run_tokens(base))
    steps = rounds * recipe.federation.tau
    given = {override.partition("=")[0].strip() for override in request.overrides}
    settled: dict[str, object] = {}
    for address in _SCHEDULE:
        is_said = address in method.settings and (is_factor(method.settings[address]) or address not in given)
        stretch = steps / (alone if is_said else base).federation.sequential_steps
        value = setting_value(recipe, address, f"x{stretch:.9f}", recipe.nodes_per_round)
        if value is not None and (address not in point or is_factor(point[address])):
            settled[address] = value
    return apply_method(method, request.source, overrides, {**point, **settled, "federation.rounds": rounds})
