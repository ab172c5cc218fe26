"""What the report says of the bytes: from float32 to what the network carried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from photon.errors import ConfigError
from photon.link.ledger import Flow
from photon.recipe import parse_recipe
from photon.summary import Summary


@dataclass(frozen=True)
class LinkRow:
    """Bytes of the whole run at one step of their way; None where there is no such step in that direction."""

    name: str
    up: int | None
    down: int | None


def link_rows(summary: Summary, recipe_text: str) -> list[LinkRow]:
    """From raw to sent, the stages of the codecs between them in the recipe's order; empty if nothing crossed."""
    up, down = summary.link.up, summary.link.down
    if not up.encoded + down.encoded:
        return []
    stages = _woven(*(sorted(flow.stages, key=flow.stages.__getitem__, reverse=True) for flow in (up, down)))
    if stages:
        # Bytes alone do not tell: of exact tensors only the lossless stage has any. Stages that the recipe no longer
        # has (a run may be resumed with others) come first.
        order = _stages_of(recipe_text)
        stages.sort(key=lambda stage: order.index(stage) if stage in order else -1)
    return [
        LinkRow("as float32", up.raw, down.raw),
        *(LinkRow(f"after {stage}", up.stages.get(stage), down.stages.get(stage)) for stage in stages),
        LinkRow("bodies of messages", up.body, down.body),
        LinkRow("whole messages", up.encoded, down.encoded),
        LinkRow("sent on the network", up.sent, down.sent),
    ]


def _stages_of(recipe_text: str) -> list[str]:
    """The stages of both ways as the ledger names them, lossless ones last; none of a recipe that cannot be read."""
    from photon.link.codec.notation import parse_pipeline  # here, because it brings torch

    try:
        link = parse_recipe(recipe_text, "recipe.toml").link
    except ConfigError:
        return []
    codecs = [parse_pipeline(stages) for stages in (link.up, link.down)]
    lossy = [codec.labels[:-1] if codec.lossless else codec.labels for codec in codecs]
    return _woven(_woven(*lossy), [codec.labels[-1] for codec in codecs if codec.lossless])


def _woven(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Both, each in its order if that can be: what is only in the second stands behind the first, or before what
    follows it there and is in both."""
    out = list(dict.fromkeys(first))
    for index, name in enumerate(second):
        if name not in out:
            places = [out.index(other) for other in second[index + 1 :] if other in out]
            out.insert(min(places, default=len(out)), name)
    return out


def times_fewer(flow: Flow) -> float:
    """How many times less the messages took than float32 would have."""
    return flow.raw / flow.encoded if flow.encoded else 1.0
