"""The public functions on numpy arrays, without torch; `ops.tensors` is the torch side of the same interface.

Storage is float32, float16, or bfloat16 as uint16 bits or as an ml_dtypes array; other floats are rounded to float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgecolbert_kernels import checks
from edgecolbert_kernels.backends import layout, native, packed

Array = np.ndarray
_CODES = {
    np.dtype(np.float32): native.FLOAT32,
    np.dtype(np.float16): native.FLOAT16,
    np.dtype(np.uint16): native.BFLOAT16,
}


def array(name: str, seen: Any) -> Array:
    if not isinstance(seen, np.ndarray):
        raise checks.not_an_array(name, seen)
    return seen


def tokens(name: str, seen: Any) -> Array:
    X = array(name, seen)
    if _code(X) is None:
        if X.dtype.kind != "f":
            raise checks.wrong_dtype(name, X.dtype, f"{checks.FLOATS}, or uint16 for the bits of bfloat16")
        # In the machine's byte order, and in float32 if it is another float.
        X = X.astype(np.float16 if X.itemsize == 2 else np.float32)
    return X if X.flags.aligned else X.copy()


def token_list(name: str, seen: Sequence[Any]) -> list[Array]:
    X = [x if isinstance(x, np.ndarray) else array(f"{name}[{n}]", x) for n, x in enumerate(seen)]
    checks.token_list(name, X)
    # They share a dtype: often none needs a second look.
    if X and tokens(f"{name}[0]", X[0]) is X[0] and all(x.flags.aligned for x in X):
        return X
    return [tokens(f"{name}[{n}]", x) for n, x in enumerate(X)]


def mask(name: str, seen: Any, of: str, X: Array) -> Array:
    checks.mask(name, array(name, seen).shape, of, X.shape)
    return np.ascontiguousarray(seen != 0)


def integers(name: str, seen: Any, like: Array | None = None) -> Array:
    if not isinstance(seen, np.ndarray):
        if not isinstance(seen, (list, tuple, range)):
            raise checks.not_an_array(name, seen, "integers in an array, a tensor or a list")
        seen = np.array(seen, dtype=None if len(seen) else np.int64)
    if seen.dtype.kind not in "iu":
        raise checks.wrong_dtype(name, seen.dtype, checks.INTEGERS)
    checks.rank(name, seen.shape, (1,), "one dimension")
    return np.ascontiguousarray(seen, dtype=np.int64)


def stored(X: Array) -> Array:
    return X


def score_stored(
    Q: Array,
    q_mask: Array | None,
    D: Any,
    query_index: Array | None,
    places: Array | None,
    normalize: bool,
    mask_mode: str,
    precision: str,
    out_dtype: Any,
) -> Array:
    """Stored documents where they lie: all of them, or those at `places`, with every query; or pair by pair."""
    dtype = floating(out_dtype)
    scores = np.empty(scores_shape_of_stored(Q.shape, D, query_index, places), np.float32)
    options = normalize, mask_mode, precision
    forward_stored(_operand(Q, q_mask, None), D, query_index, places, _address(scores), options, native.threads())
    return scores.astype(dtype, copy=False)


def scores_shape_of_stored(
    queries: Sequence[int], D: Any, query_index: Array | None, places: Array | None
) -> tuple[int, ...]:
    if query_index is not None:
        return (len(query_index),)
    count = len(D) if places is None else len(places)
    return (count,) if len(queries) == 2 else (queries[0], count)


def forward_stored(
    queries: native.Operand,
    D: Any,
    query_index: Array | None,
    places: Array | None,
    scores: int,
    options: tuple[bool, str, str],
    threads: int,
) -> None:
    """Writes float32 scores to that address. What `D.storage` holds was checked when it was made."""
    tokens, offsets, scales = D.storage()
    if places is not None and query_index is None:
        documents, _alive = packed.chosen(tokens, offsets, scales, places)
        native.forward(queries, documents, native.EVERY, native.NO_INDEX, scores, *options, threads)
        return
    if D.operand is None:
        D.operand = packed.operand(tokens, offsets, scales)
    layout, index = native.EVERY, native.NO_INDEX
    if places is not None and query_index is not None:
        layout, index = native.INDEXED, (len(places), _address(query_index), _address(places))
    native.forward(queries, D.operand, layout, index, scores, *options, threads)


def join(scores: list[Array]) -> Array:
    return np.concatenate(scores, axis=-1)


def to_numpy(seen: Any) -> Any:
    return seen


def inverse(places: list[Array]) -> Array:
    """Where each entry of a permutation went."""
    joined = np.concatenate(places) if places else np.empty(0, np.int64)
    found = np.empty_like(joined)
    found[joined] = np.arange(len(joined))
    return found


def nothing() -> Array:
    """What tells d and dtype where there is no array at all."""
    return np.empty((0, 1), np.float32)


def pack(X: Sequence[Array], masks: Sequence[Array | None] | None, like: Array) -> tuple[Array, Array | None, Array]:
    boundaries = np.cumsum([0, *map(len, X)], dtype=np.int64)
    rows = np.concatenate(X) if X else np.empty((0, like.shape[-1]), like.dtype)
    if not masks:
        return rows, None, boundaries
    kept = [np.ones(len(x), bool) if each is None else each for x, each in zip(X, masks, strict=True)]
    return rows, np.concatenate(kept), boundaries


def pad(X: Sequence[Array], masks: Sequence[Array | None] | None, like: Array) -> tuple[Array, Array]:
    longest = max(map(len, X), default=0)
    rows = np.zeros((len(X), longest, like.shape[-1]), like.dtype)
    kept = np.zeros((len(X), longest), bool)
    for n, x in enumerate(X):
        rows[n, : len(x)] = x
        kept[n, : len(x)] = True if masks is None or masks[n] is None else masks[n]
    return rows, kept


def score(
    Q: Array,
    D: Array,
    q_mask: Array | None,
    d_mask: Array | None,
    cu_q: Array | None,
    cu_d: Array | None,
    query_index: Array | None,
    document_index: Array | None,
    normalize: bool,
    mask_mode: str,
    precision: str,
    out_dtype: Any,
) -> Array:
    dtype = floating(out_dtype)
    checks.values(Q.shape, D.shape, cu_q, cu_d, query_index, document_index)
    scores = np.empty(layout.scores_shape(Q, D, cu_q, cu_d, query_index), np.float32)
    index = native.NO_INDEX
    if query_index is not None and document_index is not None:
        index = (len(query_index), _address(query_index), _address(document_index))
    native.forward(
        _operand(Q, q_mask, cu_q),
        _operand(D, d_mask, cu_d),
        layout.which(D, query_index),
        index,
        _address(scores),
        normalize,
        mask_mode,
        precision,
        native.threads(),
    )
    return scores.astype(dtype, copy=False)


def score_in_place(
    Q: Array | list[Array],
    D: Array | list[Array],
    q_mask: Any,
    d_mask: Any,
    normalize: bool,
    mask_mode: str,
    precision: str,
    out_dtype: Any,
) -> Array | None:
    """Lists read where they lie, without a copy; None where the kernels cannot."""
    for X, masks in ((Q, q_mask), (D, d_mask)):
        if isinstance(X, list) and (not X or masks or any(x.strides[1] != x.itemsize for x in X)):
            return None
    dtype = floating(out_dtype)
    queries, _q_rows = packed.listed(Q) if isinstance(Q, list) else (_operand(Q, q_mask, None), None)
    documents, _d_rows = packed.listed(D) if isinstance(D, list) else (_operand(D, d_mask, None), None)
    scores = np.empty(layout.scores_shape_of_lists(Q, D), np.float32)
    native.forward(
        queries,
        documents,
        native.EVERY,
        native.NO_INDEX,
        _address(scores),
        normalize,
        mask_mode,
        precision,
        native.threads(),
    )
    return scores.astype(dtype, copy=False)


def _operand(X: Array, mask: Array | None, cu_seqlens: Array | None) -> native.Operand:
    strides = [stride // X.itemsize for stride in X.strides]
    dtype, mask_address = _code(X), 0 if mask is None else _address(mask)
    if cu_seqlens is None:
        return native.padded(_address(X), dtype, X.shape, strides, mask_address)
    return native.packed(_address(X), dtype, X.shape, strides, _address(cu_seqlens), len(cu_seqlens) - 1, mask_address)


def _code(X: Array) -> Any:
    code = _CODES.get(X.dtype)
    return native.BFLOAT16 if code is None and X.dtype.name == "bfloat16" else code


def _address(array: Array) -> int:
    return array.__array_interface__["data"][0]


def floating(wanted: Any) -> np.dtype[Any]:
    """The dtype that `out_dtype` asks for."""
    try:
        dtype = np.dtype(np.float32 if wanted is None else wanted)
    except TypeError:
        raise checks.out_dtype(wanted, "numpy") from None
    if dtype.kind != "f":
        raise checks.out_dtype(wanted, "numpy")
    return dtype
