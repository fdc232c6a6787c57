"""Packed token embeddings on numpy arrays: made, widened again, and described to the kernels that score
them where they lie, in memory or in a mapped file.

A packed collection is three arrays: `tokens` [T, d], the kept tokens of all documents back to back; `offsets` int64 [N + 1],
document n being the rows from `offsets[n]` to `offsets[n + 1]`; and, where tokens are int8, `scales` float32 [N], with
`scales[n] * tokens` the values of document n. Scales are 0 or more. bfloat16 is held as uint16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgecolbert_kernels import checks
from edgecolbert_kernels.backends import BackendUnsupported, choose, native

Array = np.ndarray
_CODES = {
    np.dtype(np.float32): native.FLOAT32,
    np.dtype(np.float16): native.FLOAT16,
    np.dtype(np.uint16): native.BFLOAT16,
    np.dtype(np.int8): native.INT8,
}
_STORAGE = "float32, float16, uint16 (the bits of bfloat16) or int8"
# The first magnitudes that become infinite.
_INFINITE = {
    np.dtype(np.float16): np.float32(65520.0),
    np.dtype(np.uint16): np.uint32(0x7F7F8000).view(np.float32),
}


class OutOfRange(ValueError):
    """A value that the storage cannot hold, in document number `document`."""

    def __init__(self, document: int, message: str):
        super().__init__(message)
        self.document = document


def available() -> bool:
    """Whether arrays of the host are for the compiled module: unless there is none, or the backend `torch` was chosen."""
    if native.missing():
        return False
    try:
        return choose("maxsim", "cpu", "float32") == "cpu"
    except BackendUnsupported:  # chosen for a GPU
        return True


def threads_of(X: Any) -> int | None:
    """PyTorch's for a tensor; None for an array: those of calls without PyTorch."""
    if not hasattr(X, "detach"):
        return None
    import torch

    return torch.get_num_threads()


