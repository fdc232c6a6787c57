"""Builds the compiled module edgecolbert_kernels._C with CMake and ninja; the metadata is in pyproject.toml.

Environment variables read here:
  EDGECOLBERT_BUILD=0   install without the compiled module (the slower torch backend does all the work)
  CXX                   the C++ compiler, as CMake reads it
  CMAKE_ARGS            more arguments for CMake, such as "-DEDGECOLBERT_OPENMP=OFF"
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def runnable(name: str) -> str | None:
    """Path of the first `name` on PATH, or beside this interpreter, that runs.

    A match is tried before it is believed: a version manager's shim stands on PATH for a program it does not have.
    """
    for folder in [*os.get_exec_path(), sysconfig.get_path("scripts")]:
        path = shutil.which(name, path=folder)
        if path and subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    return None


def missing_tools() -> list[str]:
    """What the build needs and this machine lacks, one line each."""
    missing = []
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if os.name == "posix" and not any(shutil.which(shlex.split(name)[0]) for name in compilers):
        missing.append(
            f"a C++17 compiler (looked for {', '.join(compilers)}; gcc >= 11 or clang >= 14). "
            "Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append(
            f"Python's headers (no Python.h in {sysconfig.get_path('include')}). "
            "Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel"
        )
    missing += [f"{name}: pip install {name}" for name in ("cmake", "ninja") if runnable(name) is None]
    try:
        import pybind11  # noqa: F401
    except ImportError:
        missing.append("pybind11: pip install pybind11")
    return missing


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        missing = missing_tools()
        if missing:
            sys.exit(
                "edgecolbert_kernels: its compiled module cannot be built here. Missing:\n"
                + "".join(f"  - {line}\n" for line in missing)
                + "EDGECOLBERT_BUILD=0 installs without the compiled module (slower; needs torch)."
            )
        import pybind11

        cmake = runnable("cmake")
        build_dir = ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        target_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # --fresh: the cache of an earlier isolated build points into an environment that pip has deleted.
        configure = [cmake, "--fresh", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"]
        configure += [
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_MAKE_PROGRAM={runnable('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        for command in (
            configure,
            [cmake, "--build", str(build_dir), "--target", "_C"],
            [cmake, "--install", str(build_dir), "--prefix", str(target_dir)],
        ):
            if subprocess.run(command).returncode != 0:
                sys.exit(
                    f"edgecolbert_kernels: this build step failed, its messages stand above:\n  {shlex.join(command)}"
                )


with_module = os.environ.get("EDGECOLBERT_BUILD", "1") != "0"
setup(
    ext_modules=[Extension("edgecolbert_kernels._C", sources=[])] if with_module else [],
    cmdclass={"build_ext": CMakeBuild},
)
