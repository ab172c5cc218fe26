"""A command whose options are the fields of a dataclass: written once, for the command line and for what it asks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar, get_type_hints

Options = TypeVar("Options")


def command(options: type[Options], run: Callable[[Options], None]) -> Callable[..., None]:
    """A function with the fields of `options` as its parameters, which typer reads off its signature, and the docstring
    of `run`, which it calls with them."""

    def called(**values: Any) -> None:
        run(options(**values))  # typer has converted and checked each of them

    hints = get_type_hints(options, include_extras=True)
    parameters = [
        inspect.Parameter(
            option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=hints[option.name]
        )
        for option in fields(options)  # type: ignore[arg-type]  # it is a dataclass
    ]
    called.__doc__ = run.__doc__
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what inspect.signature looks at
    return called
