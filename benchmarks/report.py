"""The committed results as a page: ``python -m benchmarks.report`` writes docs/benchmarks.md and docs/images/bench/*.svg.

``--terminal`` prints the numbers to reach for this machine instead, ``--results DIR`` reads another folder than results/.
Every number stands under the machine that it was measured on; nothing is averaged or compared across machines.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import machine, plots, suite
from benchmarks.interleave import QUIET
from benchmarks.targets import ANY_CPU, FURTHER, H100, HOPPERS, TARGETS, Target

Rows = Sequence[Mapping]
Machine = tuple[str, str | None]
PAGE = machine.ROOT / "docs" / "benchmarks.md"
IMAGES = machine.ROOT / "docs" / "images" / "bench"
WAITED = 0.05  # share of time spent waiting for a core, above which a number is marked

# Names for what hypervisors call just "AMD EPYC".
CPUS = {
    "family 25 model 1)": "Zen 3",
    "family 25 model 17)": "Zen 4",
    "family 26 model 2)": "Zen 5",
}
TITLES = {
    "rerank": "Rerank: 1 query (Lq = 32), 1000 documents of 300 tokens, one thread",
    "batch": "Batch: 32 queries, 1000 documents of 300 tokens, d = 48, one thread",
    "peers": "Everything else that is installed, on the same rerank",
    "scaling": "Collections of 10 to 10,000 documents, uniform and ragged, d = 48, one thread",
    "dtypes": "Storage of the documents",
    "layouts": "Own candidates, pairs, chosen pairs",
    "isa": "Every instruction set, beside its own peak",
    "threads": "Threads, wall-clock time",
    "overhead": "What a call costs beyond its kernel",
    "training": "Forward and backward in a batch, Lq = 32, Ld = 180, d = 48, one thread",
    "losses": "Losses, forward and backward",
    "gradcache": "A GradCache step",
    "packing": "From an encoder's states to packed fp16",
    "search": "Exact top-10 of a collection, one thread",
    "storage": "The packed store",
    "st_maxsim": "sentence-transformers 6, as it is and patched",
    "pylate_rerank": "PyLate, as it is and patched",
    "pylate_step": "A training step of PyLate",
    "quality": "nDCG@10 by storage and precision",
    "gpu": "The kernels of the GPU",
    "table13": "Encode a collection and score it with 650 queries",
    "paper_shapes": "One step of each stage at the paper's shapes, and a document of 32k tokens",
    "pylate_quality": "nDCG@10 of PyLate, as it is and patched",
}


def load(folder: Path) -> list[dict]:
    rows = []
    for path in sorted(folder.glob("*.jsonl")):
        rows += [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if "cpu" in row and "suite" in row]


def by_machine(rows: Rows) -> dict[Machine, list[Mapping]]:
    """Rows of each machine; the machine with the newest rows first."""
    found: dict[Machine, list[Mapping]] = {}
    for row in sorted(rows, key=lambda row: row["date"][:10], reverse=True):
        found.setdefault(suite.of_machine(row), []).append(row)
    return found


def title(which: Machine, rows: Rows) -> str:
    cpu, gpu = which
    name = next((short for end, short in CPUS.items() if cpu.endswith(end)), cpu)
    isas = sorted({row["isa"] for row in rows if row.get("isa")})
    return (f"{gpu}, " if gpu else "") + name + (f", {isas[0]}" if len(isas) == 1 else "")


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def spread(found: Mapping, unit: str = "") -> str:
    text = f"{number(found['p50'])}{unit}"
    return text + (f" ({number(found['p20'])} to {number(found['p80'])})" if "p20" in found else "")


def busy(row: Mapping, rows: Rows) -> bool:
    """Whether others had a part of the core: it was waited for, or it started fewer instructions a cycle than it can."""
    most = max((each.get("dispatched", 0) for each in rows), default=0)
    return row.get("waited", 0) > WAITED or row.get("dispatched", most) < QUIET * most


def cell(target: Target, rows: Rows) -> str:
    """What one machine's rows say of a target."""
    found = target.found(rows)
    if found is None:
        return "not measured"
    row, value = found
    reached = target.reached(value["p50"])
    notes = ["busy" if busy(row, rows) else "", "" if reached else target.explained(rows)]
    noted = "".join(f", {note}" for note in notes if note)
    return f"{'yes' if reached else '**no**'}: {spread(value, target.unit)}{noted}"


