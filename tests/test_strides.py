"""Any strides: the score of a view is the score of its contiguous copy, bit for bit, and nothing outside it is read."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import as_strided

import edgecolbert_kernels as ek
from cases import DIMENSIONS, STORAGES, address_space, embeddings, grid, holes, storage_name


def views_3d(x):
    """Name to tensor: x itself in every kind of memory layout a caller may hand over."""
    n, length, dim = x.shape
    spread = torch.full((2 * n, 3 * length + 1, 2 * dim + 1), float("nan"), dtype=x.dtype)
    spread[1::2, 1::3, 1::2] = x
    row = torch.full((n, length, dim + 5), float("nan"), dtype=x.dtype)
    row[..., 2 : 2 + dim] = x
    odd = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype)
    odd[1:] = x.reshape(-1)
    return {
        "fortran": x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "token-transposed": x.transpose(1, 2).contiguous().transpose(1, 2),
        "sequence-transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "gaps everywhere": spread[1::2, 1::3, 1::2],
        "columns of wider rows": row[..., 2 : 2 + dim],
        "offset by one element": odd[1:].reshape(n, length, dim),
    }


@pytest.mark.parametrize("dtype", STORAGES, ids=storage_name)
def test_views(engine, precision, dtype):
    for dim, query_length, length in ((1, 1, 1), (7, 5, 13), (17, 33, 12), (48, 32, 29)):
        Q, D = embeddings(3, query_length, dim, dtype=dtype, seed=1), embeddings(4, length, dim, dtype=dtype, seed=2)
        wanted = ek.maxsim(Q, D, precision=precision)
        for (q_name, q), (d_name, d) in itertools.product(views_3d(Q).items(), views_3d(D).items()):
            assert torch.equal(q, Q)
            result = ek.maxsim(q, d, precision=precision)
            if isinstance(engine, str) and engine == "torch":
                torch.testing.assert_close(result, wanted, msg=f"{q_name} x {d_name}")
            else:
                assert torch.equal(result, wanted), f"{q_name} x {d_name}, dim {dim}"


@pytest.mark.parametrize("layout", ["own candidates", "varlen", "lists", "indexed", "pairs"])
def test_views_of_other_layouts(engine, precision, layout):
    """Column-major and gapped views wherever an array is an argument, the index arrays and offsets included."""
    X, Y = grid(4, 12, 33, seed=1), grid(4, 3, 13, 33, seed=2)
    gapped_Y = Y.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    gapped_X = X.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    if layout == "own candidates":
        results = [ek.maxsim(q, d, precision=precision) for q, d in ((X, Y), (gapped_X, gapped_Y))]
        results.append(ek.maxsim(X, Y.transpose(0, 1).contiguous().transpose(0, 1), precision=precision))
    elif layout == "pairs":
        results = [ek.maxsim_pairs(q, d, precision=precision) for q, d in ((X, Y[:, 1]), (gapped_X, gapped_Y[:, 1]))]
    elif layout == "indexed":
        index = torch.tensor([[0, 3], [2, 9], [3, 1], [0, 0]])
        contiguous = ek.maxsim_indexed(
            X, Y[0], index[:, 0].contiguous() % 4, index[:, 1].contiguous() % 3, precision=precision
        )
        results = [
            contiguous,
            ek.maxsim_indexed(gapped_X, gapped_Y[0], (index % 4)[:, 0], (index % 3)[:, 1], precision=precision),
        ]
    elif layout == "varlen":
        Q, D, cu = X.reshape(48, 33), Y.reshape(-1, 33), torch.tensor([0, 5, 5, 48])
        gapped_cu = torch.stack([cu, cu], 1)[:, 0]
        results = [
            ek.maxsim_varlen(Q, D, cu, cu, precision=precision),
            ek.maxsim_varlen(Q.t().contiguous().t(), D.t().contiguous().t(), gapped_cu, gapped_cu, precision=precision),
        ]
    else:
        results = [ek.maxsim(list(X), list(Y[0]), precision=precision)]
        results.append(ek.maxsim(list(gapped_X), list(gapped_Y[0]), precision=precision))
        results.append(ek.maxsim(list(X), [d[::2] for d in Y[0].repeat_interleave(2, 1)], precision=precision))
    assert all(torch.equal(result, results[0]) for result in results)


def test_broadcast_views(engine, precision):
    """Stride 0 in every axis: one query for all, one document repeated, one token repeated, one value a row."""
    Q, D = grid(1, 12, 16, seed=1), grid(1, 13, 16, seed=2)
    token, value = grid(1, 1, 16, seed=3), grid(3, 13, 1, seed=4)
    for q, d in (
        (Q.expand(4, -1, -1), D.expand(5, -1, -1)),
        (Q, token.expand(2, 13, -1)),
        (Q, value.expand(-1, -1, 16)),
        (Q.expand(3, -1, -1), D.expand(3, 2, 13, 16)),
    ):
        assert torch.equal(
            ek.maxsim(q, d, precision=precision), ek.maxsim(q.contiguous(), d.contiguous(), precision=precision)
        )
    leaf = D.clone().requires_grad_()
    ek.maxsim(Q, leaf.expand(5, -1, -1)).sum().backward()
    once = D.clone().requires_grad_()
    ek.maxsim(Q, once).sum().backward()
    assert torch.equal(leaf.grad, 5 * once.grad)


def test_negative_strides(engine, precision):
    """NumPy reverses by sign; torch cannot, so these arrive as arrays."""
    Q, D = grid(3, 12, 17, seed=1).numpy(), grid(4, 13, 17, seed=2).numpy()
    wanted = ek.maxsim(Q, D, precision=precision)
    for flip in itertools.product((1, -1), repeat=3):
        q, d = (
            np.ascontiguousarray(x[:: flip[0], :: flip[1], :: flip[2]])[:: flip[0], :: flip[1], :: flip[2]]
            for x in (Q, D)
        )
        np.testing.assert_array_equal(q, Q)
        np.testing.assert_array_equal(ek.maxsim(q, d, precision=precision), wanted, err_msg=str(flip))
        np.testing.assert_array_equal(ek.maxsim(list(q), list(d), precision=precision), wanted, err_msg=str(flip))


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_unaligned_arrays(engine, precision, dtype, offset):
    """Rows at any byte, as in a packed record or a file with an odd header."""

    def unaligned(x):
        buffer = np.zeros(x.nbytes + offset, np.uint8)
        view = buffer[offset:].view(dtype).reshape(x.shape)
        view[...] = x
        return view

    Q, D = grid(3, 12, 17, seed=1).numpy().astype(dtype), grid(4, 13, 17, seed=2).numpy().astype(dtype)
    wanted = ek.maxsim(Q, D, precision=precision)
    np.testing.assert_array_equal(ek.maxsim(unaligned(Q), unaligned(D), precision=precision), wanted)
    np.testing.assert_array_equal(
        ek.maxsim([unaligned(q) for q in Q], [unaligned(d) for d in D], precision=precision), wanted
    )
    record = np.zeros(4, np.dtype([("id", np.uint8), ("tokens", dtype, (13, 17))]))
    record["tokens"] = D
    np.testing.assert_array_equal(ek.maxsim(Q, record["tokens"], precision=precision), wanted)


@pytest.mark.parametrize("axis", ["document", "token", "dimension"])
def test_strides_beyond_32_bits(engine, precision, axis):
    """More than 2^31 elements, and 2^32 bytes, between neighbours along one axis, in either direction."""
    shape, near = (2, 3, 4), {"document": (0, 4, 1), "token": (12, 0, 1), "dimension": (12, 4, 0)}[axis]
    number = ("document", "token", "dimension").index(axis)
    far = 2**31 + 64
    memory = address_space(far * (shape[number] - 1) + 64)
    strides = tuple(2 * (far if i == number else stride) for i, stride in enumerate(near))
    D = as_strided(memory, shape, strides)
    D[...] = grid(*shape, seed=1).numpy()
    Q = grid(2, 5, 4, seed=2).half()
    dense = np.ascontiguousarray(D)
    wanted = ek.maxsim(Q, torch.from_numpy(dense), precision=precision)
    assert torch.equal(ek.maxsim(Q, torch.from_numpy(D), precision=precision), wanted)
    np.testing.assert_array_equal(ek.maxsim(Q.numpy(), D, precision=precision), wanted.numpy())
    backwards = np.ascontiguousarray(np.flip(D, number))
    np.testing.assert_array_equal(
        ek.maxsim(Q.numpy(), np.flip(D, number), precision=precision),
        ek.maxsim(Q.numpy(), backwards, precision=precision),
    )


def test_more_than_2_31_elements_indexed(engine, precision):
    """A corpus as one array: the offset of a late document is beyond 32 bits, in elements."""
    length, dim = 64, 48
    count = 2**31 // (length * dim) + 8
    D = address_space(count * length * dim).reshape(count, length, dim)
    chosen = [0, 1, count // 2, count - 2, count - 1]
    D[chosen] = grid(5, length, dim, seed=1).half().numpy()
    Q = grid(2, 5, dim, seed=2).half()
    query_index, document_index = torch.tensor([0, 1, 0, 1, 1]), torch.tensor(chosen)
    result = ek.maxsim_indexed(Q, torch.from_numpy(D), query_index, document_index, precision=precision)
    assert torch.equal(
        result, ek.maxsim_indexed(Q, torch.from_numpy(D[chosen]), query_index, torch.arange(5), precision=precision)
    )


def test_more_than_2_31_elements_packed(isa):
    """Offsets of packed tokens beyond 32 bits; the gap between the documents is masked out, so it is not scored."""
    dim = 64
    total = 2**31 // dim + 30
    D = torch.from_numpy(address_space(total * dim).reshape(total, dim))
    ends = grid(2, 15, dim, seed=1).half()
    D[:15], D[-15:] = ends[0], ends[1]
    mask = torch.zeros(total, dtype=torch.bool)
    mask[:15] = mask[-15:] = True
    Q, cu_q, cu_d = grid(5, dim, seed=2).half(), torch.tensor([0, 5]), torch.tensor([0, 15, total - 15, total])
    scores = ek.maxsim_varlen(Q, D, cu_q, cu_d, None, mask)
    wanted = ek.maxsim(Q, ends)
    assert scores.tolist() == [[wanted[0], 0, wanted[1]]]


GUARDED = '''
import ctypes, mmap, sys
import numpy as np, torch
import cases, edgecolbert_kernels as ek
from edgecolbert_kernels import _C

page = mmap.PAGESIZE
protect = ctypes.CDLL(None, use_errno=True).mprotect

def guarded(x, end):
    """A copy of x that touches an inaccessible page with its last element, or with its first."""
    size = -(-x.nbytes // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (address, address + page + size):
        assert protect(ctypes.c_void_p(guard), page, 0) == 0
    start = page + (size - x.nbytes if end else 0)
    copy = torch.from_numpy(np.frombuffer(memory, np.uint8, x.nbytes, start)).view(x.dtype).view(x.shape)
    copy.copy_(x)
    return copy

_C.set_isa(sys.argv[1])
backend = ek.backend("cpu")
backend.__enter__()
torch.set_num_threads(1)
for dim in map(int, sys.argv[2].split(",")):
    for dtype in cases.STORAGES:
        for end in (True, False):
            make = lambda *shape, seed: guarded(cases.embeddings(*shape, dim, dtype=dtype, seed=seed), end)
            for length in (1, 2, 11, 12, 13, 31, 33):
                for precision in ("exact", "fast"):
                    Q, D = make(2, length, seed=1), make(3, length, seed=2)
                    mask = guarded(cases.holes(3, length, seed=3), end)
                    plain = ek.maxsim(Q.clone(), D.clone(), precision=precision)
                    assert torch.equal(ek.maxsim(Q, D, precision=precision), plain)
                    assert torch.equal(ek.maxsim(list(Q), list(D), precision=precision), plain)
                    masked = ek.maxsim(Q.clone(), D.clone(), None, mask.clone(), precision=precision)
                    assert torch.equal(ek.maxsim(Q, D, None, mask, precision=precision), masked)
                    columns = ek.maxsim(Q.mT.contiguous().mT, D.mT.contiguous().mT, precision=precision)
                    turned = [guarded(x.mT.contiguous(), end).mT for x in (Q, D)]
                    assert torch.equal(ek.maxsim(*turned, precision=precision), columns)
                for rows in ((Q, D), turned):
                    leaves = [x.requires_grad_() for x in rows]
                    ek.maxsim(*leaves, None, mask, normalize=True).sum().backward()
'''


@pytest.mark.parametrize("dims", [DIMENSIONS[:5], DIMENSIONS[5:10], DIMENSIONS[10:]], ids=str)
def test_reads_stay_inside_the_buffers(isa, python, dims):
    """Inputs flush against inaccessible pages at their end, then at their start: one stray load is a crash."""
    python(GUARDED, isa, ",".join(map(str, dims)), timeout=300)


def test_outputs_do_not_alias_inputs(engine):
    """Inputs are left as they were, bit for bit."""
    Q, D, mask = grid(3, 12, 16, seed=1), grid(4, 13, 16, seed=2), holes(4, 13, seed=3)
    copies = Q.clone(), D.clone(), mask.clone()
    leaves = Q.requires_grad_(), D.requires_grad_()
    ek.maxsim(*leaves, None, mask).sum().backward()
    assert all(map(torch.equal, (Q, D, mask), copies))
