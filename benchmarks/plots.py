"""Pictures of one machine's rows, as SVG that is readable on a light page and on a dark one."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping]
GREY = "#868e96"
COLORS = {
    "exact": "#2f7ed8",
    "fast": "#e8590c",
    "int8 fast": "#2b8a3e",
    "torch eager fp32": "#9c36b5",
    "torch blocked fp32": "#c2255c",
    "torch.compile fp32": "#ae3ec9",
    "maxsim-cpu": "#868e96",
}
OTHERS = ("#0c8599", "#e67700", "#5f3dc4", "#66a80f", "#a61e4d", "#1971c2")


def colors(names: Sequence[str]) -> dict[str, str]:
    """A colour a contender: its own in every picture, or the next that is free in this one."""
    free = itertools.cycle(OTHERS)
    return {name: COLORS.get(name) or next(free) for name in dict.fromkeys(names)}


@contextlib.contextmanager
def figure(path: Path, width: float = 7.2, height: float = 3.4, **options: Any) -> Iterator[Any]:
    """The axes of a figure that is written to ``path`` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": path.stem,  # the same rows make the same file
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GREY,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "legend.fontsize": 8,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"), GREY
        ),
    }
    with pyplot.rc_context(style):
        drawn, axes = pyplot.subplots(figsize=(width, height), **options)
        yield axes
        drawn.tight_layout()
        drawn.savefig(path, transparent=True, metadata={"Date": None})
        pyplot.close(drawn)
    # matplotlib leaves spaces at line ends.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


