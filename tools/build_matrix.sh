#!/usr/bin/env bash
# Installs the package with every Python 3.10-3.13 and every compiler of this machine, in fresh environments under a
# temporary folder, with and without build isolation, and twice in a row into the same source tree; after each install
# one document is scored. Slow (a full build each): run it before a release or after a change to the build.
#
#   tools/build_matrix.sh                       all Pythons found on PATH and by pyenv
#   PYTHONS="python3.12" tools/build_matrix.sh  those
#   COMPILERS="" tools/build_matrix.sh          leaves the compilers out
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHONS=${PYTHONS-$(tools/pythons.sh)}
COMPILERS=${COMPILERS-$(for name in g++-11 g++-12 g++-13 g++-14 clang++-14 clang++-16 clang++-18; do
  command -v "$name" >/dev/null && echo "$name"; done || true)}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/source"
git ls-files --cached --others --exclude-standard -z | xargs -0 cp --parents -t "$scratch/source"
cd "$scratch/source"

check='
import sys
import numpy as np
from edgecolbert_kernels import _C, maxsim
q, d = np.eye(4, 8, dtype=np.float32), np.ones((1, 3, 8), dtype=np.float32)
assert maxsim(q, d).tolist() == [4.0], maxsim(q, d)
print("ok:", sys.argv[1] + ",", "Python", sys.version.split()[0] + ",", "builds", " ".join(_C.built_isas()))'

# install <label> <environment> <pip arguments>
install() {
  local label=$1 env=$2
  shift 2
  "$env/bin/python" -m pip --disable-pip-version-check install --quiet --force-reinstall --no-deps "$@" . ||
    { echo "failed: $label"; exit 1; }
  (cd "$scratch" && "$env/bin/python" -c "$check" "$label")
}

environment() {  # <python> <folder>
  "$1" -m venv "$2"
  "$2/bin/python" -m pip --disable-pip-version-check install --quiet --upgrade pip numpy setuptools cmake ninja pybind11
}

for python in $PYTHONS; do
  env=$scratch/env-$(basename "$(dirname "$(dirname "$python")")")-$(basename "$python")
  environment "$python" "$env"
  install "isolated" "$env"
  install "isolated, again" "$env"
  install "no isolation" "$env" --no-build-isolation
  last=$env
done
for compiler in $COMPILERS; do
  CXX=$compiler install "$compiler" "$last" --no-build-isolation
done
