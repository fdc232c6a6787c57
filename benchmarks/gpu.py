"""Everything about a GPU in one command: the tests on it, then all its benchmarks.

    python -m benchmarks.gpu              # within 9 minutes: build, tests on CUDA, benchmarks, plots
    python -m benchmarks.gpu --quick      # within 2: no tests, fewer rounds, without the largest batch
    python -m benchmarks.gpu --only loss  # the cases of that name, whose rows take the places of those before
    python -m benchmarks.gpu --dry-run    # on the CPU, tiny shapes, plain PyTorch: that the program runs, no numbers

Contenders take turns (`gpu_clock.py`); what is measured is in `gpu_cases.py`. Rows go into results/gpu-<device>.jsonl, bars
beside them as a PNG. Peers that are not installed are named and left out: `pip install late-interaction-kernels flash-maxsim`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from benchmarks.gpu_cases import Case, cases
from benchmarks.gpu_clock import Clock, Contender, Times, quantiles
from edgecolbert_kernels.backends import repeated

RESULTS = Path(__file__).parent / "results"
ROOT = RESULTS.parent.parent
SECONDS = {"full": 520.0, "quick": 110.0}
# Tests may take that long, and leave as much to the benchmarks; what runs out of time has a while to say so.
SECONDS_OF_TESTS, SECONDS_OF_BENCHMARKS, SECONDS_TO_END = 290, 200, 15
BUILT = "EDGECOLBERT_BENCHMARK_BUILT"
LOG_OF_TESTS = ROOT / "build" / "gpu-tests.log"
# The interpreter, the emulator and the compilers: no GPU takes part.
TESTS_ELSEWHERE = ("triton", "triton_report", "cuda_emulated", "device_interpreted", "gpu_benchmark")
# Goals on an H100: case, contender, column, and what it should be at most or at least.
GOALS = (
    ("1 x 1k x 300, d 48", "fused", "wall", "<=", 0.025, "ms end to end"),
    ("1 x 1k x 300, d 48", "fused, same documents", "wall", "<=", 0.025, "ms end to end"),
    ("1 x 1k x 300, d 64", "fused", "wall", "<=", 0.025, "ms end to end"),
    ("1 x 10k x 300 ragged, d 48", "fused, packed", "percent_of_memory", ">=", 90, "% of the measured bandwidth"),
    ("1 x 4k x 2048 ragged, d 48", "fused, packed", "percent_of_memory", ">=", 90, "% of the measured bandwidth"),
    ("128 x 128 x 32 x 300, d 128", "fused", "TFLOP/s", ">=", 400, "TFLOP/s"),
    ("forward + backward 1024, d 48", "fused", "p50", "<=", 6, "ms"),
    ("contrastive loss 24576", "fused", "p50", "<=", 5000, "ms"),
    ("contrastive loss 24576", "fused", "GB", "<=", 8, "GB beside inputs"),
)


def facts(device: torch.device, peaks: dict[str, float], quick: bool) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "suite": "gpu",
        "sm": f"{properties.major}{properties.minor}" if properties else None,
        "cuda": torch.version.cuda,
        "triton": machine.version("triton"),
        "late_interaction_kernels": machine.version("late-interaction-kernels"),
        "flash_maxsim": machine.version("flash-maxsim"),
        "peak": {name: float(f"{value:.4g}") for name, value in peaks.items()},
        "quick": quick,
        "repeats": repeated.table is not None,  # calls that were made before go through the compiled module
        **machine.gpu_facts(),
    }


def measure(case: Case, clock: Clock, peaks: dict[str, float], seconds: float) -> list[dict[str, Any]]:
    """One row a contender."""
    able, rows = [], []
    errors: dict[str, float] = {}
    for contender in case.contenders:
        if contender.missing:
            print(f"  {contender.name}: skipped, {contender.missing}", flush=True)
            continue
        try:
            errors[contender.name] = case.error(contender.call(0))
        except Exception as error:  # a peer's failure is a result; ours is the end
            if contender.name.startswith("fused"):
                raise
            print(f"  {contender.name}: failed, {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
            continue
        if contender.name.startswith("fused") and not errors[contender.name] <= case.tolerance:
            raise AssertionError(f"{case.name}, {contender.name}: error {errors[contender.name]:.2g}")
        able.append(contender)
    copies = [] if case.copy is None else [case.copy]
    times = clock.interleave([*able, *copies], case.rounds, seconds, case.fewest)
    for contender in able:
        rows.append(row(case, contender, times, errors[contender.name], peaks))
        if case.memory:
            size = clock.peak_memory(lambda c=contender: c.call(0))
            rows[-1]["GB"] = None if size is None else round(size / 1e9, 3)
    return rows


def row(
    case: Case, contender: Contender, times: dict[str, Times], error: float, peaks: dict[str, float]
) -> dict[str, Any]:
    mine = times[contender.name]
    made: dict[str, Any] = {"case": case.name, **case.parameters, "contender": contender.name, "unit": "ms"}
    made |= {**quantiles(mine.device), "wall": quantiles(mine.wall), "rounds": len(mine.device)}
    made["error"] = float(f"{error:.2g}")
    if case.operations:
        rate = case.operations / mine.device / 1e9
        made["TFLOP/s"] = quantiles(rate)
        made["percent_of_tensor"] = quantiles(100 * rate / peaks["TFLOP/s"])
    if case.bytes:
        size = case.bytes / 2 if "int8" in contender.name else case.bytes
        made["GB/s"] = quantiles(size / mine.device / 1e6)
        made["percent_of_memory"] = quantiles(size / mine.device / 1e4 / peaks["GB/s"])
        if case.copy is not None:
            made["percent_of_copy"] = quantiles(100 * size / case.bytes * times[case.copy.name].device / mine.device)
    made["ratio"] = {
        name: quantiles(mine.device / times[name].device)
        for name in case.references
        if name in times and name != contender.name
    }
    return made


def describe(found: dict[str, Any]) -> str:
    text = f"  {found['contender']:<26}{found['p50']:>10.4g} ms{found['wall']['p50']:>10.4g} wall"
    for name, unit in (
        ("TFLOP/s", "TFLOP/s"),
        ("percent_of_memory", "% of GB/s"),
        ("percent_of_copy", "% of a copy"),
        ("GB", "GB"),
    ):
        value = found.get(name)
        if value is not None:
            text += f"  {value['p50'] if isinstance(value, dict) else value:.4g} {unit}"
    text += f"  error {found['error']:.2g}"
    for name, ratio in found["ratio"].items():
        text += f"  {ratio['p50']:.2f}x {name}"
    return text


def goals(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for case, contender, column, sign, limit, unit in GOALS:
        found = [each for each in rows if (each["case"], each["contender"]) == (case, contender)]
        value = found[0].get(column) if found else None
        value = value["p50"] if isinstance(value, dict) else value
        if value is None:
            lines.append(f"{case}, {contender}: {sign} {limit:g} {unit}: not measured")
            continue
        reached = value <= limit if sign == "<=" else value >= limit
        lines.append(f"{case}, {contender}: {sign} {limit:g} {unit}: {value:.4g}, {'reached' if reached else 'missed'}")
    return lines


def replaced(before: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`before`, with the rows of every case that was measured again in their places."""
    again: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        again.setdefault(row["case"], []).append(row)
    measured, found = set(again), []
    for row in before:
        found += again.pop(row["case"], []) if row["case"] in measured else [row]
    return found + [row for rest in again.values() for row in rest]


