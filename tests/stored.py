"""Packed documents with a scale each, or floats, and the scores of the kernels for them, as bare numpy arrays."""

from __future__ import annotations

import numpy as np

from edgecolbert_kernels.backends import native

CODES = {"float32": native.FLOAT32, "float16": native.FLOAT16, "uint16": native.BFLOAT16, "int8": native.INT8}


def boundaries(lengths, start=0):
    return np.cumsum([start, *lengths], dtype=np.int64)


def queries_of(lengths, dim, seed=0):
    rows = np.random.default_rng(seed).standard_normal((sum(lengths), dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), boundaries(lengths)


def documents_of(lengths, dim, seed=1, skip=3):
    """tokens [T, d], offsets that start behind `skip` rows, scales."""
    random = np.random.default_rng(seed)
    tokens = random.integers(-127, 128, (skip + sum(lengths) + 2, dim)).astype(np.int8)
    return tokens, boundaries(lengths, skip), random.uniform(0.001, 0.02, len(lengths)).astype(np.float32)


def operand(X, mask=None, offsets=None, scales=None):
    """What `_C` is told of [N, L, d] or, with offsets, [T, d]."""
    strides = [stride // X.itemsize for stride in X.strides]
    address = 0 if mask is None else mask.ctypes.data
    if offsets is None:
        described = native.padded(X.ctypes.data, CODES[X.dtype.name], X.shape, strides, address)
    else:
        described = native.packed(
            X.ctypes.data, CODES[X.dtype.name], X.shape, strides, offsets.ctypes.data, len(offsets) - 1, address
        )
    return (*described[:-1], 0 if scales is None else scales.ctypes.data)


def forward(
    queries, documents, layout, index, out, argmax, precision="exact", mask_mode="exclude", normalize=False, threads=2
):
    address = 0 if argmax is None else argmax.ctypes.data
    native.forward(
        queries, documents, layout, index, out.ctypes.data, normalize, mask_mode, precision, threads, address, 4
    )


def score_packed(queries, query_offsets, tokens, offsets, scales, *, begin=0, end=None, **options):
    """Scores [Nq, documents] of every query with the documents from `begin` to `end`; bfloat16 is its bits, uint16."""
    offsets = offsets[begin : len(offsets) if end is None else end + 1]
    scales = None if scales is None else scales[begin:]
    out = np.empty((len(query_offsets) - 1, len(offsets) - 1), np.float32)
    described = operand(queries, None, query_offsets), operand(tokens, None, offsets, scales)
    forward(*described, native.EVERY, native.NO_INDEX, out, None, **options)
    return out
