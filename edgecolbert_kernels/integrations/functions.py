"""The hosts' scoring functions under their own names and keywords, for code that would rather import than patch.

They mean what the hosts' own mean, masked tokens included, except that half precision is scored in float32 and that
documents of unequal lengths need no padding. None of the hosts is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from edgecolbert_kernels import backends, checks
from edgecolbert_kernels.integrations import inputs
from edgecolbert_kernels.scoring import maxsim, maxsim_pairs
from edgecolbert_kernels.signatures import BackendName, MaskMode

# What sentence-transformers gives a document without a token: below any real score, and finite when squared.
EMPTY_DOCUMENT = -1e9
# With PyLate's names of other libraries' kernels: here they leave the choice to us.
HostBackend: TypeAlias = Literal[BackendName, "flash", "lik"]


def colbert_scores(
    queries_embeddings: Any,
    documents_embeddings: Any,
    queries_mask: Any = None,
    documents_mask: Any = None,
    backend: HostBackend | None = None,
    *,
    mask_mode: MaskMode = "zero",
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
        TypeError, ValueError: as `maxsim`; a mask has another shape than these, or values other than 0 and 1.
    """
    Q, D = inputs.batch(queries_embeddings), inputs.batch(documents_embeddings)
    for X, name in ((Q, "queries_embeddings"), (D, "documents_embeddings")):
        if not isinstance(X, list) and X.ndim != 3:
            raise checks.wrong_shape(name, X.shape, "three dimensions, or a list of [L, d]")
    with _on(backend):
        return _score(Q, D, inputs.kept(queries_mask, Q), inputs.kept(documents_mask, D), **_options(Q, D, mask_mode))


def colbert_kd_scores(
    queries_embeddings: Any,
    documents_embeddings: Any,
    queries_mask: Any = None,
    documents_mask: Any = None,
    backend: HostBackend | None = None,
    *,
    mask_mode: MaskMode = "zero",
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
        TypeError, ValueError: as `maxsim`; a mask has another shape than these, or values other than 0 and 1.
    """
    Q, D = inputs.whole(queries_embeddings), inputs.whole(documents_embeddings)
    if Q.ndim != 3 or D.ndim != 4:
        raise checks.wrong_shape("documents_embeddings", D.shape, "[Nq, K, Ld, d], for queries_embeddings [Nq, Lq, d]")
    with _on(backend):
        return _score(Q, D, inputs.kept(queries_mask, Q), inputs.kept(documents_mask, D), **_options(Q, D, mask_mode))


def colbert_scores_pairwise(
    queries_embeddings: Any, documents_embeddings: Any, backend: HostBackend | None = None
) -> Tensor:
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
    Q, D = (
        inputs.matrices(X) if isinstance(X, (list, tuple)) else inputs.batch(X)
        for X in (queries_embeddings, documents_embeddings)
    )
    with _on(backend):
        return inputs.tensor(maxsim_pairs(Q, D, **_options(Q, D, "exclude")))


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
        TypeError, ValueError: as `maxsim`; a mask has another shape than these, or values other than 0 and 1.
    """
    Q, q_mask = inputs.side(a, a_mask, "a_mask")
    D, d_mask = inputs.side(b, b_mask, "b_mask")
    home = next((X.device for side in (D, Q) for X in side[:1] if isinstance(X, Tensor)), torch.device("cpu"))
    if not len(Q) or not len(D):
        return torch.zeros(len(Q), len(D), device=home)
    if d_mask is None and not isinstance(D, list):
        d_mask = inputs.has_values(D)
    there = home if device is None else torch.device(device)
    moved = (inputs.move(X, there) for X in (Q, D, q_mask, d_mask))
    scores = _score(*moved).to(home)
    empty = inputs.empty(D, d_mask)
    if empty.any():
        scores = scores.masked_fill(empty.to(home), EMPTY_DOCUMENT)
    if length_normalize:
        scores = scores / inputs.count(Q, q_mask).clamp_min(1).to(home, scores.dtype)[:, None]
    return scores


@contextmanager
def _chosen(name: HostBackend) -> Iterator[None]:
    with backends.backend("auto" if name == "flash" or name == "lik" else name):
        yield


def _on(backend: HostBackend | None) -> Any:
    return nullcontext() if backend is None else _chosen(backend)


def _options(Q: Any, D: Any, mask_mode: str) -> dict[str, Any]:
    double = any(isinstance(X, Tensor) and X.dtype == torch.float64 for X in (Q, D))
    return {"mask_mode": mask_mode, "out_dtype": torch.float64 if double else None}


def _score(Q: Any, D: Any, q_mask: Any, d_mask: Any, **options: Any) -> Tensor:
    # Masks are tensors, which `maxsim` does not take next to arrays alone.
    if q_mask is not None or d_mask is not None:
        Q, D = ([inputs.whole(x) for x in X] if isinstance(X, list) else X for X in (Q, D))
    return inputs.tensor(maxsim(Q, D, q_mask, d_mask, **options))
