"""What became slower between two results, noise aside: ``python -m benchmarks.compare OLD NEW``; files or folders.

    python -m benchmarks.compare benchmarks/results build/bench --threshold 10

A row of one run is held against the row of the other with the same machine, suite, case and contender. Times of two runs on
a shared machine differ for reasons that are not the code's, so two numbers are compared that a run measures against
itself, in this order of preference: the share of the peak of the same rounds, or the ratio to a reference contender that
is not ours (PyTorch, a peer). Where a row has neither, its time is compared, and marked so.

A change counts when it is larger than the threshold and the two intervals from p20 to p80 are apart. Exit status: 0 when
nothing became slower, 1 when something did, 2 when there was nothing to compare.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

Row = Mapping
Key = tuple
# Contenders that a change of this package cannot move.
FOREIGN = ("torch", "maxsim-cpu", "NumKong", "PyLate", "colbert-ai", "sentence-transformers", "the matmul")


@dataclass(frozen=True)
class Measure:
    """A number of a row with its spread. ``faster`` is +1 where more is better, -1 where less is."""

    kind: str
    p20: float
    p50: float
    p80: float
    faster: int

    @classmethod
    def of(cls, kind: str, spread: Mapping, faster: int) -> Measure:
        return cls(kind, spread.get("p20", spread["p50"]), spread["p50"], spread.get("p80", spread["p50"]), faster)


@dataclass(frozen=True)
class Change:
    key: Key
    before: Measure
    after: Measure

    @property
    def percent_slower(self) -> float:
        """By how much the speed fell, in percent of the speed before; negative where it rose."""
        speed = self.after.p50 / self.before.p50 if self.after.faster > 0 else self.before.p50 / self.after.p50
        return 100 * (1 - speed)

    def beyond(self, threshold: float) -> bool:
        apart = self.after.p20 > self.before.p80 or self.after.p80 < self.before.p20
        return apart and abs(self.percent_slower) > threshold

    def __str__(self) -> str:
        _, _, suite, case, contender = self.key
        word = "slower" if self.percent_slower > 0 else "faster"
        return (
            f"{abs(self.percent_slower):5.1f} % {word}  {suite}: {case}, {contender}: {self.before.kind} "
            f"{self.before.p50:.4g} -> {self.after.p50:.4g}"
        )


def read(path: Path) -> dict[Key, Row]:
    """Rows by machine, suite, case and contender; the later of two with one key."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise SystemExit(f"{path}: no .jsonl file in it")
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {
        (row["cpu"], row.get("gpu"), row["suite"], row["case"], row["contender"]): row
        for row in rows
        if "contender" in row
    }


def is_foreign(contender: str) -> bool:
    return contender.startswith(FOREIGN)


def measures(row: Row, rows: Mapping[Key, Row]) -> dict[str, Measure]:
    """What of a row can be compared, best first.

    Ratios stand in the slower contender's row, as its time over that of each reference: this looks them up there.
    """
    found = {}
    if "percent_of_peak" in row:
        found["% of peak"] = Measure.of("% of peak", row["percent_of_peak"], +1)
    for other in rows.values():
        same = all(other.get(name) == row.get(name) for name in ("cpu", "gpu", "suite", "case"))
        if same and is_foreign(other["contender"]) and row["contender"] in other.get("ratio", {}):
            kind = f"{other['contender']} over it"
            found[kind] = Measure.of(kind, other["ratio"][row["contender"]], +1)
    if row.get("unit") in ("ms", "us", "s") and "p50" in row:
        found["time"] = Measure.of(f"time ({row['unit']})", row, -1)
    return found


def compare(before: Mapping[Key, Row], after: Mapping[Key, Row]) -> list[Change]:
    """One change for each row of this package that both have."""
    changes = []
    for key in before.keys() & after.keys():
        if is_foreign(key[-1]) or before[key].get("unit") == "G operations/s":
            continue
        old, new = measures(before[key], before), measures(after[key], after)
        kind = next((kind for kind in old if kind in new), None)
        if kind is not None:
            changes.append(Change(key, old[kind], new[kind]))
    return sorted(changes, key=lambda change: change.percent_slower, reverse=True)


def report(changes: Iterable[Change], threshold: float) -> tuple[str, int]:
    """Text, and the number of rows that became slower."""
    changes = list(changes)
    beyond = [change for change in changes if change.beyond(threshold)]
    slower = [change for change in beyond if change.percent_slower > 0]
    lines = [str(change) for change in beyond]
    lines.append(
        f"{len(changes)} rows compared: {len(slower)} slower and {len(beyond) - len(slower)} faster by more than "
        f"{threshold:g} % with p20 to p80 apart"
    )
    return "\n".join(lines), len(slower)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=10, help="percent that a change must exceed")
    options = parser.parse_args(arguments)
    changes = compare(read(options.old), read(options.new))
    if not changes:
        print("nothing to compare: no row of the same machine, suite, case and contender stands in both")
        return 2
    text, slower = report(changes, options.threshold)
    print(text)
    return 1 if slower else 0


if __name__ == "__main__":
    raise SystemExit(main())
