"""A training step of PyLate, with its own losses and with those of `edgecolbert_kernels.modules`: time and memory.

The model is a BERT with random weights, 2 layers of 128 dimensions, 48 a token: small, so that the loss is a large part of
the step. Queries of 32 tokens, documents of 180; one positive a query, for `Distillation` 4 candidates; dropout on; fp32,
two threads, wall time. The two losses do the same work from the same random state. In cases called "alone" fixed embeddings
stand for the model's, so that what is left is the loss and its backward.

``gradient`` rows: the norm of the gradients over that of these losses; 1 where a loss is right. ``memory`` rows: how far
the resident set of a process of its own grows during one step.

PyLate pins older versions of its dependencies, so this suite needs an environment of its own, with `pip install
pylate==1.6.0 matplotlib` and this package.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path

import torch

from benchmarks import contenders, machine, suite
from benchmarks.interleave import Contender, Samples
from benchmarks.memory import growth, own_process
from tests import tiny_colbert

BATCHES = (8, 16, 32, 64)
THREADS = 2
LOSSES = ("Contrastive", "CachedContrastive", "Distillation")
ALONE = ("Contrastive", "Distillation")
LIBRARIES = ("fused", "PyLate")
QUERY_LENGTH, DOCUMENT_LENGTH, DIM, CANDIDATES, CHUNK = 32, 180, 48, 4, 8


@lru_cache(maxsize=1)
def model() -> torch.nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        options = {"query_length": QUERY_LENGTH, "document_length": DOCUMENT_LENGTH}
        return tiny_colbert.make(Path(folder), hidden=128, layers=2, dim=DIM, **options).train()


@lru_cache(maxsize=1)
def batch(loss: str, size: int) -> tuple[list[dict], torch.Tensor | None]:
    """Tokenized queries and documents, and the teacher's scores where the loss has a teacher."""
    candidates = CANDIDATES if loss == "Distillation" else 1
    queries = model().tokenize(tiny_colbert.texts(size, 24, seed=0), is_query=True)
    texts = tiny_colbert.texts(size * candidates, DOCUMENT_LENGTH, seed=1)
    documents = model().tokenize(texts, is_query=False, pad=True)
    teacher = torch.randn(size, candidates, generator=torch.Generator().manual_seed(2))
    return [queries, documents], teacher if loss == "Distillation" else None


