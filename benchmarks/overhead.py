"""What a call costs beside its kernel: one query (Lq = 32) against 10 documents of 300 tokens.

``raw`` is the compiled module's own function with arguments made beforehand; ``overhead`` rows are
what the public function takes beyond it, in microseconds. The inputs stay in cache, as those of a
call this small do. One thread, CPU time.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch

from benchmarks import contenders, machine, suite
from benchmarks.inputs import Shape
from benchmarks.interleave import Contender, Samples, quantiles
from edgecolbert_kernels import maxsim
from edgecolbert_kernels.backends import native
from tests.cases import embeddings

SHAPE = Shape(1, 32, 10, 300, 48)
FLOAT16 = 1  # the module's code


@lru_cache(maxsize=1)
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    queries = embeddings(SHAPE.num_queries, SHAPE.query_length, SHAPE.dim, seed=0, dtype=torch.float16)
    return queries, embeddings(SHAPE.num_documents, SHAPE.length, SHAPE.dim, seed=1, dtype=torch.float16)


def operand(tensor: torch.Tensor) -> native.Operand:
    return native.padded(tensor.data_ptr(), FLOAT16, tensor.shape, tensor.stride(), 0)


@lru_cache(maxsize=1)
def prepared() -> tuple[Callable[[], None], torch.Tensor]:
    """The kernel's call, and the scores that it writes."""
    queries, documents = inputs()
    scores = torch.empty(len(queries), len(documents))
    argmax, argmax_bytes, zero_mode, normalize, threads = 0, 2, False, False, 1
    call = partial(
        machine.compiled_module().forward,
        operand(queries),
        operand(documents),
        native.EVERY,
        native.NO_INDEX,
        scores.data_ptr(),
        argmax,
        argmax_bytes,
        native.PRECISIONS["exact"],
        zero_mode,
        normalize,
        threads,
    )
    return call, scores


@lru_cache(maxsize=1)
def leaves() -> tuple[torch.Tensor, torch.Tensor]:
    queries, documents = inputs()
    return queries.clone().requires_grad_(), documents.clone().requires_grad_()


@lru_cache(maxsize=1)
def arrays() -> tuple:
    queries, documents = inputs()
    return queries.numpy(), documents.numpy()


@lru_cache(maxsize=1)
def widened() -> tuple[torch.Tensor, torch.Tensor]:
    queries, documents = inputs()
    return queries.float(), documents.float()


def raw(_turn: int) -> torch.Tensor:
    call, scores = prepared()
    call()
    return scores


PUBLIC = {
    "tensors": lambda _turn: maxsim(*inputs()),
    "tensors that need gradients": lambda _turn: maxsim(*leaves()),
    "numpy arrays": lambda _turn: maxsim(*arrays()),
}


def overhead(samples: Samples) -> list[dict]:
    return [
        {
            "contender": f"overhead, {name}",
            "unit": "us",
            **quantiles(1e6 * (samples.values[name] - samples.values["raw"])),
        }
        for name in PUBLIC
        if name in samples.values
    ]


def cases() -> Iterator[suite.Case]:
    ours = contenders.missing("edgecolbert_kernels")
    yield suite.Case(
        name="1 query, 10 documents",
        parameters=SHAPE.parameters,
        references=("tensors",),
        contenders=[
            Contender("raw", raw, missing=ours),
            *(Contender(name, call, missing=ours) for name, call in PUBLIC.items()),
            Contender("torch eager fp32", lambda _turn: contenders.eager(*widened())),
            Contender(
                "maxsim-cpu",
                lambda _turn: contenders.maxsim_cpu(*widened()),
                missing=contenders.missing("maxsim_cpu"),
            ),
        ],
        rounds=(101, 31),
        calls=50,
        expected=lambda: contenders.eager(*(tensor.double() for tensor in inputs())),
        derive=overhead,
    )


if __name__ == "__main__":
    suite.main("overhead", cases)
