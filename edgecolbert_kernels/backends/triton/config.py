"""Block sizes: by a small table that `python -m edgecolbert_kernels.backends.triton.tune` writes, else by rule.

A key names what the best choice depends on, each in few classes, so that a new shape neither tunes nor, as a rule, compiles:
the kernel, the compute capability, the dtype of the products, d, and the query tokens beside each other.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("table.json")
# Dimensions that a program holds on chip; more are read in a loop.
RESIDENT = 256
LOOPED = 64
# Dimensions of a token that a program of the backward owns, where several may share it.
SPLIT = 64
# Query tokens that leave room for 0, 1, 2 or 3 things beside the tiles: before Hopper, and from there on.
COLUMNS = {
    "score": ((128, 128, 64, 32), (128, 128, 128, 64)),
    "score_argmax": ((128, 64, 32, 32), (128, 64, 64, 32)),
}


class Blocks(NamedTuple):
    rows: int  # document tokens of a tile; query tokens in "rows" and "rows_argmax"
    columns: int  # the others
    warps: int
    stages: int


Pieces = tuple[int, int, int, bool]


def pieces(dim: int) -> Pieces:
    """d as at most three powers of two from 16 on, the last rounded up; and whether it takes a loop instead."""
    if dim > RESIDENT:
        return LOOPED, 0, 0, True
    rest, found = -(-max(dim, 1) // 16) * 16, []
    for last in (False, False, True):
        if rest <= 0:
            found.append(0)
            continue
        size = 1 << (rest - 1).bit_length()
        if size != rest and not last:
            size >>= 1
        found.append(size)
        rest -= size
    # 64 + 32 + 32 is 128 in one.
    total = sum(found)
    if total & (total - 1) == 0:
        found = [total, 0, 0]
    return found[0], found[1], found[2], False


def shared_pieces(dim: int, normalize: bool) -> Pieces:
    """The same for the backward; True: they are a part of d, and as many programs as it takes share a token.

    That keeps more rows on chip. The Jacobian of `normalize` needs a whole token.
    """
    if dim > RESIDENT or (dim > SPLIT and dim % SPLIT == 0 and not normalize):
        return SPLIT, 0, 0, True
    return pieces(dim)


@cache
def table() -> dict[str, list[int]]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def key(kernel: str, capability: int, bits: int, dim: int, columns: int) -> str:
    width = min(dim, RESIDENT + 1)
    return f"{kernel} sm_{capability} {bits}-bit d{-(-width // 16) * 16} columns{columns}"


def blocks(kernel: str, capability: int, bits: int, dim: int, columns: int, beside: int = 0) -> Blocks:
    """Of `kernel` ("score", "score_argmax", "rows", "rows_argmax", "documents" or "queries").

    `beside` counts what a variant holds in registers beside its tiles: masks, norms, boundaries. Their place is taken from the
    tiles and, before Hopper, from the pipeline; or more threads share them.
    """
    found = table().get(key(kernel, capability, bits, dim, columns))
    chosen = Blocks(*found) if found else rule(kernel, capability, bits, dim, columns)
    if kernel == "documents" and beside and dim > 64:
        return chosen._replace(warps=max(8, chosen.warps))
    if beside and capability < 90:
        chosen = chosen._replace(stages=max(1, chosen.stages - 1))
    if kernel in COLUMNS:
        chosen = chosen._replace(columns=min(chosen.columns, COLUMNS[kernel][capability >= 90][beside]))
    return chosen


def rule(kernel: str, capability: int, bits: int, dim: int, columns: int) -> Blocks:
    """What holds everything in registers, by the compiler's report, on every capability."""
    if kernel == "documents" and bits == 16:
        large = dim <= 64 and capability >= 90
        return Blocks(128 if large else 64 if dim <= 128 else 32, min(columns, 32), 8 if large else 4, 2)
    if kernel == "documents":
        return Blocks(32 if dim <= 64 else 16, 16, 4, 1)
    if kernel == "queries":
        return Blocks(4, 16, 4, 1)
    if kernel in ("rows", "rows_argmax"):
        return rows_rule(kernel == "rows_argmax", capability, dim, columns)
    if bits == 32:
        return Blocks(32, min(columns, 32), 4, 2)
    # Shared memory of 99 KiB a program must do, and without Hopper's products, which read it themselves, registers are scarcer.
    if dim > 128 or (kernel == "score_argmax" and capability < 90):
        columns = min(columns, 64)
    # One group of four warps has the 64 rows of a Hopper product, and two programs fit beside each other.
    return Blocks(64, columns, 4, 2 if dim > 128 or (dim > 64 and capability < 90) else 3)


def rows_rule(argmax: bool, capability: int, dim: int, columns: int) -> Blocks:
    """Of the kernel whose rows are query tokens: what lets at least two programs share a multiprocessor."""
    most = 64 if dim > 128 else 128
    if capability < 90 or capability >= 120:
        # Every warp has whole rows, 32 of them, where there are at least as many rows to a warp as columns.
        return Blocks(min(columns, most), 32, min(columns, most) // 32, 3 if dim <= 64 else 2)
    if 64 < dim <= 128 and not argmax:
        # Documents come from the second-level cache at its full speed, half as often where more query tokens wait for them.
        most = 256
    rows = min(columns, most)
    return Blocks(rows, 64, 8 if rows > 128 else 4, 3 if dim <= 64 or rows > 128 else 2)
