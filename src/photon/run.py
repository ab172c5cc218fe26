"""A whole run on this machine: prepare the text, start the fabric, run the rounds, write the results.

Everything that decides the outcome is in the run folder, so `resume` needs nothing else and a run that was killed
at any instant, any number of times, ends in the same model as one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from photon.aggregator.server import Aggregator
from photon.aggregator.state import GlobalState, Progress, RoundStore
from photon.aggregator.updates import largest_update
from photon.config import Recipe
from photon.data.build import Prepared, prepare
from photon.data.build import Progress as BuildProgress
from photon.data.tokenizer import Tokenizer
from photon.display import Display
from photon.durable import write_atomic
from photon.errors import ConfigError, StateError, StoppedError
from photon.events import RunFinished, RunStarted, Sampled
from photon.extras import require
from photon.fabric.base import Fabric
from photon.fabric.local import LocalFabric
from photon.fabric.site import SITE_FILE, SiteFile
from photon.link.tensors import decode_tensors, encode_tensors, read_specs
from photon.model.base import LanguageModel
from photon.model.build import build_model, load_weights, named_weights
from photon.model.generate import generate
from photon.model.hf import export
from photon.node.device import WorkerPlan, available_cores, plan_workers, resolve_devices
from photon.node.state import NodeStore
from photon.parts.method import STATE_MARK, Method, is_state
from photon.recipe import dump_recipe, load_recipe
from photon.report import write_report
from photon.runfolder import Identity, RunFolder
from photon.sites import POOLED, node_infos, plan_sites, sites_again
from photon.summary import Summary, summarise, write_summary
from photon.track import Tracker, open_tracker, read_events, truncate_to

SAMPLE_TEMPERATURE = 0.7
SAMPLE_TOP_K = 40


def prepare_data(recipe: Recipe, display: Display) -> Prepared:
    """Build or reuse the tokenizer and every silo's shards, showing progress."""

    def show(step: BuildProgress) -> None:
        display.data_progress(step.silo, step.phase, step.done_bytes, step.total_bytes, step.note)

    return prepare(recipe, progress=show)


def train(recipe: Recipe, folder: RunFolder, display: Display) -> Summary:
    """Begin a run in an empty `folder` and bring it to its end."""
    if any(silo.name.lower() == POOLED for silo in recipe.silo):
        raise ConfigError(f"a silo cannot be called {POOLED!r}: the centralised baseline uses that name")
    plan_processes(recipe)  # a device that is not here is refused before anything is built
    with folder.lock():
        prepared = prepare_data(recipe, display)
        folder.tokenizer.mkdir(exist_ok=True)
        prepared.tokenizer.save(folder.tokenizer)
        for site in plan_sites(recipe, prepared.silos):
            folder.node(site.name).mkdir(parents=True, exist_ok=True)
            write_atomic(folder.node(site.name) / SITE_FILE, site.model_dump_json(indent=1) + "\n")
        write_atomic(folder.recipe, dump_recipe(recipe))
        folder.write_identity(embedding_rows(recipe, prepared.tokenizer))  # last: now the folder is a run
        run = open_run(folder)
        return run_to_end(run, display, _setting(run), f"photon train --resume {folder.path}")


def resume(folder: RunFolder, display: Display, round_index: int | None = None) -> Summary:
    """Go on from the newest committed round, or from an older one on request (later ones are set aside)."""
    for note in folder.changes():
        display.note(note)
    with folder.lock():
        run = _with_sites_of_recipe(open_run(folder))
        if round_index is not None:
            run.store.load(run.identity.run, round_index)  # before anything is set aside: is it usable?
            run.store.set_aside(round_index)
            for site in run.sites:
                _node_store(run, site).set_aside(round_index)
        return run_to_end(run, display, _setting(run), f"photon train --resume {folder.path}")


def _with_sites_of_recipe(run: Run) -> Run:
    """Batch sizes, devices and weights are the recipe's, also where it was changed since the run began."""
    if run.recipe.link.fabric != "local":
        return run  # sites on their own look at the recipe that they are given
    sites = sites_again(run.recipe, run.sites)
    for site in sites:
        if site not in run.sites:
            write_atomic(run.folder.node(site.name) / SITE_FILE, site.model_dump_json(indent=1) + "\n")
    return replace(run, sites=sites)


def embedding_rows(recipe: Recipe, tokenizer: Tokenizer) -> int:
    """With a given tokenizer `data.vocab_size` pads: the paper has 50368 rows for gpt-neox-20b's 50277 tokens."""
    if recipe.data.tokenizer == "train" or recipe.model.hf:
        return tokenizer.vocab_size
    return max(tokenizer.vocab_size, recipe.data.vocab_size)


@dataclass(frozen=True)
class Run:
    """What the run folder says."""

    folder: RunFolder
    identity: Identity
    recipe: Recipe
    sites: list[SiteFile]
    store: RoundStore
    tokenizer: Tokenizer

    def build_model(self) -> LanguageModel:
        """The untrained model; the same weights every time."""
        return build_model(
            self.recipe.model, self.identity.vocab_size, self.recipe.data.sequence_length, self.recipe.seed
        )


