"""Documents come and go: in memory without copying the rest, in a folder by commits that are whole or not there."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import edgecolbert_kernels as ek
from cases import ragged
from edgecolbert_kernels import PackedEmbeddings, PackedFormatError, PackedLocked, PackedWriter
from edgecolbert_kernels.storage import reader
from edgecolbert_kernels.storage import writer as storage_writer

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")

DTYPES = ("float16", "bfloat16", "float32", "int8")


def rows(*lengths, seed=1, dim=8):
    return [x.numpy() for x in ragged(lengths, dim, seed=seed)]


def contents(packed):
    return [x.tolist() for x in packed]


# In memory


@pytest.mark.parametrize("dtype", DTYPES)
def test_append(dtype):
    packed, views, whole = PackedEmbeddings.empty(8, dtype), [], rows(*range(12))
    for n, each in enumerate(whole):
        packed = packed.append([each], [n])
        views.append(packed)
    wanted = PackedEmbeddings.from_list(whole, range(12), dtype=dtype)
    # Every view on the way still shows what it showed.
    for n, view in enumerate(views, 1):
        assert contents(view) == contents(wanted[:n])
        assert view.ids == list(range(n))
        assert view.position(n - 1) == n - 1
        with pytest.raises(KeyError):
            view.position(n)
    assert packed.append([]) is packed


def test_a_view_that_has_an_id_twice_is_not_joined():
    packed = PackedEmbeddings.from_list([np.ones((2, 4))] * 3, ["a", "b", "c"])
    for parts in ([packed[[0, 0]], packed[2:]], [packed[2:], packed[[0, 0]]], [packed[[0, 0]]]):
        with pytest.raises(ValueError, match="'a' stands twice"):
            PackedEmbeddings.concatenate(parts)


def test_append_packed(tmp_path):
    """A view's ids come along, as with a writer; others may be given."""
    named, nameless = PackedEmbeddings.from_list(rows(1, 2), ["a", "b"]), PackedEmbeddings.from_list(rows(3))
    other = PackedEmbeddings.from_list(rows(4, 5, 6), ["x", "y", "z"], dtype="int8")[[2, 0]]
    for start, added, ids, wanted in (
        (named, other, None, ["a", "b", "z", "x"]),
        (named, other, ["c", "d"], ["a", "b", "c", "d"]),
        (named, nameless, ["c"], ["a", "b", "c"]),
        (nameless, nameless, None, None),
        (nameless, other, None, ValueError),
        (named, nameless, None, ValueError),
        (named, named, None, ValueError),
        (named, PackedEmbeddings.empty(9), None, ValueError),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        start.save(folder)
        with PackedWriter(folder) as writer:
            if wanted is ValueError:
                for owner in (start, writer):
                    with pytest.raises(ValueError, match=r"ids|dim 9; want 8"):
                        owner.append(added, ids)
                continue
            writer.append(added, ids)
        grown, stored = start.append(added, ids), PackedEmbeddings.load(folder, verify=True)
        assert grown.ids == stored.ids == wanted
        assert grown.dtype == "float16"
        assert contents(grown) == contents(stored)


def test_append_copies_little():
    """Appending is linear in all: the memory moves a few dozen times, not a thousand."""
    packed, addresses = PackedEmbeddings.empty(4), set()
    for _ in range(1000):
        packed = packed.append([np.ones((1, 4), np.float16)])
        addresses.add(packed._tokens.ctypes.data)
    assert len(packed) == 1000
    assert len(addresses) < 40


def test_append_to_nothing():
    """Where no document is left, ids may come or go."""
    named = PackedEmbeddings.from_list(rows(2, 3), ["a", "b"])
    for nothing in (PackedEmbeddings.from_list([], [], dim=8), named.remove([0, 1]), named[:0]):
        assert nothing.append(rows(1, 4)).ids is None
        assert nothing.append(rows(1, 4), [7, 8]).ids == [7, 8]
        assert nothing.append(rows(1), ["a"]).append(rows(4), ["b"]).lengths.tolist() == [1, 4]


def test_two_views_append_to_one():
    """The second one copies: neither sees the other's document."""
    base = PackedEmbeddings.empty(8).append(rows(2, 3), ["a", "b"])
    first, second = base.append(rows(1), ["c"]), base.append(rows(4), ["d"])
    third = base.remove([0]).append(rows(5), ["e"])
    assert [view.ids for view in (base, first, second, third)] == [
        ["a", "b"],
        ["a", "b", "c"],
        ["a", "b", "d"],
        ["b", "e"],
    ]
    assert [view.lengths.tolist() for view in (base, first, second, third)] == [[2, 3], [2, 3, 1], [2, 3, 4], [3, 5]]
    assert [base.position("b"), first.position("c"), second.position("d"), third.position("e")] == [1, 2, 2, 1]
    with pytest.raises(KeyError):
        base.position("c")


def test_append_after_views():
    base = PackedEmbeddings.from_list(rows(1, 2, 3, 4), list("abcd"))
    for view in (base[1:3], base[[3, 0]], base.remove(ids=["b"])):
        grown = view.append(rows(5), ["x"])
        assert grown.ids == [*view.ids, "x"]
        assert contents(grown[:-1]) == contents(view)
        again = grown.remove([0]).append(rows(6), ["y"]).append(rows(7), ["z"])
        assert again.ids == [*grown.ids[1:], "y", "z"]
        assert again.lengths.tolist()[-2:] == [6, 7]


def test_threads_append_to_one():
    base = PackedEmbeddings.empty(8).append(rows(2))
    grown: list = [None] * 16

    def append(n):
        grown[n] = base.append([np.full((3, 8), n, np.float32)])

    threads = [threading.Thread(target=append, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, view in enumerate(grown):
        assert len(view) == 2
        assert (view[1] == n).all()


def test_remove():
    packed = PackedEmbeddings.from_list(rows(1, 2, 3, 4, 5), list("abcde"))
    assert packed.remove([1, 1, 3]).ids == ["a", "c", "e"]
    assert packed.remove(np.array([True, False, False, False, True])).ids == ["b", "c", "d"]
    assert packed.remove(ids=["e", "a"]).remove([0]).ids == ["c", "d"]
    assert packed.remove([0], ids=["b"]).position("c") == 0
    assert packed.remove([]).ids == packed.ids
    assert np.shares_memory(packed.remove([0])._tokens, packed._tokens)
    with pytest.raises(IndexError):
        packed.remove([5])
    with pytest.raises(KeyError, match="x"):
        packed.remove(ids=["a", "x"])
    with pytest.raises(KeyError):
        packed.remove(ids=["a"]).remove(ids=["a"])
    with pytest.raises(KeyError):
        PackedEmbeddings.from_list(rows(1)).remove(ids=["a"])


def test_a_string_is_no_list_of_ids(tmp_path):
    """Its letters would name other documents."""
    packed = PackedEmbeddings.from_list(rows(1, 2, 3, 4), ["1", "2", "12", "3"])
    packed.save(tmp_path / "packed")
    with PackedWriter(tmp_path / "packed") as writer:
        for names in ("12", b"12", np.str_("12")):
            for call in (
                lambda names=names: packed.remove(ids=names),
                lambda names=names: writer.remove(ids=names),
                lambda names=names: writer.append(rows(5, 6), names),
                lambda names=names: PackedEmbeddings.from_list(rows(1, 2), names),
                lambda names=names: ek.search(np.ones((2, 8), np.float32), packed, 1, ids=names),
            ):
                with pytest.raises(TypeError, match="want a list of ids"):
                    call()
        assert len(writer) == 4


def test_wrong_indices(tmp_path):
    """A writer removes what a view would remove, and refuses what that refuses."""
    packed = PackedEmbeddings.from_list(rows(1, 2, 3, 4, 5, 6), list("543210"))
    packed.save(tmp_path / "packed")
    with PackedWriter(tmp_path / "packed") as writer:
        for bad, error in (
            (np.array([False, False, False, False, True]), ValueError),
            (np.zeros((6, 1), bool), ValueError),
            ([1.7], TypeError),
            (["5"], TypeError),
            ([None], TypeError),
            ([6], IndexError),
            ([-1], IndexError),
            (np.array([2**64 - 1], np.uint64), IndexError),
        ):
            for owner in (packed, writer):
                with pytest.raises(error, match=r"mask|index"):
                    owner.remove(bad)
        assert len(writer) == 6
        writer.remove(np.array([False, True, False, False, False, True]))
    assert PackedEmbeddings.load(tmp_path / "packed").ids == list("5321")


def test_ids_stay_unique():
    packed = PackedEmbeddings.from_list(rows(1, 2), ["a", "b"])
    with pytest.raises(ValueError, match="'b' is there"):
        packed.append(rows(3), ["b"])
    assert packed.remove(ids=["b"]).append(rows(3), ["b"]).ids == ["a", "b"]
    with pytest.raises(ValueError, match="ids"):
        packed.append(rows(3))
    with pytest.raises(TypeError, match="kind"):
        packed.append(rows(3), [3])
    with pytest.raises(ValueError, match="ids"):
        PackedEmbeddings.from_list(rows(1)).append(rows(2), ["a"])


def test_views_with_repeats(tmp_path):
    """They can be scored, but what ids are to name has each id once."""
    packed = PackedEmbeddings.from_list(rows(1, 2, 3), list("abc"))
    twice = packed[[0, 0, 1]]
    assert ek.maxsim(np.ones((1, 8), np.float32), twice).shape == (3,)
    other = PackedEmbeddings.from_list(rows(4), ["z"])
    packed.save(tmp_path / "there")
    for call in (
        lambda: twice.save(tmp_path / "packed"),
        lambda: twice.save(tmp_path / "there", overwrite=True),
        lambda: PackedEmbeddings.concatenate([other, twice]),
        lambda: PackedEmbeddings.concatenate([other[:0], twice]),
    ):
        with pytest.raises(ValueError, match="'a' stands twice"):
            call()
    assert not (tmp_path / "packed").exists()
    assert PackedEmbeddings.load(tmp_path / "there", verify=True).ids == list("abc")
    assert other.append(rows(5), ["a"]).ids == ["z", "a"]
    PackedEmbeddings.from_list(rows(1, 2))[[0, 0, 1]].save(tmp_path / "packed")
    assert PackedEmbeddings.load(tmp_path / "packed").lengths.tolist() == [1, 1, 2]


# In a folder


class Growing(RuleBasedStateMachine):
    """A folder, and the same documents in a plain list."""

    def __init__(self):
        super().__init__()
        self.model: list[tuple[str, np.ndarray]] = []
        self.counter = 0
        self.writer = None

    @initialize(dtype=st.sampled_from(DTYPES))
    def create(self, dtype):
        self.folder = Path(tempfile.mkdtemp(dir=os.environ["PYTEST_GROWTH"])) / "packed"
        self.dtype = dtype
        self.memory = PackedEmbeddings.empty(3, dtype)
        self.writer = PackedWriter(self.folder, dim=3, dtype=dtype)

    @rule(lengths=st.lists(st.integers(0, 4), max_size=4))
    def append(self, lengths):
        self.counter += 1
        documents = rows(*lengths, seed=self.counter, dim=3)
        ids = [f"{self.counter}.{n}" for n in range(len(lengths))]
        self.writer.append(documents, ids)
        self.memory = self.memory.append(documents, ids)
        self.model += zip(
            ids, PackedEmbeddings.from_list(documents, dtype=self.dtype, dim=3).to("float32"), strict=True
        )

    @rule(data=st.data(), new=st.integers(0, 2))
    def upsert(self, data, new):
        self.counter += 1
        there = [name for name, _ in self.model]
        old = data.draw(st.lists(st.sampled_from(there), max_size=3, unique=True)) if there else []
        ids = [*old, *(f"{self.counter}.{n}" for n in range(new))]
        documents = rows(*range(len(ids)), seed=self.counter, dim=3)
        self.writer.upsert(documents, ids)
        self.memory = self.memory.remove(ids=old).append(documents, ids)
        stored = PackedEmbeddings.from_list(documents, dtype=self.dtype, dim=3).to("float32")
        self.model = [each for each in self.model if each[0] not in old] + list(zip(ids, stored, strict=True))

    @rule(data=st.data())
    def remove(self, data):
        if not self.model:
            return
        gone = data.draw(st.lists(st.integers(0, len(self.model) - 1), max_size=4, unique=True))
        if data.draw(st.booleans()):
            self.writer.remove(gone)
            self.memory = self.memory.remove(gone)
        else:
            names = [self.model[n][0] for n in gone]
            self.writer.remove(ids=names)
            self.memory = self.memory.remove(ids=names)
        self.model = [each for n, each in enumerate(self.model) if n not in gone]

    @rule()
    def compact(self):
        self.writer.compact()

    @rule()
    def reopen(self):
        self.writer.close()
        self.writer = PackedWriter(self.folder)

    @invariant()
    def same(self):
        if self.writer is None:
            return
        assert len(self.writer) == len(self.model)
        for packed in (PackedEmbeddings.load(self.folder, verify=True), self.memory):
            assert len(packed) == len(self.model)
            assert (packed.ids or []) == [name for name, _ in self.model]
            for found, (_, wanted) in zip(packed.to("float32"), self.model, strict=True):
                np.testing.assert_array_equal(found, wanted)

    def teardown(self):
        if self.writer is not None:
            self.writer.close()


@pytest.fixture(autouse=True)
def growth_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_GROWTH", str(tmp_path))


TestGrowing = Growing.TestCase
TestGrowing.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)


def test_writer(tmp_path):
    with pytest.raises(PackedFormatError):
        PackedWriter(tmp_path / "packed")
    with PackedWriter(tmp_path / "packed", dim=8, dtype="int8") as writer:
        writer.append(rows(1, 2), ["a", "b"])
        assert "a" in writer
        assert "c" not in writer
        writer.append(PackedEmbeddings.from_list(rows(3, 4), ["c", "d"]))
        for bad, error in ((["a"], ValueError), ([5], ValueError), (None, ValueError), (["x", "x"], ValueError)):
            with pytest.raises(error, match="ids"):
                writer.append(rows(*[1] * len(bad or [1])), bad)
        with pytest.raises(ValueError):
            writer.append([np.ones((1, 9), np.float32)], ["e"])
        with pytest.raises(KeyError):
            writer.remove(ids=["a", "x"])
        with pytest.raises(IndexError):
            writer.remove([0, 4])
        assert len(writer) == 4
    assert PackedEmbeddings.load(tmp_path / "packed", verify=True).ids == list("abcd")
    with pytest.raises(ValueError, match="dim 8"):
        PackedWriter(tmp_path / "packed", dim=9)
    with pytest.raises(ValueError, match="dtype int8"):
        PackedWriter(tmp_path / "packed", dim=8, dtype="float16")
    # The refusals gave the lock back.
    PackedWriter(tmp_path / "packed", dim=8, dtype=np.int8).close()


def test_upsert(tmp_path):
    folder = tmp_path / "packed"
    with PackedWriter(folder, dim=8) as writer:
        writer.upsert(rows(1, 2), ["a", "b"])
        writer.upsert(PackedEmbeddings.from_list(rows(3, 4), ["c", "a"]))
        assert (len(writer), "a" in writer) == (3, True)
        writer.upsert([])
        for bad, error in ((None, ValueError), (["b", "b"], ValueError), (["b", 1], TypeError), ([1, 2], ValueError)):
            with pytest.raises(error, match="ids"):
                writer.upsert(rows(5, 6), bad)
        writer.remove(ids=["c"])
        writer.append(rows(7), ["c"])
    packed = PackedEmbeddings.load(folder, verify=True)
    assert (packed.ids, packed.lengths.tolist()) == (["b", "a", "c"], [2, 4, 7])
    PackedEmbeddings.from_list(rows(1)).save(tmp_path / "nameless")
    with PackedWriter(tmp_path / "nameless") as writer, pytest.raises(ValueError, match="ids"):
        writer.upsert(rows(2), ["a"])


def test_a_refused_append_leaves_an_empty_folder_alone(tmp_path):
    twice = PackedEmbeddings.from_list(rows(1, 2), ["a", "b"])[[0, 0]]
    with PackedWriter(tmp_path / "packed", dim=8) as writer:
        for change in (writer.append, writer.upsert):
            with pytest.raises(ValueError, match="'a' stands twice"):
                change(twice)
        assert reader.read_header(tmp_path / "packed").ids == "none"


def test_a_writer_in_an_empty_folder(tmp_path):
    (tmp_path / "packed").mkdir()
    with PackedWriter(tmp_path / "packed", dim=8) as writer:
        writer.append(rows(1))
    assert len(PackedEmbeddings.load(tmp_path / "packed", verify=True)) == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("years of work")
    for path in (tmp_path / "other", tmp_path / "other/thesis.txt"):
        with pytest.raises(PackedFormatError):
            PackedWriter(path, dim=8)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_appending_rewrites_nothing(tmp_path):
    PackedEmbeddings.from_list(rows(100, 200)).save(tmp_path / "packed")
    path = tmp_path / "packed/tokens.0.bin"
    inode, before = path.stat().st_ino, path.read_bytes()
    view = PackedEmbeddings.load(tmp_path / "packed")
    with PackedWriter(tmp_path / "packed") as writer:
        writer.append(rows(3))
        writer.remove([0])
    assert path.stat().st_ino == inode
    assert path.read_bytes()[: len(before)] == before
    assert path.stat().st_size == len(before) + 3 * 8 * 2
    assert len(view) == 2
    assert PackedEmbeddings.load(tmp_path / "packed").lengths.tolist() == [200, 3]
    with PackedWriter(tmp_path / "packed") as writer:
        writer.compact()
    assert PackedEmbeddings.load(tmp_path / "packed", verify=True).lengths.tolist() == [200, 3]
    assert sum(each.stat().st_size for each in (tmp_path / "packed").glob("tokens.*")) == 203 * 8 * 2
    assert view.lengths.tolist() == [100, 200]
    assert view.tokens.tobytes() == before


def test_a_second_writer(tmp_path):
    """In this process and in another; the lock ends with its holder."""
    folder = tmp_path / "packed"
    writer = PackedWriter(folder, dim=8)
    with pytest.raises(PackedLocked, match=f"process {os.getpid()}"):
        PackedWriter(folder)
    with pytest.raises(PackedLocked):
        PackedEmbeddings.empty(8).save(folder, overwrite=True)
    source = "import sys; from edgecolbert_kernels import PackedWriter; PackedWriter(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    found = subprocess.run([sys.executable, "-c", source, folder], env=environment, capture_output=True, text=True)
    assert found.returncode
    assert "PackedLocked" in found.stderr
    writer.close()
    PackedWriter(folder).close()


def test_what_a_killed_writer_leaves_takes_room_until_it_is_written_over(tmp_path):
    folder = tmp_path / "index"
    PackedEmbeddings.from_list(rows(4)).save(folder)

    def taken():
        return sum(path.stat().st_size for path in folder.glob("*.bin"))

    size = taken()
    with (folder / "tokens.0.bin").open("ab") as file:
        file.write(bytes(10_000))
    (folder / "tokens.7.bin").write_bytes(bytes(10_000))
    with PackedWriter(folder) as writer:
        assert taken() == size + 20_000
        writer.append(rows(1))
        assert taken() == size + 20_000 + 8, "one more offset"
        writer.remove([1])
        writer.compact()
    assert taken() == size


def test_a_closed_writer(tmp_path):
    """Another may have written since: nothing is written without the lock."""
    folder = tmp_path / "packed"
    PackedEmbeddings.from_list(rows(1, 2)).save(folder)
    closed = PackedWriter(folder)
    closed.close()
    closed.close()
    with PackedWriter(folder) as writer:
        writer.append(rows(3))
        for change in (
            lambda: closed.append(rows(4)),
            lambda: closed.remove([0]),
            lambda: closed.remove([]),
            lambda: closed.compact(),
            lambda: "a" in closed,
        ):
            with pytest.raises(ValueError, match="is closed"):
                change()
        writer.append(rows(5))
    assert PackedEmbeddings.load(folder, verify=True).lengths.tolist() == [1, 2, 3, 5]


def test_a_writer_is_not_copied(tmp_path):
    with PackedWriter(tmp_path / "packed", dim=8) as writer:
        for call in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="copied or pickled"):
                call(writer)


def test_threads_share_a_writer(tmp_path, monkeypatch):
    """As if one had done it all, one commit after another."""
    folder, problems = tmp_path / "packed", []
    monkeypatch.setattr(storage_writer.os, "fsync", lambda file: time.sleep(0))

    def change(n):
        try:
            for m in range(12):
                names = [f"{n}.{m}.{each}" for each in range(n + 1)]
                writer.append([np.full((1 + (n + m) % 5, 4), float(n))] * (n + 1), names)
                if m % 3 == 0:
                    writer.remove(ids=names[:1])
                if m == n:
                    writer.compact()
                assert all(name in writer for name in names[m % 3 == 0 :])
        except BaseException as error:
            problems.append(f"{type(error).__name__}: {error}")

    with PackedWriter(folder, dim=4) as writer:
        threads = [threading.Thread(target=change, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not problems
    packed = PackedEmbeddings.load(folder, verify=True)
    wanted = {f"{n}.{m}.{each}" for n in range(8) for m in range(12) for each in range(m % 3 == 0, n + 1)}
    assert set(packed.ids) == wanted
    for name, document in zip(packed.ids, packed, strict=True):
        n, m, _ = map(int, name.split("."))
        assert document.shape == (1 + (n + m) % 5, 4)
        assert (document == n).all()


def _use_inherited(writer, folder, found):
    for change in (lambda: writer.append(rows(4)), lambda: writer.remove([0]), lambda: writer.compact(), writer.close):
        try:
            found.put(change())
        except PackedLocked as error:
            found.put(str(error))
    try:
        PackedWriter(folder)
    except PackedLocked as error:
        found.put(str(error))


@forks
def test_a_forked_child_does_not_write(tmp_path, monkeypatch):
    """Nor take the lock away from its parent, nor wait for a thread that it has not got."""
    folder, context = tmp_path / "packed", multiprocessing.get_context("fork")
    started, go_on = threading.Event(), threading.Event()
    fsync = os.fsync

    def slow(file):
        started.set()
        go_on.wait(60)
        fsync(file)

    with PackedWriter(folder, dim=8) as writer:
        writer.append(rows(1))
        monkeypatch.setattr(storage_writer.os, "fsync", slow)
        thread = threading.Thread(target=writer.append, args=(rows(2),))
        thread.start()
        started.wait(60)
        found = context.Queue()
        child = context.Process(target=_use_inherited, args=(writer, folder, found), daemon=True)
        child.start()
        answers = [found.get(timeout=60) for _ in range(5)]
        child.join(60)
        assert child.exitcode == 0
        go_on.set()
        thread.join()
        writer.append(rows(3))
    assert all(f"process {os.getpid()}; this is a fork" in answer for answer in answers[:3])
    assert answers[3] is None
    assert f"process {os.getpid()}" in answers[4]
    assert PackedEmbeddings.load(folder, verify=True).lengths.tolist() == [1, 2, 3]


@forks
def test_the_lock_does_not_stay_with_children(tmp_path):
    """`close` gives it back though a forked child has the file open."""
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    writer = PackedWriter(tmp_path / "packed", dim=8)
    child = context.Process(target=stop.wait, args=(60,), daemon=True)
    child.start()
    writer.close()
    PackedWriter(tmp_path / "packed").close()
    stop.set()
    child.join()


def _read_along(folder, stop, problems):
    seen = 0
    while not stop.is_set():
        try:
            packed = PackedEmbeddings.load(folder, verify=True)
            assert len(packed) >= seen, "a commit vanished"
            assert packed.ids is None or packed.ids == list(range(len(packed)))
            for n in (0, len(packed) // 2, len(packed) - 1):
                if len(packed):
                    assert (packed[n] == n % 1000).all(), f"document {n}"
            seen = len(packed)
        except BaseException as error:
            problems.put(f"{type(error).__name__}: {error}")
            return
    problems.put(None if seen else "nothing was seen")


def test_readers_while_a_writer_appends(tmp_path):
    folder = tmp_path / "packed"
    context = multiprocessing.get_context("fork")
    stop, problems = context.Event(), context.Queue()
    with PackedWriter(folder, dim=4) as writer:
        writer.append([np.zeros((2, 4))], [0])
        readers = [context.Process(target=_read_along, args=(folder, stop, problems)) for _ in range(2)]
        for reader in readers:
            reader.start()
        for n in range(1, 200):
            writer.append([np.full((1 + n % 5, 4), n % 1000, np.float32)], [n])
            if n % 50 == 0:
                writer.compact()
        stop.set()
    found = [problems.get(timeout=60) for _ in readers]
    for reader in readers:
        reader.join()
    assert found == [None, None]


class Crash(BaseException):
    """What a process that dies leaves: nothing after it runs."""


def test_a_crash_at_every_byte(tmp_path, monkeypatch):
    """Writing stops after each number of bytes, and before and after each system call, in append, remove and compact."""
    budget = [0]
    write, replace = os.write, os.replace
    monkeypatch.setattr(storage_writer.os, "fsync", lambda file: None)  # nothing here cuts the power

    def spend(amount):
        budget[0] -= amount
        if budget[0] < 0:
            raise Crash

    def partial_write(file, data):
        if len(data) > budget[0]:
            write(file, data[: budget[0]])
        spend(len(data))
        return write(file, data)

    def counted(call):
        def run(*arguments):
            spend(1)
            result = call(*arguments)
            spend(1)
            return result

        return run

    changes = {
        "append": (lambda writer: writer.append(rows(2, 0, 1, seed=5), ["x", "y", "z"]), ["b", "c"], ["b", "c", "x", "y", "z"]),
        "remove": (lambda writer: writer.remove(ids=["c"]), ["b", "c"], ["b"]),
        "upsert": (lambda writer: writer.upsert(rows(2, 1, seed=5), ["b", "x"]), ["b", "c"], ["c", "b", "x"]),
        "compact": (lambda writer: writer.compact(), ["b", "c"], ["b", "c"]),
    }  # fmt: skip
    for name, (change, before, after) in changes.items():
        outcomes = []
        for stop in range(10_000):
            folder = tmp_path / f"{name}.{stop}"
            PackedEmbeddings.from_list(rows(1, 2, 3), list("abc"), dtype="int8").save(folder)
            with PackedWriter(folder) as writer:
                writer.remove([0])
                with monkeypatch.context() as patch:
                    patch.setattr(storage_writer.os, "write", partial_write)
                    patch.setattr(storage_writer.os, "replace", counted(replace))
                    patch.setattr(storage_writer.os, "fsync", counted(lambda file: None))
                    budget[0] = stop
                    try:
                        change(writer)
                    except Crash:
                        whole = False
                    else:
                        whole = True
            found = PackedEmbeddings.load(folder, verify=True)
            assert found.ids in (before, after)
            outcomes.append(found.ids == after)
            # Writing goes on as if nothing had been.
            with PackedWriter(folder) as writer:
                writer.append(rows(7), ["last"])
            again = PackedEmbeddings.load(folder, verify=True)
            assert again.ids == [*found.ids, "last"]
            assert contents(again[:-1]) == contents(found)
            if whole:
                break
        else:
            raise AssertionError("never finished")
        assert stop > 100
        # Once there, it stays.
        assert outcomes == sorted(outcomes)
        assert outcomes[-1]


def test_a_full_disk_gets_its_room_back(tmp_path, monkeypatch):
    """Wherever it fills up, what the commit has taken of it is freed; who reads is not disturbed."""
    folder, write = tmp_path / "packed", os.write
    documents = PackedEmbeddings.from_list(rows(300, 200, 400), list("abc"), dtype="int8")
    documents.save(folder)
    with PackedWriter(folder) as writer:
        writer.remove([0])

    def sizes():
        return {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "lock"}

    left = sizes()
    view = PackedEmbeddings.load(folder)
    wanted = contents(view)
    changes = {
        "append": lambda writer: writer.append(rows(500, 1), ["x", "y"]),
        "remove": lambda writer: writer.remove([0]),
        "compact": lambda writer: writer.compact(),
        "save": lambda _: documents.save(folder, overwrite=True),
    }
    for name, change in changes.items():
        for stop in range(50):
            room = [stop * 300]

            def partial_write(file, data, room=room):
                if not room[0]:
                    raise OSError(28, "No space left on device")
                count = write(file, data[: room[0]])
                room[0] -= count
                return count

            writer = None if name == "save" else PackedWriter(folder)
            try:
                with monkeypatch.context() as patch:
                    patch.setattr(storage_writer.os, "write", partial_write)
                    change(writer)
            except OSError as error:
                assert error.errno == 28
            else:
                break
            finally:
                if writer is not None:
                    writer.close()
            assert sizes() == left
            assert contents(view) == contents(PackedEmbeddings.load(folder, verify=True)) == wanted
        assert 0 < stop < 49, name
        shutil.rmtree(folder)
        documents.save(folder)
        with PackedWriter(folder) as writer:
            writer.remove([0])


def test_an_error_after_the_commit_takes_nothing_back(tmp_path, monkeypatch):
    """Once the header is renamed, its bytes are those of readers."""
    PackedEmbeddings.from_list(rows(1, 2)).save(tmp_path / "packed")

    def fail(folder):
        raise OSError(5, "Input/output error")

    for change, lengths in (
        (lambda writer: writer.append(rows(3)), [1, 2, 3]),
        (lambda writer: writer.remove([0]), [2, 3]),
        (lambda writer: writer.compact(), [2, 3]),
    ):
        with PackedWriter(tmp_path / "packed") as writer:
            with monkeypatch.context() as patch:
                patch.setattr(storage_writer, "_flush_folder", fail)
                with pytest.raises(OSError, match="Input/output"):
                    change(writer)
            assert PackedEmbeddings.load(tmp_path / "packed", verify=True).lengths.tolist() == lengths
            with pytest.raises(RuntimeError, match="open it again"):
                writer.append(rows(4))
    with PackedWriter(tmp_path / "packed") as writer:
        writer.append(rows(4))
    assert PackedEmbeddings.load(tmp_path / "packed", verify=True).lengths.tolist() == [2, 3, 4]


def test_a_full_disk(tmp_path, monkeypatch):
    """An error of the disk is raised, what was committed stays, and the writer takes no more."""
    with PackedWriter(tmp_path / "packed", dim=8) as writer:
        writer.append(rows(1))

        def full(file, data):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(storage_writer.os, "write", full)
            with pytest.raises(OSError, match="No space"):
                writer.append(rows(2))
        with pytest.raises(RuntimeError, match="open it again"):
            writer.append(rows(2))
        with pytest.raises(RuntimeError, match="open it again"):
            writer.compact()
    assert PackedEmbeddings.load(tmp_path / "packed", verify=True).lengths.tolist() == [1]
    with PackedWriter(tmp_path / "packed") as writer:
        writer.append(rows(2))
    assert ek.maxsim(np.ones((1, 8), np.float32), PackedEmbeddings.load(tmp_path / "packed")).shape == (2,)