def pack_rows(
    X: Array,
    mask: Array | None = None,
    offsets: Array | None = None,
    *,
    normalize: bool,
    dtype: Any = np.float16,
    threads: int | None = None,
    out: Array | None = None,
    strict: bool = False,
) -> tuple[Array, Array, Array | None]:
    """Token embeddings to a packed collection: (tokens [T, d], offsets int64 [N + 1], scales float32 [N] or None).

    X          [N, L, d], or [R, d] with `offsets`: float32, float16, bfloat16 as uint16, any strides; other floats are
               rounded to float32
    mask       [N, L] or [R], nonzero: the token is kept; None: all are
    offsets    int64 [N + 1]: document n is the rows from `offsets[n]` to `offsets[n + 1]` of X; rows outside are not read
    normalize  divide every row by max(|row|, 1e-12) first
    dtype      of the tokens: float32, float16, uint16 (the bits of bfloat16) or int8; "bfloat16" is understood too
    out        where to write the tokens, [T, d] in that dtype and C-contiguous; it is also returned
    strict     a finite value of these dtypes that becomes infinite, as too large ones do in floats, is an error

    Values are rounded once, to nearest, ties to even. In int8 a document is `scale * tokens`, the scale being the largest
    |x| of its kept tokens / 127; below 2e-36 the document counts as zero. NaN and infinities stay what they are in floats;
    int8 cannot hold them: OutOfRange, a ValueError, with the document's number. Rows that the mask drops may hold anything.
    """
    _need_module()
    if not isinstance(X, np.ndarray):
        raise checks.not_an_array("X", X, "a numpy array")
    if offsets is None:
        checks.rank("X", X.shape, (3,), "[N, L, d], or [R, d] with offsets")
    X = _floats("X", _aligned("X", X, 3 if offsets is None else 2))
    if mask is not None:
        mask = np.asarray(mask)
        checks.mask("mask", mask.shape, "X", X.shape)
        mask = np.ascontiguousarray(mask if mask.dtype == bool else mask != 0)
    mask_address = 0 if mask is None else _address(mask)
    strides = [stride // X.itemsize for stride in X.strides]
    if offsets is None:
        count = len(X)
        source = native.padded(_address(X), _code(X), X.shape, strides, mask_address)
    else:
        offsets = _integers("offsets", offsets)
        _check_offsets("offsets", offsets, "X", len(X))
        count = len(offsets) - 1
        source = native.packed(_address(X), _code(X), X.shape, strides, _address(offsets), count, mask_address)

    def kept(n: int) -> Array:
        place = n if offsets is None else slice(int(offsets[n]), int(offsets[n + 1]))
        return X[place] if mask is None else X[place][mask[place]]

    return _pack(source, count, X.shape[-1], normalize, dtype, threads, out, kept if strict else None)


def pack_list(
    documents: Sequence[Array],
    *,
    dtype: Any = np.float16,
    threads: int | None = None,
) -> tuple[Array, Array, Array | None]:
    """The same of one [L, d] for each document, at least one, all in one of the dtypes that X of `pack_rows` may have and
    with their dimensions side by side. Strict, and nothing is normalised or left out."""
    _need_module()
    source, _rows = listed(documents)
    return _pack(source, len(documents), documents[0].shape[1], False, dtype, threads, None, documents.__getitem__)


def _pack(
    source: native.Operand,
    count: int,
    dim: int,
    normalize: bool,
    dtype: Any,
    threads: int | None,
    out: Array | None,
    strict: Callable[[int], Array] | None,
) -> tuple[Array, Array, Array | None]:
    """Of `count` documents; `strict` gives the kept tokens of one."""
    threads = native.threads() if threads is None else threads
    packed_offsets = np.empty(count + 1, np.int64)
    native.module().pack_offsets(source, _address(packed_offsets), threads)
    storage = _storage(dtype)
    shape = (int(packed_offsets[-1]), dim)
    tokens = empty_lines(shape, storage) if out is None else out
    if tokens.shape != shape or tokens.dtype != storage or not (tokens.flags.c_contiguous and tokens.flags.writeable):
        raise ValueError(
            f"out is {tokens.dtype} {list(tokens.shape)}; want writeable C-contiguous {storage} {list(shape)}"
        )
    scales = np.empty(count, np.float32) if storage == np.int8 else None
    suspect = native.module().pack(
        source,
        normalize,
        _CODES[storage],
        _address(packed_offsets),
        _address(tokens),
        0 if scales is None else _address(scales),
        threads,
    )
    if suspect >= 0 and storage == np.int8:
        raise OutOfRange(suspect, f"document {suspect} of X has a NaN or an infinity, which int8 cannot hold")
    if suspect >= 0 and strict is not None and storage in _INFINITE:
        # NaN and infinities that were there are welcome.
        for n in range(suspect, count):
            rows = strict(n)
            sizes = np.abs((rows.astype(np.uint32) << 16).view(np.float32) if rows.dtype == np.uint16 else rows)
            if (np.isfinite(sizes) & (sizes >= _INFINITE[storage])).any():
                raise OutOfRange(n, f"document {n} has a value that is too large for {storage}")
    return tokens, packed_offsets, scales


def unpack_rows(tokens: Array, offsets: Array, scales: Array | None = None, *, threads: int | None = None) -> Array:
    """The rows `offsets[0]` to `offsets[-1]` of a packed collection in float32, int8 times the scale of its document."""
    _need_module()
    tokens, offsets, scales = _collection(tokens, offsets, scales)
    _check_offsets("offsets", offsets, "tokens", len(tokens))
    out = empty_lines((int(offsets[-1] - offsets[0]), tokens.shape[1]), np.float32)
    native.module().unpack(
        operand(tokens, offsets, scales), _address(out), native.threads() if threads is None else threads
    )
    return out


def empty_lines(shape: tuple[int, ...], dtype: Any) -> Array:
    """An array that begins with a cache line (64 bytes): the kernels write whole registers past the caches."""
    line, size = 64, math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + line, np.uint8)
    start = -_address(memory) % line
    return memory[start : start + size].view(dtype).reshape(shape)


def _need_module() -> None:
    reason = native.missing()
    if reason:
        raise BackendUnsupported(reason)


def _floats(name: str, X: Array) -> Array:
    if _code(X) not in (None, native.INT8):
        return X
    if X.dtype.kind != "f":
        raise checks.wrong_dtype(name, X.dtype, f"{checks.FLOATS}, or uint16 for the bits of bfloat16")
    # In the machine's byte order, and in float32 if it is another float.
    return X.astype(np.float16 if X.itemsize == 2 else np.float32)


