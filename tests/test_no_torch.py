"""In an environment without torch: numpy is the only requirement, scoring works, the import is quick."""

from __future__ import annotations

import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

import edgecolbert_kernels as ek
from marks import compiled

pytestmark = compiled

SCORE = """
import importlib.util, sys
import numpy as np
import edgecolbert_kernels as ek

assert importlib.util.find_spec("torch") is None
rng = np.random.default_rng(0)
Q = rng.standard_normal((3, 5, 48), dtype=np.float32)
D = rng.standard_normal((4, 7, 48), dtype=np.float32)
Q /= np.linalg.norm(Q, axis=-1, keepdims=True)
D /= np.linalg.norm(D, axis=-1, keepdims=True)
mask = np.ones((4, 7), bool)
mask[:, 2] = False
similarities = np.einsum("qid,njd->qnij", Q.astype(np.float64), D)
wanted = np.where(mask[None, :, None], similarities, -np.inf).max(-1).sum(-1)

np.testing.assert_allclose(ek.maxsim(Q, D, d_mask=mask), wanted, atol=1e-5)
np.testing.assert_allclose(ek.maxsim(Q, D, d_mask=mask, precision="fast"), wanted, atol=5e-4)
kept = [d[m] for d, m in zip(D, mask)]
np.testing.assert_allclose(ek.maxsim(list(Q), kept), wanted, atol=1e-5)
packed, cu = np.concatenate(kept), np.arange(5) * 6
np.testing.assert_allclose(ek.maxsim_varlen(Q.reshape(15, 48), packed, np.arange(4) * 5, cu), wanted, atol=1e-5)
np.testing.assert_allclose(ek.maxsim_pairs(Q, D[:3], d_mask=mask[:3]), np.diag(wanted), atol=1e-5)
np.testing.assert_allclose(
    ek.maxsim_indexed(Q, D, np.array([2, 0]), np.array([3, 3]), d_mask=mask), wanted[[2, 0], [3, 3]], atol=1e-5
)
half = ek.maxsim(Q.astype(np.float16), D.astype(np.float16), d_mask=mask)
np.testing.assert_allclose(half, wanted, atol=1e-2)
assert half.dtype == np.float32
try:
    with ek.backend("torch"):
        ek.maxsim(Q, D)
except ek.BackendUnsupported as error:
    assert "torch is not installed" in str(error)
else:
    raise AssertionError("the torch backend ran without torch")
assert "torch" not in sys.modules
"""

PACKED = """
import sys, tempfile
import numpy as np
import edgecolbert_kernels as ek
from edgecolbert_kernels.cli.main import main

rng = np.random.default_rng(0)
hidden = rng.standard_normal((5, 7, 48), dtype=np.float32)
Q = rng.standard_normal((3, 5, 48), dtype=np.float32)
weight = rng.standard_normal((16, 48), dtype=np.float32)
q = Q @ weight.T
q /= np.linalg.norm(q, axis=-1, keepdims=True)
with tempfile.TemporaryDirectory() as folder:
    for dtype in ("float16", "bfloat16", "float32", "int8"):
        packed = ek.pack(hidden, weight=weight, dtype=dtype)
        path = f"{folder}/{dtype}"
        packed.save(path)
        with ek.PackedWriter(path) as writer:
            writer.append([packed.to("float32")[0]])
            writer.remove([1])
        loaded = ek.PackedEmbeddings.load(path, verify=True)
        scores, indices = ek.search(q, loaded, 2)
        wanted = ek.maxsim(q, loaded)
        np.testing.assert_array_equal(indices, np.argsort(-wanted, axis=1, kind="stable")[:, :2])
        np.testing.assert_array_equal(scores, np.take_along_axis(wanted, indices, 1))
    np.save(folder + "/q.npy", q)
    assert main(["info", path, "--verify", "--json"]) == 0
    assert main(["search", path, "--vectors", folder + "/q.npy", "-k", "2"]) == 0
assert "torch" not in sys.modules
"""

# CPU time, which a busy machine stretches less than the clock on the wall.
IMPORT = """
import time
start = time.process_time()
import edgecolbert_kernels
print(time.process_time() - start)
import sys
assert "numpy" not in sys.modules
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter that sees numpy and this package, nothing else."""
    folder = tmp_path_factory.mktemp("no_torch")
    venv.create(folder, with_pip=False, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    numpy_home = Path(np.__file__).parent.parent
    for path in [numpy_home / "numpy", *numpy_home.glob("numpy.libs"), Path(ek.__file__).parent]:
        (site_packages / path.name).symlink_to(path)

    def run(source: str) -> str:
        # -I: no variable and no working folder adds to what can be imported.
        done = subprocess.run([folder / "bin/python", "-I", "-c", source], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_scoring(python):
    python(SCORE)


def test_packed_embeddings_search_and_command_line(python):
    found = python(PACKED)
    assert '"documents": 5' in found
    assert "q.npy[2]" in found


def test_env(python):
    assert "not installed" in python("from edgecolbert_kernels import env; env.main([])")


LOOK = """
import io, pydoc, rlcompleter
import edgecolbert_kernels as ek
from edgecolbert_kernels import *

assert maxsim is ek.maxsim and "GradCache" not in dir(ek) and "search" in ek.__all__
assert "contrastive_loss" not in pydoc.render_doc(ek)
assert rlcompleter.Completer({"ek": ek}).complete("ek.max", 0).startswith("ek.maxsim")
for name in ("GradCache", "contrastive_loss"):
    try:
        getattr(ek, name)
    except ModuleNotFoundError as error:
        assert "edgecolbert-kernels[torch]" in str(error), error
    else:
        raise AssertionError(name)
"""


def test_looking_around(python):
    """help(), import * and completion name what there is; the rest says what it needs."""
    python(LOOK)


def test_import_takes_less_than_50_ms(python):
    assert min(float(python(IMPORT)) for _ in range(5)) < 0.050


def test_requirements():
    try:
        required = metadata.requires("edgecolbert-kernels")
    except metadata.PackageNotFoundError:
        pytest.skip("run from the source tree, not installed")
    assert [line.split(">")[0] for line in required if "extra ==" not in line] == ["numpy"]


def test_torch_stays_out_of_the_build():
    """An isolated build would fetch a second torch."""
    pyproject = Path(ek.__file__).parent.parent / "pyproject.toml"
    if not pyproject.exists() or sys.version_info < (3, 11):
        pytest.skip("needs the source tree and tomllib")
    import tomllib

    requires = tomllib.loads(pyproject.read_text())["build-system"]["requires"]
    assert not [line for line in requires if "torch" in line]
