"""Optional parts of the installation, and what to say when one is missing."""

from __future__ import annotations

from importlib.util import find_spec

from photon.errors import InputError

_MODULES = {"sites": ("flwr", "aiohttp", "cryptography")}


def require(extra: str) -> None:
    """Raises InputError that names the command to install, if a module of `extra` is missing."""
    missing = [name for name in _MODULES[extra] if find_spec(name) is None]
    if missing:
        raise InputError(
            f"{', '.join(missing)} is not installed: nodes beyond this process need the extra `{extra}`. "
            f"pip install 'photon-federated[{extra}]'"
        )
