"""The benchmarks' own arithmetic: interleaving, saving, comparing, reporting. No speed is asserted here."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from benchmarks import compare, inputs, interleave, machine, suite
from benchmarks.interleave import Contender


def row(contender: str, p50: float, spread: float = 0.02, **more) -> dict:
    interval = {"p20": p50 * (1 - spread), "p50": p50, "p80": p50 * (1 + spread)}
    return {"cpu": "c", "suite": "s", "case": "x", "contender": contender, "unit": "ms", **interval, **more}


def keyed(*rows: dict) -> dict:
    return {(r["cpu"], r.get("gpu"), r["suite"], r["case"], r["contender"]): r for r in rows}


def quantiles(p50: float, spread: float = 0.02) -> dict[str, float]:
    return {"p20": p50 * (1 - spread), "p50": p50, "p80": p50 * (1 + spread)}


def test_a_slower_machine_is_no_slower_kernel():
    before = keyed(row("exact", 4.0, percent_of_peak=quantiles(90)))
    after = keyed(row("exact", 8.0, percent_of_peak=quantiles(90)))
    (change,) = compare.compare(before, after)
    assert change.percent_slower == 0
    assert not change.beyond(5)


def test_a_lower_share_of_the_peak_is_one():
    before = keyed(row("exact", 4.0, percent_of_peak=quantiles(90)))
    after = keyed(row("exact", 4.0, percent_of_peak=quantiles(60)))
    (change,) = compare.compare(before, after)
    assert change.percent_slower == pytest.approx(100 / 3)
    assert change.beyond(10)
    assert compare.report([change], 10)[1] == 1
    assert compare.report([change], 50)[1] == 0


def test_the_ratio_to_a_peer_stands_in_the_peers_row():
    before = keyed(row("fused", 4.0), row("torch eager", 40.0, ratio={"fused": quantiles(10)}))
    after = keyed(row("fused", 9.0), row("torch eager", 45.0, ratio={"fused": quantiles(5)}))
    (change,) = compare.compare(before, after)
    assert change.before.kind == "torch eager over it"
    assert change.percent_slower == pytest.approx(50)


def test_intervals_that_overlap_are_noise():
    before = keyed(row("exact", 4.0, percent_of_peak=quantiles(90, spread=0.3)))
    after = keyed(row("exact", 4.0, percent_of_peak=quantiles(60, spread=0.3)))
    (change,) = compare.compare(before, after)
    assert not change.beyond(10)


def test_other_machines_and_contenders_are_left_alone():
    other = {**row("exact", 9.0), "cpu": "another"}
    assert compare.compare(keyed(row("exact", 4.0)), keyed(other)) == []
    assert compare.compare(keyed(row("torch eager", 4.0)), keyed(row("torch eager", 9.0))) == []


def test_the_command_line(tmp_path, capsys):
    for name, share in (("old", 90), ("new", 60)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "s.jsonl").write_text(json.dumps(row("exact", 4.0, percent_of_peak=quantiles(share))) + "\n")
    folders = [str(tmp_path / "old"), str(tmp_path / "new")]
    assert compare.main(folders) == 1
    assert "33.3 % slower  s: x, exact" in capsys.readouterr().out
    assert compare.main([folders[0], folders[0]]) == 0
    (tmp_path / "new" / "s.jsonl").write_text("")
    assert compare.main(folders) == 2


def case(*contenders: Contender, **options) -> suite.Case:
    return suite.Case("case", contenders, expected=lambda: torch.zeros(1), rounds=(3, 2), **options)


def test_a_wrong_contender_is_not_timed():
    wrong = Contender("wrong", lambda _turn: torch.ones(1))
    with pytest.raises(AssertionError, match="case, wrong: error 1"):
        suite.rows(case(wrong), [wrong], quick=False, label="")


def test_an_inexact_contender_is_timed_with_its_error():
    inexact = Contender("inexact", lambda _turn: torch.ones(1), tolerance=math.inf)
    (found,) = suite.rows(case(inexact), [inexact], quick=False, label="")
    assert found["error"] == 1
    assert found["rounds"] == 3


def test_a_nan_is_an_error():
    broken = Contender("broken", lambda _turn: torch.full((1,), math.nan))
    with pytest.raises(AssertionError, match="nan"):
        suite.rows(case(broken), [broken], quick=False, label="")


def test_quick_runs_leave_the_results_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(suite, "QUICK_RESULTS", tmp_path / "quick")
    here = {"cpu": machine.cpu_model(), "gpu": machine.gpu()}
    suite.save("s", [{"case": "full", "quick": False, **here}])
    suite.save("s", [{"case": "quick", "quick": True, **here}])
    assert "full" in (tmp_path / "results" / "s.jsonl").read_text()
    assert "quick" in (tmp_path / "quick" / "s.jsonl").read_text()


def test_a_run_replaces_the_rows_of_its_machine_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "RESULTS", tmp_path)
    other = {"case": "old", "cpu": "another"}
    mine = {"case": "old", "cpu": machine.cpu_model(), "gpu": machine.gpu()}
    (tmp_path / "s.jsonl").write_text(f"{json.dumps(other)}\n{json.dumps(mine)}\n")
    suite.save("s", [{**mine, "case": "new"}])
    assert [json.loads(line)["case"] for line in (tmp_path / "s.jsonl").read_text().splitlines()] == ["old", "new"]


def test_rows_name_the_commit_and_the_versions():
    facts = machine.facts()
    assert facts["torch"] == torch.__version__
    assert {"cpu", "gpu", "cores", "isa", "commit", "edgecolbert_kernels", "numpy", "date"} <= facts.keys()


def test_lengths_are_those_of_a_corpus():
    drawn = inputs.lengths(20_000)
    assert drawn.min() >= 8
    assert drawn.max() <= inputs.LONGEST
    assert np.median(drawn) == pytest.approx(inputs.MEDIAN_LENGTH, rel=0.05)


def test_every_contender_has_a_turn_in_every_round():
    seen = []
    made = [Contender(name, lambda turn, name=name: seen.append((turn, name))) for name in "ab"]
    samples = interleave.interleave(made, 3)
    assert sorted(seen[2:]) == [(turn, name) for turn in range(3) for name in "ab"]
    assert {len(values) for values in samples.values.values()} == {3}
