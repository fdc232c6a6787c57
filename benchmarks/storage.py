"""The packed store: 10,000 documents of 300 tokens in 48 dimensions. Sizes, time to save, open, verify and load, and packing.

`pack` projects nothing here: it drops masked tokens of fp32 [N, L, d], normalises and rounds, into memory that is there
already, beside a memcpy of the whole. GB/s count the bytes that must be read and those written; "of memcpy" is the median
of ratios of one round, in CPU time. Saving flushes to the disk, as does the plain write beside it; what is loaded is in the
page cache, and so is the plain read.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import suite
from benchmarks.interleave import Contender, interleave
from edgecolbert_kernels import PackedEmbeddings, PackedWriter, pack
from edgecolbert_kernels.backends.packed import pack_rows

FULL, QUICK = (10_000, 300, 48), (2_000, 300, 48)


def write(path: Path, array: np.ndarray) -> None:
    """The least that puts an array on the disk."""
    with path.open("wb") as file:
        file.write(array)
        file.flush()
        os.fsync(file.fileno())


def packing(hidden: np.ndarray, rounds: int, shared: dict) -> list[dict]:
    """What `pack` does without a projection, by mask, storage and normalisation."""
    num_documents, length, dim = hidden.shape
    random = np.random.default_rng(1)
    lengths = random.integers(length // 10, length + 1, num_documents)
    masks = {
        "no mask": None,
        "padding": np.arange(length) < lengths[:, None],
        "holes": random.random((num_documents, length)) < 0.8,
    }
    target = np.empty_like(hidden)
    calls = {"memcpy": (lambda: np.copyto(target, hidden), 2 * hidden.nbytes)}
    for mask_name, mask in masks.items():
        tokens = hidden.shape[0] * length if mask is None else int(mask.sum())
        for dtype in ("float16", "int8"):
            for normalize in (True, False):
                name = f"{dtype}, {mask_name}" + (", normalised" if normalize else "")
                out = np.empty((tokens, dim), dtype)
                call = partial(pack_rows, hidden, mask, normalize=normalize, dtype=dtype, out=out)
                calls[name] = (call, tokens * dim * (4 + out.itemsize))
    contenders = [Contender(name, lambda turn, call=call: call()) for name, (call, _) in calls.items()]
    samples = interleave(contenders, rounds)
    rates = {name: moved / 1e9 / samples.values[name] for name, (_, moved) in calls.items()}
    rows = []
    for name in calls:
        ratio = suite.quantiles(rates[name] / rates["memcpy"])
        rate = round(float(np.median(rates[name])), 2)
        times = suite.quantiles(1e3 * samples.values[name])
        rows.append(
            {"case": "pack", **shared, "contender": name, "unit": "ms", **times, "gigabytes_a_second": rate, "of_memcpy": ratio}
        )  # fmt: skip
        print(f"  {name:<34}{rate:>8.2f} GB/s{ratio['p50']:>7.2f} of memcpy", flush=True)
    return rows


def run(quick: bool) -> list[dict]:
    num_documents, length, dim = QUICK if quick else FULL
    suite.machine.set_threads(1)
    rounds = 3 if quick else 7
    random = np.random.default_rng(0)
    hidden = random.standard_normal((num_documents, length, dim), np.float32)
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

    rows += packing(hidden, rounds, shared)
    with tempfile.TemporaryDirectory() as name:
        folder, plain = Path(name) / "packed", Path(name) / "plain"
        for dtype in ("float16", "int8"):
            packed = pack(hidden, dtype=dtype)
            facts = {"mebibytes": round(packed.nbytes / 2**20, 1)}
            clear = lambda: shutil.rmtree(folder, ignore_errors=True)  # noqa: E731
            size = packed.nbytes / 1e9
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
    suite.main_of_rows("storage", run)
