"""The packed store: 10,000 documents of 300 tokens in 48 dimensions. Sizes, time to save, open, verify and load, and packing.

`pack` projects nothing here: it drops masked tokens of fp32 [N, L, d], normalises and rounds, into memory that is there
already, with one thread and with all. Beside it stands what memory gives: lines of the cache read and, for each (a copy),
every two (float16, bfloat16) or four (int8), one written past the caches, with nothing computed. GB/s count the bytes that
must be read and those written; "of memory" is the median of ratios of one round, in wall time, to memory without a mask, "of
the same lines" to memory where only the lines of kept tokens are read: less is had there, as the processor fetches many of
those between. "Of memcpy" is the ratio to numpy's copy of the whole array, by as many threads: what programs get of memory.
Saving flushes to the disk, as does the plain write beside it; what is loaded is in the page cache, and so is the plain read.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import suite
from benchmarks.interleave import Contender, interleave
from benchmarks.threads import thread_counts
from edgecolbert_kernels import PackedEmbeddings, PackedWriter, pack
from edgecolbert_kernels.backends import native
from edgecolbert_kernels.backends.packed import empty_lines, pack_rows
from edgecolbert_kernels.dtypes import STORAGE

FULL, QUICK = (10_000, 300, 48), (2_000, 300, 48)
LINE = 64
RATIOS = {"float32": 1, "float16": 2, "bfloat16": 2, "int8": 4}  # lines read for one that is written
SHARES = {"of_memory": "of memory", "of_same_lines": "of the same lines", "of_memcpy": "of memcpy"}
MEMCPY = "memcpy"


def memory(dtype: str, mask_name: str) -> str:
    return f"memory, {RATIOS[dtype]} read : 1 written, {mask_name}"


def write(path: Path, array: np.ndarray) -> None:
    """The least that puts an array on the disk."""
    with path.open("wb") as file:
        file.write(array)
        file.flush()
        os.fsync(file.fileno())


def runs_of_rows(mask: np.ndarray | None, num_documents: int, length: int) -> np.ndarray:
    """(first row, rows) of every run of kept rows that lie side by side in a document."""
    if mask is None:
        return np.stack([np.arange(num_documents) * length, np.full(num_documents, length)], axis=1)
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    (documents, begins), ends = np.nonzero(edges == 1), np.nonzero(edges == -1)[1]
    return np.stack([documents * length + begins, ends - begins], axis=1)


def traffic(
    hidden: np.ndarray, mask: np.ndarray | None, target: np.ndarray, ratio: int
) -> tuple[Callable[[int], None], int]:
    """The lines that packing must read, and one written for every `ratio` of a run; with it, how many bytes that is."""
    lines = runs_of_rows(mask, *hidden.shape[:2]) * (hidden[0, 0].nbytes // LINE)
    written = -(-lines[:, 1] // ratio)
    runs = np.column_stack([lines, np.cumsum(written) - written])

    def move(threads: int) -> None:
        native.module().move_lines(hidden.ctypes.data, target.ctypes.data, runs.ctypes.data, len(runs), ratio, threads)

    return move, LINE * int(lines[:, 1].sum() + written.sum())


def memcpy(source: np.ndarray, target: np.ndarray, pool: ThreadPoolExecutor, threads: int) -> None:
    parts = zip(np.array_split(target, threads), np.array_split(source, threads), strict=True)
    list(pool.map(lambda part: np.copyto(*part), parts))


def packing(hidden: np.ndarray, rounds: int, shared: dict, threads: int) -> list[dict]:
    """What `pack` does without a projection, by mask, storage and normalisation."""
    num_documents, length, dim = hidden.shape
    random = np.random.default_rng(1)
    lengths = random.integers(length // 10, length + 1, num_documents)
    masks = {
        "no mask": None,
        "padding": np.arange(length) < lengths[:, None],
        "holes": random.random((num_documents, length)) < 0.8,
    }
    target = empty_lines(hidden.shape, np.float32)
    target.fill(0)
    pool = ThreadPoolExecutor(threads)
    calls: dict[str, tuple[Callable[[], object], int]] = {
        MEMCPY: (partial(memcpy, hidden, target, pool, threads), 2 * hidden.nbytes)
    }
    limits: dict[str, tuple[str, str, str]] = {}
    for mask_name, mask in masks.items():
        tokens = num_documents * length if mask is None else int(mask.sum())
        for dtype, ratio in RATIOS.items():
            move, moved = traffic(hidden, mask, target, ratio)
            calls[memory(dtype, mask_name)] = partial(move, threads), moved
        for dtype in ("float16", "bfloat16", "int8"):
            for normalize in (True, False):
                out = empty_lines((tokens, dim), STORAGE[dtype])
                call = partial(pack_rows, hidden, mask, normalize=normalize, dtype=dtype, out=out, threads=threads)
                name = f"{dtype}, {mask_name}" + (", normalised" if normalize else "")
                calls[name] = call, tokens * dim * (4 + out.itemsize)
                limits[name] = memory(dtype, "no mask"), memory(dtype, mask_name), MEMCPY
    contenders = [Contender(name, lambda turn, call=call: call()) for name, (call, _) in calls.items()]
    samples = interleave(contenders, rounds, clock=time.perf_counter)
    pool.shutdown()
    rates = {name: moved / 1e9 / samples.values[name] for name, (_, moved) in calls.items()}
    rows = []
    for name in calls:
        facts = {"gigabytes_a_second": round(float(np.median(rates[name])), 2)}
        for limit, fact in zip(limits.get(name, ()), SHARES, strict=False):
            facts[fact] = suite.quantiles(rates[name] / rates[limit])
        times = suite.quantiles(1e3 * samples.values[name])
        rows.append({"case": "pack", **shared, "threads": threads, "contender": name, "unit": "ms", **times, **facts})
        shares = "".join(f"{facts[fact]['p50']:>7.2f} {text}" for fact, text in SHARES.items() if fact in facts)
        print(f"  {threads} threads, {name:<38}{facts['gigabytes_a_second']:>8.2f} GB/s{shares}", flush=True)
    return rows


def run(quick: bool) -> list[dict]:
    num_documents, length, dim = QUICK if quick else FULL
    suite.machine.set_threads(1)
    rounds = 3 if quick else 7
    random = np.random.default_rng(0)
    hidden = empty_lines((num_documents, length, dim), np.float32)
    random.standard_normal(out=hidden, dtype=np.float32)
    shared = {"num_documents": num_documents, "length": length, "dim": dim, "threads": 1}
    rows: list[dict] = []

    def measure(case: str, name: str, call, *, gigabytes: float = 0.0, prepare=lambda: None, **facts) -> None:
        seconds = []
        for _ in range(rounds):
            prepare()
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        row = {
            "case": case,
            **shared,
            "contender": name,
            "unit": "ms",
            **suite.quantiles(1e3 * np.array(seconds)),
            **facts,
        }
        if gigabytes:
            row["gigabytes_a_second"] = round(gigabytes / float(np.median(seconds)), 2)
        rows.append(row)
        rate = f"{row['gigabytes_a_second']:>8.2f} GB/s" if gigabytes else ""
        print(f"  {case + ', ' + name:<28}{row['p50']:>10.3f} ms{rate}  {facts or ''}", flush=True)

    for threads in thread_counts():
        rows += packing(hidden, rounds, shared, threads)
    with tempfile.TemporaryDirectory() as name:
        folder, plain = Path(name) / "packed", Path(name) / "plain"
        for dtype in ("float16", "int8"):
            packed = pack(hidden, dtype=dtype)
            facts = {"mebibytes": round(packed.nbytes / 2**20, 1)}
            clear = lambda: shutil.rmtree(folder, ignore_errors=True)  # noqa: E731
            size = packed.nbytes / 1e9
            moved = (hidden.nbytes + packed.nbytes) / 1e9
            makers = {
                "from_padded": partial(PackedEmbeddings.from_padded, hidden, dtype=dtype),
                "from_list": partial(PackedEmbeddings.from_list, list(hidden), dtype=dtype),
                "float32 to it": partial(PackedEmbeddings.from_padded(hidden, dtype="float32").to, dtype),
            }
            for made, call in makers.items():
                measure(dtype, made, call, gigabytes=moved)
            measure(dtype, "plain write", lambda p=packed: write(plain, p.tokens), gigabytes=size)
            measure(dtype, "save", lambda p=packed: p.save(folder), prepare=clear, gigabytes=size, **facts)
            measure(dtype, "open", lambda: PackedEmbeddings.load(folder))
            measure(dtype, "plain read", lambda p=packed: np.fromfile(plain, p.tokens.dtype), gigabytes=size)
            measure(dtype, "load", lambda: PackedEmbeddings.load(folder, mmap=False), gigabytes=size)
            measure(dtype, "verify", lambda: PackedEmbeddings.verify(folder))
            with PackedWriter(folder) as writer:
                measure(dtype, "append 10", lambda w=writer, p=packed: w.append(p[:10]))
            clear()
    return rows


if __name__ == "__main__":
    suite.main_of_rows("storage", run, pin=False)
