"""The results of the latest runs as one table of targets, and as a plot.

``python -m benchmarks.report [--cpu TEXT]`` reads ``results/*.jsonl``; TEXT picks a CPU by a part of
its name, by default this machine's.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import machine, suite

Rows = Sequence[Mapping]


@dataclass(frozen=True)
class Target:
    """A number to reach, in the row that ``at`` (suite, case, contender) names; ``quantiles`` picks its p20, p50, p80."""

    text: str
    unit: str
    limit: float
    at: tuple[str, str, str]
    quantiles: Callable[[Mapping], Mapping[str, float]]
    at_most: bool = False

    def reached(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit

    @property
    def wanted(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.limit:g}{self.unit}"


def find(rows: Rows, at: tuple[str, str, str]) -> Mapping | None:
    found = (row for row in rows if (row["suite"], row["case"], row["contender"]) == at)
    return next(found, None)


def percent_of_peak(row: Mapping) -> Mapping[str, float]:
    return row["percent_of_peak"]


def itself(row: Mapping) -> Mapping[str, float]:
    return row


def over(fast: str) -> Callable[[Mapping], Mapping[str, float]]:
    """Time of the row's contender over that of ``fast``."""
    return lambda row: row["ratio"][fast]


EAGER = "torch eager fp32"
BUSY = 0.05  # share of time spent waiting for a core, above which a row is marked
TARGETS = [
    *(
        Target(
            f"rerank, d={dim}, exact: of the fp32 FMA peak", " %", 85, ("rerank", f"d={dim}", "exact"), percent_of_peak
        )
        for dim in (48, 64, 96, 128)
    ),
    *(
        Target(f"rerank, d={dim}: {slow} / {fast}", "x", limit, ("rerank", f"d={dim}", slow), over(fast))
        for dim, slow, fast, limit in (
            (48, "exact", "fast", 1.8),
            (48, "maxsim-cpu", "exact", 7),
            (48, EAGER, "exact", 6),
            (48, "maxsim-cpu", "fast", 13),
            (48, EAGER, "fast", 12),
            (128, "maxsim-cpu", "exact", 4),
        )
    ),
    Target("rerank, d=48: torch eager fp32 / int8 fast", "x", 25, ("rerank", "d=48, int8", EAGER), over("int8 fast")),
    Target("32 queries, exact: of the fp32 FMA peak", " %", 90, ("batch", "d=48", "exact"), percent_of_peak),
    Target("AVX2, exact: of its FMA peak", " %", 75, ("isa", "1 query", "exact avx2"), percent_of_peak),
    *(
        Target(
            f"{case}, {precision}: one thread / two",
            "x",
            1.9,
            ("threads", case, f"{precision} 1 thread"),
            over(f"{precision} 2 threads"),
        )
        for case in ("1 query", "32 queries")
        for precision in ("exact", "fast")
    ),
    *(
        Target(f"training, {case}: eager / fused", "x", limit, ("training", case, "torch eager"), over("fused"))
        for case, limit in (
            ("32x32", 8),
            ("32x32, document mask", 8),
            ("128x128", 12),
            ("128x128, document mask", 12),
        )
    ),
    Target(
        "training, 128x128: saved a (query token, document)",
        " bytes",
        4,
        ("training", "128x128", "fused, saved"),
        itself,
        at_most=True,
    ),
    *(
        Target(
            f"contrastive loss, {size}x{size}, T={temperature}: eager / {regime}",
            "x",
            limit,
            ("losses", f"{size}x{size}, T={temperature}", "torch eager"),
            over(regime),
        )
        for size, kept, recomputed in ((32, 8, 6), (128, 12, 6))
        for temperature in ("1", "0.02")
        for regime, limit in (("kept", kept), ("recomputed", recomputed))
    ),
    *(
        Target(
            f"contrastive loss, 1024x1024, T={temperature}, recomputed: memory",
            " MB",
            32,
            ("losses", "128x128, T=1", f"recomputed, memory at 1024x1024, T={temperature}"),
            itself,
            at_most=True,
        )
        for temperature in ("1", "0.02")
    ),
    Target(
        "1 query, 10 documents: call beyond its kernel",
        " us",
        15,
        ("overhead", "1 query, 10 documents", "overhead, tensors"),
        itself,
        at_most=True,
    ),
]


def load(cpu: str) -> list[dict]:
    rows = []
    for path in sorted(suite.RESULTS.glob("*.jsonl")):
        rows += [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if cpu in row["cpu"]]


def table(rows: Rows) -> str:
    lines = ["| number | target | measured: p50 (p20 to p80) | reached |", "|---|---|---|---|"]
    for target in TARGETS:
        row = find(rows, target.at)
        if row is None:
            lines.append(f"| {target.text} | {target.wanted} | not measured | |")
            continue
        found = target.quantiles(row)
        spread = f" ({found['p20']:.3g} to {found['p80']:.3g})" if "p20" in found else ""
        reached = "yes" if target.reached(found["p50"]) else "no"
        busy = ", busy machine" if row["waited"] > BUSY else ""
        lines.append(f"| {target.text} | {target.wanted} | {found['p50']:.3g}{target.unit}{spread} | {reached}{busy} |")
    return "\n".join(lines)


def machine_line(rows: Rows) -> str:
    newest = max(rows, key=lambda row: row["date"])
    columns = ("cpu", "isa", "compiler", "python", "torch", "numpy", "maxsim_cpu", "date")
    return ", ".join(f"{name} {newest[name]}" for name in columns if newest.get(name))


def plot(rows: Rows, path: Path) -> None:
    """Time of a rerank by contender and dimension; percent of the peak by dimension."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if row["suite"] == "rerank" and row["unit"] == "ms"]
    dims = sorted({row["dim"] for row in timed})
    names = list(dict.fromkeys(row["contender"] for row in timed))
    figure, (times, shares) = pyplot.subplots(1, 2, figsize=(10, 3.6), width_ratios=(2, 1))
    width = 0.8 / max(len(names), 1)
    for place, name in enumerate(names):
        by_dim = {row["dim"]: row for row in timed if row["contender"] == name}
        at = [index + place * width for index, dim in enumerate(dims) if dim in by_dim]
        times.bar(at, [by_dim[dim]["p50"] for dim in dims if dim in by_dim], width, label=name)
        if name in ("exact", "fast", "int8 fast"):
            found = [by_dim[dim]["percent_of_peak"]["p50"] for dim in dims]
            shares.plot(dims, found, marker="o", label=name)
    times.set(ylabel="ms", title="1 query, 1000 documents of 300 tokens, one thread")
    times.set_xticks([index + 0.4 - width / 2 for index in range(len(dims))])
    times.set_xticklabels([f"d={dim}" for dim in dims])
    times.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    shares.set(ylim=(0, 100), xlabel="d", title="% of the measured peak", xticks=dims)
    shares.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report")
    parser.add_argument("--cpu", default=machine.cpu_model(), help="a part of the CPU's name")
    rows = load(parser.parse_args().cpu)
    if not rows:
        raise SystemExit("no results for this CPU: run python -m benchmarks.all --quick first")
    print(machine_line(rows), table(rows), sep="\n\n")
    if any(row["suite"] == "rerank" for row in rows):
        plot(rows, suite.RESULTS / "rerank.png")


if __name__ == "__main__":
    main()