@contextlib.contextmanager
def horizontal_bars(path: Path, bars: Mapping[str, float], shades: Sequence[str], label: str) -> Iterator[Any]:
    """A figure of one bar a name, the first on top, with its value as ``label`` formats it."""
    with figure(path, height=0.8 + 0.28 * len(bars)) as axes:
        drawn = axes.barh(list(bars), list(bars.values()), color=shades, height=0.65)
        axes.bar_label(drawn, [f" {label.format(value)}" for value in bars.values()], color=GREY, fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        yield axes


def of(rows: Rows, suite: str, case: str | None = None) -> list[Mapping]:
    return [row for row in rows if row["suite"] == suite and case in (None, row.get("case"))]


def ratios(rows: Rows, path: Path) -> bool:
    """Time of every contender over that of exact, d = 48."""
    bars: dict[str, float] = {}
    for suite, case, ours in (("peers", "d=48", "exact"), ("rerank", "d=48", "exact")):
        for row in of(rows, suite, case):
            if ours in row.get("ratio", {}) and row["contender"] not in bars:
                bars[row["contender"]] = row["ratio"][ours]["p50"]
    timed = {row["contender"]: row for row in of(rows, "rerank", "d=48, int8")}
    if "int8 fast" in timed and "torch eager fp32" in timed and "torch eager fp32" in bars:
        eager = timed["torch eager fp32"]["ratio"].get("int8 fast", {}).get("p50")
        if eager:
            bars["int8 fast"] = bars["torch eager fp32"] / eager
    if not bars:
        return False
    bars["exact"] = 1.0
    bars = dict(sorted(bars.items(), key=lambda bar: bar[1]))
    with horizontal_bars(path, bars, list(colors(list(bars)).values()), "{:.3g}x") as axes:
        axes.margins(x=0.08)
        axes.set(xlabel="time over that of exact (1 query x 1000 documents x 300 tokens, d = 48, one thread)")
    return True


def roofline(rows: Rows, path: Path) -> bool:
    """Rate over operations a byte of documents, under the peaks and the bandwidth of the same run."""
    base = of(rows, "rerank", "d=48")
    roofs = {row["contender"]: row["p50"] for row in [*base, *of(rows, "rerank", "d=48, int8")] if "/s" in row["unit"]}
    if not roofs:
        return False
    bandwidth = roofs.pop("read bandwidth", None)
    with figure(path, height=4) as axes:
        axes.set(xscale="log", yscale="log", xlim=(4, 3000))
        for (name, peak), style in zip(roofs.items(), (":", "--", "-."), strict=False):
            start = 4 if bandwidth is None else max(4, peak / bandwidth)
            axes.plot([start, 3000], [peak, peak], style, color=GREY, linewidth=1)
            axes.annotate(f"{name}: {peak:.0f}", (3000, peak), ha="right", va="bottom", fontsize=8, color=GREY)
        if bandwidth is not None:
            top = max(roofs.values()) / bandwidth
            axes.plot([4, top], [4 * bandwidth, top * bandwidth], color=GREY, linewidth=1)
            axes.annotate(f"{bandwidth:.3g} GB/s", (4.3, 4.6 * bandwidth), fontsize=8, color=GREY, rotation=35)
        labelled = set()
        timed = [row for row in rows if row["suite"] in ("rerank", "batch") and row["unit"] == "ms"]
        drawn_in = colors([row["contender"] for row in timed])
        for row in timed:
            name, operations = row["contender"], 2.0 * row["num_queries"] * row["query_length"] * row["dim"]
            operations *= row["num_documents"] * row["length"]
            bytes_a_value = 1 if name.startswith("int8") else 4 if "fp32" in name or name == "maxsim-cpu" else 2
            size = row["num_documents"] * row["length"] * row["dim"] * bytes_a_value
            label = None if name in labelled else name
            labelled.add(name)
            axes.plot(
                operations / size, operations / row["p50"] / 1e6, "os"[row["suite"] == "batch"],
                color=drawn_in[name], label=label, markersize=4.5, alpha=0.85,
            )  # fmt: skip
        axes.set(xlabel="operations a byte of documents (circles: 1 query, squares: 32)", ylabel="G operations/s")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return True


def lines(
    rows: Rows,
    path: Path,
    *,
    x: Callable[[Mapping], float],
    y: Callable[[Mapping], float | None],
    xlabel: str,
    ylabel: str,
    log: bool = True,
    ticks: bool = False,
) -> bool:
    """One line a contender."""
    series: dict[str, dict[float, float]] = {}
    for row in rows:
        value = y(row)
        if value is not None:
            series.setdefault(row["contender"], {})[x(row)] = value
    series = {name: points for name, points in series.items() if len(points) > 1}
    if not series:
        return False
    drawn_in = colors(list(series))
    with figure(path) as axes:
        for name, points in series.items():
            places = sorted(points)
            values = [points[place] for place in places]
            axes.plot(places, values, "o-", color=drawn_in[name], label=name, markersize=3.5)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if log:
            axes.set(xscale="log", yscale="log")
        if ticks:
            places = sorted({place for points in series.values() for place in points})
            axes.set_xticks(places, [f"{place:g}" for place in places])
            axes.minorticks_off()
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return True


def documents(rows: Rows, path: Path) -> bool:
    chosen = [row for row in of(rows, "scaling") if "ragged" not in row["case"] and row["unit"] == "ms"]
    return lines(
        chosen,
        path,
        x=lambda row: row["num_documents"],
        y=lambda row: 1e3 * row["p50"] / row["num_documents"],
        xlabel="documents of 300 tokens (1 query, d = 48, one thread)",
        ylabel="us a document",
    )


def dimensions(rows: Rows, path: Path) -> bool:
    chosen = [row for row in of(rows, "rerank") if row["unit"] == "ms"]
    chosen = [row for row in chosen if not (row["contender"] == "torch eager fp32" and "int8" in row["case"])]
    return lines(
        chosen,
        path,
        x=lambda row: row["dim"],
        y=lambda row: row["p50"],
        xlabel="dimensions (1 query x 1000 documents x 300 tokens, one thread)",
        ylabel="ms",
        ticks=True,
    )


def threads(rows: Rows, path: Path) -> bool:
    found = []
    for row in of(rows, "threads"):
        precision = row["contender"].split()[0]
        if row["contender"].endswith(" 1 thread"):
            name = f"{precision}, {row['case']}"
            found.append({"contender": name, "threads": 1, "speed": 1.0})
            for other, ratio in row["ratio"].items():
                if other.startswith(f"{precision} "):
                    found.append({"contender": name, "threads": int(other.split()[1]), "speed": ratio["p50"]})
    return lines(
        found,
        path,
        x=lambda row: row["threads"],
        y=lambda row: row["speed"],
        xlabel="threads",
        ylabel="times one thread",
        log=False,
        ticks=True,
    )


def memory(rows: Rows, path: Path) -> bool:
    """What a step keeps beside its inputs, and what a store of 10,000 documents takes."""
    bars = {}
    for row in of(rows, "losses"):
        if "memory" in row["contender"] and "T=0.02" not in row["contender"]:
            bars[row["contender"].replace(", memory", "").replace("recomputed", "fused loss")] = row["p50"]
    for row in of(rows, "gradcache"):
        if row["contender"].endswith(", memory"):
            bars[row["contender"].removesuffix(", memory") + ", a step of 64"] = row["p50"]
    if not bars:
        return False
    ours = ("fused", "GradCache, fused")
    shades = [COLORS["exact"] if name.startswith(ours) else COLORS["torch eager fp32"] for name in bars]
    with horizontal_bars(path, bars, shades, "{:,.0f}") as axes:
        axes.set(xscale="log", xlim=(1, 4 * max(bars.values())), xlabel="MB beside inputs and gradients")
    return True


ALL: dict[str, tuple[Callable[[Rows, Path], bool], str]] = {
    "ratios": (ratios, "Time of a rerank over that of exact"),
    "roofline": (roofline, "Roofline: the measured peaks and bandwidth, and how near each contender comes"),
    "dimensions": (dimensions, "Time of a rerank over the dimension"),
    "documents": (documents, "Time a document over the size of the collection"),
    "threads": (threads, "Speed over the number of threads"),
    "memory": (memory, "Memory of a loss and of a step"),
}
