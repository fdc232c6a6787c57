"""Every instruction set that this CPU runs, forced in turn, beside its own peak; one thread."""

from collections.abc import Iterator

from benchmarks import contenders, machine, suite
from benchmarks.inputs import Shape
from benchmarks.interleave import Contender

CALLS = {
    "exact": (contenders.fused, "exact", "f32"),
    "exact unscreened": (contenders.unscreened, "exact", "f32"),
    "fast": (contenders.fused, "fast", "i16"),
}
"""Function, precision and whose peak."""


def case(name: str, shape: Shape, isas: list[str], rounds: tuple[int, int]) -> suite.Case:
    found = []
    for isa in isas:
        peaks = {kind: contenders.peak(kind, isa) for kind in ("f32", "i16")}
        found += [peak for peak in peaks.values() if peak.call(0)]
        for call_name, (function, precision, kind) in CALLS.items():
            # Without int16 multiply-adds "fast" runs as "exact".
            peak = peaks[kind] if peaks[kind] in found else peaks["f32"]
            call = shape.on_f16(function, isa=isa, precision=precision)
            found.append(Contender(f"{call_name} {isa}", call, shape.operations, peak.name))
    return suite.Case(
        name=name,
        parameters=shape.parameters,
        contenders=found,
        rounds=rounds,
        expected=shape.float64_scores,
    )


def cases() -> Iterator[suite.Case]:
    module = machine.compiled_module()
    if module is None:
        print("isa: skipped, the compiled module is not built")
        return
    isas = [isa for isa in module.available_isas() if isa != "scalar"]
    yield case("1 query", Shape(1, 32, 1000, 300, 48), isas, rounds=(27, 9))
    yield case("8 queries", Shape(8, 32, 1000, 300, 48), isas, rounds=(13, 5))
    yield case("1 query, scalar", Shape(1, 32, 1000, 300, 48), ["scalar"], rounds=(7, 3))


if __name__ == "__main__":
    suite.main("isa", cases)
