"""The Markdown pages: their code blocks, and what a line for a shell must satisfy to be right without being run.

A comment before a block changes what becomes of it:

    <!-- not run: it trains for a day -->    the block is only compiled; the reason is for the reader of the page
    <!-- needs: pylate -->                   run where these modules are installed, else only compiled
    <!-- text -->                            no code
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKER = re.compile(r"<!-- (?:(text)|(not run|needs): (.+?)) -->")
ASSIGNMENT = re.compile(r"[A-Za-z_]+=\S*")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int  # of its first line of code, from 1
    language: str  # "python", "shell" or "text"
    code: str
    not_run: str = ""
    needs: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Fenced blocks, and indented ones, which are for a shell unless they are marked as text."""
    found, lines, marker = [], page.read_text(encoding="utf-8").splitlines(), None
    at, blank = 0, True
    while at < len(lines):
        line = lines[at]
        if MARKER.fullmatch(line.strip()):
            marker, at, blank = MARKER.fullmatch(line.strip()), at + 1, True
            continue
        start = at
        if line.startswith("```"):
            end = next(n for n in range(at + 1, len(lines)) if lines[n].startswith("```"))
            code, first, at = lines[at + 1 : end], at + 2, end + 1
            language = {"python": "python", "bash": "shell", "sh": "shell"}.get(line.strip("`").strip(), "text")
        elif blank and line.startswith("    "):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            code, first, language = [each[4:] for each in lines[start:at]], start + 1, "shell"
            if lines[max(0, start - 2)].startswith(":::"):
                language = "text"  # options of mkdocstrings
        else:
            blank, at = not line.strip() or line.startswith("<!--"), at + 1
            if line.startswith(":::"):
                blank = False
            if line.strip():
                marker = None
            continue
        kind = {} if marker is None else {marker[2]: marker[3]}
        text = marker is not None and marker[1]
        found.append(
            Block(
                page,
                first,
                "text" if text else language,
                "\n".join(code).rstrip() + "\n",
                kind.get("not run", ""),
                tuple(kind.get("needs", "").replace(",", " ").split()),
            )
        )
        marker, blank = None, True
    return found


def commands(block: Block) -> list[list[str]]:
    """The words of every command of a shell block, without comments, assignments before it, and `&&`."""
    found = []
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for part in [list(group) for is_and, group in itertools.groupby(words, "&&".__eq__) if not is_and]:
            while part and ASSIGNMENT.fullmatch(part[0]):
                part.pop(0)
            if part:
                found.append(part)
    return found


def problem(words: list[str]) -> str | None:
    """What is wrong with a command, as far as that shows without running it."""
    program, arguments = Path(words[0]).name, words[1:]
    if program == "pip" or words[1:3] == ["-m", "pip"]:
        return _pip(arguments)
    if program == "make":
        return _make(arguments)
    if program == "accelerate" and arguments[:2] == ["launch", "-m"]:
        return _module(arguments[2], arguments[3:])
    if re.fullmatch(r"python[\d.]*", program):
        if arguments[:1] == ["-m"]:
            return _module(arguments[1], arguments[2:])
        return _script(arguments[0], arguments[1:])
    if program == "pytest":
        return _script(arguments[0], [])
    if words[0].startswith(("tools/", ".ci/")):
        return _script(words[0], arguments)
    if program in ("cd", "git"):
        return None
    if program == "edgecolbert":
        return _edgecolbert(arguments)
    return f"{words[0]!r} is a command that tests/pages.py cannot check: mark the block"


def _pip(arguments: list[str]) -> str | None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in re.findall(r"\.\[([^\]]+)\]", " ".join(arguments)):
        for extra in name.split(","):
            if extra not in extras:
                return f"there is no extra [{extra}]"
    return None


def _make(arguments: list[str]) -> str | None:
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    wanted = [word for word in arguments if not ASSIGNMENT.match(word)]
    return next((f"there is no target {word}" for word in wanted if word not in targets), None)


def _script(path: str, arguments: list[str]) -> str | None:
    if not (ROOT / path).exists():
        return f"there is no {path}"
    return _options(arguments, [ROOT / path]) if (ROOT / path).is_file() else None


def _module(name: str, arguments: list[str]) -> str | None:
    if name in ("venv", "pip", "pytest"):
        missing = [word for word in arguments if word.startswith("tests/") and not (ROOT / word).exists()]
        return f"there is no {missing[0]}" if missing else None
    file = ROOT / Path(*name.split("."))
    files = [file.with_suffix(".py")] if file.with_suffix(".py").exists() else sorted(file.glob("*.py"))
    if not files:
        return f"there is no module {name}"
    if name == "training.train" and (ROOT / arguments[0]).exists():
        from training import config

        with mock.patch.dict(os.environ, EDGECOLBERT_DATA="data"):
            config.load(ROOT / arguments[0], [word for word in arguments[1:] if "=" in word])
    # What suites share, they read their command line with.
    return _options(arguments, [*files, file.parent / "suite.py"])


def _options(arguments: list[str], files: list[Path]) -> str | None:
    sources = "".join(file.read_text() for file in files if file.exists())
    wanted = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    return next((f"there is no option {word}" for word in wanted if f'"{word}"' not in sources), None)


def _edgecolbert(arguments: list[str]) -> str | None:
    from edgecolbert_kernels.cli import main

    try:
        main.parser().parse_args(arguments)
    except SystemExit:
        return "the command line is wrong"
    return None


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)
LINK = re.compile(r"(?<!`)\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts and mkdocs make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", title.lower()) for title in HEADING.findall(text)]
    return {re.sub(r"\s+", "-", title.strip()) for title in plain}


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    return broken