@dataclass(frozen=True)
class Setting:
    """Where a run's nodes work, and how to reach them. `shares_cores`: beside the Aggregator, on the same CPU."""

    device: str
    workers: int
    threads: int
    shares_cores: bool
    open_fabric: Callable[[Run, int, Tracker], AbstractContextManager[Fabric]]


def open_run(folder: RunFolder) -> Run:
    """The run in a folder. Raises InputError if it is none, StateError if it is incomplete."""
    recipe = load_recipe(folder.recipe)
    names = [silo.name for silo in recipe.silo] + ([POOLED] if recipe.federation.outer == "none" else [])
    sites = []
    for name in names:
        path = folder.node(name) / SITE_FILE
        if not path.is_file() and recipe.link.fabric == "flower":
            continue  # its owner is elsewhere
        if not path.is_file():
            raise StateError(f"{path} is missing: the run cannot find the text of node {name!r}")
        sites.append(SiteFile.model_validate_json(path.read_bytes()))
    keep = recipe.checkpoint
    store = RoundStore(folder.rounds, keep.keep_last, keep.keep_every)
    return Run(folder, folder.identity(), recipe, sites, store, Tokenizer.load(folder.tokenizer))


def load_trained(folder: RunFolder, round_index: int | None = None) -> tuple[Run, LanguageModel, GlobalState]:
    """A run's global model of a committed round, by default the newest, on the CPU.

    Raises InputError if `folder` is no run or has no such round, StateError if that is damaged.
    """
    folder.identity()
    run = open_run(folder)
    state = run.store.load(run.identity.run, round_index)
    model = run.build_model()
    load_weights(model, decode_tensors(state.payload))
    return run, model, state


def run_to_end(run: Run, display: Display, setting: Setting, go_on: str) -> Summary:
    """All rounds that are left, then the results. `go_on` is the command that goes on after a stop."""
    try:
        return _run_to_end(run, display, setting)
    except KeyboardInterrupt:
        raise StoppedError(f"stopped; committed rounds are safe. Go on with: {go_on}") from None


