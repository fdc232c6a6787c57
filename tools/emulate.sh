#!/usr/bin/env bash
# Runs tests/native on CPUs that this machine is not: AVX-VNNI where only AVX-512 has its instructions, the scalar path
# on a Nehalem and the AVX2 path on a Haswell under qemu-x86_64, the NEON paths cross-compiled and under qemu-aarch64.
# What is not installed is skipped, with a line that says so. On Debian and Ubuntu:
# apt install qemu-user g++-aarch64-linux-gnu
set -euo pipefail
cd "$(dirname "$0")/.."

build() {  # <folder> <cmake options>
  local folder=$1
  shift
  cmake -S . -B "$folder" -G Ninja -DCMAKE_MAKE_PROGRAM="$(command -v ninja)" \
    -DEDGECOLBERT_PYTHON=OFF -DEDGECOLBERT_NATIVE_TESTS=ON "$@" >/dev/null
  cmake --build "$folder" --target native_sweep
}

have() {  # <what is skipped> <programs>
  local what=$1 program
  shift
  for program; do
    command -v "$program" >/dev/null || { echo "skipped: $what needs $program"; return 1; }
  done
}

build build/native
echo "== this CPU"
build/native/tests/native/native_sweep

if grep -qw avx512_vnni /proc/cpuinfo && ! grep -qw avx_vnni /proc/cpuinfo; then
  echo "== AVX-VNNI, in the encoding of AVX-512"
  build build/evex -DEDGECOLBERT_EVEX=ON
  build/evex/tests/native/native_sweep
fi

if [ "$(uname -m)" = x86_64 ] && have "emulated x86-64" qemu-x86_64; then
  # qemu warns about each feature of the model that it lacks; none of them matters here.
  without=-pcid,-x2apic,-tsc-deadline,-hle,-invpcid,-rtm
  echo "== Nehalem"
  qemu-x86_64 -cpu Nehalem build/native/tests/native/native_sweep scalar
  echo "== Haswell"
  qemu-x86_64 -cpu "Haswell,$without" build/native/tests/native/native_sweep --emulated avx2 scalar
fi

if [ "$(uname -m)" != aarch64 ] && have "emulated AArch64" qemu-aarch64 aarch64-linux-gnu-g++; then
  echo "== AArch64"
  build build/aarch64 -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake
  python3 tools/spills.py --only _tile build/aarch64/CMakeFiles/edgecolbert_isa_neon*.dir/csrc/cpu/isa/*.o
  sweep="-L /usr/aarch64-linux-gnu build/aarch64/tests/native/native_sweep"
  qemu-aarch64 -cpu max $sweep neon_dotprod neon scalar
  qemu-aarch64 -cpu cortex-a72 $sweep neon scalar
fi
