"""What the pages' code blocks take as given: tiny data under the names that the text around them speaks of.

By page and by a piece of the block that needs them; a later block of the page sees what the earlier ones made.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import normalize


def tokens(*shape: int) -> torch.Tensor:
    return normalize(torch.randn(*shape), dim=-1)


def a_training_batch() -> dict:
    return {
        "torch": torch,
        "Q": tokens(4, 5, 8).requires_grad_(),
        "D": tokens(4, 7, 8).requires_grad_(),
        "q_mask": torch.ones(4, 5),
        "d_mask": torch.rand(4, 7) < 0.8,
        "target": torch.tensor([1, 0, 3, 2]),
    }


def candidates() -> dict:
    return {
        "D": tokens(4, 3, 7, 8).requires_grad_(),
        "d_mask": torch.rand(4, 3, 7) < 0.8,
        "teacher_scores": torch.randn(4, 3),
    }


def an_encoder() -> dict:
    from encoders import Encoder, texts

    encoder = Encoder()
    batch = texts(6, 5, seed=0), texts(6, 9, seed=1)
    optimizer = torch.optim.AdamW(encoder.parameters())
    return {"model": lambda *arguments: encoder(*arguments)[0], "batches": [batch, batch], "optimizer": optimizer}


def after_the_gather() -> dict:
    return {"a_batch_of_this_rank": ((tokens(4, 5, 8), torch.ones(4, 5)), (tokens(4, 7, 8), torch.ones(4, 7)))}


def a_collection() -> dict:
    return {
        "hidden": torch.randn(20, 9, 16),
        "mask": torch.rand(20, 9) < 0.8,
        "weight": torch.randn(8, 16),
        "queries": tokens(3, 5, 8),
        "query_vectors": tokens(5, 8),
    }


def a_folder(dtype: str = "int8") -> dict:
    from edgecolbert_kernels import PackedEmbeddings

    documents = [tokens(n, 8) for n in (3, 0, 5)]
    PackedEmbeddings.from_list(documents, ids=["a", "b", "c"], dtype=dtype).save("index", overwrite=True)
    return {"documents_before": documents}


# (page, piece of the block) -> the names that it takes as given
GIVEN: dict[tuple[str, str], Callable[[], dict]] = {
    ("training-losses.md", "loss = contrastive_loss(Q, D, target=target)"): a_training_batch,
    ("training-losses.md", "distillation_loss(Q, D, teacher_scores"): candidates,
    ("training-losses.md", "GradCache(encode, loss_fn"): an_encoder,
    ("training-losses.md", "gather_with_gradient(D, d_mask)"): after_the_gather,
    ("training-losses.md", "modules as losses"): lambda: {"model": torch.nn.Linear(4, 4)},
    ("search.md", "documents = pack(hidden, mask, weight)"): a_collection,
    ("packed-format.md", "def read(folder)"): a_folder,
}


def check_reader(names: dict) -> None:
    """The reader of the page on the format reads what this package wrote."""
    for dtype in ("int8", "float16", "bfloat16", "float32"):
        written = a_folder(dtype)["documents_before"]
        documents, ids = names["read"]("index")
        assert ids == ["a", "b", "c"]
        for found, before in zip(documents, written, strict=True):
            torch.testing.assert_close(torch.from_numpy(found), before, atol=1e-2, rtol=0)


def check_gather(names: dict) -> None:
    """The loss of several processes, in a world of one."""
    loss = names["loss_fn"](*names["a_batch_of_this_rank"])
    assert loss.isfinite()


# What a block defines and the page does not call, called.
AFTERWARDS: dict[tuple[str, str], Callable[[dict], None]] = {
    ("packed-format.md", "def read(folder)"): check_reader,
    ("training-losses.md", "gather_with_gradient(D, d_mask)"): check_gather,
}


def beir(folder: Path) -> None:
    """A corpus, queries and judgements for the commands of docs/search.md."""
    texts = {
        "bread": "Knead the dough for ten minutes and let it rise for an hour.",
        "rails": "The night train to Lisbon takes twelve hours.",
        "moss": "Moss grows where it is wet and dark.",
    }
    rows = {
        "corpus": [{"_id": key, "title": "", "text": text} for key, text in texts.items()],
        "queries": [{"_id": "q", "text": "how long does it take to get to Lisbon"}],
    }
    for name, records in rows.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\trails\t1\n")
