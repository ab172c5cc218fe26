"""Writes docs/metrics.md from the schema of what a run records: `python -m photon.schema_doc > docs/metrics.md`."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterable, Sequence
from typing import Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from photon.events import Event
from photon.summary import Summary

_INTRODUCTION = """\
<!-- Written by `python -m photon.schema_doc > docs/metrics.md`; edit the classes it reads. -->
# What a run records

`RUN/metrics.jsonl` is the record of a run: one JSON object a line, appended as things happen. Everything else that
tells of a run (`summary.json`, `report.html`, the final table) is computed from it, and `photon report RUN` does so
again.

- Bytes are of serialised messages. Bytes and tokens are running totals of the committed run, except those that begin
  with `round_` and those inside [NodeRound](#noderound), which count one round.
- A resume cuts the file back to the end of the last committed round, so no round is counted twice.
- A number that is not finite is written as text: `"NaN"`, `"Infinity"`.
- Losses are in nats per token. Numbers over silos are pooled from sums: a mean over all held-out tokens.
- `photon.track.read_events(path)` returns typed events and refuses a damaged line by its number.

TensorBoard, Weights & Biases and MLflow (`[track]` in the recipe) get the same numbers by sequential step, under
slash-separated names: `heldout/*` and `heldout_SILO/*` of an evaluation; `train/*`, `total/*`, `phase_s/*`,
`round/missing` and `node_NAME/*` of a round.
"""


def metrics_markdown() -> str:
    """The whole page: every kind of event, the objects inside them, then summary.json, a line for each field."""
    events = event_types()
    shared = [name for name in events[0].model_fields if all(name in event.model_fields for event in events)]
    parts = [_INTRODUCTION, "## Events of metrics.jsonl\n\nEvery event has\n", "- `event` (text): Its kind."]
    parts += [_line(name, events[0].model_fields[name]) for name in shared if name != "event"]
    parts += [_section(f"`{event_kind(event)}`", event, shared) for event in events]
    parts += ["\n## Objects inside events", *(_section(model.__name__, model) for model in _inside(events))]
    parts.append(_section("summary.json", Summary, level="##"))
    parts += [_section(model.__name__, model) for model in _inside([Summary])]
    return "\n".join(parts) + "\n"


def event_types() -> list[type[BaseModel]]:
    """The classes of all events, in the order of `photon.events.Event`."""
    union, *_ = get_args(Event)  # Event is Annotated[A | B | ..., discriminator]
    return list(get_args(union))


def event_kind(event: type[BaseModel]) -> str:
    """The word in its `event` field."""
    return str(event.model_fields["event"].default)


def _section(heading: str, model: type[BaseModel], left_out: Sequence[str] = (), level: str = "###") -> str:
    about = inspect.cleandoc(model.__doc__ or "")
    lines = [_line(name, field) for name, field in model.model_fields.items() if name not in left_out]
    return "\n".join([f"\n{level} {heading}\n\n{about}\n", *lines])


def _line(name: str, field: FieldInfo) -> str:
    meaning = f": {field.description}" if field.description else ""
    return f"- `{name}` ({_words(field.annotation)}){meaning}"


def _words(annotation: object) -> str:
    """The JSON type in words; objects link to their own section. TypeError for a type that no event had so far."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(part) for part in arguments)
    if origin is Literal:
        return " or ".join(f'"{value}"' for value in arguments)
    if origin is list:
        return f"list of {_words(arguments[0])}"
    if origin is dict:
        return f"object of name to {_words(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    words: dict[object, str] = {str: "text", int: "integer", float: "number", type(None): "null"}
    if annotation not in words:
        raise TypeError(f"no words for {annotation!r}; add them to photon.schema_doc")
    return words[annotation]


def _inside(models: Iterable[type[BaseModel]]) -> list[type[BaseModel]]:
    """The models that the fields of `models` hold, directly or further in, each once, outermost first."""
    found: list[type[BaseModel]] = []
    waiting: list[object] = [field.annotation for model in models for field in model.model_fields.values()]
    for annotation in waiting:  # it grows: what a model holds is looked at after what stands beside it
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if annotation not in found:
                found.append(annotation)
                waiting += [field.annotation for field in annotation.model_fields.values()]
        else:
            waiting += get_args(annotation)
    return found


if __name__ == "__main__":
    sys.stdout.write(metrics_markdown())
