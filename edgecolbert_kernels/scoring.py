"""The public scoring functions: what they take is settled here, once for torch tensors and numpy arrays alike.

`ops.tensors` and `arrays` are the two sides of one interface; this file only looks at shapes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, overload

from edgecolbert_kernels import checks
from edgecolbert_kernels.backends import choose
from edgecolbert_kernels.signatures import MaskMode, Precision

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from typing_extensions import Unpack

    from edgecolbert_kernels.signatures import Arrays, Integers, Masks, ScoreOptions, Tensors, Tokens

# A torch tensor or a numpy array: Any, as the same lines serve both. The overloads say which comes out.
Array = Any
Options = tuple[bool, str, str]

QUERIES = "[Lq, d], [Nq, Lq, d] or a list of [Lq, d]"
DOCUMENTS = "[Nd, Ld, d], [Nq, K, Ld, d] or a list of [Ld, d]"
MASKS = {"Q": "q_mask", "D": "d_mask"}


class Stored:
    """Documents with a storage of their own, such as PackedEmbeddings, in numpy arrays that kernels can read.

    Here, so that this file need not know them.

    Attributes:
        operand: what kernels are told of `storage`, kept from the first call on.
    """

    __slots__ = ("operand",)
    operand: Any

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def dim(self) -> int:
        raise NotImplementedError

    @property
    def device(self) -> Any:
        """The torch device that holds the documents; None for numpy arrays."""
        return None

    @property
    def resident(self) -> tuple[Any, Any, Any] | None:
        """Tokens, boundaries and scales or None, as kernels read them, where a device holds them."""
        return None

    def device_scores(self, Q: Array, q_mask: Array, cu_q: Array, options: Options, out_dtype: Any) -> Array:
        """Every document with queries on an accelerator."""
        raise NotImplementedError

    def device_pair_scores(
        self, Q: Array, query_index: Array, document_index: Array, q_mask: Array, options: Options, out_dtype: Any
    ) -> Array:
        """Chosen pairs with queries on an accelerator."""
        raise NotImplementedError

    def nothing(self) -> Array:
        """Tokens of no document, [0, d], in a dtype that kernels read."""
        raise NotImplementedError

    def blocks(self) -> Iterator[tuple[Array, Array]]:
        """All documents in their order: tokens [T, d] and boundaries int64 [n + 1], once or more."""
        raise NotImplementedError

    def storage(self) -> tuple[Array, Array, Array | None]:
        """Tokens, boundaries that may start anywhere, and scales for int8, of these documents and maybe others."""
        raise NotImplementedError

    def places(self, document_index: Array | None) -> Array | None:
        """Which documents of `storage` these are, int64; None: all of them, in their order."""
        raise NotImplementedError

    def chosen(self, document_index: Array) -> Iterator[tuple[Array, Array, Array, Array]]:
        """The pairs of `document_index`, in groups: their places in it, tokens, boundaries, and the index into these."""
        raise NotImplementedError


# An array Q beside a tensor D works too, but a third overload would turn the scores of two `np.ndarray` into Any.
@overload
def maxsim(
    Q: Arrays, D: Arrays | Stored, q_mask: Masks = None, d_mask: Masks = None, **options: Unpack[ScoreOptions]
) -> np.ndarray: ...
@overload
def maxsim(
    Q: Tensors, D: Tokens | Stored, q_mask: Masks = None, d_mask: Masks = None, **options: Unpack[ScoreOptions]
) -> Tensor: ...
def maxsim(
    Q: Array,
    D: Array,
    q_mask: Array = None,
    d_mask: Array = None,
    *,
    normalize: bool = False,
    mask_mode: MaskMode = "exclude",
    precision: Precision = "exact",
    out_dtype: Any = None,
) -> Array:
    """Score queries against documents: the sum over query tokens of the largest similarity to a document token.

    Args:
        Q: `[Nq, Lq, d]`, or `[Lq, d]` for one query, whose axis the result then lacks, or a list of `[Lq, d]`.
        D: `[Nd, Ld, d]`, a list of `[Ld, d]` or a PackedEmbeddings, scored with every query; or `[Nq, K, Ld, d]`, a
            query's own documents. A PackedEmbeddings of the host is streamed to queries on a GPU; one of a device wants
            its queries there.
        q_mask: the tokens of Q to keep, in the shape of Q without d: bool, or 0/1 in any dtype, with holes or without;
            for a list, a list of `[Lq]`.
        d_mask: the same for D; None where D is a PackedEmbeddings, which holds kept tokens only.
        normalize: divide every token by its Euclidean norm first (at least 1e-12).
        mask_mode: "exclude": a masked document token is never chosen, and a document with no token left scores 0.
            "zero": its similarity is 0 and takes part in the maximum, as in PyLate.
        precision: "exact" accumulates in float32 whatever the storage. "fast" computes in 16-bit fixed point where a query
            or document has all |x| < 1 and norms near 1, else exactly, and long documents exactly where that is quicker
            (AVX-512: of 128 tokens and more, AVX2: 160). In fixed point a similarity is off by at most
            2^-16 (|q|_1 + |d|_1); with these independent, as in ordinary data, a score of 32 tokens by less than 5e-4.
        out_dtype: the result's dtype; float32 if None.

    Q and D are torch tensors in float32, float16, bfloat16 or float64, not necessarily the same, with any strides; or
    numpy arrays, where uint16 is the bits of bfloat16 and float64 is rounded to float32. Gradients flow to tensors Q and
    D. float64 tensors are scored in float64, by the torch backend.

    Returns:
        `[Nq, Nd]`, or `[Nq, K]` for a query's own documents; `[Nd]` or `[K]` for a Q of `[Lq, d]`.

    Raises:
        TypeError: an argument is not an array or has a dtype other than those.
        ValueError: a shape does not fit, devices differ, or an option is unknown.
        BackendUnsupported: the backend that was asked for cannot run this call.
    """
    if _repeat is not None and not _tensors.is_compiling():
        scores = _repeat(Q, D, q_mask, d_mask, None, None, None, None, None, normalize, mask_mode, precision, out_dtype)
        if scores is not None:
            return scores
    checks.options(mask_mode, precision)
    options = normalize, mask_mode, precision
    if isinstance(D, Stored):
        return _score_stored(Q, D, q_mask, d_mask, options, out_dtype)
    xp = _side(Q, D)
    if isinstance(Q, (list, tuple)) or isinstance(D, (list, tuple)):
        return _score_lists(xp, Q, D, q_mask, d_mask, options, out_dtype)
    Q, q_mask = _array(xp, "Q", Q, q_mask, (2, 3), QUERIES)
    D, d_mask = _array(xp, "D", D, d_mask, (3, 4), DOCUMENTS)
    queries, documents = Q.shape, D.shape
    checks.same_dim(queries, documents)
    if len(documents) == 4:
        checks.same_batch(queries, documents)
    return xp.score(Q, D, q_mask, d_mask, None, None, None, None, normalize, mask_mode, precision, out_dtype)


@overload
def maxsim_pairs(
    Q: Arrays, D: Arrays, q_mask: Masks = None, d_mask: Masks = None, **options: Unpack[ScoreOptions]
) -> np.ndarray: ...
@overload
def maxsim_pairs(
    Q: Tensors, D: Tokens, q_mask: Masks = None, d_mask: Masks = None, **options: Unpack[ScoreOptions]
) -> Tensor: ...
def maxsim_pairs(
    Q: Array,
    D: Array,
    q_mask: Array = None,
    d_mask: Array = None,
    *,
    normalize: bool = False,
    mask_mode: MaskMode = "exclude",
    precision: Precision = "exact",
    out_dtype: Any = None,
) -> Array:
    """Score row by row: query b against document b.

    Args:
        Q: `[B, Lq, d]` or a list of B `[Lq, d]`.
        D: `[B, Ld, d]` or a list of B `[Ld, d]`.

    The other arguments, dtypes and errors are those of `maxsim`.

    Returns:
        `[B]`.
    """
    checks.options(mask_mode, precision)
    xp = _side(Q, D)
    Q, q_mask = _read(xp, "Q", Q, q_mask, (3,), "[B, Lq, d] or a list of [Lq, d]")
    D, d_mask = _read(xp, "D", D, d_mask, (3,), "[B, Ld, d] or a list of [Ld, d]")
    checks.same_count("Q", len(Q), "D", len(D))
    options = normalize, mask_mode, precision
    if type(D) is list:
        each = xp.integers("D", range(len(D)), _first(xp, D, Q))
        return _score_pairs(xp, Q, D, each, each, q_mask, d_mask, options, out_dtype)
    Q, q_mask = _padded(xp, Q, q_mask, D)
    checks.same_dim(Q.shape, D.shape)
    d_mask = None if d_mask is None else d_mask[:, None]
    return xp.score(Q, D[:, None], q_mask, d_mask, None, None, None, None, *options, out_dtype)[:, 0]


@overload
def maxsim_varlen(
    Q: np.ndarray,
    D: np.ndarray,
    cu_seqlens_q: Integers,
    cu_seqlens_d: Integers,
    q_mask: Masks = None,
    d_mask: Masks = None,
    **options: Unpack[ScoreOptions],
) -> np.ndarray: ...
@overload
def maxsim_varlen(
    Q: Tensor,
    D: np.ndarray | Tensor,
    cu_seqlens_q: Integers,
    cu_seqlens_d: Integers,
    q_mask: Masks = None,
    d_mask: Masks = None,
    **options: Unpack[ScoreOptions],
) -> Tensor: ...
def maxsim_varlen(
    Q: Array,
    D: Array,
    cu_seqlens_q: Array,
    cu_seqlens_d: Array,
    q_mask: Array = None,
    d_mask: Array = None,
    *,
    normalize: bool = False,
    mask_mode: MaskMode = "exclude",
    precision: Precision = "exact",
    out_dtype: Any = None,
) -> Array:
    """Score every query against every document, both stored back to back without padding.

    Args:
        Q: `[Tq, d]`, the tokens of all queries.
        D: `[Td, d]`, the tokens of all documents.
        cu_seqlens_q: `[Nq + 1]` integers: query n is the rows from `cu_seqlens_q[n]` to `cu_seqlens_q[n + 1]`. They start
            at 0, never decrease and end within Q.
        cu_seqlens_d: `[Nd + 1]`, the same for D.
        q_mask: `[Tq]`.
        d_mask: `[Td]`.

    The other arguments, dtypes and errors are those of `maxsim`; boundaries that are not such raise ValueError. On a GPU,
    where looking at them would make the host wait, they are moved into the buffer.

    Returns:
        `[Nq, Nd]`.
    """
    if _repeat is not None and cu_seqlens_q is not None and cu_seqlens_d is not None and not _tensors.is_compiling():
        scores = _repeat(
            Q,
            D,
            q_mask,
            d_mask,
            cu_seqlens_q,
            cu_seqlens_d,
            None,
            None,
            None,
            normalize,
            mask_mode,
            precision,
            out_dtype,
        )
        if scores is not None:
            return scores
    checks.options(mask_mode, precision)
    xp = _side(Q, D)
    Q, q_mask = _array(xp, "Q", Q, q_mask, (2,), "[Tq, d]")
    D, d_mask = _array(xp, "D", D, d_mask, (2,), "[Td, d]")
    checks.same_dim(Q.shape, D.shape)
    cu_q, cu_d = xp.integers("cu_seqlens_q", cu_seqlens_q, Q), xp.integers("cu_seqlens_d", cu_seqlens_d, D)
    checks.boundaries("cu_seqlens_q", cu_q.shape)
    checks.boundaries("cu_seqlens_d", cu_d.shape)
    return xp.score(Q, D, q_mask, d_mask, cu_q, cu_d, None, None, normalize, mask_mode, precision, out_dtype)


@overload
def maxsim_indexed(
    Q: Arrays,
    D: Arrays | Stored,
    query_index: Integers,
    document_index: Integers,
    q_mask: Masks = None,
    d_mask: Masks = None,
    **options: Unpack[ScoreOptions],
) -> np.ndarray: ...
@overload
def maxsim_indexed(
    Q: Tensors,
    D: Tokens | Stored,
    query_index: Integers,
    document_index: Integers,
    q_mask: Masks = None,
    d_mask: Masks = None,
    **options: Unpack[ScoreOptions],
) -> Tensor: ...
def maxsim_indexed(
    Q: Array,
    D: Array,
    query_index: Array,
    document_index: Array,
    q_mask: Array = None,
    d_mask: Array = None,
    *,
    normalize: bool = False,
    mask_mode: MaskMode = "exclude",
    precision: Precision = "exact",
    out_dtype: Any = None,
) -> Array:
    """Score chosen pairs: query `query_index[p]` against document `document_index[p]`.

    Args:
        Q: `[Nq, Lq, d]` or a list of `[Lq, d]`.
        D: `[Nd, Ld, d]`, a list of `[Ld, d]` or a PackedEmbeddings.
        query_index: `[P]` integers from 0 to Nq - 1, in any order, repeated at will.
        document_index: `[P]` integers from 0 to Nd - 1.
        q_mask: the tokens of Q to keep, in the shape of Q without d; for a list, a list of `[Lq]`.
        d_mask: the same for D; None where D is a PackedEmbeddings, which holds kept tokens only.

    The other arguments, dtypes and errors are those of `maxsim`; an index out of range raises IndexError. On a GPU, where
    nobody looks at it first, its pair scores NaN and has no gradient.

    Returns:
        `[P]`.
    """
    if _repeat is not None and query_index is not None and document_index is not None and not _tensors.is_compiling():
        scores = _repeat(
            Q,
            D,
            q_mask,
            d_mask,
            None,
            None,
            query_index,
            document_index,
            None,
            normalize,
            mask_mode,
            precision,
            out_dtype,
        )
        if scores is not None:
            return scores
    checks.options(mask_mode, precision)
    if isinstance(D, Stored):
        options = normalize, mask_mode, precision
        return _score_stored_pairs(Q, D, query_index, document_index, q_mask, d_mask, options, out_dtype)
    xp = _side(Q, D)
    Q, q_mask = _read(xp, "Q", Q, q_mask, (3,), "[Nq, Lq, d] or a list of [Lq, d]")
    D, d_mask = _read(xp, "D", D, d_mask, (3,), "[Nd, Ld, d] or a list of [Ld, d]")
    query_index = xp.integers("query_index", query_index, _first(xp, Q, D))
    document_index = xp.integers("document_index", document_index, _first(xp, D, Q))
    checks.same_shape("query_index", query_index.shape, "document_index", document_index.shape)
    options = normalize, mask_mode, precision
    return _score_pairs(xp, Q, D, query_index, document_index, q_mask, d_mask, options, out_dtype)


def _score_lists(xp: Any, Q: Array, D: Array, q_mask: Array, d_mask: Array, options: Options, out_dtype: Any) -> Array:
    Q, q_mask = _read(xp, "Q", Q, q_mask, (2, 3), QUERIES)
    D, d_mask = _read(xp, "D", D, d_mask, (3, 4), DOCUMENTS)
    if type(D) is not list and D.ndim == 4:
        Q, q_mask = _padded(xp, Q, q_mask, D)
        checks.same_dim(Q.shape, D.shape)
        checks.same_batch(Q.shape, D.shape)
        return xp.score(Q, D, q_mask, d_mask, None, None, None, None, *options, out_dtype)
    checks.same_dim(_first(xp, Q, D).shape, _first(xp, D, Q).shape)
    scores = xp.score_in_place(Q, D, q_mask, d_mask, *options, out_dtype)
    if scores is not None:
        return scores
    (Q, q_mask, cu_q), (D, d_mask, cu_d) = _packed(xp, Q, q_mask, D), _packed(xp, D, d_mask, Q)
    return xp.score(Q, D, q_mask, d_mask, cu_q, cu_d, None, None, *options, out_dtype)


def _score_pairs(
    xp: Any,
    Q: Array,
    D: Array,
    query_index: Array,
    document_index: Array,
    q_mask: Array,
    d_mask: Array,
    options: Options,
    out_dtype: Any,
) -> Array:
    (Q, q_mask), (D, d_mask, cu_d) = _padded(xp, Q, q_mask, D), _packed(xp, D, d_mask, Q)
    checks.same_dim(Q.shape, D.shape)
    return xp.score(Q, D, q_mask, d_mask, None, cu_d, query_index, document_index, *options, out_dtype)


def _score_stored(Q: Any, D: Stored, q_mask: Any, d_mask: Any, options: Options, out_dtype: Any) -> Array:
    if d_mask is not None:
        raise checks.stored_mask()
    xp = _side(Q)
    scores = _repeat_resident(Q, D, q_mask, None, None, options, out_dtype)
    if scores is not None:
        return scores
    if D.device is not None or checks.on_accelerator(Q):
        Q, q_mask = _read(xp, "Q", Q, q_mask, (2, 3), QUERIES)
        Q, q_mask, cu_q = _packed(xp, Q, q_mask, D.nothing()) if type(Q) is list else (Q, q_mask, None)
        checks.same_dim(Q.shape, (len(D), D.dim))
        return D.device_scores(Q, q_mask, cu_q, options, out_dtype)
    Q, q_mask = _read(xp, "Q", Q, q_mask, (2, 3), QUERIES)
    cu_q = None
    if type(Q) is list:
        some = xp.stored(D.nothing())
        if D.storage()[2] is not None:
            Q, q_mask = _padded(xp, Q, q_mask, some)
        else:
            Q, q_mask, cu_q = _packed(xp, Q, q_mask, some)
    checks.same_dim(Q.shape, (len(D), D.dim))
    if cu_q is None and _in_place(D, options):
        scores = xp.score_stored(Q, q_mask, D, None, D.places(None), *options, out_dtype)
        if scores is not None:
            return scores
    scores = [
        xp.score(
            Q, xp.stored(tokens), q_mask, None, cu_q, xp.integers("D", boundaries, Q), None, None, *options, out_dtype
        )
        for tokens, boundaries in D.blocks()
    ]
    return scores[0] if len(scores) == 1 else xp.join(scores)


def _in_place(D: Stored, options: Options) -> bool:
    """int8 with other options is scored in float32 throughout: a score has the same bits in every batch."""
    return D.storage()[2] is None or options[:2] == (False, "exclude")


def _repeat_resident(
    Q: Any, D: Stored, q_mask: Any, query_index: Any, document_index: Any, options: Options, out_dtype: Any
) -> Array | None:
    """As the public functions do first with tensors; None where the documents are not on a device."""
    arrays = D.resident
    if arrays is None or _repeat is None or _tensors.is_compiling():
        return None
    tokens, offsets, scales = arrays
    batch = q_mask, None, None, offsets, query_index, document_index, scales
    return _repeat(Q, tokens, *batch, *options, out_dtype)


def _score_stored_pairs(
    Q: Any,
    D: Stored,
    query_index: Any,
    document_index: Any,
    q_mask: Any,
    d_mask: Any,
    options: Options,
    out_dtype: Any,
) -> Array:
    if d_mask is not None:
        raise checks.stored_mask()
    xp, arrays = _side(Q), _arrays or _load_arrays()
    if query_index is not None and document_index is not None:
        scores = _repeat_resident(Q, D, q_mask, query_index, document_index, options, out_dtype)
        if scores is not None:
            return scores
    if D.device is not None or checks.on_accelerator(Q):
        Q, q_mask = _read(xp, "Q", Q, q_mask, (3,), "[Nq, Lq, d] or a list of [Lq, d]")
        Q, q_mask = _padded(xp, Q, q_mask, D.nothing()) if type(Q) is list else (Q, q_mask)
        checks.same_dim(Q.shape, (len(D), D.dim))
        return D.device_pair_scores(Q, query_index, document_index, q_mask, options, out_dtype)
    Q, q_mask = _read(xp, "Q", Q, q_mask, (3,), "[Nq, Lq, d] or a list of [Lq, d]")
    if type(Q) is list:
        Q, q_mask = _padded(xp, Q, q_mask, xp.stored(D.nothing()))
    checks.same_dim(Q.shape, (len(D), D.dim))
    queries = arrays.integers("query_index", xp.to_numpy(query_index))
    documents = arrays.integers("document_index", xp.to_numpy(document_index))
    checks.same_shape("query_index", queries.shape, "document_index", documents.shape)
    checks.index("document_index", documents, len(D))
    checks.index("query_index", queries, len(Q), "queries")
    if _in_place(D, options):
        found = xp.score_stored(Q, q_mask, D, queries, D.places(documents), *options, out_dtype)
        if found is not None:
            return found
    places, scores = [], []
    for where, tokens, boundaries, index in D.chosen(documents):
        integers = (xp.integers("D", each, Q) for each in (boundaries, queries[where], index))
        scores.append(xp.score(Q, xp.stored(tokens), q_mask, None, None, *integers, *options, out_dtype))
        places.append(where)
    return xp.join(scores)[arrays.inverse(places)]


def _array(xp: Any, name: str, X: Any, mask: Any, ranks: tuple[int, ...], wanted: str) -> tuple[Array, Array]:
    """An array and its mask, each right by itself."""
    X = xp.tokens(name, X)
    if X.ndim not in ranks:
        raise checks.wrong_shape(name, X.shape, wanted)
    return X, None if mask is None else xp.mask(MASKS[name], mask, name, X)


def _read(xp: Any, name: str, X: Any, mask: Any, ranks: tuple[int, ...], wanted: str) -> tuple[Any, Any]:
    """The same, or a list of matrices and a list of their masks."""
    if not isinstance(X, (list, tuple)):
        return _array(xp, name, X, mask, ranks, wanted)
    X = xp.token_list(name, X)
    if mask is None:
        return X, None
    checks.mask_list(MASKS[name], mask, name, len(X))
    each = zip(X, mask, strict=True)
    return X, [
        None if m is None else xp.mask(f"{MASKS[name]}[{n}]", m, f"{name}[{n}]", x) for n, (x, m) in enumerate(each)
    ]


def _packed(xp: Any, X: Any, mask: Any, other: Any) -> tuple[Array, Array, Array]:
    """A list back to back, with its boundaries; an array as it is, without."""
    return xp.pack(X, mask, _first(xp, X, other)) if type(X) is list else (X, mask, None)


def _padded(xp: Any, X: Any, mask: Any, other: Any) -> tuple[Array, Array]:
    """A list as one array with a mask; an array as it is."""
    return xp.pad(X, mask, _first(xp, X, other)) if type(X) is list else (X, mask)


def _first(xp: Any, X: Any, other: Any) -> Array:
    """An array that has the d, the dtype and the device of X; an empty list takes them from the other side."""
    for batch in (X, other):
        if type(batch) is not list:
            return batch
        if batch:
            return batch[0]
    return xp.nothing()


# The two sides, imported when first needed: with them come numpy and torch.
_arrays: Any = None
_tensors: Any = None
# `repeated.table.repeat`, where there is such a table. Set once, with the tensors' side: whoever traces a call may rely on it.
_repeat: Any = None


def _side(*inputs: Any) -> Any:
    """Who handles these inputs: numpy if all are arrays, else torch, which whoever has tensors has loaded."""
    # The usual case, before all others.
    if _tensors is not None and isinstance(inputs[0], _tensors.Tensor):
        return _tensors
    arrays = _arrays or _load_arrays()
    for batch in inputs:
        for matrix in batch if isinstance(batch, (list, tuple)) else (batch,):
            if not isinstance(matrix, arrays.Array):
                return _tensors or (_load_tensors() if sys.modules.get("torch") else arrays)
    return arrays if choose("maxsim", "cpu", "float32") == "cpu" else _ArraysInTorch()


class _ArraysInTorch:
    """numpy arrays where the torch backend is chosen or the only one."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_tensors or _load_tensors(), name)

    def score(self, *arguments: Any) -> Array:
        *inputs, out_dtype = arguments
        dtype = _arrays.floating(out_dtype)
        return self.__getattr__("score")(*inputs, None).numpy().astype(dtype, copy=False)

    def join(self, scores: list[Array]) -> Array:
        return _arrays.join(scores)


def _load_arrays() -> Any:
    global _arrays
    from edgecolbert_kernels import arrays as _arrays

    return _arrays


def _load_tensors() -> Any:
    global _tensors, _repeat
    from edgecolbert_kernels.ops import tensors as _tensors

    table = _tensors.repeated.table
    _repeat = None if table is None else table.repeat
    return _tensors
