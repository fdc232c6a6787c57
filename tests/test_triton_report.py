"""The compiler's report of the GPU kernels: its rules hold, and the committed table is of these sources. Needs no GPU."""

from __future__ import annotations

import json
import platform

import pytest

from tools import triton_report

triton = pytest.importorskip("triton", reason="triton is not installed")

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.system() != "Linux",
    reason="its compiler's tools come for Linux on x86-64",
)

# A part of the table that compiles within a minute: the main shape, the batch, masks, int8, packing, and the losses.
CALLS = (
    "1 query, d 48",
    "128 queries, d 48",
    "1 query, packed, d 48, int8",
    "backward, d 48",
    "pack, d 48, int8",
    "distillation, 16 candidates, kl, minmax",
    "contrastive loss",
)


def stored():
    return [json.loads(line) for line in triton_report.RESULTS.read_text().splitlines()]


def test_the_table_breaks_no_rule():
    rows = stored()
    assert {row["sm"] for row in rows} == set(triton_report.SHARED)
    names = [name for name, _, _ in triton_report.calls()]
    assert list(dict.fromkeys(row["call"] for row in rows)) == names, "python -m tools.triton_report writes it anew"
    dims = {name: dim for name, dim, _ in triton_report.calls()}
    for row in rows:
        fields = {key: value for key, value in row.items() if key not in ("suite", "triton")}
        assert not triton_report.Report(**fields).problems(dims[row["call"]])


def test_the_page_shows_the_table():
    rows = [triton_report.Report(**{k: v for k, v in row.items() if k not in ("suite", "triton")}) for row in stored()]
    assert triton_report.table(rows) in triton_report.TABLE.read_text()


@pytest.mark.parametrize("name", CALLS)
def test_what_the_compiler_says_today(name):
    """Registers may differ by a version of triton; with the one of the table everything is the same."""
    rows = stored()
    for call, dim, run in triton_report.calls():
        if call != name:
            continue
        for sm in triton_report.SHARED:
            for launch in triton_report.launches(run, sm):
                found = triton_report.report(call, dim, launch, sm)
                assert not found.problems(dim)
                if rows[0]["triton"] == triton.__version__:
                    assert {"suite": "triton-aot", "triton": triton.__version__, **vars(found)} in rows


def test_rules_are_broken_by_what_they_forbid():
    row = {"call": "x", "kernel": "score", "sm": 90, "warps": 4, "stages": 3, "registers": 200, "stack": 0, "spills": 0,
           "shared": 1000, "hmma": 0, "hgmma": 3, "steps": 3.0}  # fmt: skip
    assert not triton_report.Report(**row).problems(48)
    for change, text in (
        ({"spills": 2}, "spilling"),
        ({"stack": 8}, "stack"),
        ({"shared": 1 << 20}, "shared memory"),
        ({"hgmma": 0, "hmma": 12}, "no HGMMA"),
        ({"steps": 4.0}, "4.0 steps"),
    ):
        (problem,) = triton_report.Report(**{**row, **change}).problems(48)
        assert text in problem


def test_loops_are_found_in_machine_code():
    code = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   HGMMA.64x32x16.F32 R8, gdesc[UR4], RZ, !UPT ;
        /*0020*/                   HGMMA.64x32x16.F32 R8, gdesc[UR4], R8, gsb0 ;
        /*0030*/                   IADD3 R3, R3, 0x1, RZ ;
        /*0040*/               @P0 BRA 0x20 ;
        /*0050*/              @!P1 BRA 0x10 ;
        /*0060*/                   EXIT ;
    """
    (loop,) = triton_report.tensor_loops(code)
    assert triton_report.volume(loop, 4) == 64 * 32 * 16
    assert triton_report.volume(code, 8) == 2 * 2 * 64 * 32 * 16
