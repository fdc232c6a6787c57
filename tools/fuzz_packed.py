"""Feeds damaged folders of packed embeddings to the reader: each must load whole, or raise PackedFormatError.

    python tools/fuzz_packed.py [seconds] [seed]

With atheris (`pip install atheris`) the mutations follow the coverage of the reader; without it they are random. Both take a
folder apart, damage some of its files (bits, bytes, cuts, splices, fields of the header with its checksum made right
again), load it in both ways, and score what loaded. A mutant that verifies must equal the folder that it came from, unless
a checksum was forged. A crash of the process is a finding too: its choices are kept in build/fuzz (FUZZ_KEPT).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

try:
    import atheris
except ImportError:
    atheris = None

with atheris.instrument_imports(include=["edgecolbert_kernels"]) if atheris else contextlib.nullcontext():
    import edgecolbert_kernels as ek
    from edgecolbert_kernels import PackedEmbeddings, PackedFormatError, PackedWriter

KEPT = Path(os.environ.get("FUZZ_KEPT", "build/fuzz"))
INTEGERS = (
    0,
    1,
    -1,
    2,
    7,
    8,
    1 << 16,
    (1 << 31) - 1,
    1 << 32,
    (1 << 63) - 1,
    1 << 63,
    1 << 64,
    10**30,
    0.5,
    True,
    None,
)
WORDS = (
    "float16",
    "bfloat16",
    "float32",
    "int8",
    "utf8",
    "int64",
    "none",
    "little",
    "big",
    "",
    "../x",
    "00000000",
    [],
    {},
)
JSON = ("NaN", "Infinity", "-0", "1e400", '"', "{", "[" * 2000, "9" * 5000, '{"a":1,"a":2}', "\x00", "\\ud800")


class Choices:
    """Decisions from a stream of bytes; zeros when it has run out."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def below(self, limit: int) -> int:
        part = self.data[self.at : self.at + 4]
        self.at += 4
        return int.from_bytes(part, "little") % max(1, limit)

    def of(self, options):
        return options[self.below(len(options))]

    def bytes(self, count: int) -> bytes:
        part = self.data[self.at : self.at + count]
        self.at += count
        return part


def seeds() -> list[tuple[dict[str, bytes], PackedEmbeddings]]:
    """Small folders of every kind, as file contents."""
    random, made = np.random.default_rng(0), []
    for dtype in ("float16", "bfloat16", "float32", "int8"):
        for ids in (None, ["a", "é", ""], [3, -1, 7]):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name) / "packed"
                rows = [random.standard_normal((n, 4), np.float32) for n in (2, 0, 3)]
                PackedEmbeddings.from_list(rows, ids, dtype=dtype).save(folder)
                with PackedWriter(folder) as writer:
                    writer.remove([1])
                loaded = PackedEmbeddings.load(folder, mmap=False)
                made.append(({path.name: path.read_bytes() for path in folder.iterdir()}, loaded))
    return made


def mutate(files: dict[str, bytes], choose: Choices) -> tuple[dict[str, bytes], bool]:
    """Damaged files, and whether a checksum was forged."""
    files, forged = dict(files), False
    for _ in range(1 + choose.below(4)):
        name = choose.of(sorted(files))
        content = bytearray(files[name])
        kind, at = choose.below(9), choose.below(len(content) + 1)
        if kind == 0 and content:
            content[at % len(content)] ^= 1 << choose.below(8)
        elif kind == 1:
            content[at : at + 1] = choose.bytes(1)
        elif kind == 2:
            del content[at:]
        elif kind == 3:
            del content[at : at + choose.below(16)]
        elif kind == 4:
            content[at:at] = choose.bytes(choose.below(32))
        elif kind == 5:
            content[at:at] = files[choose.of(sorted(files))][: choose.below(64)]
        elif kind == 6 and len(content) >= 8:
            at = at % (len(content) - 7) // 8 * 8
            content[at : at + 8] = (choose.of([x for x in INTEGERS if type(x) is int]) % (1 << 64)).to_bytes(
                8, "little"
            )
        elif kind == 7 and "header.json" in files:
            name, content, forged = "header.json", bytearray(edited(files["header.json"], choose)), True
        elif kind == 8:
            del files[name]
            if not files:
                break
            continue
        files[name] = bytes(content)
    return files, forged


