"""The hosts' scoring functions under their own names and keywords, for code that would rather import than patch.

They mean what the hosts' own mean, masked tokens included, except that half precision is scored in float32 and that
documents of unequal lengths need no padding. None of the hosts is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgecolbert_kernels import backends, checks
from edgecolbert_kernels.ops import arguments, tensors
from edgecolbert_kernels.scoring import maxsim, maxsim_pairs

# What sentence-transformers gives a document without a token: below any real score, and finite when squared.
EMPTY_DOCUMENT = -1e9
# PyLate's names of other libraries' kernels: here they leave the choice to us.
OTHER_KERNELS = ("flash", "lik")


def colbert_scores(
    queries_embeddings: Any,
    documents_embeddings: Any,
    queries_mask: Any = None,
    documents_mask: Any = None,
    backend: str | None = None,
    *,
    mask_mode: str = "zero",
) -> Tensor:
    """PyLate's `scores.colbert_scores`: every query with every document.

    Args:
        queries_embeddings: `[Nq, Lq, d]`: tensor, array or nested lists; or a list of `[Lq, d]`.
        documents_embeddings: `[Nd, Ld, d]`, or a list of `[Ld, d]`, of equal lengths or not.
        queries_mask: `[Nq, Lq]` of 0/1 or bool.
        documents_mask: `[Nd, Ld]`.
        backend: one of `backend()`, or PyLate's "flash" or "lik", which here mean "auto".
        mask_mode: "zero", as PyLate: the similarity to a masked document token is 0 and takes part in the maximum; or
            "exclude": such a token is never chosen.

    Returns:
        `[Nq, Nd]`, float32 (float64 for float64 tensors).

    Raises:
        TypeError, ValueError: as `maxsim`; a mask has values other than 0 and 1.
    """
    Q, D = _batch(queries_embeddings), _batch(documents_embeddings)
    for X, name in ((Q, "queries_embeddings"), (D, "documents_embeddings")):
        if not isinstance(X, list) and X.ndim != 3:
            raise checks.wrong_shape(name, X.shape, "three dimensions, or a list of [L, d]")
    with _on(backend):
        return _score(Q, D, _kept(queries_mask, Q), _kept(documents_mask, D), **_options(Q, D, mask_mode))


def colbert_kd_scores(
    queries_embeddings: Any,
    documents_embeddings: Any,
    queries_mask: Any = None,
    documents_mask: Any = None,
    backend: str | None = None,
    *,
    mask_mode: str = "zero",
) -> Tensor:
    """PyLate's `scores.colbert_kd_scores`: every query with its own candidates.

    Args:
        queries_embeddings: `[Nq, Lq, d]`: tensor, array, or (nested) lists of equal lengths.
        documents_embeddings: `[Nq, K, Ld, d]`.
        queries_mask: `[Nq, Lq]` of 0/1 or bool.
        documents_mask: `[Nq, K, Ld]`.
        backend, mask_mode: as in `colbert_scores`.

    Returns:
        `[Nq, K]`, float32 (float64 for float64 tensors).

    Raises:
        TypeError, ValueError: as `maxsim`; a mask has values other than 0 and 1.
    """
    Q, D = _whole(queries_embeddings), _whole(documents_embeddings)
    if Q.ndim != 3 or D.ndim != 4:
        raise checks.wrong_shape("documents_embeddings", D.shape, "[Nq, K, Ld, d], for queries_embeddings [Nq, Lq, d]")
    with _on(backend):
        return _score(Q, D, _kept(queries_mask, Q), _kept(documents_mask, D), **_options(Q, D, mask_mode))


def colbert_scores_pairwise(queries_embeddings: Any, documents_embeddings: Any, backend: str | None = None) -> Tensor:
    """PyLate's `scores.colbert_scores_pairwise`: query b with document b.

    Args:
        queries_embeddings: `[B, Lq, d]`, or a list of B `[Lq, d]` of any lengths: tensors, arrays or nested lists.
        documents_embeddings: `[B, Ld, d]`, or a list of B `[Ld, d]`.
        backend: as in `colbert_scores`.

    Returns:
        `[B]`, float32 (float64 for float64 tensors).

    Raises:
        TypeError, ValueError: as `maxsim_pairs`.
    """
    Q, D = (_list(X) if isinstance(X, (list, tuple)) else _batch(X) for X in (queries_embeddings, documents_embeddings))
    with _on(backend):
        return _tensor(maxsim_pairs(Q, D, **_options(Q, D, "exclude")))


def maxsim_st(
    a: Any,
    b: Any,
    a_mask: Any = None,
    b_mask: Any = None,
    chunk_elements: int | None = None,
    length_normalize: bool = False,
    device: str | torch.device | None = None,
) -> Tensor:
    """`sentence_transformers.util.maxsim` of sentence-transformers 6: every query with every document.

    Args:
        a: queries: `[Nq, Lq, d]`, a list of `[Lq, d]`, or `[Lq, d]` for one: tensors or arrays.
        b: documents: `[Nd, Ld, d]`, a list of `[Ld, d]`, or `[Ld, d]`.
        a_mask: `[Nq, Lq]` (for a list, Lq of the longest) or a list of `[Lq]`, of 0/1 or bool. None: all of a list; of an
            array, its rows that are not all zero.
        b_mask: the same for b.
        chunk_elements: not used: there is no intermediate to keep small.
        length_normalize: divide by the number of tokens of the query that are kept.
        device: where to score; None: where b is.

    Returns:
        `[Nq, Nd]` float32, where b is. A document without a token scores -1e9.

    Raises:
        TypeError, ValueError: as `maxsim`; a mask has values other than 0 and 1.
    """
    Q, q_mask = _side(a, a_mask, "a_mask")
    D, d_mask = _side(b, b_mask, "b_mask")
    home = next((X.device for side in (D, Q) for X in side[:1] if isinstance(X, Tensor)), torch.device("cpu"))
    if not len(Q) or not len(D):
        return torch.zeros(len(Q), len(D), device=home)
    if d_mask is None and not isinstance(D, list):
        d_mask = D.any(-1)
    there = home if device is None else torch.device(device)
    moved = (_move(X, there) for X in (Q, D, q_mask, d_mask))
    scores = _score(*moved).to(home)
    empty = _empty(D, d_mask)
    if empty.any():
        scores = scores.masked_fill(empty.to(home), EMPTY_DOCUMENT)
    if length_normalize:
        scores = scores / _count(Q, q_mask).clamp_min(1).to(home, scores.dtype)[:, None]
    return scores


def fused(Q: Any, D: Any) -> bool:
    """Whether a kernel of ours, not plain PyTorch, would score these; the hosts have plain PyTorch themselves."""
    Q, D = (X[0] if isinstance(X, (list, tuple)) and len(X) else X for X in (Q, D))
    device, dtype = "cpu", "float32"
    for X in (Q, D):
        if isinstance(X, Tensor):
            if X.dtype not in arguments.DTYPES:
                return False
            device = X.device.type if X.device.type != "cpu" else device
            dtype = "float64" if X.dtype == torch.float64 else dtype
        elif isinstance(X, np.ndarray) and X.dtype.kind != "f":
            return False
    return (_known if torch.compiler.is_compiling() else _takes)(device, dtype)


def _takes(device: str, dtype: str) -> bool:
    return backends.choose("maxsim", device, dtype) != "torch"


_known = torch.compiler.assume_constant_result(_takes)


@contextmanager
def _chosen(name: str) -> Iterator[None]:
    with backends.backend("auto" if name in OTHER_KERNELS else name):
        yield


def _on(backend: str | None) -> Any:
    return nullcontext() if backend is None else _chosen(backend)


def _whole(X: Any) -> Tensor:
    """A tensor of an array or of lists of equal lengths."""
    if isinstance(X, Tensor):
        return X
    if isinstance(X, np.ndarray):
        return tensors.from_numpy(X)
    if X and isinstance(X[0], Tensor):
        return torch.stack(list(X))
    return torch.from_numpy(np.asarray(X, dtype=np.float32))


def _batch(X: Any) -> Any:
    """The same, but a list of matrices stays one, as its lengths may differ."""
    if isinstance(X, (list, tuple)) and X and all(isinstance(x, (Tensor, np.ndarray)) and x.ndim == 2 for x in X):
        return list(X)
    return _whole(X)


def _list(X: Any) -> list[Any]:
    return [x if isinstance(x, (Tensor, np.ndarray)) else torch.tensor(x, dtype=torch.float32) for x in X]


def _kept(mask: Any, X: Any) -> Any:
    """The mask as bool, for a list as a list."""
    if mask is None:
        return None
    mask = _whole(mask) if not isinstance(mask, (list, tuple)) or not isinstance(X, list) else mask
    if isinstance(mask, Tensor):
        mask = _binary(mask)
        return list(mask) if isinstance(X, list) else mask
    return [_binary(_whole(each)) for each in mask]


def _binary(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    # The hosts multiply by a mask: other values are weights. Under torch.compile there is no looking at them.
    if torch.compiler.is_compiling() or not ((mask == 0) | (mask == 1)).all():
        raise ValueError("a mask has values other than 0 and 1")
    return mask != 0


def _options(Q: Any, D: Any, mask_mode: str) -> dict[str, Any]:
    double = any(isinstance(X, Tensor) and X.dtype == torch.float64 for X in (Q, D))
    return {"mask_mode": mask_mode, "out_dtype": torch.float64 if double else None}


def _score(Q: Any, D: Any, q_mask: Any, d_mask: Any, **options: Any) -> Tensor:
    if (
        q_mask is not None or d_mask is not None
    ):  # These are tensors, and `maxsim` takes no tensors next to arrays only.
        Q, D = ([_whole(x) for x in X] if isinstance(X, list) else X for X in (Q, D))
    return _tensor(maxsim(Q, D, q_mask, d_mask, **options))


def _tensor(scores: Any) -> Tensor:
    return scores if isinstance(scores, Tensor) else torch.from_numpy(scores)


def _side(X: Any, mask: Any, name: str) -> tuple[Any, Any]:
    """One side of `maxsim_st`: a batch in floating point, and its mask in the same layout."""
    if isinstance(X, (list, tuple)):
        X = [_floating(x if isinstance(x, (Tensor, np.ndarray)) else _whole(x)) for x in X]
        if isinstance(mask, (Tensor, np.ndarray)):
            mask, longest = _whole(mask), max(len(x) for x in X)
            if mask.shape[-1] != longest:
                raise checks.wrong_shape(name, mask.shape, f"{longest} tokens, as the longest")
            mask = [row[: len(x)] for row, x in zip(mask.expand(len(X), -1), X, strict=True)]
        return X, _kept(mask, X)
    X = _floating(_whole(X))
    if X.ndim == 2:
        X = X[None]
    if isinstance(mask, (list, tuple)):
        mask = torch.nn.utils.rnn.pad_sequence([_whole(each) for each in mask], batch_first=True)
    if mask is not None:
        mask = _binary(_whole(mask)).expand(X.shape[:2])
    return X, mask


def _floating(X: Any) -> Any:
    if isinstance(X, np.ndarray):
        return X if X.dtype.kind == "f" else X.astype(np.float32)
    return X if X.is_floating_point() else X.float()


def _move(X: Any, device: torch.device) -> Any:
    if isinstance(X, list):
        return X if device.type == "cpu" and isinstance(X[0], np.ndarray) else [_whole(x).to(device) for x in X]
    return X if X is None else X.to(device)


def _count(X: Any, mask: Any) -> Tensor:
    if isinstance(mask, list):
        return torch.tensor([int(each.sum()) for each in mask])
    if mask is not None:
        return mask.sum(-1)
    return torch.tensor([len(x) for x in X]) if isinstance(X, list) else X.any(-1).sum(-1)


def _empty(X: Any, mask: Any) -> Tensor:
    return _count(X, mask) == 0
