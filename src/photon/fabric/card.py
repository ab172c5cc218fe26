"""The run card: what a node must know of a run to take part in it. It names no text, path or shard.

The Aggregator writes it, the gateway hands it to every node with a valid certificate, and the node makes of it a run
folder of its own, with the options that are the owner's put in place of the Aggregator's.
"""

from __future__ import annotations

import json
import re

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from photon.config import Recipe, SiloConfig, TrackConfig
from photon.errors import ConfigError, WireError
from photon.link.tensors import sha256_hex
from photon.link.update import Hash, Natural
from photon.recipe import dump_recipe, parse_recipe

MAX_TOKENIZER_BYTES = 64 * 2**20
# Files of a tokenizer folder; nothing that could name a place outside it, nothing that is code.
_TOKENIZER_FILE = re.compile(r"[A-Za-z0-9_-]{1,64}\.(json|txt|model)")


class RunCard(BaseModel):
    """What `GET /v1/run` answers."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    run: str = Field(max_length=64, pattern=r"^[0-9a-f]+$")
    photon: str = Field(max_length=32)
    recipe: str = Field(max_length=2**20, description="TOML, without the text of any silo.")
    vocab_size: Natural
    tokenizer_sha256: Hash
    tokenizer_bytes: Natural

    @property
    def recipe_sha256(self) -> str:
        """It changes with the recipe, which an operator may change between two rounds."""
        return sha256_hex(self.recipe.encode())


def run_card(run: str, photon: str, recipe: Recipe, vocab_size: int, tokenizer: bytes, sha256: str) -> RunCard:
    """The card of a run; `tokenizer` is what `pack_tokenizer` made."""
    return RunCard(
        run=run,
        photon=photon,
        recipe=dump_recipe(_without_text(recipe)),
        vocab_size=vocab_size,
        tokenizer_sha256=sha256,
        tokenizer_bytes=len(tokenizer),
    )


def read_card(answer: object) -> tuple[RunCard, Recipe]:
    """A card and its recipe, both checked. Raises WireError."""
    try:
        card = RunCard.model_validate(answer)
        return card, parse_recipe(card.recipe, "the Aggregator's recipe")
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise WireError(f"the Aggregator's run card is malformed: {place}: {first['msg']}") from None
    except ConfigError as error:
        raise WireError(
            f"this Photon cannot follow the Aggregator's recipe; are both of one version? {error}"
        ) from None


def pack_tokenizer(files: dict[str, str]) -> bytes:
    """A tokenizer folder's text files, by name, as one blob that is the same for the same files."""
    return json.dumps({name: files[name] for name in sorted(files)}, ensure_ascii=False).encode()


def unpack_tokenizer(blob: bytes) -> dict[str, str]:
    """Files by name. Raises WireError on anything but names of plain data files with text."""
    try:
        files = json.loads(blob)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the tokenizer that came is not JSON: {error}") from None
    if not isinstance(files, dict) or not files or len(files) > 16:
        raise WireError("the tokenizer that came is not a handful of named files")
    for name, text in files.items():
        if not _TOKENIZER_FILE.fullmatch(name) or not isinstance(text, str):
            raise WireError(f"the tokenizer that came holds {name!r}, which is no file of a tokenizer")
    return files


def _without_text(recipe: Recipe) -> Recipe:
    """The recipe as others may see it: who takes part and how, but not with which text, nor where results go."""
    silos = [
        SiloConfig(name=silo.name, batch_size=silo.batch_size, tau=silo.tau)  # no more than rounds need
        for silo in recipe.silo
    ]
    data = recipe.data.model_copy(update={"dir": "data", "tokenizer": "given", "tokenizer_text": []})
    link = recipe.link.model_copy(update={"store": ""})
    return recipe.model_copy(update={"silo": silos, "data": data, "link": link, "track": TrackConfig()})
