"""Time and peak memory of scoring one corpus: these kernels beside eager PyTorch.

Each contender runs in a process of its own, so that no other's memory is counted; `python -m demo.timing` is one.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from demo.vectors import TokenVectors
from edgecolbert_kernels import maxsim, maxsim_varlen

# Eager PyTorch builds [queries, documents, Lq, Ld] in float32: as many queries as keep it under this.
EAGER_BYTES = 1 << 30
MAX_BATCH = 32
SECONDS_A_SHAPE = 0.4


@dataclass(frozen=True)
class Measurement:
    """`single_s` and `batch_s`: median seconds for one query and for the batch. Bytes: of the documents as this
    contender stores them, and of what scoring the batch takes beyond, at its peak (None where it cannot be told).
    """

    single_s: float
    batch_s: float
    document_bytes: int
    peak_bytes: int | None
    max_error: float  # of a score of the batch, against the first contender


@dataclass(frozen=True)
class Inputs:
    """What scoring needs, as stored: queries float32 [Nq, Lq, d]; documents padded (with a mask) or packed."""

    queries: Tensor
    query_mask: Tensor
    documents: Tensor
    document_mask: Tensor | None
    cu_seqlens: Tensor | None


def eager(queries: Tensor, query_mask: Tensor, inputs: Inputs) -> Tensor:
    similarity = torch.einsum("qld,ntd->qnlt", queries, inputs.documents)
    similarity.masked_fill_(~inputs.document_mask[:, None], -torch.inf)
    return similarity.amax(dim=-1).masked_fill(~query_mask[:, None], 0).sum(dim=-1)


def padded(queries: Tensor, query_mask: Tensor, inputs: Inputs, precision: str) -> Tensor:
    return maxsim(queries, inputs.documents, query_mask, inputs.document_mask, precision=precision)


def packed(queries: Tensor, query_mask: Tensor, inputs: Inputs, precision: str) -> Tensor:
    lengths = query_mask.sum(dim=1)
    cu_seqlens_q = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return maxsim_varlen(queries[query_mask], inputs.documents, cu_seqlens_q, inputs.cu_seqlens, precision=precision)


@dataclass(frozen=True)
class Contender:
    score: Callable[[Tensor, Tensor, Inputs], Tensor]
    storage: str  # the name of a saved array


# The first one is what the others are compared with. It gets float32 documents: an einsum
# of float16 ones takes several times as long on a CPU.
CONTENDERS = {
    "eager float32, padded": Contender(eager, "padded_float32"),
    "exact float16, padded": Contender(partial(padded, precision="exact"), "padded_float16"),
    "fast float16, padded": Contender(partial(padded, precision="fast"), "padded_float16"),
    "exact float16, packed": Contender(partial(packed, precision="exact"), "packed_float16"),
    "fast float16, packed": Contender(partial(packed, precision="fast"), "packed_float16"),
}


def measure_all(queries: TokenVectors, documents: TokenVectors) -> tuple[int, dict[str, Measurement]]:
    """The number of queries in the batch, and what each contender took."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        batch = _save(queries, documents, folder)
        measurements = {}
        for contender in tqdm(CONTENDERS, desc="Timing", unit=" scorers"):
            command = [sys.executable, "-m", "demo.timing", contender, name, str(torch.get_num_threads())]
            # From the folder that holds this package, wherever the caller stands.
            finished = subprocess.run(
                command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True
            )
            measurements[contender] = Measurement(**json.loads(finished.stdout.splitlines()[-1]))
    return batch, measurements


def _save(queries: TokenVectors, documents: TokenVectors, folder: Path) -> int:
    """Writes every form of the documents as a contender reads it, so that loading adds nothing to a peak."""
    values, mask = documents.padded()
    np.save(folder / "padded_float16.npy", values)
    np.save(folder / "padded_float32.npy", values.float())
    np.save(folder / "document_mask.npy", mask)
    np.save(folder / "packed_float16.npy", documents.values)
    np.save(folder / "cu_seqlens.npy", documents.offsets)

    # Queries of about the median length: a batch then has next to no padding, which is not what is compared here.
    by_length = queries.lengths.argsort()
    median = int(queries.lengths.median())
    batch = max(1, min(MAX_BATCH, len(by_length), EAGER_BYTES // (values.shape[0] * values.shape[1] * median * 4)))
    start = (len(by_length) - batch) // 2
    views = queries.views()
    values, mask = TokenVectors.from_texts(views[i] for i in by_length[start : start + batch].tolist()).padded()
    np.save(folder / "queries.npy", values.float())
    np.save(folder / "query_mask.npy", mask)
    return batch


def _measure(name: str, folder: Path) -> Measurement:
    contender = CONTENDERS[name]
    queries, query_mask = _load(folder, "queries"), _load(folder, "query_mask")
    is_packed = contender.storage.startswith("packed")
    inputs = Inputs(
        queries,
        query_mask,
        _load(folder, contender.storage),
        None if is_packed else _load(folder, "document_mask"),
        _load(folder, "cu_seqlens") if is_packed else None,
    )
    contender.score(queries[:1], query_mask[:1], inputs)  # libraries load, thread pools start

    resting = _restart_peak()
    scores = contender.score(queries, query_mask, inputs)
    peak = _memory_bytes("VmHWM")

    reference = folder / "scores.npy"
    if not reference.exists():
        np.save(reference, scores)
    return Measurement(
        single_s=_median_seconds(lambda: contender.score(queries[:1], query_mask[:1], inputs)),
        batch_s=_median_seconds(lambda: contender.score(queries, query_mask, inputs)),
        document_bytes=inputs.documents.nbytes,
        peak_bytes=None if resting is None or peak is None else peak - resting,
        max_error=float((scores - _load(folder, "scores")).abs().max()),
    )


def _load(folder: Path, name: str) -> Tensor:
    return torch.from_numpy(np.load(folder / f"{name}.npy"))


def _median_seconds(call: Callable[[], object]) -> float:
    seconds: list[float] = []
    while len(seconds) < 5 or (sum(seconds) < SECONDS_A_SHAPE and len(seconds) < 200):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _restart_peak() -> int | None:
    """Resident bytes now, from where the peak counts again; None where the system cannot tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _memory_bytes("VmRSS")


def _memory_bytes(field: str) -> int | None:
    # Not getrusage: on Linux its maximum outlives exec, so a child reports the peak of its parent.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return None


if __name__ == "__main__":
    name, folder, num_threads = sys.argv[1:]
    torch.set_num_threads(int(num_threads))
    print(json.dumps(asdict(_measure(name, Path(folder)))))
