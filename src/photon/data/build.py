"""Data preparation: from a recipe's texts to a tokenizer and every silo's shards, built once and then reused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from photon.config import DataConfig, Recipe, SiloConfig
from photon.data.atomic import new_folder
from photon.data.document import Document
from photon.data.manifest import FILE_NAME
from photon.data.pool import Share, write_shares
from photon.data.shards import Origin, ShardReader, encode_and_split, write_shards
from photon.data.sources import Source, expanded, limited, open_source
from photon.data.split import Encoded, is_heldout
from photon.data.tokenizer import Tokenizer, train_tokenizer
from photon.errors import DataError

_TOKENIZERS, _SILOS = "tokenizers", "silos"
_ABOUT = "photon.json"
_REPORT_BYTES = 1 << 18


@dataclass(frozen=True)
class Progress:
    """How far a build is. `phase` is `sample`, `train tokenizer`, `tokenize`, `done` or `reuse`; bytes are of text."""

    silo: str
    phase: str
    done_bytes: int
    total_bytes: int | None
    note: str = ""


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class SiloData:
    """One silo's shards on disk: a folder per source, in the order of the recipe, or one for its share of a pool."""

    name: str
    folder: Path
    sources: list[Path]


@dataclass
class Prepared:
    """Everything a run reads: the tokenizer (also as a folder that transformers loads) and every silo's shards."""

    tokenizer: Tokenizer
    tokenizer_folder: Path
    silos: dict[str, SiloData]


def prepare(recipe: Recipe, root: Path | None = None, progress: Report | None = None) -> Prepared:
    """Build or reuse the tokenizer and all shards of `recipe` under its `data.dir`.

    Relative paths start at `root` (default: the working folder). Folders are named after everything that shaped
    their content, so a change of text or options builds anew and nothing stale is ever read. Every source is found
    before the first is read. With `data.partition = "iid"` every silo has one folder, its share of all text. DataError
    names silo and source.
    """
    base = (root or Path.cwd()).resolve()
    work = _Workplace(recipe.data, base, base / expanded(recipe.data.dir), progress or (lambda _: None))
    sources = {silo.name: [work.found(silo, spec) for spec in _text_of(silo)] for silo in recipe.silo}
    tokenizer, tokenizer_folder = work.tokenizer(work.shared_text() or sources)
    if recipe.data.partition == "iid":
        folders = work.pool(sources, tokenizer)
    else:
        folders = {
            name: [work.shards(name, one, len(parts), tokenizer) for one in parts] for name, parts in sources.items()
        }
    silos = {name: SiloData(name, work.folder / _SILOS / name, folders[name]) for name in sources}
    return Prepared(tokenizer, tokenizer_folder, silos)


def prepare_tokenizer(recipe: Recipe, root: Path | None = None, progress: Report | None = None) -> Tokenizer:
    """The tokenizer alone, for an Aggregator that has no silo's text: given, or trained on `data.tokenizer_text`.

    Raises DataError if the recipe would train it on text that stays with its owners.
    """
    base = (root or Path.cwd()).resolve()
    work = _Workplace(recipe.data, base, base / expanded(recipe.data.dir), progress or (lambda _: None))
    shared = work.shared_text()
    if recipe.data.tokenizer == "train" and not shared:
        raise DataError(
            'data.tokenizer = "train" needs text, and the owners\' text stays with them: name text of your own in '
            "data.tokenizer_text (builtin:core, for instance), or a finished tokenizer in data.tokenizer"
        )
    return work.tokenizer(shared)[0]


def _text_of(silo: SiloConfig) -> list[str]:
    if not silo.text:
        raise DataError(
            f"silo {silo.name} has no text: name it in the recipe, or let its owner join from elsewhere (photon node)"
        )
    return silo.text


def without_built(source: Source, folder: Path) -> Source:
    """The source without what Photon has built in the data folder `folder`, which may lie within the owner's text."""
    own = [(folder / name).resolve() for name in (_TOKENIZERS, _SILOS)]
    # Either may be named through a link; folders are few beside files.
    real = {place: place.resolve() for place in {path.parent for path in source.files}}
    kept = [path for path in source.files if not any(real[path.parent].is_relative_to(place) for place in own)]
    return replace(source, files=tuple(kept))


