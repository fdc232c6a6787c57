"""The packed store: 10,000 documents of 300 tokens in 48 dimensions. Sizes, time to save, open, verify and load, and packing.

`pack` projects nothing here: it normalises fp32 [N, L, d], drops masked tokens and rounds, against a memcpy of the same
bytes. GB/s count bytes read. Files are in the page cache.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import suite
from edgecolbert_kernels import PackedEmbeddings, PackedWriter, pack

FULL, QUICK = (10_000, 300, 48), (2_000, 300, 48)


def run(quick: bool) -> list[dict]:
    num_documents, length, dim = QUICK if quick else FULL
    suite.machine.set_threads(1)
    rounds = 3 if quick else 7
    random = np.random.default_rng(0)
    hidden = random.standard_normal((num_documents, length, dim), np.float32)
    mask = np.ones((num_documents, length), bool)
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

    target = np.empty_like(hidden)
    size = hidden.nbytes / 1e9
    measure("pack", "memcpy", lambda: np.copyto(target, hidden), gigabytes=size)
    for dtype in ("float16", "bfloat16", "float32", "int8"):
        measure("pack", dtype, lambda dtype=dtype: pack(hidden, mask, dtype=dtype), gigabytes=size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "packed"
        for dtype in ("float16", "int8"):
            packed = pack(hidden, dtype=dtype)
            facts = {"mebibytes": round(packed.nbytes / 2**20, 1)}
            clear = lambda: shutil.rmtree(folder, ignore_errors=True)  # noqa: E731
            measure(dtype, "save", lambda p=packed: p.save(folder), prepare=clear, **facts)
            measure(dtype, "open", lambda: PackedEmbeddings.load(folder))
            measure(dtype, "load", lambda: PackedEmbeddings.load(folder, mmap=False))
            measure(dtype, "verify", lambda: PackedEmbeddings.verify(folder))
            with PackedWriter(folder) as writer:
                measure(dtype, "append 10", lambda w=writer, p=packed: w.append(p[:10]))
            clear()
    return rows


if __name__ == "__main__":
    suite.main_of_rows("storage", run)
