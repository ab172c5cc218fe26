"""The unit of text that every source yields and that the train/held-out split never divides."""

from __future__ import annotations

from dataclasses import dataclass

from photon.errors import DataError


@dataclass(frozen=True)
class Document:
    """One text and where it came from (`path`, `path:line`, or a dataset row), for error messages."""

    text: str
    origin: str


def document(text: object, origin: str) -> Document:
    """A Document of `text` if it is text that UTF-8 can hold; DataError naming `origin` otherwise."""
    if not isinstance(text, str):
        raise DataError(f"{origin}: the text is {_kind(text)}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{origin}: character {error.start + 1} is half of a surrogate pair, which is not text; repair the escape"
        ) from error
    return Document(text, origin)


def _kind(value: object) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"
