"""Between a view of documents and the bytes of a folder, which `edgecolbert_kernels.storage` keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgecolbert_kernels import identifiers
from edgecolbert_kernels.identifiers import Id
from edgecolbert_kernels.packed.tokens import PackedTokens
from edgecolbert_kernels.storage import reader
from edgecolbert_kernels.storage.header import Header

Array = np.ndarray
Commit = tuple[Header, dict[str, Any]]


def commit(documents: PackedTokens, names: list[Id] | None) -> Commit:
    """As a folder has them: a header without its parts, and the bytes of each.

    Raises:
        ValueError: an id stands twice.
    """
    tokens, offsets, scales = documents.contiguous()
    data: dict[str, Any] = {"tokens": tokens, "offsets": offsets}
    kind = "none"
    if scales is not None:
        data["scales"] = scales
    if names:
        identifiers.each_once(names)
        kind = identifiers.kind(names[0])
        if kind == "int64":
            data["ids"] = np.array(names, np.int64)
        else:
            data["ids"], ends = identifiers.encode(names)
            data["id_offsets"] = np.concatenate([[0], ends])
    return Header(documents.dtype, documents.dim, kind, documents=len(documents), tokens=len(tokens)), data


def nothing(header: Header, kind: str) -> Commit:
    """No documents, with this kind of ids."""
    data = {"offsets": np.zeros(1, np.int64)}
    if kind == "utf8":
        data["id_offsets"] = np.zeros(1, np.int64)
    return Header(header.dtype, header.dim, kind), data


def names(folder: Path, contents: reader.Contents) -> Any:
    """The ids of all documents of a commit, those of removed ones too; None where there are none."""
    if contents.ids is None or contents.id_offsets is None:
        return contents.ids
    return identifiers.MappedIds(contents.ids, contents.id_offsets, str(folder / contents.header.file("ids")))


def live(contents: reader.Contents) -> Array:
    """The numbers of the documents that are not removed."""
    keep = np.ones(contents.header.documents, bool)
    keep[contents.removed] = False
    return np.flatnonzero(keep)
