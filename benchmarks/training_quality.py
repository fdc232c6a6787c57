"""Quality of training runs: nDCG@10 with paired bootstrap intervals over test queries, and its plots.

`python -m benchmarks.training_quality collect NAME=FOLDER ...` keeps each query's value in results/training_quality.jsonl: of
runs of training.train (their outputs), or of what `training.evaluate --keep` wrote. Without arguments, the table and the plot
of what is kept there.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from training.ablate import MEASURE, bootstrap

RESULTS = Path(__file__).parent / "results"
KEPT = RESULTS / "training_quality.jsonl"

# Set -> model -> each query's value, in the order of the query ids.
Values = dict[str, dict[str, np.ndarray]]


def collect(pairs: Sequence[str]) -> None:
    """One line a set with its query ids, then one a model and set, sorted by both."""
    ids, values = read()
    for pair in pairs:
        name, _, folder = pair.rpartition("=")
        place = Path(folder)
        if (place / "eval").is_dir():
            place = max((place / "eval").iterdir())
        for path in sorted(place.glob("*-test.jsonl")):
            records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            scores = {record["query_id"]: record[MEASURE] for record in records}
            own = path.stem.removesuffix("-test")
            if ids.setdefault(own, sorted(scores)) != sorted(scores):
                raise SystemExit(f"{path}: other queries than those kept of {own}")
            values.setdefault(own, {})[name] = np.array([scores[query] for query in ids[own]])
    with KEPT.open("w", encoding="utf-8") as file:
        for own, queries in sorted(ids.items()):
            file.write(json.dumps({"set": own, "queries": queries}) + "\n")
            for name, row in values[own].items():
                record = {"set": own, "model": name, MEASURE: [round(float(value), 4) for value in row]}
                file.write(json.dumps(record) + "\n")


def read() -> tuple[dict[str, list[str]], Values]:
    ids: dict[str, list[str]] = {}
    values: Values = {}
    for line in KEPT.read_text(encoding="utf-8").splitlines() if KEPT.exists() else ():
        record = json.loads(line)
        if "queries" in record:
            ids[record["set"]] = record["queries"]
        else:
            values.setdefault(record["set"], {})[record["model"]] = np.array(record[MEASURE])
    return ids, values


def table(values: Values, baseline: str) -> str:
    """Each model's mean, and its paired difference to the baseline with a 95 % interval."""
    sets = list(values)
    lines = ["| model | " + " | ".join(f"{each} | difference to {baseline}" for each in sets) + " |"]
    lines += ["|---" * (1 + 2 * len(sets)) + "|"]
    for name in values[sets[0]]:
        cells = [name]
        for each in sets:
            own = values[each][name]
            mean, low, high, _ = bootstrap(own - values[each][baseline])
            cells += [f"{own.mean():.3f}", "" if name == baseline else f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(values: Values, path: Path) -> None:
    """A panel a set with nDCG@10 over the dimension, and one with the other models beside the head of 48 dimensions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(next(iter(values.values())))
    heads = {int(found[1]): name for name in names if (found := re.fullmatch(r"head, d = (\d+)", name))}
    models = [name for name in names if name not in heads.values() or name == heads.get(48)]
    shares = [3] * len(values) + [4]
    figure, axes = pyplot.subplots(1, len(shares), figsize=(12, 3.4), layout="constrained", width_ratios=shares)
    for number, (own, scores) in enumerate(values.items()):
        axis, colour, sizes = axes[number], f"C{number}", sorted(heads)
        axis.plot(sizes, [scores[heads[size]].mean() for size in sizes], "o-", color=colour)
        axis.set(xscale="log", xlabel="dimensions a token", ylabel=MEASURE, title=f"{own}: heads over one encoder")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        means = np.array([scores[name].mean() for name in models])
        spread = np.array([bootstrap(scores[name])[1:3] for name in models]).T
        places = np.arange(len(models)) + 0.2 * number - 0.1
        axes[-1].errorbar(means, places, xerr=np.abs(spread - means), fmt="o", color=colour, capsize=2, label=own)
    axes[-1].set_yticks(range(len(models)), models)
    axes[-1].invert_yaxis()
    axes[-1].set(xlabel=f"{MEASURE}, 95 % over queries")
    axes[-1].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main(arguments: Sequence[str]) -> None:
    if arguments:
        if arguments[0] != "collect" or not all("=" in pair for pair in arguments[1:]):
            raise SystemExit(__doc__)
        collect(arguments[1:])
    _, values = read()
    for baseline in ("BM25", "untrained, d = 48"):
        print(table(values, baseline), end="\n\n")
    plot(values, RESULTS / "training_quality.png")


if __name__ == "__main__":
    main(sys.argv[1:])
