#!/usr/bin/env bash
# Times a contributor's first steps on this machine: a fresh clone, `make test` green, a first benchmark.
#
#   tools/contribute.sh [REPOSITORY]           REPOSITORY: what to clone, by default this one
#   PYTEST="-n 2 -q" BENCH="--only rerank" tools/contribute.sh
set -euo pipefail

repository=${1:-$(cd "$(dirname "$0")/.." && pwd)}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
times=""
step() {  # <name> <command>
  local name=$1 start=$SECONDS
  shift
  printf '\n==== %s: %s\n' "$name" "$*"
  "$@" || { printf '\n%sfailed: %s\n' "$times" "$name"; exit 1; }
  times+=$(printf '%-24s %5d s  (%5d s from the start)' "$name" $((SECONDS - start)) "$SECONDS")$'\n'
}

step "clone" git clone --quiet "$repository" "$scratch/clone"
cd "$scratch/clone"
step "environment and module" make module
step "make test" make test PYTEST="${PYTEST:--q}"
step "make bench-quick" make bench-quick BENCH="${BENCH:-}"
printf '\n%s' "$times"
