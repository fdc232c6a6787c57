"""An index: a folder with the packed embeddings of a corpus and what is needed to encode a query the same way.

DIR/index.json       model with a fingerprint of its weights, tokens a document, dimensions
DIR/texts.json       a digest of the text that each document was encoded from; "" while it may be one or the other
DIR/projection.npy   for a sentence encoder: what brings its vectors to that many dimensions
DIR/embeddings/      PackedEmbeddings with the corpus' ids
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from edgecolbert_kernels.packed import PackedEmbeddings, PackedWriter
from edgecolbert_kernels.signatures import Storage

SETTINGS, TEXTS, PROJECTION, EMBEDDINGS = "index.json", "texts.json", "projection.npy", "embeddings"
# Texts that are sorted by length together, and documents of a commit: what an interruption costs at most.
WINDOW = 4096
COMMIT = 256


@dataclass(frozen=True)
class Settings:
    model: str
    max_tokens: int
    dimension: int
    dtype: Storage
    fingerprint: str | None = None  # of the encoder; None in an index from before it was kept


class Progress:
    """One line on the standard error that says how far things are; nothing where nobody looks."""

    def __init__(self, total: int, done: int, unit: str, quiet: bool = False) -> None:
        self.total, self.first, self.done, self.unit = total, done, done, unit
        self.quiet = quiet or not sys.stderr.isatty()
        self.start = self.shown = time.monotonic()

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if self.quiet or (now - self.shown < 0.2 and self.done < self.total):
            return
        self.shown = now
        left = (self.total - self.done) / max(self.rate, 1e-9)
        text = f"{self.done}/{self.total} {self.unit}, {self.rate:.1f} {self.unit}/s, {_clock(left)} left"
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    @property
    def rate(self) -> float:
        return (self.done - self.first) / max(time.monotonic() - self.start, 1e-9)

    def close(self) -> None:
        if not self.quiet:
            print(file=sys.stderr)


def build(
    folder: Path,
    corpus: Iterable[tuple[str, str]],
    encoder: Any,
    settings: Settings,
    *,
    update: bool = False,
    prune: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Encode what is not there yet. Every COMMIT documents are a commit, so whatever stops this leaves an index.

    update: also what is there with another text than in the corpus; its old vectors stay until the commit of the new ones.
    prune: remove what is not in the corpus. Returns `info`, and how many documents were added, updated and pruned, and are
    left outdated and not in the corpus.

    Raises:
        ValueError: the folder is something else, or was begun with other settings or weights.
    """
    documents = list(corpus)
    folder.mkdir(parents=True, exist_ok=True)
    there = load_settings(folder) if (folder / SETTINGS).exists() else None
    if there is None:
        # The settings come last: without them, the rest is what an attempt before has left behind.
        leftovers = {folder / PROJECTION, *folder.glob(f".{PROJECTION}.*.tmp"), *folder.glob(f".{SETTINGS}.*.tmp")}
        if not leftovers.issuperset(folder.iterdir()):
            raise ValueError(f"{folder} is not empty, and not an index")
        for path in leftovers:
            path.unlink(missing_ok=True)
        if hasattr(encoder, "projection"):
            encoder.fit([text for _, text in documents])
            array = io.BytesIO()
            np.save(array, encoder.projection.numpy())
            _write(folder / PROJECTION, array.getvalue())
        _write(folder / SETTINGS, json.dumps(asdict(settings), indent=1).encode())
    else:
        pairs = zip(asdict(there).items(), asdict(settings).values(), strict=True)
        # An older index has no fingerprint, and is taken at its word.
        differing = [f"{name} {old!r}, not {new!r}" for (name, old), new in pairs if old not in (None, new)]
        if differing:
            raise ValueError(f"{folder} was begun with {'; '.join(differing)}")
        load_projection(folder, encoder)
    started = time.monotonic()
    with PackedWriter(folder / EMBEDDINGS, dim=settings.dimension, dtype=settings.dtype) as writer:
        digests = {name: _digest(text) for name, text in documents}
        encoded, changed, absent = _compare(folder, digests)
        if prune:
            writer.remove(ids=absent)
        outdated = set(changed if update else ())
        missing = [(name, text) for name, text in documents if name in outdated or name not in writer]
        # Whatever stops this, no document has the digest of a text that it was not encoded from: one that is replaced loses
        # its own before the commit and gets the new one after it.
        kept = {name: "" if name in outdated else old for name, old in encoded.items() if name in writer}
        known = {**digests, **kept}
        _write_digests(folder, known)
        progress = Progress(len(documents), len(documents) - len(missing), "documents", quiet)
        for window in _batches(missing, WINDOW):
            window.sort(key=lambda each: len(each[1]))
            replaced: dict[str, str] = {}
            try:
                for batch in _batches(window, COMMIT):
                    names = [name for name, _ in batch]
                    writer.upsert(encoder.encode_documents([text for _, text in batch], progress), names)
                    replaced |= {name: digests[name] for name in names if name in outdated}
            finally:
                if replaced:
                    known |= replaced
                    _write_digests(folder, known)
        progress.close()
    seconds = time.monotonic() - started
    return {
        **info(folder),
        "added": len(missing) - len(outdated),
        "updated": len(outdated),
        "pruned": len(absent) if prune else 0,
        "outdated": 0 if update else len(changed),
        "not_in_corpus": 0 if prune else len(absent),
        "seconds": round(seconds, 2),
        "documents_per_second": round(progress.rate, 1),
    }