def belongs(target: Target, which: Machine) -> bool:
    return any(name in (which[1] or "") for name in HOPPERS) if target.on == H100 else which[1] is None


def targets_table(machines: Mapping[Machine, Rows], targets: Sequence[Target]) -> str:
    """One column a machine; a target of a machine that no row comes from says so."""
    columns = {which: rows for which, rows in machines.items() if any(belongs(each, which) for each in targets)}
    lines = [
        "| number | to reach | " + " | ".join(title(which, rows) for which, rows in columns.items()) + " | file |",
        "|---|---|" + "---|" * len(columns) + "---|",
    ]
    for target in targets:
        fits = [which for which in columns if belongs(target, which)]
        cells = [cell(target, rows) if which in fits else "" for which, rows in columns.items()]
        if not any(target.found(columns[which]) for which in fits):
            place = ANY_CPU if target.on == ANY_CPU else target.on
            cells[0] = f"not measured on {place}"
            cells[1:] = [""] * (len(cells) - 1)
            file = ""
        else:
            file = "gpu-*.jsonl" if target.at[0] == "gpu" else f"{target.at[0]}.jsonl"
        lines.append(f"| {target.text} | {target.wanted} | " + " | ".join(cells) + f" | {file} |")
    return "\n".join(lines)


def machines_table(machines: Mapping[Machine, Rows]) -> str:
    lines = [
        "| machine | as the system names it | compiler | torch | measured | at commit |",
        "|---|---|---|---|---|---|",
    ]
    for which, rows in machines.items():
        values = {
            name: ", ".join(sorted({str(row[name]) for row in rows if row.get(name)}))
            for name in ("compiler", "torch", "commit")
        }
        dates = sorted({row["date"][:10] for row in rows})
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        system = ", ".join(filter(None, which))
        commit = values["commit"] or "not recorded"
        lines.append(
            f"| {title(which, rows)} | {system} | {values['compiler']} | {values['torch']} | {when} | {commit} |"
        )
    return "\n".join(lines)


def joined(rows: Rows) -> tuple[list[dict], list[str]]:
    """Rows with what was derived of a contender, "NAME, memory" in another unit, as a value of its own; those values' names."""
    made = [dict(row) for row in rows]
    found = {(row["case"], row.get("threads"), row["contender"]): row for row in made}
    quantities: dict[str, list[dict]] = {}
    for row in made:
        contender, _, quantity = row["contender"].rpartition(", ")
        of = found.get((row["case"], row.get("threads"), contender))
        if of and of["unit"] != row["unit"]:
            of[quantity] = f"{number(row['p50'])} {row['unit']}"
            quantities.setdefault(quantity, []).append(row)
    # A quantity of one contender alone stays a row.
    quantities = {quantity: derived for quantity, derived in quantities.items() if len(derived) > 1}
    gone = [id(row) for derived in quantities.values() for row in derived]
    return [row for row in made if id(row) not in gone], list(quantities)


def result_table(rows: Rows) -> str:
    """Every contender of a suite; a column that would be empty is left out."""
    several = len({row.get("threads") for row in rows}) > 1
    rows, quantities = joined(rows)
    lines = []
    for row in rows:
        scaled = f", extrapolated x {row['extrapolated']:g}" if row.get("extrapolated", 1) > 1 else ""
        share = row.get("percent_of_peak", {}).get("p50") or 100 * row.get("of_memory", {}).get("p50", 0)
        lines.append({
            "case": row["case"],
            "threads": row["threads"] if several else "",
            "contender": row["contender"],
            "p50 (p20 to p80)": f"{spread(row)} {row['unit']}{scaled}",
            "GB/s": number(row["gigabytes_a_second"]) if row.get("gigabytes_a_second") else "",
            "of its peak": f"{share:.0f} %" if share else "",
            "of the same lines": f"{100 * row['of_same_lines']['p50']:.0f} %" if "of_same_lines" in row else "",
            "of memcpy": f"{100 * row['of_memcpy']['p50']:.0f} %" if "of_memcpy" in row else "",
            "time over that of": ", ".join(f"{name} {value['p50']:.3g}x" for name, value in row.get("ratio", {}).items()),
            **{quantity: row.get(quantity, "") for quantity in quantities},
            "error": row.get("error", ""),
            "waited": row.get("waited", ""),
            "dispatched": row.get("dispatched", ""),
        })  # fmt: skip
    names = [name for name in lines[0] if any(line[name] != "" for line in lines)]
    head = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    return "\n".join(head + ["| " + " | ".join(str(line[name]) for name in names) + " |" for line in lines])