def run_tests(deadline: float) -> dict[str, Any]:
    """The tests that a GPU takes part in."""
    command = [sys.executable, "-m", "pytest", "tests", "-v", "-p", "no:cacheprovider", "--tb=short", "--durations=25"]
    command += ["-k", "triton or cuda or gpu or device"]
    command += [f"--ignore=tests/test_{name}.py" for name in TESTS_ELSEWHERE]
    if machine.version("pytest-xdist"):
        command += ["-n", str(os.cpu_count() or 1), "--dist", "worksteal"]
    start = time.monotonic()
    seconds_left = deadline - start - SECONDS_OF_BENCHMARKS - SECONDS_TO_END
    output, status = run_for(max(60, min(SECONDS_OF_TESTS, seconds_left)), command)
    LOG_OF_TESTS.parent.mkdir(exist_ok=True)
    LOG_OF_TESTS.write_text(output)
    print(output[-3000:], f"all of it: {LOG_OF_TESTS}", sep="\n", flush=True)
    counts = {name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|skipped|error)", output[-2000:])}
    seconds = round(time.monotonic() - start)
    return {"case": "tests", "contender": "tests", "exit_status": status, "seconds": seconds, **counts}


def failed(tests: dict[str, Any]) -> bool:
    """Whether one failed, or none was seen to pass. All that were run before the time was up may have passed."""
    if tests["exit_status"] is None:
        return bool(not tests.get("passed") or tests.get("failed") or tests.get("error"))
    return bool(tests["exit_status"])


def run_for(seconds: float, command: Sequence[str]) -> tuple[str, int | None]:
    """What pytest writes and its status, None where it did not end in time; nothing of it is left running."""
    # Each of its processes has a core.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        return running.communicate(timeout=seconds)[0], running.returncode
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGINT)  # it still says how many passed
    try:
        return running.communicate(timeout=SECONDS_TO_END)[0], None
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        return running.communicate()[0], None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)