class Fixed(torch.nn.Module):
    """Embeddings of a batch where a model would be."""

    skiplist, do_query_expansion = property(lambda _: model().skiplist), True

    def __init__(self, features: list[dict]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shapes = [(*each["input_ids"].shape, DIM) for each in features]
        self.tokens = torch.nn.ParameterList([torch.randn(shape, generator=generator) for shape in shapes])

    def forward(self, features: dict) -> dict:
        is_query = features["input_ids"].shape[1] == QUERY_LENGTH
        return {"token_embeddings": self.tokens[0 if is_query else 1]}


def step(loss: str, library: str, size: int, alone: bool) -> Callable[[int], tuple[float, torch.Tensor]]:
    """One forward and backward; returns the loss and the norm of the gradients."""
    if library == "PyLate":
        from pylate import losses
    else:
        from edgecolbert_kernels import modules as losses
    options = {"mini_batch_size": CHUNK} if loss == "CachedContrastive" else {}
    module = getattr(losses, loss)(Fixed(batch(loss, size)[0]) if alone else model(), **options)

    def call(turn: int) -> tuple[float, torch.Tensor]:
        features, teacher = batch(loss, size)
        torch.manual_seed(turn)
        module.zero_grad()
        value = module([dict(each) for each in features], teacher)
        value.backward()
        gradients = [p.grad.norm() for p in module.parameters() if p.grad is not None]
        return value.item(), torch.stack(gradients).norm()

    return call


def measure_memory(loss: str, library: str, alone: bool) -> None:
    """Print the growth of the resident set at each batch size, as JSON; for a process of its own."""
    machine.set_threads(THREADS)
    step(loss, library, 2, alone)(0)
    grown = {}
    for size in BATCHES:
        batch(loss, size)
        call = step(loss, library, size, alone)
        grown[size] = growth(lambda call=call: call(0))
    print(json.dumps(grown))


@cache
def memory(loss: str, library: str, alone: bool) -> dict[str, int]:
    return own_process("benchmarks.pylate_step", loss, library, *["alone"] * alone)


def difference(found: tuple[float, torch.Tensor], expected: tuple[float, torch.Tensor]) -> float:
    """Of the losses, relative; their gradients have rows of their own."""
    return abs(found[0] - expected[0]) / abs(expected[0])


def case(loss: str, size: int, alone: bool) -> suite.Case:
    calls = {library: step(loss, library, size, alone) for library in LIBRARIES}

    def derived(_samples: Samples) -> list[dict]:
        norms = {library: calls[library](0)[1].item() for library in LIBRARIES}
        rows = [
            {"contender": f"{library}, gradient", "unit": "x", "p50": round(norms[library] / norms["fused"], 5)}
            for library in LIBRARIES
        ]
        for library in LIBRARIES if sys.platform == "linux" else ():
            grown = memory(loss, library, alone)[str(size)] / 2**20
            rows.append({"contender": f"{library}, memory", "unit": "MiB", "p50": round(grown, 1)})
        return rows

    return suite.Case(
        name=f"{loss}{' alone' * alone}, batch {size}",
        parameters={"loss": loss, "batch": size, "alone": alone, "pylate": machine.version("pylate")},
        contenders=[Contender(library, calls[library]) for library in LIBRARIES],
        references=("fused",),
        rounds=(5, 5),
        warm=False,
        clock=time.perf_counter,
        threads=THREADS,
        expected=lambda: calls["PyLate"](0),
        error=difference,
        tolerance=1e-4,
        derive=derived,
    )


def cases() -> Iterator[suite.Case]:
    for alone, losses in ((True, ALONE), (False, LOSSES)):
        for loss in losses:
            for size in BATCHES:
                yield case(loss, size, alone)


def plot(rows: Sequence[dict], path: Path) -> None:
    """Time and memory of a step over the batch size, a column for each loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(LOSSES), figsize=(10, 5.5), sharex=True, sharey="row")
    for column, loss in enumerate(LOSSES):
        for line, (suffix, unit) in enumerate((("", "ms"), (", memory", "MiB"))):
            axis = axes[line][column]
            for color, library in zip(("C0", "C1"), LIBRARIES, strict=True):
                for alone, style in ((False, "o-"), (True, "o:")):
                    wanted = loss, alone, library + suffix
                    found = [row for row in rows if (row["loss"], row["alone"], row["contender"]) == wanted]
                    label = library + ", loss alone" * alone
                    x, y = [row["batch"] for row in found], [row["p50"] for row in found]
                    axis.plot(x, y, style, color=color, markersize=4, label=label)
            axis.set(xscale="log", yscale="log")
            axis.set_xticks(BATCHES, [str(size) for size in BATCHES], minor=False)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            if not column:
                axis.set_ylabel(f"{'memory' if line else 'time'} of a step, {unit}")
        axes[0][column].set_title(loss)
        axes[1][column].set_xlabel("batch size")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=9)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main() -> None:
    if sys.argv[1:2] == ["--memory"]:
        measure_memory(*sys.argv[2:4], alone="alone" in sys.argv[4:])
        return
    reason = contenders.missing("pylate") or contenders.missing("edgecolbert_kernels")
    if reason:
        raise SystemExit(reason)
    suite.main("pylate_step", cases, pin=False)
    if reason := contenders.missing("matplotlib"):
        print(f"no picture: {reason}")
        return
    rows = [json.loads(line) for line in (suite.RESULTS / "pylate_step.jsonl").read_text().splitlines()]
    plot([row for row in rows if row["cpu"] == machine.cpu_model()], suite.RESULTS / "pylate_step.png")


if __name__ == "__main__":
    main()
