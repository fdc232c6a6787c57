"""A suite: its cases, its command line, its rows in ``results/<name>.jsonl``; quick ones go to ``build/bench``.

A row is one contender of one case: the case's parameters, times (p20/p50/p80), ``ratio`` (its time over that of each
reference contender), ``percent_of_peak``, ``error`` and the machine's facts. ``waited`` is the share of time in which
threads of this process were ready to run and had no core, ``dispatched`` the instructions that a core started a cycle
around the rounds that count. A run replaces the rows of its suite and machine and leaves those of other machines.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from benchmarks.interleave import Contender, Samples, interleave, quantiles

RESULTS = Path(__file__).parent / "results"
# A quick run is for the eye: it does not take the place of what was measured with care.
QUICK_RESULTS = machine.ROOT / "build" / "bench"


def largest_error(found: torch.Tensor | np.ndarray, expected: torch.Tensor) -> float:
    return (torch.as_tensor(found).detach().double() - expected).abs().max().item()


@dataclass(frozen=True)
class Case:
    """Contenders that do the same work.

    ``references`` are the contenders that ratios are taken to. ``expected`` makes what every call returns, ``error`` is
    the distance to it, at most ``tolerance``: a wrong result has no speed. ``derive`` turns the samples into further
    rows, for what is a difference of contenders. ``rounds`` is (full, quick); a quick run leaves a case out that has no
    rounds for it. Without ``warm``, for calls of seconds, a timed call does not come after one of the same contender.
    """

    name: str
    contenders: Sequence[Contender]
    expected: Callable[[], Any]
    references: Sequence[str] = ()
    parameters: Mapping[str, object] = field(default_factory=dict)
    rounds: tuple[int, int] = (41, 13)
    warm: bool = True
    calls: int = 1
    clock: Callable[[], float] = time.process_time
    keep: float = 1.0
    threads: int = 1
    error: Callable[[Any, Any], float] = largest_error
    tolerance: float = 5e-3
    derive: Callable[[Samples], list[dict]] = lambda samples: []


def check(case: Case, contenders: Sequence[Contender]) -> dict[str, float]:
    """The error of every contender; one above its tolerance ends the run."""
    expected = case.expected()
    errors = {
        contender.name: case.error(contender.once(0), expected)
        for contender in contenders
        if not contender.returns_rate
    }
    for contender in contenders:
        tolerance = case.tolerance if contender.tolerance is None else contender.tolerance
        if contender.name in errors and not errors[contender.name] <= tolerance:
            raise AssertionError(f"{case.name}, {contender.name}: error {errors[contender.name]:.2g} > {tolerance}")
    return errors


def rows(case: Case, contenders: Sequence[Contender], *, quick: bool, label: str) -> list[dict]:
    """Time ``contenders`` and describe each, then what the case derives from them."""
    errors = check(case, contenders)
    samples = interleave(
        contenders,
        case.rounds[quick],
        calls=case.calls,
        clock=case.clock,
        keep=case.keep,
        warm=case.warm,
        progress=show_progress(label),
    )
    shared = {
        "case": case.name,
        **case.parameters,
        "threads": case.threads,
        "rounds": len(samples.waited),
        "waited": round(float(np.median(samples.waited)), 3),
        "dispatched": round(float(np.median(samples.dispatched)), 2),
    }
    made = []
    for contender in contenders:
        values = samples.values[contender.name]
        row = {**shared, "contender": contender.name}
        if contender.returns_rate:
            made.append({**row, "unit": contender.rate_unit, **quantiles(values)})
            continue
        row |= {"unit": "ms", **quantiles(1e3 * values)}
        row["error"] = float(f"{errors[contender.name]:.2g}")
        row["ratio"] = {
            name: quantiles(samples.ratio(contender.name, name))
            for name in case.references
            if name in samples.values and name != contender.name
        }
        if contender.peak in samples.values:
            row["percent_of_peak"] = quantiles(samples.percent_of_peak(contender))
        made.append(row)
    return made + [{**shared, **row} for row in case.derive(samples)]


def describe(row: Mapping) -> str:
    text = f"  {row['contender']:<32}{row['p50']:>10.4g} {row['unit']}"
    if "percent_of_peak" in row:
        text += f"  {row['percent_of_peak']['p50']:.1f} % of peak"
    for name, ratio in row.get("ratio", {}).items():
        text += f"  {ratio['p50']:.2f}x {name}"
    return text


def of_machine(row: Mapping) -> tuple[str, str | None]:
    return row["cpu"], row.get("gpu")


def save(name: str, new: Iterable[Mapping], *, other_cases: bool = False) -> Path:
    """In place of this machine's rows; with `other_cases` those of cases that `new` has not stay."""
    new = list(new)
    measured = {row.get("case") for row in new}
    folder = QUICK_RESULTS if any(row.get("quick") for row in new) else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    here = machine.cpu_model(), machine.gpu()
    old = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [row for row in old if of_machine(row) != here or (other_cases and row.get("case") not in measured)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*kept, *new]))
    return path


def show_progress(label: str) -> Callable[[int, int], None]:
    if not sys.stderr.isatty():
        return lambda done, total: None

    def show(done: int, total: int) -> None:
        end = "\r" if done < total else "\r\033[K"
        print(f"  {label}: round {done}/{total}", end=end, file=sys.stderr, flush=True)

    return show


def run(name: str, cases: Iterable[Case], *, quick: bool) -> list[dict]:
    """Run every case, print its rows and save them."""
    made = []
    for case in cases:
        if not case.rounds[quick]:
            continue
        print(f"{name}: {case.name}", flush=True)
        for contender in case.contenders:
            if contender.missing:
                print(f"  {contender.name}: skipped, {contender.missing}")
        contenders = [contender for contender in case.contenders if not contender.missing]
        if not contenders:
            continue
        machine.set_threads(case.threads)
        found = rows(case, contenders, quick=quick, label=f"{name}, {case.name}")
        made += [{"suite": name, **row, "quick": quick, **machine.facts()} for row in found]
        print("\n".join(describe(row) for row in found), flush=True)
    save(name, made)
    return made


def main_of_rows(name: str, run: Callable[[bool], list[dict]], *, pin: bool = True) -> None:
    """The command line of a suite that makes its rows itself, where one call takes too long to be interleaved."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--quick", action="store_true", help="smaller")
    quick = parser.parse_args().quick
    if pin:
        machine.pin_to_one_core()
    print(f"{name}:", flush=True)
    save(name, [{"suite": name, **row, "quick": quick, **machine.facts()} for row in run(quick)])


def main(name: str, cases: Callable[[], Iterable[Case]], *, pin: bool = True) -> None:
    """The command line of a suite."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    quick = parser.parse_args().quick
    if pin:
        machine.pin_to_one_core()
    run(name, cases(), quick=quick)