def build(deadline: float) -> None:
    """The compiled module, where it is not there: repeated calls go through it. What is imported has not seen it, so the
    program begins anew, with the time that is left."""
    if machine.compiled_module() is not None:
        return
    if BUILT in os.environ:
        raise SystemExit(
            "the compiled module was built and cannot be imported: python -m edgecolbert_kernels.env says why"
        )
    print("building the compiled module", flush=True)
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, check=True)
    os.environ[BUILT] = "1"
    left = str(round(deadline - time.monotonic()))
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], "--seconds", left])


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Device time of every contender, a panel a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(each["case"] for each in rows))
    columns = 4
    figure, axes = pyplot.subplots(-(-len(names) // columns), columns, figsize=(16, 2.6 * -(-len(names) // columns)))
    for axis, name in zip(np.ravel(axes), names, strict=False):
        found = [each for each in rows if each["case"] == name]
        axis.barh([each["contender"] for each in found][::-1], [each["p50"] for each in found][::-1])
        axis.set_title(f"{name}, ms", fontsize=8)
        axis.tick_params(labelsize=6)
    for axis in np.ravel(axes)[len(names) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def benchmark(
    device: torch.device,
    quick: bool,
    tiny: bool,
    only: Sequence[str],
    deadline: float,
    save: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Rows of every case; `save` is handed those that there are after each."""
    clock = Clock(device)
    peaks = clock.peaks(tiny)
    print(f"peaks: {peaks['GB/s']:.4g} GB/s, {peaks['TFLOP/s']:.4g} TFLOP/s", flush=True)
    shared, rows = facts(device, peaks, quick), []
    makers: list[Callable[[], Case]] = [
        make
        for make in cases(device, quick, tiny)
        if not only or any(text in make.args[0] for text in only)  # type: ignore[attr-defined]
    ]
    for number, make in enumerate(makers, 1):
        left = deadline - time.monotonic()
        if left < 5:
            print(f"[{number}/{len(makers)}] {make.args[0]}: skipped, out of time", flush=True)  # type: ignore[attr-defined]
            continue
        print(f"[{number}/{len(makers)}] {make.args[0]}, {left:.0f} s left", flush=True)  # type: ignore[attr-defined]
        try:
            case = make()
            if tiny:
                case.rounds = 1
            found = measure(case, clock, peaks, seconds=1.5 if quick else 4.0)
            print("\n".join(describe(each) for each in found), flush=True)
            del case
        except Exception:  # the other cases are still worth their time
            traceback.print_exc()
            found = [{"case": make.args[0], "contender": "fused", "failed": 1}]  # type: ignore[attr-defined]
        rows += [{**shared, **each} for each in found]
        save(rows)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="within 2 minutes")
    parser.add_argument(
        "--dry-run", action="store_true", help="on the CPU, tiny shapes; nothing is saved without --out"
    )
    parser.add_argument("--seconds", type=float, help="start no case after so many (default: 520, or 110 with --quick)")
    parser.add_argument("--no-tests", action="store_true", help="benchmarks alone")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="no tests, and cases whose name has it")
    parser.add_argument("--out", type=Path, help="where the rows go")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here; --dry-run runs the program on the CPU")
    deadline = time.monotonic() + (options.seconds or SECONDS["quick" if options.quick else "full"])
    device = torch.device("cpu") if options.dry_run else torch.device("cuda", torch.cuda.current_device())
    tests: list[dict[str, Any]] = []
    if not options.dry_run:
        build(deadline)
    if not (options.dry_run or options.quick or options.no_tests or options.only):
        tests = [run_tests(deadline)]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-").removeprefix("nvidia-")
    path = options.out or (None if options.dry_run else RESULTS / f"gpu-{slug}.jsonl")
    shared = {"suite": "gpu", **machine.gpu_facts()}

    kept = options.only and path is not None and path.exists()
    before = [json.loads(line) for line in path.read_text().splitlines()] if kept else [{**shared, **t} for t in tests]

    def save(rows: list[dict[str, Any]]) -> None:
        if path is not None:
            path.write_text("".join(json.dumps(each) + "\n" for each in replaced(before, rows)))

    rows = benchmark(device, options.quick, options.dry_run, options.only, deadline, save)
    if not options.dry_run:
        print("\n".join(goals(rows)), flush=True)
    if path is not None:
        measured = [each for each in replaced(before, rows) if "p50" in each]
        if machine.version("matplotlib") and measured:
            plot(measured, path.with_suffix(".png"))
    if any(map(failed, tests)) or any(each.get("failed") for each in rows):
        raise SystemExit("tests or cases failed")


if __name__ == "__main__":
    main()
