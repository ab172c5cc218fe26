"""The manifest of a shard folder: what its token files hold, and what they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from photon.errors import DataError

Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
FILE_NAME = "manifest.json"


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ShardFile(_Closed):
    """One file of little-endian token ids."""

    name: Annotated[str, StringConstraints(pattern=r"^(train|heldout)-\d{5}\.bin$")]
    tokens: Count
    sha256: Sha256


class Split(_Closed):
    """One side of the train/held-out split."""

    documents: Count = Field(description="Those that begin here: the held-out tail of a divided one does not.")
    tokens: Count = Field(description="End-of-text tokens included.")
    bytes: Count = Field(description="Of text in UTF-8.")
    files: list[ShardFile]


class Origin(_Closed):
    """What the shards were made from, and how."""

    source: str
    field: str
    fingerprint: str = Field(description="Hash of everything that shaped the shards: files, options, tokenizer.")
    heldout_fraction: float
    sequence_length: int = Field(description="Both splits of a small silo were made to hold one such sequence.")
    max_bytes: int | None


class Manifest(_Closed):
    """Everything a reader needs; unknown keys are refused."""

    format: Literal["photon-shards"] = "photon-shards"
    version: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    tokenizer_sha256: Sha256
    vocab_size: Annotated[int, Field(ge=1, le=2**32)]
    end_of_text: Count
    origin: Origin
    train: Split
    heldout: Split
    unigram_loss: float = Field(
        description="Held-out cross-entropy (nats/token) under the train split's add-one-smoothed unigram."
    )
    notes: list[str] = Field(description="What was left out of the source.")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read a shard folder's manifest; DataError if there is none or it is not one."""
        path = folder / FILE_NAME
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError(f"{folder}: no shards here (no {FILE_NAME}); build them, or name a shard folder") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValidationError, UnicodeDecodeError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "not UTF-8"}
            where = ".".join(str(part) for part in first["loc"]) or "whole file"
            raise DataError(
                f"{path}: not a manifest of this version ({where}: {first['msg']}); delete {folder} to build it again"
            ) from error
