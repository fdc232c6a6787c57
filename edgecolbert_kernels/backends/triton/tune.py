"""`python -m edgecolbert_kernels.backends.triton.tune`: measures block sizes on this GPU and writes the best to `table.json`.

Nothing is tuned while scoring: a choice that is not in the table goes by a rule. Entries for other GPUs stay as they are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from edgecolbert_kernels.backends.triton import config, supports

DIMENSIONS = (48, 64, 96, 128)
DTYPES = (torch.float16, torch.float32)
# Query tokens beside each other -> queries, documents: a rerank, some queries, a training batch.
SHAPES = {32: (1, 4096), 64: (2, 2048), 128: (4, 2048), 256: (128, 128)}
QUERY_TOKENS, DOCUMENT_TOKENS = 32, 300


def candidates(kernel: str, bits: int, columns: int) -> Iterator[config.Blocks]:
    if kernel == "queries":
        for documents, warps in itertools.product((2, 4, 8), (2, 4, 8)):
            yield config.Blocks(documents, columns, warps, 1)
        return
    if kernel in ("rows", "rows_argmax"):
        heights = [rows for rows in (64, 128, 256) if rows <= columns]
        for rows, width, warps, stages in itertools.product(heights, (32, 64, 128), (4, 8), (2, 3, 4)):
            yield config.Blocks(rows, width, warps, stages)
        return
    tiles = (64, 128, 256) if bits == 16 else (16, 32, 64)
    widths = {columns, min(columns, 64)} if kernel != "documents" else {min(columns, 32), columns}
    for rows, width, warps, stages in itertools.product(tiles, sorted(widths), (4, 8), (2, 3, 4)):
        yield config.Blocks(rows, width, warps, stages)


def problems(dim: int, dtype: torch.dtype) -> Iterator[tuple[str, str, int, Callable[[], Any]]]:
    """Kernel, key, columns and a call, for each kernel and width."""
    from edgecolbert_kernels.backends.triton import gradients, scoring

    capability, bits = scoring.capability(torch.cuda.current_device()), 8 * dtype.itemsize
    rest = None, None, None, None, None, None, False, "exclude", "exact"
    for columns, (num_queries, num_documents) in SHAPES.items():
        Q = torch.randn(num_queries, QUERY_TOKENS, dim, device="cuda").to(dtype)
        D = torch.randn(num_documents, DOCUMENT_TOKENS, dim, device="cuda").to(dtype)
        rows = bits == 16 and columns >= scoring.FEWEST_ROWS
        beside = columns if rows else min(columns, scoring.MOST_COLUMNS)
        for with_argmax in (False, True):
            kernel = ("rows" if rows else "score") + with_argmax * "_argmax"
            key = config.key(kernel, capability, bits, dim, beside)
            yield kernel, key, beside, partial(scoring.forward, Q, D, *rest, with_argmax)
        if columns == max(SHAPES):
            scores, argmax = scoring.forward(Q, D, *rest, True)
            assert argmax is not None
            width = sum(config.shared_pieces(dim, False)[:3])
            for kernel, tokens in (("documents", QUERY_TOKENS), ("queries", 16)):
                key = config.key(kernel, capability, bits if kernel == "documents" else 16, width, tokens)
                needs = kernel == "queries", kernel == "documents"
                yield kernel, key, tokens, partial(gradients.backward, scores, Q, D, argmax, *rest, *needs)


def measure(call: Callable[[], Any]) -> float:
    """Median milliseconds; infinite for blocks that do not compile or do not fit."""
    from triton.testing import do_bench

    from edgecolbert_kernels.backends.triton import gradients, scoring

    scoring.forget()
    gradients.forget()
    try:
        return float(do_bench(call, warmup=10, rep=50, return_mode="median"))
    except Exception as error:
        print(f"    {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", file=sys.stderr)
        return float("inf")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m edgecolbert_kernels.backends.triton.tune", description=__doc__)
    parser.add_argument("--dim", type=int, nargs="+", default=DIMENSIONS, help="d of the tokens (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the choices and write nothing")
    options = parser.parse_args(arguments)
    reason = supports("maxsim", "cuda", "float32")
    if reason:
        print(f"nothing to tune: {reason}", file=sys.stderr)
        return 1
    from edgecolbert_kernels.backends.triton import scoring

    capability = scoring.capability(torch.cuda.current_device())
    for dim, dtype in itertools.product(options.dim, DTYPES):
        for kernel, key, columns, call in problems(dim, dtype):
            times: dict[config.Blocks, float] = {}
            bits = 8 * dtype.itemsize
            for blocks in {config.rule(kernel, capability, bits, dim, columns), *candidates(kernel, bits, columns)}:
                config.table()[key] = list(blocks)
                times[blocks] = measure(call)
            best = min(times, key=lambda blocks: (times[blocks], blocks))
            config.table()[key] = list(best)
            print(f"{key}: {tuple(best)} {1000 * times[best]:.1f} us", flush=True)
            if not options.dry_run:
                config.TABLE.write_text(json.dumps(dict(sorted(config.table().items())), indent=0) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