def _storage(dtype: Any) -> np.dtype[Any]:
    try:
        storage = np.dtype(np.uint16 if str(dtype) == "bfloat16" else dtype)
    except TypeError:
        raise checks.wrong_dtype("the result", dtype, _STORAGE) from None
    if storage not in _CODES:
        raise checks.wrong_dtype("the result", storage, _STORAGE)
    return storage


def _collection(tokens: Array, offsets: Array, scales: Array | None) -> tuple[Array, Array, Array | None]:
    tokens = _aligned("tokens", tokens, 2)
    if _code(tokens) is None:
        raise checks.wrong_dtype("tokens", tokens.dtype, _STORAGE)
    offsets = _integers("offsets", offsets)
    checks.boundaries("offsets", offsets.shape)
    if (scales is not None) != (tokens.dtype == np.int8):
        raise ValueError(
            f"scales are {'missing' if scales is None else 'given'} and tokens are {tokens.dtype}; "
            "int8 tokens have scales, others do not"
        )
    if scales is not None:
        if scales.dtype != np.float32:
            raise checks.wrong_dtype("scales", scales.dtype, "float32")
        if scales.shape != (len(offsets) - 1,):
            raise checks.wrong_shape("scales", scales.shape, f"[{len(offsets) - 1}], one for each document")
        scales = np.ascontiguousarray(scales)
    return tokens, offsets, scales


def _aligned(name: str, X: Array, rank: int) -> Array:
    if not isinstance(X, np.ndarray):
        raise checks.not_an_array(name, X, "a numpy array")
    checks.rank(name, X.shape, (rank,), "[N, L, d]" if rank == 3 else "[tokens, d]")
    if X.shape[-1] < 1:
        raise checks.wrong_shape(name, X.shape, "a last dimension of at least 1")
    return X if X.flags.aligned else X.copy()


def _integers(name: str, X: Array) -> Array:
    X = np.asarray(X)
    if X.dtype.kind not in "iu":
        raise checks.wrong_dtype(name, X.dtype, checks.INTEGERS)
    checks.rank(name, X.shape, (1,), "one dimension")
    return np.ascontiguousarray(X, dtype=np.int64)


def _check_offsets(name: str, offsets: Array, of: str, rows: int) -> None:
    checks.boundaries(name, offsets.shape)
    if offsets[0] < 0 or (offsets[1:] < offsets[:-1]).any() or offsets[-1] > rows:
        raise ValueError(
            f"{name} span {offsets[0]} to {offsets[-1]}; want them in order, within the {rows} rows of {of}"
        )


def operand(X: Array, offsets: Array, scales: Array | None) -> native.Operand:
    """What kernels are told of a collection, or of queries: arrays that are checked, and stay alive."""
    count = len(offsets) - 1
    strides = [stride // X.itemsize for stride in X.strides]
    scales_address = 0 if scales is None else _address(scales)
    return native.packed(_address(X), _code(X), X.shape, strides, _address(offsets), count, 0, scales_address)


def listed(X: Sequence[Array]) -> tuple[native.Operand, Any]:
    """One [L, d] for each sequence, of one dtype, dimensions side by side; with it, the array to keep alive."""
    addresses, lengths = [_address(x) for x in X], [len(x) for x in X]
    strides = [x.strides[0] // x.itemsize for x in X]
    return native.table(_code(X[0]), X[0].shape[1], addresses, lengths, strides)


def chosen(
    tokens: Array, offsets: Array, scales: Array | None, documents: Array
) -> tuple[native.Operand, tuple[Array, ...]]:
    """Some documents of a collection, where they lie, as a list; with it, the arrays to keep alive."""
    first = offsets[documents]
    addresses = _address(tokens) + first * tokens.strides[0]
    rows = np.stack([addresses, offsets[documents + 1] - first, np.full_like(first, tokens.shape[1])])
    start, step = _address(rows), rows.strides[0]
    each = _code(tokens), tokens.shape[1], start, start + step, start + 2 * step, len(first)
    if scales is None:
        return each, (rows,)
    scales = scales[documents]
    return (*each, _address(scales)), (rows, scales)


def _code(X: Array) -> Any:
    code = _CODES.get(X.dtype)
    return native.BFLOAT16 if code is None and X.dtype.name == "bfloat16" else code


def _address(array: Array) -> int:
    return array.__array_interface__["data"][0]