@dataclass(frozen=True)
class _Workplace:
    """The options, the folder and the listener of one preparation."""

    config: DataConfig
    base: Path
    folder: Path
    report: Report

    def shared_text(self) -> dict[str, list[Source]]:
        """The sources of `data.tokenizer_text`, as those of one owner; empty if there are none."""
        if not self.config.tokenizer_text or self.config.tokenizer != "train":
            return {}
        shared = SiloConfig(name="tokenizer_text", text=self.config.tokenizer_text)
        return {shared.name: [self.found(shared, spec) for spec in shared.text]}

    def found(self, silo: SiloConfig, spec: str) -> Source:
        """A source of `silo`, without what this preparation itself keeps in a folder that the source names."""
        try:
            source = open_source(spec, silo.field, self.base)
            kept = without_built(source, self.folder)
            if source.files and not kept.files:
                raise DataError(f"{spec}: only files that Photon built are there; name a folder of text")
        except DataError as error:
            raise DataError(f"silo {silo.name}: {error}") from error
        return kept

    def tokenizer(self, silos: dict[str, list[Source]]) -> tuple[Tokenizer, Path]:
        """The tokenizer of the recipe and its folder: trained, found from last time, or taken from elsewhere."""
        if self.config.tokenizer != "train":
            local = self.base / expanded(self.config.tokenizer)
            tokenizer = Tokenizer.load(local if local.is_dir() else self.config.tokenizer)
            folder = self.folder / _TOKENIZERS / tokenizer.sha256[:16]
            if not folder.is_dir():
                _save_tokenizer(tokenizer, folder, self.config.tokenizer, {})
            return _load_tokenizer(folder), folder
        fingerprint = _fingerprint(
            version=1,
            vocab_size=self.config.vocab_size,
            bytes_per_silo=self.config.tokenizer_bytes_per_silo,
            max_bytes=self.config.max_bytes_per_silo,
            heldout_fraction=self.config.heldout_fraction,
            silos={name: [source.identity(self.base) for source in sources] for name, sources in silos.items()},
        )
        folder = self.folder / _TOKENIZERS / fingerprint
        if not folder.is_dir():
            samples = {name: self._sample(name, sources) for name, sources in silos.items()}
            shares = {
                name: {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)}
                for name, texts in samples.items()
            }
            total = sum(share["bytes"] for share in shares.values())
            said = ", ".join(f"{name} {share['bytes']:,} bytes" for name, share in shares.items())
            self.report(Progress("", "train tokenizer", 0, total, f"sample: {said}"))
            tokenizer = train_tokenizer(samples, self.config.vocab_size)
            _save_tokenizer(tokenizer, folder, "train", shares)
            self.report(Progress("", "train tokenizer", total, total, f"{tokenizer.vocab_size} tokens"))
        return _load_tokenizer(folder), folder

    def shards(self, silo: str, source: Source, sources: int, tokenizer: Tokenizer) -> Path:
        """The shard folder of one of a silo's `sources` sources."""
        origin = self._origin(source, sources)
        identity = source.identity(self.base)
        fingerprint = _fingerprint(version=1, origin=origin.model_dump(), text=identity, tokenizer=tokenizer.sha256)
        origin = origin.model_copy(update={"fingerprint": fingerprint})
        folder = self.folder / _SILOS / silo / fingerprint
        try:
            reused = folder.is_dir()
            if not reused:
                notes: list[str] = []
                documents = self._read(silo, source, origin.max_bytes, notes)
                write_shards(documents, tokenizer, folder, origin, workers=self._workers, notes=notes)
            self._tell(silo, origin, folder, reused)
        except DataError as error:
            raise DataError(f"silo {silo}, source {source.spec}: {error}") from error
        return folder

    def pool(self, silos: dict[str, list[Source]], tokenizer: Tokenizer) -> dict[str, list[Path]]:
        """Every node's share of all silos' documents, one shard folder each, whatever the order of `silos`."""
        pool = {name: silos[name] for name in sorted(silos)}
        shares = self._shares(pool, tokenizer)
        missing = {place: share for place, share in enumerate(shares) if not share.folder.is_dir()}
        if missing:
            notes: list[str] = []
            with closing(self._pooled(pool, tokenizer, notes)) as documents:
                write_shares(documents, missing, len(shares), tokenizer, notes)
        for place, share in enumerate(shares):
            try:
                self._tell(share.node, share.origin, share.folder, place not in missing)
            except DataError as error:
                raise DataError(f"silo {share.node}, its share of the pool: {error}") from error
        return {share.node: [share.folder] for share in shares}

    def _shares(self, pool: dict[str, list[Source]], tokenizer: Tokenizer) -> list[Share]:
        """Where each node's share of the pool belongs; the folder is named after all that shapes it, as `shards` do."""
        identities = {name: [source.identity(self.base) for source in sources] for name, sources in pool.items()}
        shares = []
        for place, name in enumerate(pool):
            origin = Origin(
                source=f"share {place + 1} of {len(pool)} of the pool of all silos",
                field=", ".join(sorted({source.field for sources in pool.values() for source in sources})),
                fingerprint="",
                heldout_fraction=self.config.heldout_fraction,
                sequence_length=self.config.sequence_length,
                max_bytes=self.config.max_bytes_per_silo,
            )
            fingerprint = _fingerprint(
                version=1, partition="iid", origin=origin.model_dump(), pool=identities, tokenizer=tokenizer.sha256
            )
            origin = origin.model_copy(update={"fingerprint": fingerprint})
            shares.append(Share(name, self.folder / _SILOS / name / fingerprint, origin))
        return shares

    def _pooled(
        self, pool: dict[str, list[Source]], tokenizer: Tokenizer, notes: list[str]
    ) -> Generator[tuple[Encoded, bool], None, None]:
        """The documents of all silos, each source limited and split as it is by owner."""
        for name, sources in pool.items():
            for source in sources:
                origin = self._origin(source, len(sources))
                documents = self._read(name, source, origin.max_bytes, notes)
                try:
                    yield from encode_and_split(documents, tokenizer, origin, self._workers)
                except DataError as error:
                    raise DataError(f"silo {name}, source {source.spec}: {error}") from error

    def _origin(self, source: Source, sources: int) -> Origin:
        """What is made of one of a silo's `sources` sources; without its fingerprint."""
        return Origin(
            source=source.spec,
            field=source.field,
            fingerprint="",
            heldout_fraction=self.config.heldout_fraction,
            sequence_length=self.config.sequence_length,
            max_bytes=self._limit(sources),
        )

    def _read(self, silo: str, source: Source, max_bytes: int | None, notes: list[str]) -> Iterator[Document]:
        """The documents of a source, progress reported; `notes` takes in what is left out."""
        expected = _smaller(source.text_bytes, max_bytes)
        done = 0

        def note(text: str) -> None:
            notes.append(text)
            self.report(Progress(silo, "tokenize", done, expected, text))

        def advance(count: int) -> None:
            nonlocal done
            done = count
            self.report(Progress(silo, "tokenize", done, expected, source.spec))

        return _metered(source.documents(max_bytes, note), advance)

    def _tell(self, silo: str, origin: Origin, folder: Path, reused: bool) -> None:
        """Report what a finished shard folder holds; DataError if it is damaged."""
        manifest = ShardReader(folder).manifest
        text_bytes = manifest.train.bytes + manifest.heldout.bytes
        said = f"{origin.source}: {manifest.train.tokens:,} training and {manifest.heldout.tokens:,} held-out tokens"
        self.report(Progress(silo, "reuse" if reused else "done", text_bytes, text_bytes, said))

    @property
    def _workers(self) -> int:
        """Threads that tokenise."""
        return (os.cpu_count() or 1) if self.config.build_workers == "auto" else self.config.build_workers

    def _sample(self, silo: str, sources: list[Source]) -> list[str]:
        """One owner's share of the text that a tokenizer is trained on: never what is held out by its hash."""
        budget = self.config.tokenizer_bytes_per_silo // len(sources)
        texts: list[str] = []
        for source in sources if budget else []:
            documents = source.documents(self._limit(len(sources)), lambda note: None)
            training = (found for found in documents if not is_heldout(found.text, self.config.heldout_fraction))

            def advance(done: int) -> None:
                self.report(Progress(silo, "sample", done, budget))

            try:
                texts += [found.text for found in _metered(limited(training, budget), advance)]
            except DataError as error:
                raise DataError(f"silo {silo}, source {source.spec}: {error}") from error
        return texts

    def _limit(self, sources: int) -> int | None:
        """A silo's limit is shared equally by its sources."""
        limit = self.config.max_bytes_per_silo
        return None if limit is None else max(1, limit // sources)


def _fingerprint(**parts: object) -> str:
    """Sixteen hex digits naming everything that shapes an artefact."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _smaller(first: int | None, second: int | None) -> int | None:
    known = [value for value in (first, second) if value is not None]
    return min(known) if first is not None and known else None


def _metered(documents: Iterable[Document], advance: Callable[[int], None]) -> Iterator[Document]:
    """Pass documents on and report the bytes so far, every quarter megabyte."""
    done = told = 0
    for found in documents:
        yield found
        done += len(found.text.encode())
        if done - told >= _REPORT_BYTES:
            advance(done)
            told = done


def _save_tokenizer(tokenizer: Tokenizer, folder: Path, source: str, sample: dict[str, dict[str, int]]) -> None:
    """Write the folder whole, with a note of its hash and of what every owner's text contributed."""
    about = {"source": source, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "sample": sample}
    with new_folder(folder) as temporary:
        tokenizer.save(temporary)
        (temporary / _ABOUT).write_text(json.dumps(about, indent=2), encoding="utf-8")


def _load_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer saved here before; DataError if it is not the one that was saved."""
    tokenizer = Tokenizer.load(folder)
    if tokenizer.sha256 != _declared_sha256(folder):
        raise DataError(f"{folder}: the tokenizer is not the one that was saved here; delete the folder")
    return tokenizer


def _declared_sha256(folder: Path) -> str | None:
    try:
        about: Any = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        return str(about["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def shard_folders(folder: Path) -> list[Path]:
    """Every finished shard folder at or under `folder`, sorted; DataError if there is none."""
    found = sorted(
        path.parent
        for path in folder.rglob(FILE_NAME)
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise DataError(f"{folder}: no shards here; build them first, or name their folder")
    return found


def describe(folder: Path) -> dict[str, Any]:
    """A shard folder in plain values: counts and bytes per token of both splits, options, notes, first text.

    `excerpt` is the start of the first training document, None when its tokenizer is not in this data folder.
    """
    reader = ShardReader(folder)
    manifest = reader.manifest
    train, heldout = manifest.train, manifest.heldout
    tokenizer = _tokenizer_beside(folder, manifest.tokenizer_sha256)
    return {
        "folder": str(folder),
        "source": manifest.origin.source,
        "documents": train.documents + heldout.documents,
        "tokens": train.tokens + heldout.tokens,
        "bytes": train.bytes + heldout.bytes,
        "bytes_per_token": reader.bytes_per_token,
        "train": train.model_dump(exclude={"files"}),
        "heldout": heldout.model_dump(exclude={"files"}),
        "unigram_loss": manifest.unigram_loss,
        "vocab_size": manifest.vocab_size,
        "dtype": manifest.dtype,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "options": manifest.origin.model_dump(),
        "notes": manifest.notes,
        "excerpt": tokenizer.decode(reader.first_document(100)) if tokenizer else None,
    }


def _tokenizer_beside(folder: Path, sha256: str) -> Tokenizer | None:
    for parent in folder.resolve().parents:
        for about in sorted((parent / _TOKENIZERS).glob(f"*/{_ABOUT}")):
            if _declared_sha256(about.parent) == sha256:
                return Tokenizer.load(about.parent)
    return None
