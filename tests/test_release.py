"""What a release holds: everything that an install without this repository needs, one version, metadata that indexes accept."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import edgecolbert_kernels as ek

ROOT = Path(__file__).resolve().parent.parent
# What builds the package and describes it; not results, pictures or pages.
CARRIED = (
    "CHANGELOG.md", "CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "cmake", "csrc", "edgecolbert_kernels",
    "pyproject.toml", "setup.py", "tests/native",
)  # fmt: skip


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Built from a copy of the sources, without isolation: nothing is fetched."""
    copy = tmp_path_factory.mktemp("release")
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "build")
    for name in CARRIED:
        source, target = ROOT / name, copy / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignored)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    code = "import setuptools.build_meta as backend; backend.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    (found,) = (copy / "dist").glob("*.tar.gz")
    return found


@pytest.fixture(scope="module")
def members(sdist) -> set[str]:
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive if member.isfile()}


def sources() -> set[str]:
    files = {
        path
        for name in CARRIED
        for path in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_the_sdist_holds_every_source(members):
    assert sources() - members == set()


def test_the_sdist_holds_nothing_else(members):
    made = {"PKG-INFO", "setup.cfg"}
    beside = {name for name in members if not name.startswith("edgecolbert_kernels.egg-info/")}
    assert beside - sources() == made


def test_the_version_stands_in_one_place(sdist):
    assert sdist.name == f"edgecolbert_kernels-{ek.__version__}.tar.gz"
    exact = re.compile(rf"(?<![\d.=>]){re.escape(ek.__version__)}(?![\d.])")
    named = [
        name
        for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "mkdocs.yml")
        if exact.search((ROOT / name).read_text())
    ]
    assert named == []
    assert f"## [{ek.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_pythons_that_are_named_are_those_that_are_tried():
    """The metadata, what tries them, and the page that says so."""
    named = re.findall(r"Python :: 3\.(\d+)", (ROOT / "pyproject.toml").read_text())
    tried = re.search(r"for minor in ([\d ]+);", (ROOT / "tools" / "pythons.sh").read_text())
    assert tried is not None and named == tried[1].split()
    page = (ROOT / "docs" / "faq.md").read_text()
    assert f"CPython 3.{named[0]} to 3.{named[-1]}:" in page and f"3.{int(named[-1]) + 1} is not tested" in page


def test_indexes_accept_its_metadata(sdist):
    pytest.importorskip("twine")
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", sdist], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
