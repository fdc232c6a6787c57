"""The folder: what is written, how it is read by hand, and every way in which it can be bad."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

import edgecolbert_kernels as ek
from cases import embeddings, ragged
from edgecolbert_kernels import PackedEmbeddings, PackedFormatError, PackedWriter
from edgecolbert_kernels.storage import header, reader

DTYPES = ("float16", "bfloat16", "float32", "int8")
LENGTHS = (3, 0, 7, 30, 1)
IDS = {"none": None, "utf8": ["a", "", "hä", "\U0001f600", "e" * 300], "int64": [5, -1, 0, 2**63 - 1, 7]}
ROOT = Path(__file__).resolve().parent.parent


def make(dtype="float16", ids="utf8") -> PackedEmbeddings:
    return PackedEmbeddings.from_list([x.numpy() for x in ragged(LENGTHS, 8, seed=1)], IDS[ids], dtype=dtype)


def same(found: PackedEmbeddings, wanted: PackedEmbeddings) -> None:
    assert (found.dtype, found.dim, found.ids) == (wanted.dtype, wanted.dim, wanted.ids)
    assert found.offsets.tolist() == wanted.offsets.tolist()
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.scales, wanted.scales)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with every kind of file in it, and a removed document."""
    make("int8").save(tmp_path / "packed")
    with PackedWriter(tmp_path / "packed") as writer:
        writer.remove(ids=["hä"])
    return tmp_path / "packed"


def edit(folder: Path, change, *, checksum: bool = True) -> None:
    """Let `change` alter the header's record, and make its checksum right again."""
    path = folder / header.NAME
    record = json.loads(path.read_text())
    changed = change(record)
    text = json.dumps(record if changed is None else changed)
    path.write_bytes(signed(text.encode()) if checksum else text.encode())


def signed(text: bytes) -> bytes:
    pattern = rb'"header_crc32": "[0-9a-f]{8}"'
    zeroed = re.sub(pattern, b'"header_crc32": "00000000"', text)
    return re.sub(pattern, b'"header_crc32": "%08x"' % zlib.crc32(zeroed), zeroed)


def refused(folder: Path, match: str) -> None:
    """By whatever opens it."""
    for mmap in (True, False):
        with pytest.raises(PackedFormatError, match=match):
            PackedEmbeddings.load(folder, mmap=mmap)
    with pytest.raises(PackedFormatError, match=match):
        PackedEmbeddings.verify(folder)
    with pytest.raises(PackedFormatError, match=match):
        PackedWriter(folder)
    with pytest.raises(PackedFormatError, match=match):
        make().save(folder, overwrite=True)


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mmap", [True, False])
def test_round_trip(tmp_path, dtype, ids, mmap):
    packed = make(dtype, ids)
    for number, view in enumerate((packed, packed[1:4], packed[[3, 0]], packed.remove([1]), packed[:0])):
        view.save(tmp_path / str(number))
        loaded = PackedEmbeddings.load(tmp_path / str(number), mmap=mmap, verify=True)
        if len(view):
            same(loaded, view)
        else:
            assert (len(loaded), loaded.dtype, loaded.dim) == (0, dtype, 8)
    Q = embeddings(2, 5, 8, seed=3)
    whole = PackedEmbeddings.load(tmp_path / "0", mmap=mmap)
    np.testing.assert_array_equal(ek.maxsim(Q.numpy(), whole), ek.maxsim(Q.numpy(), packed))
    np.testing.assert_array_equal(ek.maxsim(Q, whole).numpy(), ek.maxsim(Q, packed).numpy())
    with pytest.raises(ValueError, match="read-only"):
        whole.tokens[...] = 0


def test_only_what_is_asked_for_is_read(tmp_path):
    """Opening maps the tokens: a sparse file of 4 TiB opens at once."""
    PackedEmbeddings.from_list([np.ones((1, 8), np.float16)]).save(tmp_path / "packed")
    tokens = 1 << 38
    try:
        os.truncate(tmp_path / "packed/tokens.0.bin", tokens * 16)
    except OSError:
        pytest.skip("the file system has no files of 4 TiB")
    offsets = np.array([0, 3, tokens])
    (tmp_path / "packed/offsets.0.bin").write_bytes(offsets.tobytes())

    def change(record):
        record |= {"documents": 2, "tokens": tokens}
        record["parts"]["tokens"]["bytes"] = tokens * 16
        record["parts"]["offsets"]["bytes"] = 24

    edit(tmp_path / "packed", change)
    packed = PackedEmbeddings.load(tmp_path / "packed")
    assert packed[0].tolist() == [[1.0] * 8, [0.0] * 8, [0.0] * 8]
    assert ek.maxsim(np.ones((1, 8), np.float32), packed[:1]).tolist() == [8.0]
    assert packed.num_tokens == tokens


