"""Whatever else scores late interaction and is installed: 1 query (Lq = 32) against 1000 documents of 300 tokens.

One thread, CPU time. Each contender gets the form of documents that it is fastest with, made beforehand; its error against
float64 is measured before it is timed and stands in its rows, also where it is inexact by design. Compiling (torch.compile,
colbert-ai's extension) happens before as well.

PyLate runs in an environment of its own. late-interaction-kernels and flash-maxsim run on GPUs alone.
"""

import importlib.util
import math
import shutil
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from pathlib import Path

import torch

from benchmarks import contenders, machine, suite
from benchmarks.inputs import Shape
from benchmarks.interleave import Contender

DIMS = (48, 128)


@cache
def compiled() -> Callable:
    return torch.compile(contenders.eager)


@lru_cache(maxsize=1)
def numkong_documents(shape: Shape) -> list[list]:
    import numkong

    return [[numkong.maxsim_pack(each, dtype="f16") for each in copy.numpy()] for copy in shape.inputs().documents]


def numkong(shape: Shape) -> Callable[[int], torch.Tensor]:
    """Documents packed beforehand. NumKong returns a sum of distances 1 - cos."""

    def call(turn: int) -> torch.Tensor:
        import numkong

        copies = numkong_documents(shape)
        query = numkong.maxsim_pack(shape.inputs().queries[0].numpy(), dtype="f16")
        distances = [numkong.maxsim_packed(query, each) for each in copies[turn % len(copies)]]
        return shape.query_length - torch.tensor([distances])

    return call


@cache
def colbert_ai_extension():
    """segmented_maxsim.cpp of the installed package, compiled as the package does."""
    from torch.utils.cpp_extension import load

    (folder,) = importlib.util.find_spec("colbert").submodule_search_locations
    source = Path(folder, "modeling", "segmented_maxsim.cpp")
    place = machine.ROOT / "build" / "segmented_maxsim"
    place.mkdir(parents=True, exist_ok=True)
    # A build that was killed leaves its lock, and the next would wait for it forever.
    (place / "lock").unlink(missing_ok=True)
    return load("segmented_maxsim_cpp", [str(source)], extra_cflags=["-O3"], build_directory=str(place))


def colbert_ai(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """`colbert_score_packed` on the CPU: all similarities, then the maxima in C++."""
    rows = documents.flatten(0, 1)
    counts = torch.full((len(documents),), documents.shape[1])
    return colbert_ai_extension().segmented_maxsim_cpp(rows @ queries[0].T, counts)[None]


def pylate(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    from pylate.scores import colbert_scores

    return colbert_scores(queries, documents)


def sentence_transformers(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    from sentence_transformers.util import maxsim

    return maxsim(queries, documents)


def no_sentence_transformers() -> str | None:
    reason = contenders.missing("sentence_transformers")
    if reason is None and not hasattr(importlib.import_module("sentence_transformers.util"), "maxsim"):
        return "sentence_transformers before version 6 has no maxsim"
    return reason


def no_compiler() -> str | None:
    from torch.utils.cpp_extension import get_cxx_compiler

    return None if shutil.which(get_cxx_compiler()) else "torch.compile needs a C++ compiler"


def no_colbert_ai() -> str | None:
    return contenders.missing("colbert") or contenders.missing("ninja") or no_compiler()


def case(shape: Shape, rounds: tuple[int, int]) -> suite.Case:
    ours = contenders.missing("edgecolbert_kernels")

    def eager(*arguments) -> torch.Tensor:
        return compiled()(*arguments)

    return suite.Case(
        name=f"d={shape.dim}",
        parameters=shape.parameters,
        references=("exact", "fast"),
        contenders=[
            contenders.peak("f32"),
            Contender("exact", shape.on_f16(contenders.fused), shape.operations, "peak f32", missing=ours),
            Contender("fast", shape.on_f16(contenders.fused, precision="fast"), missing=ours),
            Contender("torch eager fp32", shape.on_f32(contenders.eager)),
            Contender("torch.compile fp32", shape.on_f32(eager), missing=no_compiler()),
            Contender("torch blocked fp32", shape.on_f32(contenders.blocked)),
            Contender("maxsim-cpu", shape.on_f32(contenders.maxsim_cpu), missing=contenders.missing("maxsim_cpu")),
            # Its coarse argmax in int8 picks other tokens than the best.
            Contender("NumKong f16", numkong(shape), missing=contenders.missing("numkong"), tolerance=math.inf),
            Contender("colbert-ai segmented_maxsim", shape.on_f32(colbert_ai), missing=no_colbert_ai()),
            Contender("PyLate colbert_scores", shape.on_f32(pylate), missing=contenders.missing("pylate")),
            Contender(
                "sentence-transformers maxsim", shape.on_f32(sentence_transformers), missing=no_sentence_transformers()
            ),
        ],
        rounds=rounds,
        expected=shape.float64_scores,
    )


def cases() -> Iterator[suite.Case]:
    for dim in DIMS:
        yield case(Shape(1, 32, 1000, 300, dim), rounds=(11, 0))


if __name__ == "__main__":
    suite.main("peers", cases)