def _compare(folder: Path, digests: dict[str, str]) -> tuple[dict[Any, str | None], list[Any], list[Any]]:
    """The digest of the text that each document of the index was encoded from, the ids of those that have another in the
    corpus, and of those that are not in it.
    """
    # None for a document of unknown text: of an older index, or that something else has added.
    kept: dict[Any, str | None] = _read_json(folder / TEXTS) if (folder / TEXTS).exists() else {}
    encoded = {name: kept.get(name) for name in load_embeddings(folder).ids or []}
    changed = [name for name, old in encoded.items() if name in digests and old not in (None, digests[name])]
    return encoded, changed, [name for name in encoded if name not in digests]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _write_digests(folder: Path, digests: dict[Any, str | None]) -> None:
    _write(folder / TEXTS, json.dumps(digests).encode())


def load_settings(folder: Path) -> Settings:
    path = folder / SETTINGS
    if not path.exists():
        raise FileNotFoundError(f"{folder} is not an index: it has no {SETTINGS}")
    record = _read_json(path)
    names = [field.name for field in fields(Settings)]
    if record.keys() | {"fingerprint"} != set(names):
        raise ValueError(f"{path}: want {', '.join(names)}")
    return Settings(**record)


def load_projection(folder: Path, encoder: Any) -> None:
    if hasattr(encoder, "projection"):
        import torch

        encoder.projection = torch.from_numpy(load_array(folder / PROJECTION))


def load_array(path: Path) -> np.ndarray:
    """What a .npy file holds.

    Raises:
        ValueError: names the file, which is something else, cut off, or holds objects.
    """
    with path.open("rb") as file:
        try:
            return np.lib.format.read_array(file, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{path}: not a whole .npy file ({error})") from None


def load_embeddings(folder: Path) -> PackedEmbeddings:
    """Of an index, or of a folder of packed embeddings alone."""
    inside = folder / EMBEDDINGS
    return PackedEmbeddings.load(inside if inside.exists() else folder)


def info(folder: Path) -> dict[str, Any]:
    packed = load_embeddings(folder)
    lengths = packed.lengths
    settings = asdict(load_settings(folder)) if (folder / SETTINGS).exists() else {}
    return {
        **settings,
        "documents": len(packed),
        "tokens": packed.num_tokens,
        "tokens_per_document": round(float(lengths.mean()), 1) if len(lengths) else 0.0,
        "longest": int(lengths.max(initial=0)),
        "dim": packed.dim,
        "dtype": packed.dtype,
        "mebibytes": round(packed.nbytes / 2**20, 2),
        "ids": packed._ids is not None,
    }


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: not a JSON object")
    return record


def _write(path: Path, data: bytes) -> None:
    """All of it or, where the disk refuses, nothing."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        error.filename = str(path)  # a full disk does not name one
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
