#!/usr/bin/env python
"""Runs the test suites of other MaxSim kernels against the CPU kernels here.

    python tools/peer_suites.py late-interaction-kernels
    python tools/peer_suites.py maxsim [--source DIR-OR-GIT-REPOSITORY]

A thin alias package (tools/aliases) has the peer's names and calls our functions; what the tests compare with, the peer's
reference in plain PyTorch, is its own. Where its tests ask for a GPU, the copy of them in build/peers asks for the CPU.

The tests come from the peer's source distribution on PyPI, from the archive of a commit on GitHub, or from --source. Where
they cannot be had, the suite is "not run", which is a failure, never a pass. It passes when every test does, but for those
below, which fail for the reason that stands there, and when the kernels ran in each group of tests that scores.

This file is also the pytest plugin that counts the calls of the kernels.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

try:
    from host_suites import copy, download
except ModuleNotFoundError:  # python -m tools.peer_suites: only a script's own folder is on the path
    from tools.host_suites import copy, download

ROOT = Path(__file__).resolve().parents[1]
ALIASES = ROOT / "tools" / "aliases"
VARIABLE = "EDGECOLBERT_PEER_SUITE"
WORDS = "the error says the same in other words"
INTERNAL = "calls a function inside the peer's Triton code"
CUDA = "asks CUDA's allocator or graphs"
NORMS = "tokens of any length are taken, without a look at their norms and without a warning"


@dataclass(frozen=True)
class Peer:
    """A peer and its tests.

    Args:
        version: of the source distribution, or the commit.
        archive: where that is to be had, if not from PyPI.
        groups: test files, by what they test.
        files: what makes the alias package, by its path: ours from tools/aliases, the peer's by its path in its source.
        explained: test -> why it fails here; patterns as in fnmatch, the part after "::" alone.
        select: options for pytest.
        rewrite: regular expressions and what stands for them in the peer's tests.
    """

    version: str
    groups: dict[str, list[str]]
    files: dict[str, Path | str]
    archive: str | None = None
    explained: dict[str, str] = field(default_factory=dict)
    select: tuple[str, ...] = ()
    rewrite: tuple[tuple[str, str], ...] = ()


PEERS = {
    "late-interaction-kernels": Peer(
        version="0.4.5",
        groups={
            "forward": ["forward", "normalize"],
            "backward": ["backward"],
            "varlen": ["varlen"],
            "pairs and candidates": ["kd_pairs_fast", "maxsim_kd_dispatch", "scatter", "padded"],
            "top-k": ["topk", "retrieve", "retrieve_cpu"],
            "edge cases": ["edge_cases", "robustness"],
        },
        files={
            "late_interaction_kernels/__init__.py": ALIASES / "late_interaction_kernels.py",
            "late_interaction_kernels/reference.py": "late_interaction_kernels/reference.py",
        },
        explained={
            "test_chunked_backward_matches_unchunked*": INTERNAL,
            "test_kd_over_ceil_still_warns": INTERNAL,
            "test_grad_parity_fp16?4-8-32-128-128?": "rounding these inputs to float16 moves a maximum: the peer's "
            "reference on rounded inputs has our gradients, and is as far from itself on float32",
            "test_varlen_too_small_max_seqlen_asserts": "no longest length is asked for, so none can be too small",
            "test_maxsim_pairs_rejects_*": WORDS,
            "test_kd_rejects_wrong_nq": WORDS,
            "test_kd_dispatch_rejects_*": WORDS,
            "test_retrieve_chunked_reduces_peak_memory": CUDA,
            "test_no_grad_does_not_save_argmax_buffer": CUDA,
            "test_cuda_graph_capture_and_replay": CUDA,
            "test_wrong_device_raises": "both tensors are on the CPU, the one device here",
            "test_unnormalized_input_warns_once": NORMS,
            "test_suppress_norm_warn_env_var_silences_warning": NORMS,
            "test_unnormalized_warn_fires_once_direct": NORMS,
            "test_norm_check_runs_once_even_when_normalized": NORMS,
            "test_scorer_gradcheck_fp64": "scores of float64 are float32 unless out_dtype says otherwise",
        },
        # Tests of a change of layout, without a kernel.
        select=("-k", "not pack_padded"),
        rewrite=(
            (r'"cuda"', '"cpu"'),
            (r"\.cuda\(\)", ""),
            (r"torch\.cuda\.is_available\(\)", "True"),
            (r"torch\.cuda\.(synchronize|empty_cache)\(\)", "None"),
            (r"pytest\.mark\.cuda", "pytest.mark.slow"),
            (r'pytest\.importorskip\("triton"\)', "None"),
        ),
    ),
    "maxsim": Peer(
        version="6bcaa61919d6db4e43588b857702efac01505f9c",
        archive="https://github.com/ErikKaum/maxsim/archive/{version}.tar.gz",
        groups={
            "forward": ["maxsim", "correctness", "padded", "dtypes", "ragged", "argmax"],
            "backward": ["backward", "train_convergence", "stability"],
            "varlen and pairs": ["packed_train"],
            "contrastive": ["contrastive"],
            "edge cases": ["edge_shapes", "fuzz", "invalid_inputs", "nan_inf", "compat"],
        },
        files={
            "maxsim/__init__.py": "torch-ext/maxsim/__init__.py",
            "maxsim/reference.py": "torch-ext/maxsim/reference.py",
            "maxsim/_ops.py": ALIASES / "maxsim_ops.py",
        },
        explained={
            "test_nan_in_input_produces_neg_inf_scores*": "a NaN gives a NaN here, as in PyTorch; there -inf",
        },
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--python", default=sys.executable, help="of an environment with torch and pytest")
    parser.add_argument("--source", type=Path, help="a folder or a git repository with the peer's source")
    parser.add_argument("--revision", default="HEAD", help="of that repository")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds for all of its tests")
    parser.add_argument("-k", dest="choose", help="only these tests, as pytest -k has it")
    options = parser.parse_args()
    peer, at = PEERS[options.peer], ROOT / "build" / "peers" / options.peer
    shutil.rmtree(at, ignore_errors=True)
    try:
        prepare(options, peer, at)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{options.peer} {peer.version}: NOT RUN: {getattr(error, 'stderr', None) or error}")
        return 1
    print(f"{options.peer} {peer.version}, tests in {at}")
    seen = tests(options, peer, at)
    if seen is None:
        print(f"NOT RUN: no result in {options.timeout} s")
        return 1
    return 0 if report(peer, seen, whole=options.choose is None) else 1


def prepare(options: argparse.Namespace, peer: Peer, at: Path) -> None:
    """The peer's tests, rewritten for the CPU, and the alias package, in one folder."""
    with tempfile.TemporaryDirectory() as folder:
        if options.source:
            source = Path(folder) / "source"
            paths = ["tests", *(path for path in peer.files.values() if isinstance(path, str))]
            copy(options.source, options.revision, paths, source)
        else:
            what = peer.archive.format(version=peer.version) if peer.archive else f"{options.peer}=={peer.version}"
            # Its build backend, which tells pip the name and version of the archive, is not in every environment.
            source = download(what, options.python, Path(folder), "--prefer-binary")
        shutil.copytree(source / "tests", at / "tests")
        for to, path in peer.files.items():
            (at / to).parent.mkdir(exist_ok=True)
            shutil.copy(source / path if isinstance(path, str) else path, at / to)
    for file in (at / "tests").glob("test_*.py"):
        text = file.read_text()
        for pattern, replacement in peer.rewrite:
            text = re.sub(pattern, replacement, text)
        file.write_text(text)