def test_save_puts_nothing_in_the_way(tmp_path):
    packed = make()
    packed.save(tmp_path / "deep/er/packed")
    assert sorted(path.name for path in (tmp_path / "deep/er").iterdir()) == ["packed"]
    with pytest.raises(FileExistsError):
        packed.save(tmp_path / "deep/er/packed")
    (tmp_path / "empty").mkdir()
    packed.save(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises((FileExistsError, PackedFormatError)):
            packed.save(tmp_path / "other", overwrite=overwrite)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("text")
    with pytest.raises(FileExistsError):
        packed.save(tmp_path / "file")


def test_overwrite(tmp_path):
    make().save(tmp_path / "packed")
    before = PackedEmbeddings.load(tmp_path / "packed")
    other = make("int8", "int64")[1:]
    for _ in range(3):
        other.save(tmp_path / "packed", overwrite=True)
        same(PackedEmbeddings.load(tmp_path / "packed", verify=True), other)
    same(before, make())
    assert len(list((tmp_path / "packed").glob("tokens.*"))) == 1
    # Onto itself.
    loaded = PackedEmbeddings.load(tmp_path / "packed")
    loaded[::-1].save(tmp_path / "packed", overwrite=True)
    same(PackedEmbeddings.load(tmp_path / "packed", verify=True), other[::-1])
    other.save(tmp_path / "new", overwrite=True)


def test_the_header_says(folder):
    record = json.loads((folder / "header.json").read_text())
    assert record["format"] == "edgecolbert-packed"
    assert (record["version"], record["dtype"], record["dim"], record["ids"]) == (1, "int8", 8, "utf8")
    assert (record["documents"], record["tokens"], record["removed"]) == (5, sum(LENGTHS), 1)
    for name, part in record["parts"].items():
        content = (folder / f"{name}.0.bin").read_bytes()
        assert part == {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}


def example() -> str:
    """The Python example of docs/packed-format.md."""
    text = (ROOT / "docs/packed-format.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code


def test_the_documented_reader(folder, tmp_path):
    """The example reads with numpy alone what this package wrote."""
    code = example()
    assert "edgecolbert_kernels" not in code
    names: dict = {}
    exec(code, names)
    for dtype in DTYPES:
        for ids in IDS:
            make(dtype, ids).save(tmp_path / dtype / ids)
            documents, found = names["read"](tmp_path / dtype / ids)
            assert found == IDS[ids]
            for rows, wanted in zip(documents, make(dtype, ids).to("float32"), strict=True):
                np.testing.assert_array_equal(rows, wanted)
    documents, found = names["read"](folder)
    assert found == ["a", "", "\U0001f600", "e" * 300]
    (folder / "header.json").write_bytes((folder / "header.json").read_bytes().replace(b'"dim": 8', b'"dim": 4'))
    with pytest.raises(ValueError):
        names["read"](folder)


# Bad folders


def test_not_a_folder(tmp_path):
    for path, match in ((tmp_path / "absent", "does not exist"), (tmp_path, "has no header.json")):
        with pytest.raises(PackedFormatError, match=match):
            PackedEmbeddings.load(path)
        with pytest.raises(PackedFormatError, match=match):
            PackedWriter(path)
    (tmp_path / "file").write_text("text")
    with pytest.raises(PackedFormatError, match="is not a folder"):
        PackedEmbeddings.load(tmp_path / "file")
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("part", ["tokens", "offsets", "scales", "ids", "id_offsets", "removed"])
def test_missing_and_truncated_files(folder, part):
    path = folder / f"{part}.0.bin"
    content = path.read_bytes()
    for size in {0, 1, len(content) // 2, len(content) - 1}:
        path.write_bytes(content[:size])
        refused(folder, rf"{part}\.0\.bin: {size} bytes; the header counts {len(content)}")
    path.unlink()
    refused(folder, rf"{part}\.0\.bin is missing")
    path.write_bytes(content + b"left by an append that did not finish")
    same(PackedEmbeddings.load(folder, verify=True), make("int8").remove(ids=["hä"]))


@pytest.mark.parametrize("part", ["tokens", "offsets", "scales", "ids", "id_offsets", "removed"])
def test_every_bit_of_the_data_is_checked(folder, part):
    """verify() sees any flipped bit; load() at least never hands out an offset that leaves the file."""
    path = folder / f"{part}.0.bin"
    content = bytearray(path.read_bytes())
    for bit in np.random.default_rng(1).permutation(len(content) * 8)[:200].tolist():
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(PackedFormatError, match=part):
            PackedEmbeddings.load(folder, verify=True)
        try:
            packed = PackedEmbeddings.load(folder)
        except PackedFormatError:
            pass
        else:
            ek.maxsim(np.ones((1, 8), np.float32), packed)
        content[bit // 8] ^= 1 << bit % 8


def test_every_bit_of_the_header_is_checked(folder):
    path = folder / header.NAME
    content = bytearray(path.read_bytes())
    for bit in range(len(content) * 8):
        content[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PackedFormatError):
            header.parse(bytes(content), "header.json")
        content[bit // 8] ^= 1 << bit % 8
    for size in range(len(content)):
        if not content[size:].strip():
            continue
        with pytest.raises(PackedFormatError):
            header.parse(bytes(content[:size]), "header.json")


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("format", "zarr", "format"),
        ("version", 2, "version 2; this program reads version 1"),
        ("version", 0, "version 0"),
        ("byteorder", "big", "byteorder is 'big'"),
        ("dtype", "float64", "dtype"),
        ("dtype", ["int8"], "dtype"),
        ("dim", 0, "dim"),
        ("dim", -8, "dim"),
        ("dim", 8.0, "number"),
        ("dim", True, "dim"),
        ("dim", "8", "dim"),
        ("dim", None, "dim"),
        ("dim", 1 << 40, "dim"),
        ("dim", 16, "tokens has"),
        ("ids", "utf16", "ids"),
        ("ids", "none", "unknown"),
        ("ids", "int64", "parts"),
        ("generation", "../../etc", "generation"),
        ("documents", 4, "make"),
        ("documents", 1 << 60, "documents"),
        ("documents", 1 << 40, "make"),
        ("tokens", 10**30, "tokens"),
        ("tokens", 40, "make"),
        ("removed", 6, "removed"),
        ("removed", 0, "make"),
        ("parts", [], "parts"),
        ("parts", {}, "missing"),
        ("surprise", 1, "surprise"),
    ],
)
def test_header_fields(folder, name, value, match):
    edit(folder, lambda record: record.update({name: value}))
    refused(folder, match)


@pytest.mark.parametrize("name", ["format", "version", "byteorder", "dtype", "dim", "ids", "documents", "parts"])
def test_missing_header_fields(folder, name):
    edit(folder, lambda record: {key: value for key, value in record.items() if key != name})
    refused(folder, name)


@pytest.mark.parametrize(
    ("part", "value", "match"),
    [
        ("tokens", None, "tokens"),
        ("tokens", {"bytes": 1}, "crc32"),
        ("tokens", {"bytes": 10**40, "crc32": "0" * 8}, "bytes"),
        ("tokens", {"bytes": -1, "crc32": "0" * 8}, "bytes"),
        ("tokens", {"bytes": 328, "crc32": "0" * 7}, "crc32"),
        ("tokens", {"bytes": 328, "crc32": 0}, "crc32"),
        ("tokens", {"bytes": 320, "crc32": "0" * 8}, "make"),
        ("../tokens", {"bytes": 1, "crc32": "0" * 8}, "unknown"),
        ("ids", {"bytes": 1 << 61, "crc32": "0" * 8}, "the header counts"),
        ("ids", {"bytes": 3, "crc32": "0" * 8}, "id_offsets"),
    ],
)
def test_header_parts(folder, part, value, match):
    edit(folder, lambda record: record["parts"].update({part: value}))
    refused(folder, match)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"null", b"[]", b"3", b'"text"', b"\xff\xfe", b"\0" * 100, b"[" * 60000, b'{"a":' * 10000,
        b"1" * 60000, b'{"version": NaN}', b'{"version": Infinity}', b'{"version": 1e400}', b"{} {}", b"\xef\xbb\xbf{}",
    ],
)  # fmt: skip
def test_not_json(folder, text):
    (folder / "header.json").write_bytes(text)
    refused(folder, "header.json")


def test_hostile_json(folder):
    path = folder / "header.json"
    text = path.read_bytes()
    for old, new in (
        (b'"dim": 8', b'"dim": 8, "dim": 16'),
        (b'"dim": 8', b'"dim": NaN'),
        (b'"dim": 8', b'"dim": Infinity'),
        (b'"dim": 8', b'"dim": 8e0'),
        (b'"dim": 8', b'"dim": ' + b"9" * 5000),
        (b'"bytes": 328', b'"bytes": NaN'),
        (b'"dim": 8', b'"dim": 8, "x": "\\"header_crc32\\": \\"00000000\\""'),
        (b'"dim": 8', b'"dim": {"header_crc32": "00000000"}'),
    ):
        assert old in text, old
        path.write_bytes(signed(text.replace(old, new, 1)))
        refused(folder, "header.json")
    path.write_bytes(text + b" " * (1 << 16))
    refused(folder, "at most")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ([1, 3, 3, 10, 40, 41], "starts at 1"),
        ([0, 3, 2, 10, 40, 41], "falls from 3 to 2 at entry 2"),
        ([0, -3, 3, 10, 40, 41], "falls"),
        ([0, 3, 3, 10, 40, 40], "ends at 40; want 41"),
        ([0, 3, 3, 10, 40, 2**63 - 1], "ends at"),
        ([0, 2**62, 3, 10, 40, 41], "falls"),
    ],
)
def test_offsets(folder, values, match):
    (folder / "offsets.0.bin").write_bytes(np.array(values, "<i8").tobytes())
    refused(folder, match)


