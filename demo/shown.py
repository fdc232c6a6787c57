"""What the story comes to: a table with bars for the terminal, and the same as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from demo.story import MEASURE, Chapter
from training.ablate import bootstrap

WIDTH = 14  # of the longest bar, in characters
EIGHTHS = " ▏▎▍▌▋▊▉"


def bar(value: float, most: float, width: int = WIDTH) -> str:
    """`value` of `most` as a bar of at most `width` characters, to an eighth of one."""
    whole, part = divmod(round(8 * width * value / most), 8)
    return ("█" * whole + EIGHTHS[part]).rstrip()


def gains(chapters: Sequence[Chapter]) -> list[tuple[float, float, float] | None]:
    """What each stage adds to the one before it (the first: to the start): mean, and a 95 % interval over the queries."""
    found: list[tuple[float, float, float] | None] = []
    for before, chapter in zip([None, *chapters], chapters, strict=False):
        if before is None or not chapter.seconds:
            found.append(None)
            continue
        mean, low, high, _ = bootstrap(np.subtract(chapter.values, before.values))
        found.append((mean, low, high))
    return found


def table(console: Console, chapters: Sequence[Chapter]) -> None:
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("", MEASURE, "", "gain (95 %)", "time"):
        shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    most = max(chapter.mean for chapter in chapters)
    for chapter, gain in zip(chapters, gains(chapters), strict=True):
        label = Text(chapter.title, style="bold" if chapter.seconds else "").append(f"  {chapter.what}", style="dim")
        told, style = "", ""
        if gain is not None:
            mean, low, high = gain
            told = f"{mean:+.3f} ± {(high - low) / 2:.3f}"
            style = "green" if low > 0 else "red" if high < 0 else "yellow"
        colour = "cyan" if chapter.seconds else "bright_black"
        seconds = f"{chapter.seconds:.0f} s" if chapter.seconds else ""
        shown.add_row(label, f"{chapter.mean:.3f}", Text(bar(chapter.mean, most), colour), Text(told, style), seconds)
    console.print(shown)


def plot(chapters: Sequence[Chapter], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, 3.4), layout="constrained")
    places = range(len(chapters))
    means = [chapter.mean for chapter in chapters]
    errors = [1.96 * np.std(chapter.values) / len(chapter.values) ** 0.5 for chapter in chapters]
    colours = ["tab:blue" if chapter.seconds else "0.75" for chapter in chapters]
    bars = axis.barh(places, means, color=colours, xerr=errors, error_kw={"ecolor": "0.4", "lw": 1, "capsize": 2})
    axis.bar_label(bars, [f"{mean:.3f}" for mean in means], label_type="center", color="white", fontweight="bold")
    axis.set_yticks(places, [f"{chapter.title}\n{chapter.what}" for chapter in chapters], fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel=f"{MEASURE}; whiskers: 95 % over the queries", title=title)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
