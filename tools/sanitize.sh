#!/usr/bin/env bash
# The native sweep and the Python tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the sources
# below build/sanitize, so that the module in use stays as it is. Arguments go to pytest; after `--fuzz SECONDS` the reader
# of packed embeddings is fuzzed instead.
#
# Leaks are not looked for: the interpreter and torch keep memory until the process ends. Left out: tests of the build,
# of the layers, of the pages, of the benchmarks and of the demo, which run no kernel on memory of their own.
set -euo pipefail
cd "$(dirname "$0")/.."

source=build/sanitize/source
objects=$PWD/build/sanitize/objects
kept=$PWD/build/fuzz
rm -rf "$source"
mkdir -p "$source"
# `cp -p`: what has not changed is not compiled again.
git ls-files --cached --others --exclude-standard -z | xargs -0 cp -p --parents -t "$source"
cd "$source"

cmake -S . -B "$objects" -G Ninja -DCMAKE_MAKE_PROGRAM="$(command -v ninja)" \
  -DPython_EXECUTABLE="$(command -v python)" -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" \
  -DEDGECOLBERT_SANITIZE=address,undefined -DEDGECOLBERT_NATIVE_TESTS=ON >/dev/null
cmake --build "$objects"
cmake --install "$objects" --prefix edgecolbert_kernels

# Into files, as a test's own output would swallow what a crashed worker or a child process says.
reports=$(dirname "$objects")/reports
rm -rf "$reports"
mkdir "$reports"
export ASAN_OPTIONS=detect_leaks=0:log_path=$reports/report
export UBSAN_OPTIONS=print_stacktrace=1:log_path=$reports/report
show_reports() {
  if [ -n "$(ls -A "$reports")" ]; then
    head -n 40 "$reports"/*
    echo "sanitizer reports: $(find "$reports" -type f | wc -l), in $reports"
    exit 1
  fi
}
trap show_reports EXIT

compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' "$objects/CMakeCache.txt")
# The interpreter is not instrumented, so the runtime must be there before it; and libstdc++ before the runtime looks for
# the function that throws.
preload="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so)"

if [ "${1:-}" = --fuzz ]; then
  echo "== fuzzing the reader"
  LD_PRELOAD=$preload FUZZ_KEPT=$kept python -m tools.fuzz_packed "${@:2}"
  exit
fi

echo "== native sweep"
"$objects/tests/native/native_sweep"

echo "== tests"
# Training, other libraries' adapters and processes are Python over the kernels that the other tests cover; GPU kernels,
# interpreted and emulated, are not instrumented, nor is the engine that is PyTorch; pytrec_eval, which the two others call, frees what `new` gave. A child forked
# while another thread allocates may hang: this runtime's allocator holds its locks over a fork.
LD_PRELOAD=$preload python -m pytest tests -n auto -k "not ([torch- or [torch])" --ignore=tests/test_objects.py --ignore=tests/test_layers.py \
  --ignore=tests/test_no_torch.py --ignore=tests/test_demo.py --ignore-glob='*/test_training_*.py' \
  --ignore-glob='*/test_triton*.py' --ignore-glob='*/test_cuda*.py' --ignore-glob='*/test_device*.py' \
  --ignore-glob='*/test_gpu*.py' --ignore-glob='*/test_patch_*.py' --ignore=tests/test_distributed.py \
  --ignore=tests/test_documentation.py --ignore=tests/test_benchmarks.py --ignore=tests/test_release.py \
  --deselect=tests/test_cli.py::test_eval --deselect=tests/test_cli.py::test_metrics_by_hand \
  --deselect='tests/test_fork.py::test_fork[fork while another thread is in a call]' "$@"
