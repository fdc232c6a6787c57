"""NumPy in, NumPy out: every storage NumPy can hold, every layout, and no torch on the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import edgecolbert_kernels as ek
from cases import embeddings, grid, holes, packed, ragged
from edgecolbert_kernels.backends import native


def bits(x):
    """bfloat16 as its uint16 bits, which is how NumPy holds it here."""
    return x.bfloat16().view(torch.uint16).numpy()


STORAGES = {
    "float32": (torch.float32, lambda x: x.float().numpy()),
    "float16": (torch.float16, lambda x: x.half().numpy()),
    "bfloat16 bits": (torch.bfloat16, bits),
}


@pytest.mark.parametrize("q_storage", STORAGES)
@pytest.mark.parametrize("d_storage", STORAGES)
def test_storages(engine, precision, q_storage, d_storage):
    Q, D = embeddings(3, 12, 48, seed=1), embeddings(4, 13, 48, seed=2)
    (q_dtype, q_array), (d_dtype, d_array) = STORAGES[q_storage], STORAGES[d_storage]
    result = ek.maxsim(q_array(Q), d_array(D), precision=precision)
    assert type(result) is np.ndarray
    assert result.dtype == np.float32
    wanted = ek.maxsim(Q.to(q_dtype), D.to(d_dtype), precision=precision)
    np.testing.assert_array_equal(result, wanted.numpy())


def test_layouts(engine, precision):
    """Each public function, with masks of NumPy, gives what it gives on tensors."""
    Q, D, own = grid(3, 12, 16, seed=1), grid(5, 13, 16, seed=2), grid(3, 2, 13, 16, seed=3)
    q_mask, d_mask, own_mask = holes(3, 12, seed=4), holes(5, 13, seed=5), holes(3, 2, 13, seed=6)
    queries, documents = ragged((5, 0, 33), 16, make=grid, seed=7), ragged((12, 1, 0, 40), 16, make=grid, seed=8)
    (Qp, cu_q), (Dp, cu_d) = packed(queries), packed(documents)
    index = torch.tensor([0, 2, 2]), torch.tensor([4, 0, 4])
    calls = [
        (ek.maxsim, (Q, D)),
        (ek.maxsim, (Q, D, q_mask, d_mask)),
        (ek.maxsim, (Q[0], D, q_mask[0], d_mask)),
        (ek.maxsim, (Q, own, q_mask, own_mask)),
        (ek.maxsim, (queries, documents)),
        (ek.maxsim, (Q[0], documents)),
        (ek.maxsim_pairs, (Q, D[:3], q_mask, d_mask[:3])),
        (ek.maxsim_varlen, (Qp, Dp, cu_q, cu_d)),
        (ek.maxsim_varlen, (Qp, Dp, cu_q, cu_d, holes(len(Qp), seed=1), holes(len(Dp), seed=2))),
        (ek.maxsim_indexed, (Q, D, *index)),
        (ek.maxsim_indexed, (Q, D, *index, q_mask, d_mask)),
        (ek.maxsim_indexed, (queries, documents, torch.tensor([2, 0]), torch.tensor([3, 3]))),
    ]
    for function, arguments in calls:
        for mask_mode in ("exclude", "zero"):
            arrays = [[t.numpy() for t in a] if isinstance(a, list) else a.numpy() for a in arguments]
            result = function(*arrays, mask_mode=mask_mode, precision=precision)
            assert isinstance(result, np.ndarray)
            wanted = function(*arguments, mask_mode=mask_mode, precision=precision)
            np.testing.assert_array_equal(result, wanted.numpy())


def test_float64_is_scored_in_float32(engine):
    Q, D = grid(2, 5, 16, seed=1).double().numpy(), grid(3, 7, 16, seed=2).double().numpy()
    result = ek.maxsim(Q, D)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, ek.maxsim(Q.astype(np.float32), D.astype(np.float32)))


@pytest.mark.parametrize("order", [">f4", ">f2"])
def test_foreign_byte_order(engine, order):
    """A big-endian array is either scored right or refused; its bytes are never read as little-endian."""
    Q, D = grid(2, 5, 16, seed=1).numpy(), grid(3, 7, 16, seed=2).numpy()
    try:
        result = ek.maxsim(Q.astype(order), D)
    except TypeError as error:
        assert "Q" in str(error)
    else:
        np.testing.assert_array_equal(result, ek.maxsim(Q, D))


def test_read_only_memory_map(engine, tmp_path):
    """A file of embeddings is scored where it lies."""
    D = grid(5, 13, 16, seed=2).half().numpy()
    path = tmp_path / "tokens.npy"
    np.save(path, D)
    mapped = np.load(path, mmap_mode="r")
    Q = grid(3, 12, 16, seed=1).numpy()
    np.testing.assert_array_equal(ek.maxsim(Q, mapped), ek.maxsim(Q, D))
    np.testing.assert_array_equal(ek.maxsim(Q, list(mapped)), ek.maxsim(Q, D))
    frozen = D.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(ek.maxsim(Q, frozen), ek.maxsim(Q, D))


def test_empty(engine):
    zeros = np.zeros
    assert ek.maxsim(zeros((0, 5, 8), np.float32), zeros((3, 7, 8), np.float32)).shape == (0, 3)
    assert ek.maxsim(zeros((2, 5, 8), np.float32), zeros((0, 7, 8), np.float32)).shape == (2, 0)
    np.testing.assert_array_equal(ek.maxsim(zeros((2, 5, 8), np.float32), zeros((3, 0, 8), np.float32)), zeros((2, 3)))
    np.testing.assert_array_equal(ek.maxsim(zeros((0, 8), np.float32), [zeros((0, 8), np.float32)]), zeros(1))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.int8, np.bool_, np.complex64, object, "U3"])
def test_not_floating_point(engine, dtype):
    Q = np.zeros((2, 5, 8), np.float32)
    with pytest.raises(TypeError, match=r"\bQ\b"):
        ek.maxsim(Q.astype(dtype), Q)
    with pytest.raises(TypeError, match=r"\bD\b"):
        ek.maxsim(Q, Q.astype(dtype))


def test_subclasses(engine):
    """A matrix or a masked array is still an array; a masked array's own mask is not ours to guess."""
    Q, D = grid(5, 8, seed=1).numpy(), grid(3, 7, 8, seed=2).numpy()
    np.testing.assert_array_equal(ek.maxsim(np.asmatrix(Q), D), ek.maxsim(Q, D))


