"""The kernels as they are launched for the shapes that matter, to compile ahead of time without a GPU.

One entry names everything that `triton.compile` wants: the function, the types of its arguments, the constants, what the
pointers and strides are divisible by, and the launch options. The reports and tests of registers, spills and tensor-core
instructions go by this list.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton.language as tl

from edgecolbert_kernels.backends import native
from edgecolbert_kernels.backends.triton import config
from edgecolbert_kernels.backends.triton.gradient_kernels import documents, queries, unusual
from edgecolbert_kernels.backends.triton.gradients import documents_blocks
from edgecolbert_kernels.backends.triton.score_kernel import score

CAPABILITIES = (80, 90)
DIMENSIONS = (48, 64, 128)
ALIGNED = 16

_POINTERS = {
    **dict.fromkeys(("q_mask_ptr", "d_mask_ptr"), "*i1"),
    **dict.fromkeys(("q_bounds_ptr", "d_bounds_ptr", "order_ptr", "first_ptr"), "*i64"),
    **dict.fromkeys(("query_index_ptr", "document_index_ptr"), "*i64"),
    **dict.fromkeys(("d_scale_ptr", "grad_ptr", "scores_ptr"), "*fp32"),
    "argmax_ptr": "*i16",
    "flags_ptr": "*i32",
}
_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_SPECIALIZED = (
    "q_ptr",
    "d_ptr",
    "out_ptr",
    "x_ptr",
    "q_stride_n",
    "q_stride_t",
    "d_stride_n",
    "d_stride_k",
    "d_stride_t",
)


class Compilation(NamedTuple):
    name: str
    fn: Any  # of `triton.jit`
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    num_warps: int
    num_stages: int
    capability: int
    dot_dim: int | None  # the dimensions that a similarity is summed over


def variants(capability: int) -> Iterator[Compilation]:
    """For one compute capability, 80 or 90."""
    for dim in DIMENSIONS:
        for argmax in (False, True):
            yield _score(f"in-batch d{dim}", capability, dim, torch.float16, 128, ARGMAX=argmax)
            yield _score(f"rerank d{dim}", capability, dim, torch.float16, 32, ARGMAX=argmax)
        yield _score(f"rerank masked d{dim}", capability, dim, torch.float16, 32, D_MASK=True)
        yield _documents(f"documents d{dim}", capability, dim, torch.float16)
        yield _queries(f"queries d{dim}", capability, dim, torch.float16)
    yield _score("in-batch bf16 d48", capability, 48, torch.bfloat16, 128, ARGMAX=True)
    yield _score("in-batch fp32 d48", capability, 48, torch.float32, 128, ARGMAX=True)
    yield _score("in-batch tf32x3 d48", capability, 48, torch.float32, 128, how="tf32x3")
    yield _score("in-batch normalize d48", capability, 48, torch.float16, 128, NORMALIZE=True, ARGMAX=True)
    yield _score("in-batch zero d48", capability, 48, torch.float16, 128, D_MASK=True, ZERO=True, ARGMAX=True)
    yield _score("packed d48", capability, 48, torch.float16, 64, Q_PACKED=True, D_PACKED=True, ARGMAX=True)
    yield _score("rerank packed d48", capability, 48, torch.float16, 32, D_PACKED=True)
    yield _score("rerank int8 d48", capability, 48, torch.float16, 32, d_type="*i8", D_PACKED=True, SCALED=True)
    yield _score(
        "rerank e4m3 d48", capability, 48, torch.float16, 32, d_type="*u8", D_PACKED=True, SCALED=True, E4M3=True
    )
    yield _score("own d48", capability, 48, torch.float16, 32, LAYOUT=native.OWN, ARGMAX=True, D_MASK=True)
    yield _score("indexed d48", capability, 48, torch.float16, 32, LAYOUT=native.INDEXED, ARGMAX=True)
    yield _score("winners d48", capability, 48, torch.float16, 128, ARGMAX=True, SKIP=True, D_MASK=True)
    yield _score("rerank d768", capability, 768, torch.float16, 32)
    yield _documents("documents normalize d48", capability, 48, torch.float16, NORMALIZE=True)
    yield _documents("documents fp32 d48", capability, 48, torch.float32)
    yield _documents("documents packed d48", capability, 48, torch.float16, Q_PACKED=True, D_PACKED=True)
    yield _queries("queries normalize d48", capability, 48, torch.float16, NORMALIZE=True)
    yield _queries("queries sum d48", capability, 48, torch.float16, SUM=True)
    yield _compilation(
        "unusual d48", unusual, capability, torch.float16, {"DIM": 48, "C": 64, "ROWS": 16}, (4, 1), None
    )


def _score(
    name: str,
    capability: int,
    dim: int,
    dtype: torch.dtype,
    columns: int,
    how: str = "",
    d_type: str | None = None,
    **flags: Any,
) -> Compilation:
    bits = 8 * dtype.itemsize
    kernel = "score_argmax" if flags.get("ARGMAX") else "score"
    blocks = config.blocks(kernel, capability, bits, dim, columns)
    c0, c1, c2, loop = config.pieces(dim)
    group = blocks.columns // 32
    constants = {
        "LAYOUT": native.EVERY,
        "DIM": dim,
        "C0": c0,
        "C1": c1,
        "C2": c2,
        "LOOP": loop,
        "BM": blocks.rows,
        "BN": blocks.columns,
        "GROUP": group,
        "SLOTS": group,
        "EVEN": not flags.get("Q_PACKED"),
        "COMPUTE": _TYPES[dtype],
        "PRECISION": how or ("ieee" if bits == 32 else "tf32"),
        **dict.fromkeys(("E4M3", "Q_MASK", "D_MASK", "Q_PACKED", "D_PACKED", "SCALED", "NORMALIZE"), False),
        **dict.fromkeys(("ZERO", "ARGMAX", "SKIP"), False),
        **flags,
    }
    return _compilation(
        f"{name}{' argmax' * constants['ARGMAX']}", score, capability, dtype, constants, blocks[2:], dim, d_type
    )


def _documents(name: str, capability: int, dim: int, dtype: torch.dtype, **flags: Any) -> Compilation:
    width, blocks = documents_blocks(capability, 8 * dtype.itemsize, dim, flags.get("NORMALIZE", False), 32, 256)
    constants = {
        **dict(zip(("C0", "C1", "C2", "SPLIT"), width, strict=True)),
        "LAYOUT": native.EVERY,
        "DIM": dim,
        "BM": blocks.rows,
        "BN": blocks.columns,
        "COMPUTE": _TYPES[dtype],
        "PRECISION": "ieee" if dtype is torch.float32 else "tf32",
        "D_MASK": True,
        "Q_PACKED": False,
        "D_PACKED": False,
        "NORMALIZE": False,
        **flags,
    }
    return _compilation(name, documents, capability, dtype, constants, blocks[2:], None)


def _queries(name: str, capability: int, dim: int, dtype: torch.dtype, **flags: Any) -> Compilation:
    width = config.shared_pieces(dim, flags.get("NORMALIZE", False))
    blocks = config.blocks("queries", capability, 16, sum(width[:3]), 16)
    constants = {
        **dict(zip(("C0", "C1", "C2", "SPLIT"), width, strict=True)),
        "LAYOUT": native.EVERY,
        "DIM": dim,
        "BT": blocks.columns,
        "BD": blocks.rows,
        **dict.fromkeys(("Q_PACKED", "D_PACKED", "NORMALIZE", "SUM"), False),
        **flags,
    }
    out = "*fp32" if constants["SUM"] else None
    return _compilation(name, queries, capability, dtype, constants, blocks[2:], None, out=out)


def _compilation(
    name: str,
    fn: Any,
    capability: int,
    dtype: torch.dtype,
    constants: dict[str, Any],
    launch: tuple[int, int],
    dot_dim: int | None,
    d_type: str | None = None,
    out: str | None = None,
) -> Compilation:
    tokens = f"*{_NAMES[dtype]}"
    pointers = {**_POINTERS, "q_ptr": tokens, "x_ptr": tokens, "d_ptr": d_type or tokens, "out_ptr": out or tokens}
    names = [parameter.name for parameter in fn.params]
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i64") for n in names}
    attrs: dict[tuple[int, ...], Any] = {
        (names.index(n),): [["tt.divisibility", ALIGNED]] for n in names if n in _SPECIALIZED
    }
    return Compilation(name, fn, signature, constants, attrs, *launch, capability, dot_dim)