def test_offsets_that_change_later(folder):
    """A file that is written over is not looked at again: nothing is read outside the tokens."""
    packed = PackedEmbeddings.load(folder)
    Q = np.ones((2, packed.dim), np.float32)
    wanted = ek.maxsim(Q, packed)
    for path in folder.glob("*offsets*"):
        path.write_bytes(np.full(path.stat().st_size // 8, 10**9, np.int64).tobytes())
    np.testing.assert_array_equal(ek.maxsim(Q, packed), wanted)
    np.testing.assert_array_equal(ek.maxsim(Q, packed[1:]), wanted[1:])


def test_big_endian_offsets(folder):
    (folder / "offsets.0.bin").write_bytes(make().offsets.astype(">i8").tobytes())
    refused(folder, r"offsets\.0\.bin")


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -1.0])
def test_scales(folder, scale):
    scales = np.ones(5, "<f4")
    scales[3] = scale
    (folder / "scales.0.bin").write_bytes(scales.tobytes())
    refused(folder, "the scale of document 3")


@pytest.mark.parametrize("removed", [-1, 5, 2**62])
def test_removed(folder, removed):
    (folder / "removed.0.bin").write_bytes(np.array([removed], "<i8").tobytes())
    refused(folder, "there are 5 documents")


def test_removed_twice(folder):
    (folder / "removed.0.bin").write_bytes(np.array([1, 1], "<i8").tobytes())

    def change(record):
        record["removed"] = 2
        record["parts"]["removed"]["bytes"] = 16

    edit(folder, change)
    refused(folder, "removed twice")