@pytest.mark.parametrize("threads", ["1", "2", "4", "1000"])
def test_thread_count_from_the_environment(python, threads):
    """Any count, more than there are cores or documents included, gives the same bits."""
    source = """
import hashlib, numpy as np, edgecolbert_kernels as ek
random = np.random.default_rng(1)
Q, D = random.standard_normal((8, 32, 48), np.float32), random.standard_normal((64, 60, 48), np.float32)
print(hashlib.sha256(ek.maxsim(Q, D).tobytes()).hexdigest())
"""
    assert python(source, EDGECOLBERT_NUM_THREADS=threads) == python(
        source, EDGECOLBERT_NUM_THREADS=None, OMP_NUM_THREADS="1"
    )


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_bad_thread_count(python, value):
    """Nonsense in our variable is named."""
    python(
        """
import numpy as np, edgecolbert_kernels as ek
X = np.ones((2, 3, 4), np.float32)
try:
    ek.maxsim(X, X)
except ValueError as error:
    assert "EDGECOLBERT_NUM_THREADS" in str(error), error
else:
    raise AssertionError("taken")
""",
        EDGECOLBERT_NUM_THREADS=value,
    )


@pytest.mark.parametrize("variables, wanted", [(("3", "2"), 3), ((None, "4,2"), 4), (("9" * 20, None), 1024)])
def test_which_thread_count_counts(monkeypatch, variables, wanted):
    for name, value in zip(("EDGECOLBERT_NUM_THREADS", "OMP_NUM_THREADS"), variables, strict=True):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert native.threads() == wanted


def test_torch_is_not_imported(python):
    """Neither by the import nor by scoring."""
    python(
        """
import sys, numpy as np, edgecolbert_kernels as ek
X = np.ones((2, 3, 4), np.float32)
ek.maxsim(X, X), ek.maxsim([X[0]], [X[1]]), ek.maxsim_pairs(X, X)
cu = np.array([0, 1, 3])
ek.maxsim_varlen(X[0], X[0], cu, cu), ek.maxsim_indexed(X, X, np.array([0]), np.array([1]))
assert "torch" not in sys.modules
"""
    )


@pytest.mark.parametrize("integers", [np.int64, np.int32, np.uint16])
def test_the_contrastive_loss_takes_arrays(integers):
    Q, D = grid(3, 5, 16, seed=1), grid(4, 7, 16, seed=2)
    target, weight = torch.tensor([2, 0, 3]), torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    exclude, positives = torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)
    exclude[0, 1] = positives[0, 1:] = positives[2, 0] = True
    options = {"weight": weight.numpy(), "exclude": exclude.numpy(), "temperature": np.float32(0.5)}
    wanted = {"weight": weight, "exclude": exclude, "temperature": 0.5}
    for own in (target, positives):
        found = ek.contrastive_loss(
            Q.numpy(), D.numpy(), target=own.numpy().astype(integers if own is target else bool), **options
        )
        assert torch.equal(found, ek.contrastive_loss(Q, D, target=own, **wanted))
    Q.requires_grad_()
    ek.contrastive_loss(Q, list(D), target=target.numpy().astype(integers), **options).backward()
    assert Q.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64, np.uint16])
def test_the_distillation_loss_takes_arrays(dtype):
    Q, D = grid(3, 5, 16, seed=1), grid(3, 4, 7, 16, seed=2)
    scores, kept = np.arange(12).reshape(3, 4).astype(dtype), np.arange(12).reshape(3, 4) % 5 > 0
    weight = np.array([1.0, 0.5, 2.0])
    options = {"candidate_mask": torch.from_numpy(kept), "weight": torch.from_numpy(weight)}
    wanted = ek.distillation_loss(Q, D, torch.arange(12).view(3, 4).float(), **options)
    for documents in (D, D.numpy(), list(D.flatten(0, 1))):
        found = ek.distillation_loss(Q, documents, scores, candidate_mask=kept, weight=weight)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("wrong", [[0, 1], np.array(["0", "1"]), 1.0])
def test_losses_say_what_they_take(wrong):
    Q, D = grid(2, 5, 16, seed=1), grid(2, 2, 7, 16, seed=2)
    calls = {
        "target": lambda: ek.contrastive_loss(Q, D, target=wrong),
        "weight": lambda: ek.contrastive_loss(Q, D, weight=wrong),
        "teacher_scores": lambda: ek.distillation_loss(Q, D, wrong),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=rf"^{name} (is a .*; want a torch tensor or a numpy array|has dtype <U1)"):
            call()
    with pytest.raises(TypeError, match=r"^teacher_scores (is a|has dtype)"):
        ek.distillation_loss(Q, list(D.flatten(0, 1)), wrong)
