"""Grids parse, their statistics are right, and a small one runs to its table and plot."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

import tiny

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
from training import ablate, config, train

ROOT = Path(ablate.__file__).parent.parent
GRIDS = sorted((ROOT / "training" / "grids").glob("*.toml"))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_variant_of_every_grid_is_a_configuration(monkeypatch, tmp_path, path):
    monkeypatch.setenv("EDGECOLBERT_DATA", str(tmp_path))
    grid = ablate.read(path, [])
    seen = [config.flat(config.load(ROOT / grid["base"], overrides)) for overrides in grid["variants"].values()]
    assert all(own != seen[0] for own in seen[1:]) or path.stem == "table-10-case"


def test_a_grid_with_an_unknown_key(tmp_path):
    (tmp_path / "grid.toml").write_text('base = "b"\noutput = "o"\nseeds = [0]\nsets = []\nvariant = 1\n[variants]\n')
    with pytest.raises(config.ConfigError, match="variant is not a setting of a grid"):
        ablate.read(tmp_path / "grid.toml", [])


def test_the_bootstrap_knows_a_difference_from_noise():
    rng = np.random.default_rng(0)
    mean, low, high, p = ablate.bootstrap(rng.normal(0.1, 0.2, 300))
    assert low < mean < high and low > 0.05 and p < 0.01
    _, low, high, p = ablate.bootstrap(rng.normal(0.0, 0.2, 300))
    assert low < 0 < high and p > 0.05


START = subprocess.run


def in_process(command, **options):
    """The training process that a grid starts, without its start; others, such as matplotlib's, as ever."""
    if command[1:3] != ["-m", "training.train"]:
        return START(command, **options)
    train.run(config.load(command[3], command[4:]))
    return subprocess.CompletedProcess(command, 0)


def test_a_small_grid(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(ablate.subprocess, "run", in_process)
    base, task = tiny.encoder(tmp_path / "base"), tiny.beir(tmp_path / "task")
    (tmp_path / "run.toml").write_text(
        f'stage = "colbert"\noutput = "x"\n[model]\nbase = "{base}"\ndimension = 16\n[loss]\nkind = "contrastive"\n'
        f'[data]\nsources = [{{path = "{task}"}}]\n[train]\nbatch = 8\nsteps = 2\n'
    )
    grid = {
        "base": str(tmp_path / "run.toml"),
        "output": str(tmp_path / "out"),
        "seeds": [0],
        "sets": [str(task)],
        "variants": {"a": [], "b, c": ["optimizer.lr=1e-3"]},
    }
    table = ablate.run(grid)
    assert "| task-test | a |" in table and "| task-test | b, c |" in table
    assert (tmp_path / "out" / "plot.png").stat().st_size > 1000
    capfd.readouterr()
    assert ablate.run(grid) == table and "of 2" not in capfd.readouterr().out
    with pytest.raises(config.ConfigError, match="was made with other settings"):
        ablate.run(grid | {"variants": {"a": ["optimizer.lr=1e-3"]}})
