"""Encode a collection and score it on a GPU: `table13.py`'s documents, queries and encoders, in float16.

    python -m benchmarks.table13_gpu                        # 10,000 documents, all sizes and dimensions
    python -m benchmarks.table13_gpu --documents 200        # a taste; on a CPU too, for a dry run

Wall-clock seconds. The backbone runs once for all dimensions; tokenisation, the CPU's, is a time of its own. Beside ours,
PyTorch's usual lines score the same padded documents, in blocks that fit, and the scores must agree. ``memory`` is what the
documents take on the device, ``peak`` the most that scoring takes beside them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, suite
from benchmarks.table13 import BATCH, DIMS, LENGTH, MIB, QUERIES, QUERY_LENGTH, SIZES, make_model, make_tokenizer, texts

BLOCK = 256  # documents that PyTorch scores at a time: 6.4 GB of similarities in float32
REPEATS = 3
TOLERANCE = 0.05  # of a score of 32 tokens, products in float16


def scored(Q: Tensor, D: Tensor) -> Tensor:
    """The usual lines of PyTorch, with sums in float32; every document is as long as the longest."""
    found = [torch.einsum("qid,njd->qnij", Q.float(), part.float()).amax(-1).sum(-1) for part in D.split(BLOCK)]
    return torch.cat(found, 1)


class Clock:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"

    def __call__(self, call: Callable[[], Any]) -> tuple[float, Any]:
        self.wait()
        start = time.perf_counter()
        result = call()
        self.wait()
        return time.perf_counter() - start, result

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def held(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.on_gpu else 0

    def peak(self, call: Callable[[], Any]) -> float | None:
        """MiB beside what was there."""
        if not self.on_gpu:
            return None
        before = self.held()
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.wait()
        return (torch.cuda.max_memory_allocated(self.device) - before) / MIB


def measure(size: str, documents: int, device: torch.device) -> Iterator[dict[str, Any]]:
    from edgecolbert_kernels import maxsim, pack

    clock = Clock(device)
    dtype = torch.float16 if clock.on_gpu else torch.float32
    with tempfile.TemporaryDirectory(prefix="table13-") as name:
        make_tokenizer(Path(name) / "tokenizer")
        encoders = {dim: make_model(size, dim, Path(name)).to(device, dtype) for dim in DIMS}
    first = encoders[DIMS[0]]
    listed = list(texts(documents, LENGTH, seed=1))
    spent, given = clock(lambda: first.tokenize(listed, False))
    ids, mask, kept = (given[key].to(device) for key in ("input_ids", "attention_mask", "score_mask"))
    parts = list(zip(ids.split(BATCH), mask.split(BATCH), strict=True))
    first.states(*parts[0])
    backbone_s, hidden = clock(lambda: torch.cat([first.states(*part) for part in parts]))
    given = first.tokenize(list(texts(QUERIES, QUERY_LENGTH, seed=2)), True)
    asked = first.states(given["input_ids"].to(device), given["attention_mask"].to(device))
    for dim, encoder in encoders.items():
        Q = torch.nn.functional.normalize(encoder.head(asked), dim=-1)
        vectors = torch.cat([encoder.head(part) for part in hidden[:BATCH].split(BATCH)])
        pack(vectors, kept[:BATCH], device=device)
        head_s, vectors = clock(lambda e=encoder: torch.cat([e.head(part) for part in hidden.split(BATCH)]))
        held = clock.held()
        pack_s, stored = clock(lambda v=vectors: pack(v, kept, device=device))
        memory = (clock.held() - held) / MIB
        padded = torch.nn.functional.normalize(vectors, dim=-1)
        shared = {
            "case": f"{size}, d={dim}", "size": size, "dim": dim, "documents": documents, "length": LENGTH,
            "num_queries": QUERIES, "query_length": QUERY_LENGTH, "unit": "s", "tokens": int(kept.sum()), "tokenize_s": spent,
            "pack_s": pack_s, "encode_s": backbone_s + head_s + pack_s,
        }  # fmt: skip
        wanted = scored(Q[:8], padded)
        for contender, size_mib, call in (
            ("packed fp16, GPU", memory, lambda q=Q, d=stored: maxsim(q, d)),
            ("PyTorch, GPU", padded.nbytes / MIB, lambda q=Q, d=padded: scored(q, d)),
        ):
            error = (call()[:8] - wanted).abs().max().item()
            assert error < TOLERANCE, f"{contender}, d = {dim}: off by {error}"
            score_s = sorted(clock(call)[0] for _ in range(REPEATS))[REPEATS // 2]
            share = score_s / (shared["encode_s"] + score_s)
            yield {
                **shared, "contender": contender, "score_s": score_s, "score_share": share, "memory_mib": size_mib,
                "peak_mib": clock.peak(call), "error": error,
            }  # fmt: skip
        del vectors, padded, stored


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table13_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = machine.gpu_facts()
    rows = []
    with torch.inference_mode():
        for size in options.sizes:
            for made in measure(size, options.documents, device):
                made = {key: float(f"{each:.4g}") if isinstance(each, float) else each for key, each in made.items()}
                rows.append({"suite": "table13", **made, "quick": options.documents < 1000, **facts})
                print(
                    f"  {made['case']:<12}{made['contender']:<18}encode {made['encode_s']:.3g} s, score {made['score_s']:.4g} s"
                    f" ({100 * made['score_share']:.1f} %), memory {made['memory_mib']:.0f} and {made['peak_mib']} MiB",
                    flush=True,
                )
                suite.save("table13", rows, other_cases=True)


if __name__ == "__main__":
    main()
