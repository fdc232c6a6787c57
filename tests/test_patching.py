"""The mechanism of the patches, on a small host of our own: reach, report, holds, threads, exact restoration."""

from __future__ import annotations

import importlib.metadata
import inspect
import pickle
import sys
import threading
import types
import warnings

import pytest

from edgecolbert_kernels.integrations import patching
from edgecolbert_kernels.integrations.patching import Patch, PatchWarning, Target, hit, original

SOURCE = '''
def score(a, b=2, *, scale=1):
    """The host's."""
    return ("host", a, b, scale)

def use(f=score):
    return f(1)

class Loss:
    def __init__(self, metric=score):
        self.metric = metric

    def method(self, x):
        return ("host", x)

    @staticmethod
    def static(x):
        return ("host", x)

    @classmethod
    def named(cls, x):
        return ("host", cls.__name__, x)

def open_ended(*args):
    return args

def closure():
    inner = 1
    def f(x):
        return inner
    return f

closed = closure()
'''


@pytest.fixture
def host(monkeypatch):
    module = types.ModuleType("small_host")
    exec(compile(SOURCE, "small_host", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "small_host", module)
    versions = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2" if name == "small-host" else versions(name))
    return module


def ours(**arguments):
    hit("small_host:score")
    return ("ours", *arguments.values())


def patch(*targets, versions=("1.0", "2.0")):
    made = [target if isinstance(target, Target) else Target(f"small_host:{target}", ours) for target in targets]
    return Patch("small-host", lambda **options: made, versions)


def test_everybody_is_reached(host):
    copy, before = host.score, host.Loss()
    signature, code = inspect.signature(host.score), host.score.__code__
    p = patch("score")
    report = p.apply()
    assert report.reached == ("small_host:score",)
    assert not report.missed
    wanted = ("ours", 1, 2, 1)
    hits = report.hits["small_host:score"] if report.hits else 0
    assert copy(1) == host.score(1) == host.use() == before.metric(1) == host.Loss().metric(a=1) == wanted
    assert host.score(3, scale=5) == ("ours", 3, 2, 5)
    assert report.hits["small_host:score"] == hits + 6
    assert inspect.signature(host.score) == signature
    assert host.score.__doc__ == "The host's."
    with pytest.raises(TypeError, match="score"):
        host.score()
    assert original("small_host:score")(1) == ("host", 1, 2, 1)
    p.undo()
    assert host.score.__code__ is code
    assert copy is host.score
    assert host.use() == ("host", 1, 2, 1)


def test_methods(host):
    names = {name: vars(host.Loss)[name] for name in ("method", "static", "named")}
    p = patch(*(f"Loss.{name}" for name in names))
    p.apply()
    loss = host.Loss()
    assert loss.method(1) == ("ours", loss, 1)
    assert loss.static(1) == host.Loss.static(1) == ("ours", 1)
    assert host.Loss.named(1) == ("ours", host.Loss, 1)
    p.undo()
    assert all(vars(host.Loss)[name] is value for name, value in names.items())
    assert loss.method(1) == loss.static(1) == ("host", 1)
    assert host.Loss.named(1) == ("host", "Loss", 1)


def test_attributes(host):
    targets = [Target(f"small_host:Loss.{name}", value, attribute=True) for name, value in (("new", 1), ("static", 2))]
    static = vars(host.Loss)["static"]
    p = patch(*targets)
    p.apply()
    assert (host.Loss.new, host.Loss.static) == (1, 2)
    p.undo()
    assert not hasattr(host.Loss, "new")
    assert vars(host.Loss)["static"] is static


def test_what_cannot_be_reached_is_a_warning(host):
    names = ("score", "nothing", "Loss.nothing", "Nobody.x", "Loss", "closed", "open_ended")
    p = patch(*names, Target("small_host.sub:f", ours), Target("small_host:absent", ours, optional=True))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        report = p.apply()
    assert report.reached == ("small_host:score",)
    assert len(report.missed) == len(seen) == 7
    assert all(issubclass(each.category, PatchWarning) for each in seen)
    assert "closed: it is a closure" in str(report)
    assert host.use()[0] == "ours"
    p.undo()


def test_untested_versions_are_a_warning(host):
    for versions in (("1.3", "2.0"), ("1.0", "1.2")):
        with pytest.warns(PatchWarning, match=r"small-host 1\.2 is not one of"):
            patch("score", versions=versions).apply()


def test_twice_is_harmless(host):
    code = host.score.__code__
    p = patch("score")
    p.undo()
    assert p.apply() is p.apply()
    p.undo()
    assert host.score.__code__ is code
    p.undo()
    assert host.score(1)[0] == "host"


def test_blocks(host):
    p = patch("score")
    with p.using() as outer:
        with p.using() as inner:
            assert inner is outer
        assert host.score(1)[0] == "ours"
        p.apply()
    assert host.score(1)[0] == "ours"
    with p.using():
        p.undo()
        assert host.score(1)[0] == "ours"
    assert host.score(1)[0] == "host"
    with pytest.raises(KeyError), p.using():
        raise KeyError
    assert host.score(1)[0] == "host"


def test_options(host):
    made = []
    p = Patch("small-host", lambda **options: made.append(options) or [Target("small_host:score", ours)], ("1", "2"))
    p.apply(mode=1)
    p.apply(mode=2)
    assert made == [{"mode": 1}, {"mode": 2}]
    with pytest.raises(RuntimeError, match="mode"), p.using(mode=1):
        pass
    with p.using(mode=2), pytest.raises(RuntimeError, match="mode"):
        p.apply(mode=1)
    p.undo()
    assert host.score(1)[0] == "host"


def test_a_patch_that_fails_leaves_nothing(host):
    def fail(**options):
        return [Target("small_host:score", ours), None]

    with pytest.raises(AttributeError):
        Patch("small-host", fail, ("1", "2")).apply()
    assert host.score(1)[0] == "host"


def test_somebody_else_patched_later(host):
    p = patch("score")
    p.apply()

    def theirs(a, b=2, *, scale=1):
        return "theirs"

    host.score.__code__ = theirs.__code__
    with pytest.warns(PatchWarning, match="left alone"):
        p.undo()
    assert host.score(1) == "theirs"


def test_a_host_that_is_not_installed():
    with pytest.raises(ImportError):
        Patch("no-such-host", list, ("1", "2")).apply()


def test_pickles(host):
    """Of objects made before, while and after the patch; loaded before, while and after."""
    for thing in (host.score, host.Loss, host.Loss.static):
        thing.__module__ = "small_host"
    before = host.Loss()
    pickles = [pickle.dumps(before)]
    p = patch("score")
    with p.using():
        loss = host.Loss()
        pickles += [pickle.dumps(before), pickle.dumps(loss)]
        assert all(pickle.loads(data).metric(1)[0] == "ours" for data in pickles)
        assert b"edgecolbert" not in pickles[-1]
    pickles.append(pickle.dumps(loss))
    assert all(pickle.loads(data).metric(1)[0] == "host" for data in pickles)


def test_threads(host):
    """Calls while others patch and unpatch: each is answered, by one or the other, and the last to leave restores."""
    code = host.score.__code__
    p = patch("score")
    stop, wrong, seen = threading.Event(), [], set()

    def call():
        while not stop.is_set():
            try:
                seen.add(host.score(1)[0])
            except BaseException as error:
                wrong.append(error)
                return

    def hold():
        for _ in range(200):
            with p.using():
                if host.score(1)[0] != "ours":
                    wrong.append("not patched in its own block")

    callers = [threading.Thread(target=call) for _ in range(2)]
    holders = [threading.Thread(target=hold) for _ in range(4)]
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in (*callers, *holders):
            thread.start()
        for thread in holders:
            thread.join(60)
        stop.set()
        for thread in callers:
            thread.join(60)
    finally:
        sys.setswitchinterval(switch)
    assert not wrong
    assert seen <= {"host", "ours"}
    assert host.score.__code__ is code


def test_hits_of_many_threads():
    before = patching.hits().get("test:hits", 0)
    threads = [threading.Thread(target=lambda: [hit("test:hits") for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert patching.hits()["test:hits"] == before + 2000


def test_nothing_is_imported(python):
    out = python(
        "import sys, edgecolbert_kernels, edgecolbert_kernels.integrations\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'pylate', 'sentence_transformers', 'numpy'}))"
    )
    assert out.strip() == "[]"