def _run_to_end(run: Run, display: Display, setting: Setting) -> Summary:
    # The Aggregator works while nodes train: where they do so on the CPU, a second thread here would fight them for
    # cores and slow both; beside GPUs the cores are free.
    torch.set_num_threads(1 if setting.shares_cores else max(1, available_cores() // 2))
    model = run.build_model()
    begun = bool(run.store.rounds())
    if begun:
        state = run.store.load(run.identity.run)
        _check_shared(run, model, state)
    else:
        state = _untrained(run, model)
    truncate_to(run.folder.metrics, state.progress.metrics_bytes)
    for site in run.sites:  # what a resume was about to put away when it was cut off itself
        _node_store(run, site).set_aside(state.progress.round + 1)
    with (
        open_tracker(run.recipe.track, run.folder.path, run.identity.run, display) as tracker,
        setting.open_fabric(run, _largest_body(run.recipe, state), tracker) as fabric,
    ):
        tracker.write(_started(run, state, model, setting))
        if not begun:
            _sample(run, model, tracker, state)
        aggregator = Aggregator(run.recipe, fabric, run.store, tracker, state, run.folder.operator)
        del model, state  # the Aggregator has its own: these would be two copies too many, for weeks
        final = aggregator.run()
        del aggregator
        fabric.close()  # what follows needs no node
        trained = run.build_model()
        load_weights(trained, decode_tensors(final.payload))
        _sample(run, trained, tracker, final)
        export(trained, run.recipe.model, run.folder.tokenizer, run.folder.model)
        tracker.write(
            RunFinished(
                time=time.time(),
                seconds=final.progress.seconds,
                round=final.progress.round,
                model_sha256=final.model_sha256,
            )
        )
    return write_results(run.folder)


def write_results(folder: RunFolder) -> Summary:
    """Rewrite summary.json and report.html from what the run recorded."""
    folder.identity()
    summary = summarise(read_events(folder.metrics))
    write_summary(folder.path, summary)
    write_report(folder.path)
    return summary


def _largest_body(recipe: Recipe, state: GlobalState) -> int:
    """No reply may be longer: an update of all that is shared, exact or as the codec writes it, whichever is more."""
    return max(len(state.payload), largest_update(recipe.link, state.payload))


def _untrained(run: Run, model: LanguageModel) -> GlobalState:
    return GlobalState(Progress(run.identity.run), encode_tensors(_shared(run, model, "cpu")), {})


def _shared(run: Run, model: LanguageModel, device: str) -> dict[str, Tensor]:
    """What is shared before the first round, on `device`."""
    method = Method.of(run.recipe)
    if not (kinds := method.shared_state):
        return {name: weight.to(device) for name, weight in named_weights(model).items()}
    from photon.node.optimizers import build_optimizer  # here: torch's own bring its compiler, 80 MB
    from photon.node.shared import shared_tensors

    optimizer = method.optimizer(build_optimizer(model, run.recipe.node, torch.device("cpu")))
    return shared_tensors(model, optimizer, kinds, device)


def _check_shared(run: Run, model: LanguageModel, state: GlobalState) -> None:
    """Raises StateError if the recipe shares other optimizer state than the run has shared so far."""
    _, specs = read_specs(state.payload)
    has = {spec.name for spec in specs if is_state(spec.name)}
    wants = {name for name in _shared(run, model, "meta") if is_state(name)}
    if has != wants:
        raise StateError(
            f"federation.parts, node.optimizer: this run has shared {_kinds(has)} since it began, and its recipe now "
            f"says {_kinds(wants)}: put back what was changed, or export the model and begin a new run from it "
            "(model.hf)"
        )


def _kinds(names: set[str]) -> str:
    """With the number of weights that have it: another optimizer may keep the same of others."""
    kinds = sorted({name.rpartition(STATE_MARK)[2] for name in names})
    weights = len({name.partition(STATE_MARK)[0] for name in names})
    return f"{', '.join(kinds)} of {weights} weight{'s' * (weights != 1)}" if kinds else "no optimizer state"


def plan_processes(recipe: Recipe) -> list[WorkerPlan]:
    """The workers of a run. Raises ConfigError if a device is not on this machine."""
    trainers = 1 if recipe.federation.outer == "none" else recipe.nodes_per_round
    plans = plan_workers(recipe.node, trainers)
    # A silo's own devices get workers of their own if the plan has none there.
    own = {device for silo in recipe.silo if silo.device for device in resolve_devices(silo.device)}
    for device in sorted(own - {plan.device for plan in plans}):
        plans.append(WorkerPlan(device, plans[0].threads))
    return plans


def _setting(run: Run) -> Setting:
    """The local fabric, or processes of their own for every node of this machine."""
    plans = plan_processes(run.recipe)
    open_fabric: Callable[[Run, int, Tracker], AbstractContextManager[Fabric]]
    if run.recipe.link.fabric == "flower":
        require("sites")
        from photon.sites_here import open_sites_here  # it takes seconds to import Flower

        open_fabric = partial(open_sites_here, plans[0].threads)
    else:
        open_fabric = partial(_open_local, plans)
    device = ", ".join(sorted({plan.device for plan in plans}))
    shares_cores = any(plan.device == "cpu" for plan in plans)
    return Setting(device, len(plans), plans[0].threads, shares_cores, open_fabric)


@contextmanager
def _open_local(plans: list[WorkerPlan], run: Run, payload_bytes: int, tracker: Tracker) -> Iterator[Fabric]:
    fabric = LocalFabric(
        run.folder.path,
        node_infos(run.recipe, run.sites),
        plans,
        run.folder.logs,
        payload_bytes,
        {site.name: resolve_devices(site.device) for site in run.sites if site.device},
    )
    try:
        yield fabric
    finally:
        fabric.close()


def _started(run: Run, state: GlobalState, model: LanguageModel, setting: Setting) -> RunStarted:
    pooled = run.recipe.federation.outer == "none"
    weights = named_weights(model)
    return RunStarted(
        time=time.time(),
        seconds=state.progress.seconds,
        run=run.identity.run,
        recipe=run.recipe.name,
        nodes=[POOLED] if pooled else [silo.name for silo in run.recipe.silo],
        nodes_per_round=1 if pooled else run.recipe.nodes_per_round,
        rounds=run.recipe.federation.rounds,
        tau=run.recipe.federation.tau,
        parameters=sum(tensor.numel() for tensor in weights.values()),
        payload_bytes=sum(tensor.numel() * tensor.element_size() for tensor in weights.values()),
        first_round=state.progress.round,
        first_step=state.progress.sequential_step,
        device=setting.device,
        workers=setting.workers,
        threads=setting.threads,
    )


def _sample(run: Run, model: LanguageModel, tracker: Tracker, state: GlobalState) -> None:
    evaluation = run.recipe.evaluation
    if evaluation.sample_tokens:
        prompt = run.tokenizer.encode(evaluation.prompt) or [run.tokenizer.end_of_text]
        tokens = generate(
            model,
            prompt,
            evaluation.sample_tokens,
            SAMPLE_TEMPERATURE,
            SAMPLE_TOP_K,
            run.recipe.seed,
            run.tokenizer.end_of_text,
        )
        tracker.write(
            Sampled(
                time=time.time(),
                seconds=state.progress.seconds,
                round=state.progress.round,
                prompt=evaluation.prompt,
                text=run.tokenizer.decode(tokens),
            )
        )


def _node_store(run: Run, site: SiteFile) -> NodeStore:
    keep = run.recipe.checkpoint
    return NodeStore(run.folder.node(site.name) / "state", keep.keep_last, keep.keep_every)
