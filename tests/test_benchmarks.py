"""The benchmarks' own arithmetic: interleaving, saving, comparing, reporting. No speed is asserted here."""

from __future__ import annotations

import importlib
import json
import math
import os
import re

import numpy as np
import pytest
import torch

from benchmarks import compare, inputs, interleave, machine, overhead, report, suite, targets
from benchmarks.interleave import Contender
from edgecolbert_kernels import maxsim
from marks import compiled


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
    suite.save("s", [{**mine, "case": "part"}], other_cases=True)
    assert [json.loads(line)["case"] for line in (tmp_path / "s.jsonl").read_text().splitlines()] == [
        "old",
        "new",
        "part",
    ]


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
    assert sorted(seen) == sorted((turn + ahead, name) for turn in range(3) for name in "ab" for ahead in (0, 1))
    assert all(warm == (turn + 1, name) for warm, (turn, name) in zip(seen[::2], seen[1::2], strict=True))
    assert {len(values) for values in samples.values.values()} == {3}


def test_rounds_beside_a_neighbour_do_not_count(monkeypatch):
    """Two rounds of eight touch a low rate and go; where fewer than five would stay, all do."""
    rates = [6, 6, 6, 6, 3, 6, 6, 6, 6]
    monkeypatch.setattr(interleave, "dispatch_rate", iter(rates).__next__)
    samples = interleave.interleave([Contender("a", lambda turn: turn)], 8)
    assert samples.dispatched.tolist() == [6] * 6
    assert len(samples.values["a"]) == len(samples.waited) == 6
    assert interleave.quiet_rounds(np.array([6, 6, 3, 3])).tolist() == [0, 1, 2, 3]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system does not tell cores apart")
def test_every_core_is_asked():
    cores = os.sched_getaffinity(0)
    assert machine.on_each_core(lambda: os.sched_getaffinity(0)) == [{core} for core in cores]
    with pytest.raises(ZeroDivisionError):
        machine.on_each_core(lambda: 1 / 0)
    assert os.sched_getaffinity(0) == cores


def test_a_row_beside_a_neighbour_is_marked():
    ratio = {"ratio": {"exact": quantiles(3)}, "case": "x"}
    alone, shared = (
        {**row("torch eager", 9, **ratio), "waited": 0, "dispatched": dispatched} for dispatched in (5.8, 3.6)
    )
    assert not report.cell(target(), [alone, shared]).endswith("busy")
    assert report.cell(target(), [shared, alone]).endswith("busy")


@compiled
def test_the_call_that_overhead_is_measured_against_scores():
    queries, documents = overhead.inputs()
    torch.testing.assert_close(overhead.raw(0), maxsim(queries, documents), rtol=0, atol=0)


def target(**options) -> targets.Target:
    return targets.Target("number", "x", 2, ("s", "x", "torch eager"), targets.over("exact"), **options)


def test_a_number_stands_under_its_machine():
    """Two machines with the same row: neither's number appears in the other's column."""
    made = [
        {**row("torch eager", 9, ratio={"exact": quantiles(ratio)}), "cpu": cpu, "date": "2026-01-01", "waited": 0}
        for cpu, ratio in (("first", 3.0), ("second", 1.5))
    ]
    table = report.targets_table(report.by_machine(made), [target()])
    head, _, line = table.splitlines()
    cells = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert cells["first"] == "yes: 3x (2.94 to 3.06)"
    assert cells["second"] == "**no**: 1.5x (1.47 to 1.53)"


def test_what_was_not_measured_says_where():
    made = [{**row("torch eager", 9), "cpu": "first", "date": "2026-01-01", "waited": 0}]
    table = report.targets_table(report.by_machine(made), [target(), target(on=targets.H100)])
    assert "not measured on a CPU" in table.splitlines()[2]
    assert "not measured on an H100" in table.splitlines()[3]


def test_a_row_that_waited_is_marked():
    waiting = {**row("torch eager", 9, ratio={"exact": quantiles(3)}), "waited": 0.2}
    assert report.cell(target(), [waiting]).endswith("busy")


def test_targets_that_are_bounds_from_above():
    bound = targets.Target("number", " us", 15, ("s", "x", "overhead"), at_most=True)
    assert bound.reached(15)
    assert not bound.reached(16)


def test_every_target_names_a_suite_and_its_contender():
    """A renamed case or contender would read as not measured."""
    # The suite of the GPU names its goals itself; rows that a suite derives from its samples are known when it has run.
    derived = ("overhead", ", saved", ", memory")
    for each in (*targets.TARGETS, *targets.FURTHER):
        suite_name, case_name, contender = each.at
        if each.on != targets.ANY_CPU or any(word in contender for word in derived):
            continue
        cases = {case.name: case for case in importlib.import_module(f"benchmarks.{suite_name}").cases()}
        if suite_name == "isa" and machine.compiled_module() is None:
            continue
        assert case_name in cases, each
        names = {found.name for found in cases[case_name].contenders}
        # An instruction set that this CPU lacks, a second core.
        assert contender in names or contender.startswith(("exact avx", "fast 1", "exact 1")), (each, names)


def test_the_page_has_every_machine_and_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "PAGE", tmp_path / "benchmarks.md")
    monkeypatch.setattr(report, "IMAGES", tmp_path / "images")
    (tmp_path / "images").mkdir()
    rows = report.load(suite.RESULTS)
    page = report.page(rows)
    for which, found in report.by_machine(rows).items():
        assert f"\n## {report.title(which, found)}\n" in page
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
    assert pictures
    assert all((tmp_path / path).exists() for path in pictures)
    assert "nan" not in page


def test_rows_of_a_gpu():
    made = {
        "suite": "gpu", "cpu": "c", "gpu": "NVIDIA H100 80GB HBM3", "date": "2026-01-01", "unit": "ms",
        "case": "1 x 1k x 300, d 48", "contender": "fused", **quantiles(0.01), "wall": quantiles(0.02),
        "TFLOP/s": quantiles(90), "percent_of_memory": quantiles(80), "error": 1e-5, "ratio": {},
    }  # fmt: skip
    wanted = next(each for each in targets.TARGETS if each.at[0] == "gpu")
    assert report.cell(wanted, [made]) == "yes: 0.02 ms (0.0196 to 0.0204)"
    machines = report.by_machine([made])
    assert "yes: 0.02 ms" in report.targets_table(machines, [wanted])
    assert "| 90 | 80 % |" in report.suite_table("gpu", [made])


def test_what_is_derived_of_contenders_stands_in_their_rows():
    memory = [{**row(f"{name}, memory", value), "unit": "MiB"} for name, value in (("fused", 12), ("eager", 80))]
    made = [row("fused", 2), row("eager", 9), *memory, row("fused, masked", 3)]
    head, _, *lines = (line[2:-2].split(" | ") for line in report.result_table(made).splitlines())
    cells = [dict(zip(head, line, strict=True)) for line in lines]
    assert [each["contender"] for each in cells] == ["fused", "eager", "fused, masked"]
    assert [each["memory"] for each in cells] == ["12 MiB", "80 MiB", ""]
    assert "of its peak" not in head


def test_rows_that_are_no_times():
    rows = [{"suite": "quality", "case": "a", "cpu": "c", "date": "2026-01-01", "ndcg": 0.5, "more": [1]}]
    assert report.suite_table("other", rows) == "| case | ndcg |\n|---|---|\n| a | 0.5 |"