def test_ids_that_are_not_text(folder):
    """Strings are decoded when they are asked for; then the document is named."""
    path = folder / "ids.0.bin"
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    packed = PackedEmbeddings.load(folder)
    with pytest.raises(PackedFormatError, match="document 0"):
        packed.ids  # noqa: B018
    with pytest.raises(PackedFormatError, match="document 0"):
        packed.position("a")


@pytest.mark.parametrize("name", ["header.json", "tokens.0.bin", "removed.0.bin"])
def test_links_and_pipes(folder, tmp_path, name):
    """Files are read in the folder or not at all, and nothing waits for a writer of a pipe."""
    path = folder / name
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refused(folder, f"{re.escape(name)} is a symbolic link.*cp -rL")
    path.unlink()
    os.mkfifo(path)
    refused(folder, f"{re.escape(name)} is not a regular file")
    path.unlink()
    path.mkdir()
    refused(folder, re.escape(name))


def test_the_folder_itself_may_be_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert len(PackedEmbeddings.load(tmp_path / "link", verify=True)) == 4


@pytest.mark.parametrize("moment", ["_read", "verify"])
def test_written_over_while_it_is_opened(tmp_path, monkeypatch, moment):
    """The header that was read names files that are gone: the new header is read."""
    make().save(tmp_path / "packed")
    other = make("int8", "int64")
    step = getattr(reader, moment)

    def overtaken(*arguments):
        monkeypatch.undo()
        other.save(tmp_path / "packed", overwrite=True)
        return step(*arguments)

    monkeypatch.setattr(reader, moment, overtaken)
    same(PackedEmbeddings.load(tmp_path / "packed", verify=True), other)
    assert reader.read_header(tmp_path / "packed").generation == 1


def test_a_page_of_random_folders(folder, tmp_path):
    """Random damage to random files: what loads and verifies is what was written."""
    random = np.random.default_rng(5)
    wanted = PackedEmbeddings.load(folder, mmap=False)
    files = sorted(path for path in folder.iterdir() if path.name != "lock")
    contents = [path.read_bytes() for path in files]
    for _ in range(300):
        number = int(random.integers(len(files)))
        content = bytearray(contents[number])
        for _ in range(random.integers(1, 4)):
            at = int(random.integers(max(1, len(content))))
            kind = random.integers(3)
            if kind == 0 and content:
                content[at] = int(random.integers(256))
            elif kind == 1:
                del content[at : at + int(random.integers(20))]
            else:
                content[at:at] = random.bytes(int(random.integers(1, 9)))
        files[number].write_bytes(content)
        try:
            found = PackedEmbeddings.load(folder, verify=True)
        except PackedFormatError:
            pass
        else:
            same(found, wanted)
        files[number].write_bytes(contents[number])
