"""The same contenders under pytest-benchmark: ``pytest benchmarks/ --benchmark-only``.

pytest-benchmark times one contender after the other; take ratios from ``python -m benchmarks.all``,
which interleaves them.
"""

import itertools

import pytest

from benchmarks import (
    batch,
    dtypes,
    gradcache,
    isa,
    layouts,
    losses,
    machine,
    overhead,
    packing,
    peers,
    rerank,
    scaling,
    search,
    threads,
    training,
)

SUITES = (
    rerank,
    batch,
    layouts,
    training,
    losses,
    gradcache,
    packing,
    overhead,
    threads,
    isa,
    scaling,
    dtypes,
    peers,
    search,
)
CONTENDERS = [
    pytest.param(
        f"{suite.__name__.split('.')[-1]}, {case.name}",
        case,
        contender,
        id=f"{suite.__name__.split('.')[-1]}-{case.name}-{contender.name}",
        marks=pytest.mark.skipif(contender.missing is not None, reason=str(contender.missing)),
    )
    for suite in SUITES
    for case in suite.cases()
    for contender in case.contenders
    if not contender.returns_rate
]


@pytest.mark.parametrize(("group", "case", "contender"), CONTENDERS)
def test_speed(benchmark, group, case, contender):
    benchmark.group = group
    machine.set_threads(case.threads)
    turns = itertools.count()
    benchmark.pedantic(
        contender.call,
        setup=lambda: ((next(turns),), {}),
        rounds=case.rounds[True] or 3,
        warmup_rounds=1,
    )
