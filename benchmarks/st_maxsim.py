"""sentence-transformers 6 as it is and patched: `maxsim` of one query with 1000 documents, and a contrastive step.

The query has 32 tokens, the documents 30 to 300, 48 dimensions, fp32; as a list of tensors, as `encode_document` returns
them, and padded. The step is the cross-entropy of 64 x 64 scores and its backward. One thread, CPU time.

Needs sentence-transformers 6, so not the environment of `benchmarks.pylate_step`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cache, partial

import torch

from benchmarks import contenders, machine, suite
from benchmarks.interleave import Contender
from benchmarks.pylate_rerank import relative

HOST = "sentence-transformers"


@cache
def texts() -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """64 queries, and documents as a list and padded."""
    generator = torch.Generator().manual_seed(0)

    def tokens(*shape: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, 48, generator=generator), dim=-1)

    lengths = torch.randint(30, 301, (1000,), generator=generator).tolist()
    documents = [tokens(length) for length in lengths]
    return tokens(64, 32), documents, torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)


def score(kind: str) -> torch.Tensor:
    from sentence_transformers.util import maxsim

    queries, documents, padded = texts()
    if kind == "step":
        Q, D = queries.clone().requires_grad_(), padded[:64].clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(maxsim(Q, D), torch.arange(64))
        loss.backward()
        return loss.detach()
    return maxsim(queries[:1], documents if kind == "list" else padded)


def patched() -> AbstractContextManager[object]:
    from edgecolbert_kernels.integrations.sentence_transformers import using_sentence_transformers

    return using_sentence_transformers()


def cases() -> Iterator[suite.Case]:
    for kind in ("list", "padded", "step"):
        call = lambda turn, kind=kind: score(kind)  # noqa: E731
        yield suite.Case(
            name=f"maxsim, {kind}",
            parameters={"host": machine.version(HOST)},
            contenders=[Contender("patched", call, around=patched), Contender(HOST, call)],
            references=("patched",),
            rounds=(21, 7),
            expected=partial(score, kind),
            error=relative,
            tolerance=1e-4,
        )


def main() -> None:
    reason = contenders.missing("sentence_transformers") or contenders.missing("edgecolbert_kernels")
    if reason:
        raise SystemExit(reason)
    suite.main("st_maxsim", cases)


if __name__ == "__main__":
    main()
