"""The numbers to reach, and where in the results each of them stands."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Row = Mapping
EAGER = "torch eager fp32"
UNSCREENED = "exact unscreened"  # every similarity in fp32; "exact" is that where nothing is screened
ANY_CPU = "a CPU"
H100 = "an H100"
# One core's multiply-add rate, and the operations of a query with a document in the suites of training: 32 x 180 x 48.
PEAK = ("rerank", "d=48", "peak f32")
TRAINED, PAIR_OPERATIONS = r"(\d+)x\d+(?:, T=.*)?", 2 * 32 * 180 * 48
# GPUs whose rows count for it: the same multiprocessors, the second with faster memory.
HOPPERS = ("H100", "H200")


def percent_of_peak(row: Row) -> Row:
    return row["percent_of_peak"]


def itself(row: Row) -> Row:
    return row


def over(fast: str) -> Callable[[Row], Row]:
    """Time of the row's contender over that of ``fast``."""
    return lambda row: row["ratio"][fast]


@dataclass(frozen=True)
class Target:
    """A number to reach, in the row that ``at`` (suite, case, contender) names; ``quantiles`` picks its p20, p50, p80."""

    text: str
    unit: str
    limit: float
    at: tuple[str, str, str]
    quantiles: Callable[[Row], Row] = itself
    at_most: bool = False
    on: str = ANY_CPU
    fast: str = ""  # of a ratio, the contender whose speed it is

    def reached(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit

    @property
    def wanted(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.limit:g}{self.unit}"

    def found(self, rows: Sequence[Row]) -> tuple[Row, Row] | None:
        """Its row among those of one machine, and the p20, p50, p80 in it."""
        row = find(rows, self.at)
        try:
            return None if row is None else (row, self.quantiles(row))
        except KeyError:  # the contender that it is a ratio to was not installed
            return None

    def explained(self, rows: Sequence[Row]) -> str:
        """What is known about a number that was missed."""
        row, value = self.found(rows) or ({}, {})
        share = (find(rows, (*self.at[:2], self.fast)) or {}).get("percent_of_peak")
        if share:
            return f"{share['p50'] * self.limit / value['p50']:.0f} % of its peak needed"
        peak, size = find(rows, PEAK), re.fullmatch(TRAINED, self.at[1])
        if self.unit == "x" and self.at[0] in ("training", "losses") and size and peak:
            forwards = 2 if "recomputed" in self.text else 1  # it scores twice
            least = forwards * int(size[1]) ** 2 * PAIR_OPERATIONS / (1e6 * peak["p50"])
            return f"{100 * least * self.limit / row['p50']:.0f} % of the time for its scores at the peak"
        if self.unit == " %" and "percent_of_copy" in row:
            return f"{row['percent_of_copy']['p50']:.0f} % of a copy"
        return ""


def find(rows: Sequence[Row], at: tuple[str, str, str]) -> Row | None:
    found = (row for row in rows if (row["suite"], row.get("case"), row.get("contender")) == at)
    row = next(found, None)
    return find(rows, (*at[:2], "exact")) if row is None and at[2] == UNSCREENED else row


def _rerank(dim: int, slow: str, fast: str, limit: float) -> Target:
    at = ("rerank", f"d={dim}" + ", int8" * fast.startswith("int8"), slow)
    return Target(f"1 query x 1000 x 300, d={dim}: {slow} / {fast}", "x", limit, at, over(fast), fast=fast)


def column(name: str) -> Callable[[Row], Row]:
    """A column of the suite `gpu`: its quantiles, or one number; "device" is the row's own time."""

    def found(row: Mapping) -> Mapping:
        value = row if name == "device" else row[name]
        return value if isinstance(value, Mapping) else {"p50": value}

    return found


def _gpu(case: str, contender: str, name: str, limit: float, unit: str, text: str) -> Target:
    at_most = name in ("wall", "device", "GB")
    return Target(text, unit, limit, ("gpu", case, contender), column(name), at_most=at_most, on=H100)


TARGETS = [
    *(
        Target(
            f"1 query x 1000 x 300, d={dim}, exact: of the fp32 FMA peak",
            " %",
            85,
            ("rerank", f"d={dim}", "exact"),
            percent_of_peak,
        )
        for dim in (48, 64, 96, 128)
    ),
    Target(
        "1 query x 1000 x 300, d=48, exact unscreened: of the fp32 FMA peak",
        " %",
        85,
        ("rerank", "d=48", UNSCREENED),
        percent_of_peak,
    ),
    _rerank(48, "maxsim-cpu", "exact", 7),
    _rerank(48, EAGER, "exact", 6),
    _rerank(48, "maxsim-cpu", "fast", 13),
    _rerank(48, EAGER, "fast", 12),
    _rerank(48, EAGER, "int8 fast", 25),
    Target("32 queries, d=48, exact: of the fp32 FMA peak", " %", 90, ("batch", "d=48", "exact"), percent_of_peak),
    Target("AVX2, exact: of its FMA peak", " %", 75, ("isa", "1 query", "exact avx2"), percent_of_peak),
    Target(
        "AVX2, exact unscreened: of its FMA peak", " %", 75, ("isa", "1 query", f"{UNSCREENED} avx2"), percent_of_peak
    ),
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
        Target(
            f"forward + backward, {case}: eager / fused", "x", limit, ("training", case, "torch eager"), over("fused")
        )
        for case, limit in (("32x32", 8), ("128x128", 12))
    ),
    Target(
        "1 query x 10 x 300: call beyond its kernel",
        " us",
        15,
        ("overhead", "1 query, 10 documents", "overhead, tensors"),
        at_most=True,
    ),
    *(
        _gpu(f"1 x 1k x 300, d {dim}", "fused", "wall", 0.025, " ms", f"1 query x 1000 x 300, d={dim}, end to end")
        for dim in (48, 64)
    ),
    _gpu(
        "1 x 10k x 300 ragged, d 48",
        "fused, packed",
        "percent_of_memory",
        90,
        " %",
        "1 query x 10,000 x up to 300: of the memory bandwidth",
    ),
    _gpu(
        "1 x 4k x 2048 ragged, d 48",
        "fused, packed",
        "percent_of_memory",
        90,
        " %",
        "1 query x 4000 x up to 2048: of the memory bandwidth",
    ),
    _gpu(
        "128 x 128 x 32 x 300, d 128", "fused", "TFLOP/s", 400, " TFLOP/s", "128 queries x 128 documents x 300, d=128"
    ),
    _gpu("forward + backward 1024, d 48", "fused", "device", 6, " ms", "forward + backward, 1024 x 1024, Ld 180"),
    _gpu("contrastive loss 24576", "fused", "device", 5000, " ms", "contrastive loss of 24,576, with gradients"),
    _gpu("contrastive loss 24576", "fused", "GB", 8, " GB", "the same: memory beside inputs"),
]

FURTHER = [
    _rerank(48, UNSCREENED, "fast", 1.8),
    _rerank(128, "maxsim-cpu", "exact", 4),
    *(
        Target(
            f"forward + backward, {case}, document mask: eager / fused",
            "x",
            limit,
            ("training", f"{case}, document mask", "torch eager"),
            over("fused"),
        )
        for case, limit in (("32x32", 8), ("128x128", 12))
    ),
    Target(
        "forward + backward, 128x128: saved a (query token, document)",
        " bytes",
        4,
        ("training", "128x128", "fused, saved"),
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
            at_most=True,
        )
        for temperature in ("1", "0.02")
    ),
]
