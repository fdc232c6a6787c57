"""Retrieval tasks: the docstrings of the installed Python standard library, or a folder in the BEIR layout."""

import ast
import csv
import gzip
import json
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

# Not written for a reader of the library, or not part of it.
SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests"}

# A docstring's first sentence ends at an empty line, or at a full stop before what can begin a sentence.
SENTENCE_END = re.compile(r"\n\s*\n|(?<=[.!?])\s+(?=[A-Z0-9\"'`*<\[(])")

MIN_QUERY_WORDS = 4
MIN_DOCUMENT_WORDS = 5


@dataclass(frozen=True)
class Document:
    """`text` is what is encoded and searched; `name` and `heading` are only shown."""

    name: str
    heading: str
    text: str


@dataclass(frozen=True)
class Task:
    """Documents, and queries whose relevant documents are known."""

    name: str
    documents: list[Document]
    queries: list[str]
    relevant: list[dict[int, int]]  # for each query: document number -> grade > 0
    max_tokens: int  # documents are cut here, special tokens included
    samples: list[str]  # typed queries for when nobody is there to type
    notes: list[str]  # what was left out
    others: list[Document] = field(default_factory=list)  # texts with a name that are no documents of the task


def standard_library() -> Task:
    """Each docstring is cut in two: its first sentence asks, the rest must be found.

    The sources are parsed, never imported: importing some modules opens windows or browsers.
    """
    relevant: dict[str, dict[int, int]] = {}
    documents: dict[tuple[str, str], Document] = {}
    others: list[Document] = []
    for name, docstring in _library_docstrings(Path(sysconfig.get_path("stdlib"))):
        query, rest = split_first_sentence(docstring)
        if _num_words(query) < MIN_QUERY_WORDS or _num_words(rest) < MIN_DOCUMENT_WORDS or (query, rest) in documents:
            others.append(Document(name, query, rest))
            continue
        relevant.setdefault(query, {})[len(documents)] = 1
        documents[query, rest] = Document(name, query, rest)
    if not documents:
        raise FileNotFoundError("This Python has no sources of its standard library; use --data with a BEIR folder.")
    return Task(
        name="Python standard library",
        documents=list(documents.values()),
        queries=list(relevant),
        relevant=list(relevant.values()),
        max_tokens=128,
        samples=[
            "run a command and capture what it prints",
            "how long until the lock is released",
            "which address belongs to a private network",
            "find the longest matching block of two sequences",
        ],
        notes=[
            f"{len(others)} of {len(others) + len(documents)} docstrings left out: repeated, a first sentence under "
            f"{MIN_QUERY_WORDS} words, or under {MIN_DOCUMENT_WORDS} words after it. Modules written in C have no sources "
            "to read."
        ],
        others=others,
    )


def beir(folder: Path) -> Task:
    """Reads corpus.jsonl, queries.jsonl and qrels/test.tsv, each plain or with .gz.

    A document's text is its title and its text, as BEIR scores them. Queries without a relevant document are dropped.
    """
    numbers: dict[str, int] = {}
    documents = []
    for record in _json_lines(folder / "corpus.jsonl"):
        numbers[record["_id"]] = len(documents)
        text = f"{record.get('title') or ''} {record['text']}".strip()
        documents.append(Document(record["_id"], "", text))
    texts = {record["_id"]: record["text"] for record in _json_lines(folder / "queries.jsonl")}

    relevant: dict[str, dict[int, int]] = {}
    num_unknown = 0
    with _open(folder / "qrels" / "test.tsv") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            query, document, grade = row["query-id"], row["corpus-id"], int(row["score"])
            if grade > 0 and query in texts and document in numbers:
                relevant.setdefault(query, {})[numbers[document]] = grade
            elif grade > 0:
                num_unknown += 1
    queries = [texts[query] for query in relevant]
    return Task(
        name=folder.resolve().name,
        documents=documents,
        queries=queries,
        relevant=list(relevant.values()),
        max_tokens=256,
        samples=queries[:3],
        notes=[f"{num_unknown} judgements of unknown queries or documents left out."] if num_unknown else [],
    )


def subsample(task: Task, limit: int) -> Task:
    """`limit` documents drawn at random, always the same ones, and the queries that still have a relevant one."""
    total = len(task.documents)
    if limit >= total:
        return task
    kept = sorted(random.Random(0).sample(range(total), limit))
    renumbered = {old: new for new, old in enumerate(kept)}
    relevant = [
        {renumbered[document]: grade for document, grade in grades.items() if document in renumbered}
        for grades in task.relevant
    ]
    note = f"{total - limit} of {total} documents left out by --limit: an easier task, not comparable with the whole."
    return replace(
        task,
        documents=[task.documents[i] for i in kept],
        queries=[query for query, grades in zip(task.queries, relevant, strict=True) if grades],
        relevant=[grades for grades in relevant if grades],
        notes=[*task.notes, note],
    )


def split_first_sentence(docstring: str) -> tuple[str, str]:
    """The first sentence and the rest, white space collapsed; the rest is "" when there is none."""
    first, *rest = SENTENCE_END.split(docstring.strip(), maxsplit=1)
    return " ".join(first.split()), " ".join(" ".join(rest).split())


def _library_docstrings(root: Path) -> Iterator[tuple[str, str]]:
    for path in tqdm(sorted(_sources(root)), desc="Reading the library", unit=" files"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # templates and deliberate mistakes
        module = path.relative_to(root).with_suffix("")
        yield from docstrings(tree, ".".join(part for part in module.parts if part != "__init__"))


def _sources(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - SKIPPED_FOLDERS
        yield from (Path(folder, file) for file in files if file.endswith(".py"))


def docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of a module and of every class and function in it, however deep."""
    definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, (ast.Module, *definitions)) and (docstring := ast.get_docstring(node)):
        yield name, docstring
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):  # expressions define nothing, and are most of the tree
            yield from docstrings(child, f"{name}.{child.name}" if isinstance(child, definitions) else name)


def _num_words(text: str) -> int:
    return len(re.findall(r"[A-Za-z]{2,}", text))


def _open(path: Path) -> TextIO:
    if path.exists():
        return path.open(encoding="utf-8", newline="")
    compressed = path.with_name(path.name + ".gz")
    if compressed.exists():
        return gzip.open(compressed, "rt", encoding="utf-8", newline="")
    raise FileNotFoundError(f"{path} is missing, with and without .gz")


def _json_lines(path: Path) -> Iterator[dict]:
    with _open(path) as file:
        for line in file:
            if line.strip():
                yield json.loads(line)
