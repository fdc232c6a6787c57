#!/usr/bin/env bash
# Installs a wheel, or an sdist, in a fresh environment and tests what was installed, away from the sources.
#
#   tools/check_wheel.sh PYTHON FILE [pytest arguments]
#   TORCH="" tools/check_wheel.sh ...                 with numpy alone: scores and searches, no test suite
#   TORCH="torch --index-url URL" tools/check_wheel.sh ...    where the package index serves a CUDA build
#
# For a wheel, PATH holds nothing but that environment: no compiler, no build tool.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$1 file=$(realpath "$2")
shift 2
TORCH=${TORCH-torch}
TESTS=${TESTS-"test_forward.py test_backward.py test_masks.py test_numpy.py test_errors.py test_contrastive.py
  test_distillation.py test_packed.py test_packed_format.py test_search.py test_int8.py test_fork.py test_public_api.py"}

scratch=$(mktemp -d)
trap '/bin/rm -rf "$scratch"' EXIT
"$python" -m venv "$scratch/env"
pip() { "$scratch/env/bin/python" -m pip --disable-pip-version-check install --quiet "$@"; }
cd "$scratch"
PATH=$scratch/env/bin:$PATH
if [[ $file == *.whl ]]; then
  PATH=$scratch/env/bin
  if command -v cc || command -v g++ || command -v cmake; then echo "PATH still has a compiler"; exit 1; fi
fi
pip "$file"
python - <<'CODE'
import numpy as np
from edgecolbert_kernels import PackedEmbeddings, _C, __file__, __version__, maxsim, search
Q, D = np.eye(4, 8, dtype=np.float32), np.ones((3, 5, 8), np.float16)
assert maxsim(Q, D).tolist() == [4.0] * 3
assert search(Q, PackedEmbeddings.from_list(list(D)), 2)[1].tolist() == [0, 1]
print(f"{__version__} in {__file__}: numpy alone, {_C.get_isa()} of {' '.join(_C.built_isas())}")
CODE
[ -n "$TORCH" ] || exit 0
# shellcheck disable=SC2086
pip $TORCH
pip hypothesis psutil pytest
/bin/cp -r "$root/tests" "$root/docs" "$scratch"
printf '[pytest]\naddopts = --strict-markers\n' > "$scratch/pytest.ini"
# shellcheck disable=SC2086
cd tests && PYTHONPATH= python -m pytest -q -p no:cacheprovider $TESTS "$@"
