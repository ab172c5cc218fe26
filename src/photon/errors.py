"""Every error Photon raises on purpose. Each says what was wrong, where, and what to do."""

from __future__ import annotations


class PhotonError(Exception):
    """Base of all errors a user can meet; the CLI prints its text without a traceback and exits 1."""

    exit_code = 1


class InputError(PhotonError):
    """The user's input cannot be used as it is (exit code 2)."""

    exit_code = 2


class ConfigError(InputError):
    """A recipe or an override is wrong; the text names the place, the nearest valid key and the allowed range."""


class DataError(InputError):
    """A text, tokenizer or shard cannot be used; the text names the file and, where it has one, the line."""


class WireError(PhotonError):
    """Bytes that are not a well-formed Photon message, or that break their own declared bounds."""


class ReplyRefusedError(PhotonError):
    """A reply that does not belong to the task it answers, or whose update cannot be trusted."""


class StateError(PhotonError):
    """A stored state that is damaged, incomplete, or belongs to another run."""


class FabricError(PhotonError):
    """Tasks cannot be delivered to the nodes at all."""


class RoundFailedError(PhotonError):
    """Too few nodes answered before the deadline for the round to count."""


class StoppedError(PhotonError):
    """The user stopped a run; the text says how to go on."""