def quality_table(rows: Rows) -> str:
    names = [name for name in ("nDCG@10", "R@100", "RR@10") if all(name in row for row in rows)]
    lines = ["| corpus | storage | MiB | " + " | ".join(names) + " |", "|---|---|---|" + "---|" * len(names)]
    for row in rows:
        values = " | ".join(f"{row[name]:.4f}" for name in names)
        lines.append(f"| {row['case']} | {row['contender']} | {row['mebibytes']} | {values} |")
    return "\n".join(lines)


def table13(rows: Rows) -> str:
    lines = [
        "| model | d | contender | documents | encode, s | score, s | share of scoring | memory, MiB | peak, MiB | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        scaled = f"extrapolated x {row['extrapolated']:.3g}" if row.get("extrapolated", 1) > 1 else ""
        memory = number(row["memory_mib"]) if row["memory_mib"] else ""
        lines.append(
            f"| {row['size']} | {row['dim']} | {row['contender']} | {row['documents']:,} | {number(row['encode_s'])} "
            f"| {number(row['score_s'])} | {100 * row['score_share']:.1f} % | {memory} "
            f"| {number(row['peak_mib']) if row['peak_mib'] else ''} | {scaled} |"
        )
    return "\n".join(lines)


def plain_table(rows: Rows) -> str:
    """Whatever a suite without times of contenders writes, the machine's facts left out."""
    facts = {"suite", "quick", *machine.facts(), *(package.replace("-", "_") for package in machine.PACKAGES)}
    names = list(dict.fromkeys(name for row in rows for name in row if name not in facts))
    names = [name for name in names if all(not isinstance(row.get(name), (dict, list)) for row in rows)]
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * len(names) + "|"]
    lines += ["| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def gpu_tests(row: Mapping) -> str:
    counts = ", ".join(f"{row[name]} {name}" for name in ("passed", "failed", "error", "skipped") if name in row)
    ended = "" if row["exit_status"] is not None else "; stopped there, with some left"
    return f"Tests that a GPU takes part in: {counts} in {row['seconds']} s{ended}.\n"


def gpu_table(rows: Rows) -> str:
    lines = [
        *(gpu_tests(row) for row in rows if row["case"] == "tests"),
        "| case | contender | device, ms | wall, ms | TFLOP/s | of the bandwidth | of a copy | GB | device time over that of "
        "| error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "p50" not in row:  # tests, and cases that failed
            continue
        rate = number(row["TFLOP/s"]["p50"]) if "TFLOP/s" in row else ""
        share, of_copy = (
            f"{row[name]['p50']:.0f} %" if name in row else "" for name in ("percent_of_memory", "percent_of_copy")
        )
        ratio = ", ".join(f"{name} {value['p50']:.3g}x" for name, value in row.get("ratio", {}).items())
        lines.append(
            f"| {row['case']} | {row['contender']} | {spread(row)} | {number(row['wall']['p50'])} | {rate} | {share} "
            f"| {of_copy} | {row.get('GB') or ''} | {ratio} | {row.get('error', '')} |"
        )
    return "\n".join(lines)


def suite_table(name: str, rows: Rows) -> str:
    if name == "table13":
        return table13(rows)
    if name == "gpu":
        return gpu_table(rows)
    if name == "quality":
        return quality_table(rows)
    times = all({"case", "contender", "unit", "p50"} <= row.keys() for row in rows)
    return result_table(rows) if times else plain_table(rows)


def machine_section(which: Machine, rows: Rows) -> list[str]:
    name = title(which, rows)
    parts = [f"## {name}"]
    for picture, (draw, caption) in plots.ALL.items():
        path = IMAGES / f"{slug(name)}-{picture}.svg"
        if draw(rows, path):
            parts.append(f"![{caption}, {name}]({path.relative_to(PAGE.parent)})")
    names = [*TITLES, *sorted({row["suite"] for row in rows} - TITLES.keys())]
    for each in names:
        chosen = [row for row in rows if row["suite"] == each]
        if chosen:
            table = suite_table(each, chosen)
            quick = " (a short run)" if any(row.get("quick") for row in chosen) else ""
            summary = f"<summary>{TITLES.get(each, each)}{quick}</summary>"
            parts.append(f'<details markdown="1">\n{summary}\n\n{table}\n\n</details>')
    return parts


INTRODUCTION = """\
# Benchmarks

<!-- Written by python -m benchmarks.report from benchmarks/results: run it again instead of changing this page. -->

    make bench          # every suite
    make bench-quick    # the main ones, briefly; no committed result changes

Contenders take turns in one process, each is checked against float64 before it is timed, and the peaks are measured in the
same rounds; a ratio is the median over rounds of two times of one round. The numbers are p50 (p20 to p80). The machines were
shared virtual ones: trust ratios and shares of a peak before times. "busy" marks rows in which this process waited for a core
for more than 5 % of the time ("waited" in the tables), or in which the core started at least 15 % fewer instructions a cycle
than in the machine's best row ("dispatched"), as another thread was on it. [In full](../benchmarks/README.md)."""


SET_FOR = """\
The numbers of one query and of int8 were set for a CPU with AVX-512 and VNNI; AVX2 has a line of its own. All were set for a
core that is not shared with another thread. Where a multiple of another contender's speed is missed, beside it stands the share
of its peak that would be needed (fp32's of exact, int16's of fast: where int8 screens them both can be passed), or of training
how much of the time that would be left its scores take at the peak (twice, where they are recomputed); where a share of the
bandwidth is, how a copy of as many bytes did in the same rounds."""


def page(rows: Rows) -> str:
    """The page; its pictures are drawn on the way."""
    machines = by_machine(rows)
    parts = [INTRODUCTION, "## Machines", machines_table(machines)]
    parts += ["## Numbers to reach", SET_FOR, targets_table(machines, TARGETS)]
    parts += ["Set beside them while the kernels were written:", targets_table(machines, FURTHER)]
    for which, found in machines.items():
        parts += machine_section(which, found)
    return "\n\n".join(parts) + "\n"


def terminal(rows: Rows, targets: Sequence[Target]) -> str:
    """The numbers to reach on this machine, in columns."""
    lines = []
    for target in targets:
        found = target.found(rows)
        if found is None:
            continue
        row, value = found
        verdict = "yes" if target.reached(value["p50"]) else "NO"
        mark = "  busy machine" if busy(row, rows) else ""
        lines.append(f"{target.text:<64}{target.wanted:>12}  {spread(value, target.unit):<28}{verdict}{mark}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=suite.RESULTS, metavar="DIR")
    parser.add_argument("--terminal", action="store_true", help="print this machine's numbers, write nothing")
    options = parser.parse_args()
    rows = load(options.results)
    if options.terminal:
        here = [row for row in rows if suite.of_machine(row) == (machine.cpu_model(), machine.gpu())]
        if not here:
            raise SystemExit(f"no results of this machine in {options.results}")
        print(f"{title(suite.of_machine(here[0]), here)}: {here[0]['cpu']}, torch {here[0].get('torch')}")
        print(terminal(here, [*TARGETS, *FURTHER]))
        return
    IMAGES.mkdir(parents=True, exist_ok=True)
    text = page(rows)
    PAGE.write_text(text)
    for picture in IMAGES.glob("*.svg"):
        if picture.name not in text:
            picture.unlink()
    print(f"{PAGE}: {len(by_machine(rows))} machines, {len(rows)} rows, {len(list(IMAGES.glob('*.svg')))} pictures")


if __name__ == "__main__":
    main()