def tests(options: argparse.Namespace, peer: Peer, at: Path) -> dict | None:
    result = at / "result.json"
    paths = [str(ROOT), str(ROOT / "tools"), str(at)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        VARIABLE: str(result),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [options.python, "-m", "pytest", "-q", "-p", "peer_suites", "-p", "no:cacheprovider", "-o", "addopts="]
    command += [
        "-c",
        os.devnull,
        "--rootdir",
        str(at),
        *peer.select,
        *(["-k", options.choose] if options.choose else []),
    ]
    command += [f"tests/test_{file}.py" for files in peer.groups.values() for file in files]
    try:
        done = subprocess.run(command, cwd=at, env=environment, capture_output=True, text=True, timeout=options.timeout)
    except subprocess.TimeoutExpired:
        return None
    (at / "log.txt").write_text(done.stdout + done.stderr)
    if not result.exists():
        raise SystemExit(f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return json.loads(result.read_text())


def report(peer: Peer, seen: dict, whole: bool) -> bool:
    """Print every group; False where a test fails without a reason, or with one and passes."""
    good, used = True, set()
    for group, files in peer.groups.items():
        mine = {t: seen[t] for t in seen if Path(t.split("::")[0]).stem.removeprefix("test_") in files}
        reasons = {t: reason(peer, t) for t, (outcome, _) in mine.items() if outcome == "failed"}
        used |= {pattern for pattern, _ in reasons.values()}
        count = Counter(outcome for outcome, _ in mine.values())
        unexplained = [t for t, (pattern, _) in reasons.items() if pattern is None]
        hits = sum(calls for _, calls in mine.values())
        ok = not unexplained and (hits > 0 or not mine)
        good = good and ok
        skipped = f", {count['skipped']} skipped" if count["skipped"] else ""
        print(
            f"  {group}: {'ok' if ok else 'FAILED'}: {count['passed']} passed, {len(reasons)} failed, "
            f"{len(reasons) - len(unexplained)} of them explained{skipped}; {hits} calls of the kernels"
        )
        for test, (_, why) in reasons.items():
            print(f"      {test.removeprefix('tests/')}: {why or 'NOT EXPLAINED'}")
    stale = set(peer.explained) - used if whole else set()
    for pattern in sorted(stale):
        print(f"  FAILED: {pattern} is explained and does not fail")
    return good and not stale


def reason(peer: Peer, test: str) -> tuple[str | None, str | None]:
    name = test.split("::")[-1]
    found = ((pattern, why) for pattern, why in peer.explained.items() if fnmatch.fnmatchcase(name, pattern))
    return next(found, (None, None))


# The plugin.

_calls = Counter()
_outcomes: dict[str, tuple[str, int]] = {}


def pytest_configure(config: object) -> None:
    if VARIABLE not in os.environ:
        return
    from edgecolbert_kernels.backends import cpu

    for name in ("forward", "backward", "forward_lists"):
        setattr(cpu, name, _counted(getattr(cpu, name)))
    from edgecolbert_kernels import arrays

    arrays.forward_stored = _counted(arrays.forward_stored)


def _counted(function: object) -> object:
    def call(*arguments: object, **options: object) -> object:
        _calls["kernels"] += 1
        return function(*arguments, **options)

    return call


def pytest_runtest_logreport(report: object) -> None:
    if report.when == "call" or report.outcome != "passed":
        _outcomes[report.nodeid] = report.outcome, _calls.pop("kernels", 0)


def pytest_sessionfinish(session: object) -> None:
    Path(os.environ[VARIABLE]).write_text(json.dumps(_outcomes))


if __name__ == "__main__":
    sys.exit(main())
