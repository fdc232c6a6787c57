"""MaxSim and its gradient once more, in float64 NumPy and a pair at a time, written independently of the package.

`reference.py` is held against this, and everything else against both. A query and a document are arrays [tokens, d];
`keep` arrays are boolean [tokens], and None keeps every token.
"""

from __future__ import annotations

import numpy as np

UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "float64": 2.0**-53}
"""Largest relative error of one rounding to nearest."""


def normalized(rows):
    """Rows over max(L2 norm, 1e-12), as torch.nn.functional.normalize."""
    return rows / np.maximum(np.sqrt((rows * rows).sum(-1, keepdims=True)), 1e-12)


def maxsim(query, document, q_keep=None, d_keep=None, mask_mode="exclude"):
    """(score, argmax [Lq]): argmax is -1 for a masked query token, where nothing is kept, and where a masked token's 0 won."""
    q_kept = np.ones(len(query), bool) if q_keep is None else q_keep
    d_kept = np.ones(len(document), bool) if d_keep is None else d_keep
    candidates = np.flatnonzero(d_kept) if mask_mode == "exclude" else np.arange(len(document))
    if len(candidates) == 0:
        return 0.0, np.full(len(query), -1)
    similarity = np.zeros((len(query), len(document)))
    with np.errstate(invalid="ignore", over="ignore"):
        similarity[:, d_kept] = query @ document[d_kept].T  # padding is skipped, never multiplied: it may be NaN
    argmax = candidates[similarity[:, candidates].argmax(1)]  # NumPy's argmax is the first maximum, or the first NaN
    score = similarity[q_kept, argmax[q_kept]].sum()
    return score, np.where(q_kept & d_kept[argmax], argmax, -1)


def gradients(query, document, argmax):
    """Gradients of one score to its query and document, and the sums of the absolute values of their terms."""
    chosen = argmax >= 0
    one_hot = np.zeros((len(query), len(document)))
    one_hot[chosen, argmax[chosen]] = 1
    return one_hot @ document, one_hot.T @ query, one_hot @ abs(document), one_hot.T @ abs(query)


def every_pair(similarity, query_lengths, document_lengths):
    """Sum over each query's rows of the maximum over each document's columns, [Nq, Nd]; without tokens 0."""
    scores = np.zeros((len(query_lengths), len(document_lengths)))
    q, d = (np.flatnonzero(lengths) for lengths in (query_lengths, document_lengths))
    if len(q) and len(d):
        rows, columns = (np.cumsum([0, *lengths])[:-1] for lengths in (query_lengths, document_lengths))
        best = np.maximum.reduceat(similarity, columns[d], axis=1)
        scores[np.ix_(q, d)] = np.add.reduceat(best, rows[q], axis=0)
    return scores


def rounding_term(query, document):
    """What fp32 accumulation in any order may cost each similarity [Lq, Ld] and its place in the score's sum.

    A dot product of d terms errs by at most gamma_d <|q_i|, |d_j|> (Higham, Accuracy and Stability, 3.1), a maximum by
    at most the worst of its arguments, and the sum over the query adds gamma_Lq of the magnitudes.
    """
    n = (query.shape[-1] + len(query) + 1) * UNIT_ROUNDOFF["float32"]
    return n / (1 - n) * (abs(query) @ abs(document).T)


FIXED_POINT_STEP = 2.0**-15
"""Distance of neighbouring values in "fast", on both sides."""


def fixed_point_term(query, document):
    """What rounding to fixed point may cost each similarity, half a step an element; its sums are exact in int32."""
    half = FIXED_POINT_STEP / 2
    return half * (abs(query).sum(1)[:, None] + abs(document).sum(1)) + half * half * query.shape[1]


def bound(query, document, precision="exact"):
    """The largest error of one score: its maxima are off by no more than the worst of their arguments."""
    if len(query) == 0 or len(document) == 0:
        return 0.0
    term = rounding_term(query, document) + (fixed_point_term(query, document) if precision == "fast" else 0)
    return term.max(1).sum()


def grid_bound(precision, query_length, dim, largest=1 / 8):
    """What a score of `cases.grid` values may be off: nothing in "exact", the fixed-point bound in "fast"."""
    if precision == "exact":
        return 0.0
    rows = np.full((1, dim), largest)
    return query_length * bound(rows, rows, precision)


def same_on_grid(result, wanted, precision, query_length, dim):
    """Equal shapes, and no score further off than `grid_bound`; equal bits in "exact"."""
    if result.shape != wanted.shape:
        return False
    difference = abs(np.asarray(result, np.float64) - np.asarray(wanted, np.float64))
    return bool((difference <= grid_bound(precision, query_length, dim)).all())
