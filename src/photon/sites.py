"""Who takes part in a local run: one site per silo, or, for the centralised baseline, one pooled trainer.

The baseline (`federation.outer = none`) is the same code with a single training node whose stream mixes every silo in
the shares that the federation would train, with the batch of all nodes together: equal tokens at equal sequential
steps. It is the only case in which one node reads several owners' text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from photon.config import Recipe, SiloConfig
from photon.data.build import SiloData
from photon.data.shards import ShardReader
from photon.errors import ConfigError
from photon.fabric.base import NodeInfo
from photon.fabric.site import SiteFile

POOLED = "pooled"


def plan_sites(recipe: Recipe, silos: Mapping[str, SiloData]) -> list[SiteFile]:
    """The sites of a run, in the order of the recipe; the pooled trainer, if any, comes last."""
    pooled = recipe.federation.outer == "none"
    sites = [
        SiteFile(
            name=silo.name,
            sources=_absolute(silos[silo.name].sources),
            weights=silo.weights,
            batch_size=recipe.batch_size_of(silo),
            trains=not pooled,
            evaluates=True,
            device=silo.device,
        )
        for silo in recipe.silo
    ]
    return [*sites, _pooled_site(recipe, sites)] if pooled else sites


def sites_again(recipe: Recipe, sites: Sequence[SiteFile]) -> list[SiteFile]:
    """The sites of a run that goes on with `recipe`, in its order: all but their text is as `plan_sites` has it now.

    Raises ConfigError if a silo's weights are not of the sources that were prepared for it when the run began.
    """
    sources = {site.name: site.sources for site in sites}
    for silo in recipe.silo:
        if silo.weights is not None and len(silo.weights) != len(sources[silo.name]):
            raise ConfigError(
                f"silo {silo.name}: {len(silo.weights)} weights, but its text was prepared as "
                f"{len(sources[silo.name])} source(s) when the run began, and stays so: give as many"
            )
    return plan_sites(recipe, {silo.name: SiloData(silo.name, Path(), sources[silo.name]) for silo in recipe.silo})


def node_infos(recipe: Recipe, sites: list[SiteFile]) -> list[NodeInfo]:
    """What the Aggregator is told of the sites."""
    length = recipe.data.sequence_length
    return [
        NodeInfo(
            site.name,
            tokens_per_step=site.batch_size * length,
            trains=site.trains,
            evaluates=site.evaluates,
            evaluation_tokens=recipe.evaluation.sequences * length * len(site.sources),
        )
        for site in sites
    ]


def _pooled_site(recipe: Recipe, sites: list[SiteFile]) -> SiteFile:
    sequences = {silo.name: recipe.batch_size_of(silo) * recipe.tau_of(silo) for silo in recipe.silo}
    weights = [
        sequences[silo.name] * share
        for silo, site in zip(recipe.silo, sites, strict=True)
        for share in _source_shares(silo, site, recipe.data.sequence_length)
    ]
    return SiteFile(
        name=POOLED,
        sources=[source for site in sites for source in site.sources],
        weights=weights,
        # Where a round samples K of P nodes, it trains that share of their sequences.
        batch_size=max(1, round(sum(sequences.values()) * recipe.nodes_per_round / len(sites) / recipe.federation.tau)),
        trains=True,
        evaluates=False,
        device=recipe.silo[0].device,
    )


def _source_shares(silo: SiloConfig, site: SiteFile, sequence_length: int) -> list[float]:
    """Each source's share of its silo: the silo's weights, or by size, as its own node would mix them."""
    sizes = silo.weights or [float(ShardReader(source).train_sequences(sequence_length)) for source in site.sources]
    return [size / sum(sizes) for size in sizes]


def _absolute(paths: list[Path]) -> list[Path]:
    return [path.resolve() for path in paths]
