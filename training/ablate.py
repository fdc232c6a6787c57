"""A grid of configurations over one data order: `python -m training.ablate GRID.toml [key=value ...]`.

A grid names a base configuration, seeds, BEIR folders, and variants, each a list of overrides; the first is the baseline:

    base = "training/configs/ettin-4-colbert.toml"
    output = "runs/ablations/dimension"
    seeds = [0, 1, 2]
    sets = ["$EDGECOLBERT_DATA/beir/scifact"]
    [variants]
    "48" = []
    "32" = ["model.dimension=32", "model.head.widths=[512, 32]"]

Seeds change weights and dropout, never the order of the data. Runs that are done are not done again. Results: per-query
nDCG@10 of every run, a table with a paired bootstrap over queries against the baseline, and a plot, all in `output`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from training import config as settings
from training.config import ConfigError

MEASURE = "nDCG@10"
RESAMPLES = 10_000


def read(path: Path, overrides: Sequence[str]) -> dict:
    try:
        grid = settings.tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except settings.tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
    for override in overrides:
        settings.put(grid, override)
    wanted = {"base", "output", "seeds", "sets", "variants"}
    for name in wanted ^ grid.keys():
        raise ConfigError(f"{path}: {name} is {'missing' if name in wanted else 'not a setting of a grid'}")
    return grid


def run(grid: dict) -> str:
    """Train and evaluate what is missing, one process a run; the table."""
    output = Path(grid["output"])
    values: dict[str, dict[str, np.ndarray]] = {}
    total = len(grid["variants"]) * len(grid["seeds"])
    done = 0
    for name, overrides in grid["variants"].items():
        for seed in grid["seeds"]:
            done += 1
            place = output / slug(name) / f"seed-{seed}"
            sets = json.dumps(list(grid["sets"]))
            own = [*overrides, f"output={place}", f"train.seed={seed}", "train.data_seed=0", f"eval.sets={sets}"]
            config = settings.load(grid["base"], own)
            finished = place / "finished.json"
            wanted = json.dumps(settings.flat(config), sort_keys=True)
            if not finished.exists():
                print(f"{done} of {total}: {name}, seed {seed}", flush=True)
                command = [sys.executable, "-m", "training.train", str(grid["base"]), *own]
                if subprocess.run(command).returncode:
                    raise ConfigError(f"{name}, seed {seed} has failed; what is done stays, the same command goes on")
                finished.write_text(wanted, encoding="utf-8")
            elif finished.read_text(encoding="utf-8") != wanted:
                raise ConfigError(f"{place} was made with other settings; remove it, or choose another output")
            last = max((place / "eval").iterdir())
            for path in sorted(last.glob("*.jsonl")):
                records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
                scores = {record["query_id"]: record[MEASURE] for record in records}
                row = np.array([scores[query] for query in sorted(scores)])
                values.setdefault(path.stem, {}).setdefault(name, np.zeros((0, len(row))))
                values[path.stem][name] = np.vstack([values[path.stem][name], row])
    table = report(values)
    (output / "table.md").write_text(table, encoding="utf-8")
    plot(values, output / "plot.png")
    return table


def report(values: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """Set -> variant -> `[seeds, queries]`, the first variant being the baseline; as a table in Markdown."""
    lines = [f"| set | variant | {MEASURE} | over seeds | difference | 95 % | p |", "|---|---|---|---|---|---|---|"]
    for name, variants in values.items():
        baseline = next(iter(variants.values()))
        for variant, own in variants.items():
            spread = f"{own.mean(1).min():.4f} to {own.mean(1).max():.4f}"
            row = f"| {name} | {variant} | {own.mean():.4f} | {spread} |"
            if own is baseline:
                lines.append(f"{row} | | |")
                continue
            mean, low, high, p = bootstrap(own.mean(0) - baseline.mean(0))
            lines.append(f"{row} {mean:+.4f} | {low:+.4f} to {high:+.4f} | {p:.3f} |")
    return "\n".join(lines) + "\n"


def bootstrap(differences: np.ndarray, seed: int = 0) -> tuple[float, float, float, float]:
    """Mean of paired differences over queries, its 95 % interval, and the two-sided p that it is 0.

    Queries are resampled, the mean over seeds of each: what is left out is how training would vary with other seeds.
    """
    rng, count = np.random.default_rng(seed), len(differences)
    means = np.array([differences[rng.integers(count, size=count)].mean() for _ in range(RESAMPLES)])
    low, high = np.quantile(means, [0.025, 0.975])
    mean = differences.mean()
    p = (1 + np.sum(np.abs(means - mean) >= abs(mean))) / (1 + RESAMPLES)
    return float(mean), float(low), float(high), float(p)


def plot(values: Mapping[str, Mapping[str, np.ndarray]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(values), squeeze=False, figsize=(1 + 4 * len(values), 3.5), layout="constrained"
    )
    for axis, (name, variants) in zip(axes[0], values.items(), strict=True):
        for place, own in enumerate(variants.values()):
            axis.plot([place] * len(own), own.mean(1), "o", color="tab:blue", alpha=0.4)
            axis.plot(place, own.mean(), "_", color="black", markersize=18)
        axis.set_xticks(range(len(variants)), list(variants), rotation=30, ha="right")
        axis.set(title=name, ylabel=MEASURE)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in name)


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(__doc__)
        return
    try:
        print(run(read(Path(given[0]), given[1:])))
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