def edited(text: bytes, choose: Choices) -> bytes:
    """A header with a field changed and its checksum made right."""
    try:
        record = json.loads(text)
        place = record
        while isinstance(place, dict) and place:
            key = choose.of(sorted(place))
            if isinstance(place[key], dict) and place[key] and choose.below(4):
                place = place[key]
                continue
            action = choose.below(4)
            if action == 0:
                del place[key]
            elif action == 1 and type(place[key]) is int:
                place[key] += choose.below(33) - 16
            else:
                place[key] = choose.of(INTEGERS + WORDS)
            break
        text = json.dumps(record).encode()
        if choose.below(4) == 0:
            at = choose.below(len(text))
            text = text[:at] + choose.of(JSON).encode() + text[at:]
    except (ValueError, TypeError, RecursionError):
        pass
    pattern = rb'"header_crc32": "[0-9a-f]{8}"'
    zeroed = re.sub(pattern, b'"header_crc32": "00000000"', text)
    return re.sub(pattern, b'"header_crc32": "%08x"' % zlib.crc32(zeroed), zeroed)


def check(files: dict[str, bytes], forged: bool, wanted: PackedEmbeddings, folder: Path) -> bool:
    """Whether it loaded."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    try:
        PackedEmbeddings.load(folder, verify=True)
        verified = True
    except PackedFormatError:
        verified = False
    try:
        packed, read = PackedEmbeddings.load(folder), PackedEmbeddings.load(folder, mmap=False)
        assert len(packed) == len(read) and packed.tokens.tobytes() == read.tokens.tobytes()
        ids = packed.ids
    except PackedFormatError:
        return False
    if packed.dim <= 64 and packed.num_tokens < 10_000:
        Q = np.ones((2, 3, packed.dim), np.float32)
        with np.errstate(all="ignore"):
            for precision in ("exact", "fast"):
                assert ek.maxsim(Q, packed, precision=precision).shape == (2, len(packed))
            ek.search(Q, packed, 2)
    if verified and not forged:
        assert ids == wanted.ids and packed.tokens.tobytes() == wanted.tokens.tobytes()
        assert packed.offsets.tolist() == wanted.offsets.tolist()
    return True


def one(data: bytes, corpus, folder: Path) -> bool:
    choose = Choices(data)
    files, wanted = choose.of(corpus)
    return check(*mutate(files, choose), wanted, folder)


def at_random(seconds: float, seed: int) -> None:
    random, corpus, count, loaded = np.random.default_rng(seed), seeds(), 0, 0
    end = time.monotonic() + seconds
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        while time.monotonic() < end:
            data = random.bytes(256)
            (KEPT / "input").write_bytes(data)  # a crash leaves it there
            try:
                loaded += one(data, corpus, Path(name) / "packed")
            except BaseException:
                print(f"finding number {count}: its choices are in {KEPT / 'input'}", file=sys.stderr)
                raise
            count += 1
    print(f"{count} folders in {seconds:.0f} s, {loaded} of them loaded, nothing found (random mutations, seed {seed})")


def by_coverage(seconds: float, seed: int) -> None:
    corpus = seeds()
    KEPT.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)) / "packed"
    options = [f"-max_total_time={int(seconds)}", f"-seed={seed or 1}", "-max_len=512", f"-artifact_prefix={KEPT}/"]
    atheris.Setup([sys.argv[0], *options, "-print_final_stats=1"], lambda data: one(data, corpus, folder) and None)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz_packed", description=__doc__.splitlines()[0])
    parser.add_argument("seconds", type=float, nargs="?", default=600)
    parser.add_argument("seed", type=int, nargs="?", default=int(time.time()))
    options = parser.parse_args()
    seconds, seed = options.seconds, options.seed
    # Half of the time each: coverage finds the deep paths, chance is not led astray.
    at_random(seconds / 2 if atheris else seconds, seed)
    if atheris:
        by_coverage(seconds / 2, seed)


if __name__ == "__main__":
    main()
