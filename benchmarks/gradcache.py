"""One GradCache step beside the same step in one piece: 64 queries (32 tokens) and documents (180), fp32, one thread, CPU time.

The encoder is a BERT of 2 layers and 128 dimensions with random weights and 48 dimensions a token; chunks of 8. The cached
step encodes everything twice, which is its price; ``memory`` rows are what it buys: how far the resident set of a process
of its own grows. ``error`` is the distance of the gradients to those of the whole batch in one piece.
"""

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch

from benchmarks import contenders, machine, suite
from benchmarks.interleave import Contender, Samples
from benchmarks.losses import growth
from edgecolbert_kernels import GradCache, contrastive_loss

BATCH, CHUNK, HIDDEN, LAYERS, DIM = 64, 8, 128, 2, 48
LENGTHS = {"queries": 32, "documents": 180}
VOCABULARY = 1000

Representation = tuple[torch.Tensor, torch.Tensor]


@lru_cache(maxsize=1)
def encoder() -> torch.nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=4 * HIDDEN,
        hidden_dropout_prob=0.0,  # two forward passes of one batch must agree
        attention_probs_dropout_prob=0.0,
    )
    return torch.nn.ModuleDict({"bert": BertModel(config), "head": torch.nn.Linear(HIDDEN, DIM, bias=False)})


@lru_cache(maxsize=1)
def batch() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for longest in LENGTHS.values():
        counts = torch.randint(longest // 2, longest + 1, (BATCH, 1), generator=generator)
        ids = torch.randint(VOCABULARY, (BATCH, longest), generator=generator)
        made.append({"input_ids": ids, "attention_mask": (torch.arange(longest) < counts).long()})
    return made


def encode(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Representation:
    model = encoder()
    hidden = model["bert"](input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    return torch.nn.functional.normalize(model["head"](hidden), dim=-1), attention_mask.bool()


def fused(queries: Representation, documents: Representation) -> torch.Tensor:
    (Q, q_mask), (D, d_mask) = queries, documents
    return contrastive_loss(Q, D, q_mask, d_mask, temperature=0.02)


def eager(queries: Representation, documents: Representation) -> torch.Tensor:
    (Q, q_mask), (D, d_mask) = queries, documents
    similarities = torch.einsum("qid,njd->qnij", Q, D).masked_fill(~d_mask[None, :, None], -torch.inf)
    scores = (similarities.max(-1).values * q_mask[:, None]).sum(-1)
    return torch.nn.functional.cross_entropy(scores / 0.02, torch.arange(len(Q)))


def in_one_piece(loss: Callable[..., torch.Tensor]) -> None:
    loss(*(encode(**each) for each in batch())).backward()


def in_chunks(loss: Callable[..., torch.Tensor]) -> None:
    GradCache(encode, loss, CHUNK, models=[]).step(*batch())


STEPS: dict[str, Callable[[], None]] = {
    "GradCache, fused loss": lambda: in_chunks(fused),
    "GradCache, eager loss": lambda: in_chunks(eager),
    "one piece, fused loss": lambda: in_one_piece(fused),
    "one piece, eager loss": lambda: in_one_piece(eager),
}


def gradients(name: str) -> tuple[torch.Tensor, ...]:
    encoder().zero_grad()
    STEPS[name]()
    return tuple(each.grad.clone() for each in encoder().parameters() if each.grad is not None)


def relative_error(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """Distance of all gradients together: single ones may be zero but for rounding."""
    total = sum(each.square().sum().item() for each in expected)
    off = sum((f - e).square().sum().item() for f, e in zip(found, expected, strict=True))
    return (off / total) ** 0.5


def memory(_samples: Samples) -> list[dict]:
    if not Path("/proc/self/statm").exists():
        return []
    rows = []
    for name in STEPS:
        command = [sys.executable, "-m", "benchmarks.gradcache", "--memory", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        grown = json.loads(done.stdout.splitlines()[-1]) / 2**20
        rows.append({"contender": f"{name}, memory", "unit": "MiB", "p50": round(grown, 1)})
    return rows


def measure_memory(name: str) -> None:
    """For a process of its own: how far the resident set grows in a step, the gradients not counted."""
    machine.set_threads(1)
    # Blocks go back to the system when they are freed (M_MMAP_THRESHOLD), so that the resident set is what is in use.
    ctypes.CDLL(None).mallopt(-3, 65536)
    gradients(name)  # libraries load, and gradients come into being
    print(json.dumps(growth(lambda: (STEPS[name](), ())[1])[0]))


def cases() -> Iterator[suite.Case]:
    missing = contenders.missing("edgecolbert_kernels") or contenders.missing("transformers")
    yield suite.Case(
        name=f"batch {BATCH}, chunks of {CHUNK}",
        parameters={"batch": BATCH, "chunk": CHUNK, "dim": DIM, "hidden": HIDDEN, "layers": LAYERS, **LENGTHS},
        contenders=[Contender(name, lambda _turn, name=name: gradients(name), missing=missing) for name in STEPS],
        references=("GradCache, fused loss", "one piece, fused loss"),
        rounds=(9, 3),
        warm=False,
        expected=lambda: gradients("one piece, eager loss"),
        error=relative_error,
        tolerance=1e-2,
        derive=memory,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        measure_memory(sys.argv[2])
    else:
        suite.main("gradcache", cases)
