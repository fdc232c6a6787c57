"""Which backend runs, who decides, and what is said when it cannot."""

from __future__ import annotations

import asyncio
import importlib
import threading

import numpy as np
import pytest
import torch

import edgecolbert_kernels as ek
import oracle
from cases import embeddings, grid
from marks import compiled

Q, D = grid(2, 5, 16, seed=1), grid(3, 7, 16, seed=2)
WANTED = torch.einsum("qid,kjd->qkij", Q, D).amax(3).sum(2)

try:
    from edgecolbert_kernels import _C
except ImportError:
    _C = None

VARIABLE = "EDGECOLBERT_BACKEND"


@pytest.fixture
def spy(monkeypatch):
    """Names of the backends whose forward ran, in order."""
    ran = []
    for name, file in {"torch": "torch_", "cpu": "cpu"}.items():
        module = importlib.import_module(f"edgecolbert_kernels.backends.{file}")
        for attribute in ("forward", "forward_lists"):
            function = getattr(module, attribute, None)
            if function:
                monkeypatch.setattr(
                    module, attribute, lambda *a, f=function, n=name, **k: (ran.append(n), f(*a, **k))[1]
                )
    return ran


@compiled
def test_default(spy, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    ek.maxsim(Q, D)
    ek.maxsim(Q.double(), D.double())
    assert spy == ["cpu", "torch"], "float64 is PyTorch's"


@compiled
def test_variable_is_read_at_every_call(spy, monkeypatch):
    for name in ("torch", "cpu", "torch"):
        monkeypatch.setenv(VARIABLE, name)
        assert torch.equal(ek.maxsim(Q, D), WANTED)
    assert spy == ["torch", "cpu", "torch"]


@compiled
def test_context_wins_over_variable(spy, monkeypatch):
    monkeypatch.setenv(VARIABLE, "torch")
    with ek.backend("cpu"):
        ek.maxsim(Q, D)
        with ek.backend("torch"):
            ek.maxsim(Q, D)
        ek.maxsim(Q, D)
    ek.maxsim(Q, D)
    assert spy == ["cpu", "torch", "cpu", "torch"]


@compiled
def test_context_ends_with_an_exception(spy, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(KeyError), ek.backend("torch"):
        raise KeyError
    ek.maxsim(Q, D)
    assert spy == ["cpu"]


@compiled
def test_context_is_of_one_thread_and_task(spy, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)

    async def inside():
        with ek.backend("torch"):
            await asyncio.sleep(0.01)
            ek.maxsim(Q, D)

    async def outside():
        await asyncio.sleep(0.005)
        ek.maxsim(Q, D)

    async def both():
        await asyncio.gather(inside(), outside())

    asyncio.run(both())
    with ek.backend("torch"):
        thread = threading.Thread(target=ek.maxsim, args=(Q, D))
        thread.start()
        thread.join()
    assert spy == ["cpu", "torch", "cpu"]


def test_backends_agree(engine, precision):
    """Every backend and instruction set gives the scores of every other, within the rounding bound."""
    q, d = embeddings(4, 32, 48, seed=1, dtype=torch.float16), embeddings(6, 60, 48, seed=2, dtype=torch.float16)
    with ek.backend("torch"):
        wanted = ek.maxsim(q, d).double()
    wide_q, wide_d = q[0].double().numpy(), d[0].double().numpy()
    allowed = 2 * oracle.bound(wide_q, wide_d) + (5e-4 if precision == "fast" else 0)
    assert (ek.maxsim(q, d, precision=precision).double() - wanted).abs().max() <= allowed


@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("how", ["context", "variable"])
def test_unsupported(name, how, monkeypatch):
    """Asking for what cannot run says why, for tensors, lists, arrays and with gradients; nothing falls back quietly."""
    if how == "variable":
        monkeypatch.setenv(VARIABLE, name)
    for q, d in ((Q, D), (list(Q), list(D)), (Q.numpy(), D.numpy()), (Q.clone().requires_grad_(), D)):
        with pytest.raises(ek.BackendUnsupported, match="GPU") as raised:
            if how == "variable":
                ek.maxsim(q, d)
            else:
                with ek.backend(name):
                    ek.maxsim(q, d)
        assert name in str(raised.value)


@pytest.mark.parametrize("how", ["context", "variable"])
def test_unknown_name(how, monkeypatch):
    if how == "variable":
        monkeypatch.setenv(VARIABLE, "gpu")
        with pytest.raises(ValueError, match=r"EDGECOLBERT_BACKEND.*'gpu'.*torch"):
            ek.maxsim(Q, D)
    else:
        with pytest.raises(ValueError, match=r"'gpu'.*torch"), ek.backend("gpu"):
            pass


def test_empty_variable_means_unset(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    assert torch.equal(ek.maxsim(Q, D), WANTED)


@compiled
def test_cpu_cannot_run_float64():
    """Asked for by name, the kernels refuse what they would have to round."""
    with ek.backend("cpu"), pytest.raises(ek.BackendUnsupported, match="float64"):
        ek.maxsim(Q.double(), D)


MISSING = """
import sys, warnings
sys.modules["edgecolbert_kernels._C"] = None
import edgecolbert_kernels as ek
"""


def test_missing_module_warns_once(python):
    """Without the compiled module everything still works, slower, with one warning and a reason."""
    python(
        MISSING
        + """
import torch
from cases import grid
Q, D = grid(2, 5, 16, seed=1).requires_grad_(), grid(3, 7, 16, seed=2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        scores = ek.maxsim(Q, D)
        scores.sum().backward()
        ek.maxsim(list(Q.detach()), list(D))
        ek.maxsim_pairs(Q, D[:2])
ours = [w for w in caught if "edgecolbert" in str(w.message).lower() or "slower" in str(w.message)]
assert len(ours) == 1, [str(w.message) for w in caught]
assert "_C" in str(ours[0].message)
wanted = torch.einsum("qid,kjd->qkij", Q, D).amax(3).sum(2)
assert torch.equal(scores, wanted)
"""
    )


@pytest.mark.parametrize(
    "call",
    [
        "ek.maxsim(Q, D)",
        "ek.maxsim(Q.numpy(), D.numpy())",
        "ek.contrastive_loss(Q, D)",
        "ek.search(Q, ek.PackedEmbeddings.from_list(list(D)), 2)",
        "modules.MaxSimScorer()(Q, D)",
        "torch.compile(ek.maxsim, backend='eager')(Q, D)",
    ],
)
def test_missing_module_is_said_of_the_callers_line(python, call):
    """However many lines of the package, and of PyTorch, stand between."""
    python(
        MISSING
        + f"""
import torch
from cases import grid
from edgecolbert_kernels import modules
Q, D = grid(2, 5, 16, seed=1), grid(3, 7, 16, seed=2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    line = sys._getframe().f_lineno + 1
    {call}
ours = [(w.filename, w.lineno) for w in caught if "slower" in str(w.message)]
assert ours == [(sys._getframe().f_code.co_filename, line)], ours
"""
    )


def test_missing_module_and_arrays(python):
    """Arrays are scored by PyTorch where there is one; where there is neither, the error names both."""
    python(
        MISSING
        + """
import numpy as np
warnings.simplefilter("ignore")
X = np.ones((2, 3, 4), np.float32)
result = ek.maxsim(X, X)
assert isinstance(result, np.ndarray) and (result == 12).all()
assert (ek.maxsim([X[0]], [X[1]]) == 12).all()
"""
    )
    python(
        "import sys\nsys.modules['torch'] = None\n"
        + MISSING
        + """
import numpy as np
X = np.ones((2, 3, 4), np.float32)
try:
    ek.maxsim(X, X)
except (ek.BackendUnsupported, ImportError, RuntimeError) as error:
    assert "_C" in str(error) or "compiled" in str(error), error
else:
    raise SystemExit("scored without any backend")
"""
    )


def test_missing_module_asked_for_by_name(python):
    python(
        MISSING
        + """
import torch
X = torch.ones(2, 3, 4)
try:
    with ek.backend("cpu"):
        ek.maxsim(X, X)
except ek.BackendUnsupported as error:
    assert "_C" in str(error), error
else:
    raise SystemExit("no error")
"""
    )


@compiled
def test_instruction_set_from_the_environment(python):
    """Each is taken where it runs, and refused with a list of those that do where it does not."""
    source = "from edgecolbert_kernels import _C; print(_C.get_isa())"
    available = _C.available_isas()
    for isa in available:
        assert python(source, EDGECOLBERT_ISA=isa).strip() == isa
    assert python(source, EDGECOLBERT_ISA=None).strip() == available[0]
    assert python(source, EDGECOLBERT_ISA="").strip() == available[0]
    refused = """
import numpy as np, edgecolbert_kernels as ek
X = np.ones((2, 3, 4), np.float32)
try:
    ek.maxsim(X, X)
except RuntimeError as error:
    print(error)
else:
    raise SystemExit("ran on an instruction set that is not there")
"""
    for isa in [*(set(_C.built_isas()) - set(available)), "mmx", "AVX2"]:
        message = python(refused, EDGECOLBERT_ISA=isa)
        assert isa in message
        assert all(name in message for name in available)


@compiled
def test_forcing_an_instruction_set():
    available = _C.available_isas()
    assert set(available) <= set(_C.built_isas())
    assert available[-1] == "scalar"
    try:
        for isa in available:
            _C.set_isa(isa)
            assert _C.get_isa() == isa
            np.testing.assert_array_equal(ek.maxsim(Q.numpy(), D.numpy()), WANTED.numpy())
        with pytest.raises(ValueError, match="mmx"):
            _C.set_isa("mmx")
        assert _C.get_isa() == available[-1], "a refused name changes nothing"
    finally:
        _C.set_isa("")
