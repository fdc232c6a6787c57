"""Wrong input raises the exception that fits and names the argument, what was seen and what is wanted; nothing aborts."""

from __future__ import annotations

import pytest
import torch

import edgecolbert_kernels as ek


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def index(*values):
    return torch.tensor(values)


Q3, D3, D4 = zeros(2, 5, 8), zeros(3, 7, 8), zeros(2, 3, 7, 8)
ROWS = zeros(10, 8)
CU = index(0, 4, 10)
LIST = [zeros(5, 8), zeros(2, 8)]

# name: (call, exception, what its message must hold)
MISTAKES = {
    # Types
    "Q is None": (lambda: ek.maxsim(None, D3), TypeError, ["Q", "NoneType"]),
    "D is a string": (lambda: ek.maxsim(Q3, "documents"), TypeError, ["D", "str"]),
    "Q is a number": (lambda: ek.maxsim(1.0, D3), TypeError, ["Q", "float"]),
    "Q is a list of numbers": (lambda: ek.maxsim([1.0, 2.0], D3), TypeError, ["Q", "float"]),
    "Q is a list of lists": (lambda: ek.maxsim([[1.0]], D3), TypeError, ["Q", "list"]),
    "mask is a list": (lambda: ek.maxsim(Q3, D3, None, [[True] * 7] * 3), TypeError, ["d_mask", "list"]),
    "mask of a list is a tensor": (lambda: ek.maxsim(LIST, D3, zeros(2, 5)), TypeError, ["q_mask", "list"]),
    "nested": (lambda: ek.maxsim(torch.nested.nested_tensor(LIST), D3), TypeError, ["Q", "nested", "list"]),
    "sparse": (lambda: ek.maxsim(Q3.to_sparse(), D3), TypeError, ["Q", "sparse"]),
    "cu_seqlens is a string": (lambda: ek.maxsim_varlen(ROWS, ROWS, "0 10", CU), TypeError, ["cu_seqlens_q"]),
    "cu_seqlens is None": (lambda: ek.maxsim_varlen(ROWS, ROWS, None, CU), TypeError, ["cu_seqlens_q"]),
    "lists to varlen": (lambda: ek.maxsim_varlen(LIST, ROWS, CU, CU), TypeError, ["Q", "list"]),
    # Dtypes
    "integer queries": (lambda: ek.maxsim(Q3.long(), D3), TypeError, ["Q", "int64"]),
    "boolean documents": (lambda: ek.maxsim(Q3, D3.bool()), TypeError, ["D", "bool"]),
    "complex": (lambda: ek.maxsim(Q3, D3.to(torch.complex64)), TypeError, ["D", "complex64"]),
    "float8": (lambda: ek.maxsim(Q3.to(torch.float8_e4m3fn), D3), TypeError, ["Q", "float8"]),
    "integers in a list": (lambda: ek.maxsim(Q3, [zeros(5, 8).int()]), TypeError, ["D", "int32"]),
    "two dtypes in a list": (
        lambda: ek.maxsim(Q3, [zeros(5, 8), zeros(5, 8).half()]),
        TypeError,
        ["D", "float16", "float32"],
    ),
    "cu_seqlens of floats": (
        lambda: ek.maxsim_varlen(ROWS, ROWS, CU.float(), CU),
        TypeError,
        ["cu_seqlens_q", "float32"],
    ),
    "index of floats": (
        lambda: ek.maxsim_indexed(Q3, D3, index(0.0), index(0)),
        TypeError,
        ["query_index", "float32"],
    ),
    "boolean index": (
        lambda: ek.maxsim_indexed(Q3, D3, index(0), index(True)),
        TypeError,
        ["document_index", "bool"],
    ),
    "out_dtype of integers": (lambda: ek.maxsim(Q3, D3, out_dtype=torch.int32), TypeError, ["out_dtype", "int32"]),
    # Ranks and shapes
    "one-dimensional Q": (lambda: ek.maxsim(zeros(8), D3), ValueError, ["Q", "[8]", "Lq, d"]),
    "four-dimensional Q": (lambda: ek.maxsim(zeros(1, 2, 5, 8), D3), ValueError, ["Q", "[1, 2, 5, 8]"]),
    "two-dimensional D": (lambda: ek.maxsim(Q3, zeros(7, 8)), ValueError, ["D", "[7, 8]", "Nd, Ld, d"]),
    "five-dimensional D": (lambda: ek.maxsim(Q3, zeros(1, 2, 3, 7, 8)), ValueError, ["D", "[1, 2, 3, 7, 8]"]),
    "zero-dimensional": (lambda: ek.maxsim(torch.tensor(1.0), D3), ValueError, ["Q", "[]"]),
    "dimensions differ": (lambda: ek.maxsim(Q3, zeros(3, 7, 9)), ValueError, ["Q", "[2, 5, 8]", "D", "[3, 7, 9]"]),
    "dimension zero": (lambda: ek.maxsim(zeros(2, 5, 0), zeros(3, 7, 0)), ValueError, ["Q", "[2, 5, 0]"]),
    "own candidates of other queries": (
        lambda: ek.maxsim(Q3, zeros(3, 2, 7, 8)),
        ValueError,
        ["[2, 5, 8]", "[3, 2, 7, 8]"],
    ),
    "broadcast own candidates": (lambda: ek.maxsim(Q3, zeros(1, 2, 7, 8)), ValueError, ["[2, 5, 8]", "[1, 2, 7, 8]"]),
    "lists of unequal dimensions": (lambda: ek.maxsim(Q3, [zeros(5, 8), zeros(5, 9)]), ValueError, ["D", "9"]),
    "list of 3-D": (lambda: ek.maxsim(Q3, [zeros(1, 5, 8)]), ValueError, ["D", "[1, 5, 8]"]),
    "list of 1-D": (lambda: ek.maxsim([zeros(8)], D3), ValueError, ["Q", "[8]"]),
    "pairs of unequal batches": (lambda: ek.maxsim_pairs(Q3, D3), ValueError, ["Q", "2", "D", "3"]),
    "pairs of 2-D": (lambda: ek.maxsim_pairs(zeros(5, 8), zeros(7, 8)), ValueError, ["Q", "[5, 8]"]),
    "pairs against 4-D": (lambda: ek.maxsim_pairs(Q3, D4), ValueError, ["D", "[2, 3, 7, 8]"]),
    "padded to varlen": (lambda: ek.maxsim_varlen(Q3, ROWS, CU, CU), ValueError, ["Q", "[2, 5, 8]"]),
    "indexed 4-D": (lambda: ek.maxsim_indexed(Q3, D4, index(0), index(0)), ValueError, ["D", "[2, 3, 7, 8]"]),
    # Masks
    "mask of queries": (lambda: ek.maxsim(Q3, D3, zeros(2, 6)), ValueError, ["q_mask", "[2, 6]", "[2, 5]"]),
    "mask of documents": (lambda: ek.maxsim(Q3, D3, None, zeros(7)), ValueError, ["d_mask", "[7]", "[3, 7]"]),
    "transposed mask": (lambda: ek.maxsim(Q3, D3, None, zeros(7, 3)), ValueError, ["d_mask", "[7, 3]", "[3, 7]"]),
    "mask with a dimension": (lambda: ek.maxsim(Q3, D3, None, zeros(3, 7, 8)), ValueError, ["d_mask", "[3, 7, 8]"]),
    "mask to broadcast": (lambda: ek.maxsim(Q3, D3, None, zeros(1, 7)), ValueError, ["d_mask", "[1, 7]", "[3, 7]"]),
    "mask of candidates": (lambda: ek.maxsim(Q3, D4, None, zeros(3, 7)), ValueError, ["d_mask", "[3, 7]", "[2, 3, 7]"]),
    "mask of 2-D query": (lambda: ek.maxsim(zeros(5, 8), D3, zeros(1, 5)), ValueError, ["q_mask", "[1, 5]", "[5]"]),
    "too few masks": (lambda: ek.maxsim(LIST, D3, [zeros(5)]), ValueError, ["q_mask", "1", "2"]),
    "mask in a list": (lambda: ek.maxsim(LIST, D3, [zeros(5), zeros(3)]), ValueError, ["q_mask", "[3]", "[2]"]),
    "packed mask": (lambda: ek.maxsim_varlen(ROWS, ROWS, CU, CU, zeros(9)), ValueError, ["q_mask", "[9]", "[10]"]),
    # Offsets
    "not from 0": (lambda: ek.maxsim_varlen(ROWS, ROWS, index(1, 10), CU), ValueError, ["cu_seqlens_q", "1", "0"]),
    "decreasing": (
        lambda: ek.maxsim_varlen(ROWS, ROWS, CU, index(0, 6, 4, 10)),
        ValueError,
        ["cu_seqlens_d", "decreas"],
    ),
    "beyond the tokens": (
        lambda: ek.maxsim_varlen(ROWS, ROWS, CU, index(0, 11)),
        ValueError,
        ["cu_seqlens_d", "11", "10"],
    ),
    "negative": (lambda: ek.maxsim_varlen(ROWS, ROWS, index(0, -1, 10), CU), ValueError, ["cu_seqlens_q"]),
    "enormous": (lambda: ek.maxsim_varlen(ROWS, ROWS, index(0, 2**62), CU), ValueError, ["cu_seqlens_q"]),
    "most negative": (lambda: ek.maxsim_varlen(ROWS, ROWS, index(0, -(2**63), 10), CU), ValueError, ["cu_seqlens_q"]),
    "no offsets": (lambda: ek.maxsim_varlen(ROWS, ROWS, CU[:0], CU), ValueError, ["cu_seqlens_q", "[0]"]),
    "two-dimensional offsets": (
        lambda: ek.maxsim_varlen(ROWS, ROWS, CU[None], CU),
        ValueError,
        ["cu_seqlens_q", "[1, 3]"],
    ),
    # Indices
    "query too high": (lambda: ek.maxsim_indexed(Q3, D3, index(2), index(0)), IndexError, ["query_index", "2"]),
    "document too high": (
        lambda: ek.maxsim_indexed(Q3, D3, index(0, 0), index(0, 3)),
        IndexError,
        ["document_index", "3"],
    ),
    "negative query": (lambda: ek.maxsim_indexed(Q3, D3, index(-1), index(0)), IndexError, ["query_index", "-1"]),
    "enormous document": (lambda: ek.maxsim_indexed(Q3, D3, index(0), index(2**62)), IndexError, ["document_index"]),
    "unequal indices": (
        lambda: ek.maxsim_indexed(Q3, D3, index(0, 1), index(0)),
        ValueError,
        ["query_index", "document_index"],
    ),
    "two-dimensional index": (
        lambda: ek.maxsim_indexed(Q3, D3, index([0]), index(0)),
        ValueError,
        ["query_index", "[1, 1]"],
    ),
    "index into nothing": (
        lambda: ek.maxsim_indexed(Q3, D3[:0], index(0), index(0)),
        IndexError,
        ["document_index"],
    ),
    # Options
    "mask_mode": (lambda: ek.maxsim(Q3, D3, mask_mode="multiply"), ValueError, ["mask_mode", "multiply", "exclude"]),
    "precision": (lambda: ek.maxsim(Q3, D3, precision="half"), ValueError, ["precision", "half", "exact"]),
    "mask_mode of None": (lambda: ek.maxsim(Q3, D3, mask_mode=None), (TypeError, ValueError), ["mask_mode", "None"]),
    "backend": (lambda: ek.backend("gpu").__enter__(), ValueError, ["gpu", "torch"]),
    "meta device": (lambda: ek.maxsim(Q3, D3.to("meta")), ValueError, ["D", "meta", "cpu"]),
    "mask on another device": (lambda: ek.maxsim(Q3, D3, None, zeros(3, 7).to("meta")), ValueError, ["d_mask", "meta"]),
    "offsets on another device": (
        lambda: ek.maxsim_varlen(ROWS, ROWS, CU.to("meta"), CU),
        ValueError,
        ["cu_seqlens_q", "meta"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(backend, name):
    call, exception, words = MISTAKES[name]
    with pytest.raises(exception) as raised:
        call()
    for word in words:
        assert word in str(raised.value), f"{word!r} is missing from: {raised.value}"


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_where_gradients_are_wanted(backend, name, monkeypatch):
    """The same call with leaves that require gradients takes the autograd path; it must not be less careful."""
    call, exception, words = MISTAKES[name]
    for tensor in (Q3, D3, D4, ROWS):
        monkeypatch.setattr(tensor, "requires_grad", True)
    with pytest.raises(exception) as raised:
        call()
    for word in words:
        assert word in str(raised.value), f"{word!r} is missing from: {raised.value}"


def arrays(value):
    if isinstance(value, torch.Tensor):
        return value.numpy()
    return [arrays(v) for v in value] if isinstance(value, list) else value


NUMPY_MISTAKES = {
    "one-dimensional Q": (ek.maxsim, (zeros(8), D3), ValueError, ["Q", "[8]"]),
    "dimensions differ": (ek.maxsim, (Q3, zeros(3, 7, 9)), ValueError, ["[2, 5, 8]", "[3, 7, 9]"]),
    "dimension zero": (ek.maxsim, (zeros(2, 5, 0), zeros(3, 7, 0)), ValueError, ["Q", "[2, 5, 0]"]),
    "mask": (ek.maxsim, (Q3, D3, zeros(2, 6)), ValueError, ["q_mask", "[2, 6]", "[2, 5]"]),
    "integers": (ek.maxsim, (Q3, D3.int()), TypeError, ["D", "int32"]),
    "not from 0": (ek.maxsim_varlen, (ROWS, ROWS, index(1, 10), CU), ValueError, ["cu_seqlens_q"]),
    "decreasing": (ek.maxsim_varlen, (ROWS, ROWS, CU, index(0, 6, 4, 10)), ValueError, ["cu_seqlens_d"]),
    "beyond the tokens": (ek.maxsim_varlen, (ROWS, ROWS, CU, index(0, 11)), ValueError, ["cu_seqlens_d", "11", "10"]),
    "most negative": (ek.maxsim_varlen, (ROWS, ROWS, index(0, -(2**63), 10), CU), ValueError, ["cu_seqlens_q"]),
    "no offsets": (ek.maxsim_varlen, (ROWS, ROWS, CU[:0], CU), ValueError, ["cu_seqlens_q"]),
    "document too high": (ek.maxsim_indexed, (Q3, D3, index(0), index(3)), IndexError, ["document_index", "3"]),
    "negative query": (ek.maxsim_indexed, (Q3, D3, index(-1), index(0)), IndexError, ["query_index", "-1"]),
    "unequal indices": (ek.maxsim_indexed, (Q3, D3, index(0, 1), index(0)), ValueError, ["query_index"]),
    "own candidates of other queries": (ek.maxsim, (Q3, zeros(3, 2, 7, 8)), ValueError, ["[3, 2, 7, 8]"]),
    "lists of unequal dimensions": (ek.maxsim, (Q3, [zeros(5, 8), zeros(5, 9)]), ValueError, ["D"]),
    "list of 3-D": (ek.maxsim, (Q3, [zeros(1, 5, 8)]), ValueError, ["D", "[1, 5, 8]"]),
    "mask of a list is an array": (ek.maxsim, (LIST, D3, zeros(2, 5)), TypeError, ["q_mask"]),
    "mask in a list": (ek.maxsim, (LIST, D3, [zeros(5), zeros(3)]), ValueError, ["q_mask", "[3]", "[2]"]),
    "pairs of unequal batches": (ek.maxsim_pairs, (Q3, D3), ValueError, ["Q", "2", "D", "3"]),
}


@pytest.mark.parametrize("name", NUMPY_MISTAKES)
def test_mistake_with_arrays(backend, name):
    function, arguments, exception, words = NUMPY_MISTAKES[name]
    with pytest.raises(exception) as raised:
        function(*map(arrays, arguments))
    for word in words:
        assert word in str(raised.value), f"{word!r} is missing from: {raised.value}"


@pytest.mark.parametrize("function", ["maxsim_forward", "maxsim_backward"])
@pytest.mark.parametrize(
    "mistake",
    [
        "dimension",
        "offsets",
        "query index",
        "mask",
        "dtype",
        "argmax",
        "argmax length",
        "grad",
        "mask_mode",
        "precision",
    ],
)
def test_registered_op_is_as_careful(backend, function, mistake):
    """torch.ops.edgecolbert can be called by anyone, so raw memory is behind the same checks there."""
    Q, D = torch.ones(2, 5, 8), torch.ones(3, 7, 8)
    arguments = dict.fromkeys(("q_mask", "d_mask", "cu_q", "cu_d", "query_index", "document_index"))
    tail = {"normalize": False, "mask_mode": "exclude"}
    if function == "maxsim_forward":
        tail |= {"precision": "exact", "with_argmax": True}
        head = {}
    else:
        head = {"grad": torch.ones(2, 3), "argmax": torch.zeros(2 * 3 * 5, dtype=torch.int16)}
        tail |= {"need_queries": True, "need_documents": True}
    op = getattr(torch.ops.edgecolbert, function)
    names = {argument.name for argument in op.default._schema.arguments}
    tail = {name: value for name, value in tail.items() if name in names}
    if mistake == "dimension":
        D = torch.ones(3, 7, 9)
    elif mistake == "offsets":
        Q, arguments["cu_q"], head["argmax"] = (
            torch.ones(10, 8),
            torch.tensor([0, 2**40]),
            torch.zeros(30, dtype=torch.int16),
        )
        head["grad"] = torch.ones(1, 3)
    elif mistake == "query index":
        arguments["query_index"], arguments["document_index"] = torch.tensor([2**40]), torch.tensor([0])
        head["grad"], head["argmax"] = torch.ones(1), torch.zeros(5, dtype=torch.int16)
    elif mistake == "mask":
        arguments["d_mask"] = torch.ones(3, 6, dtype=torch.bool)
    elif mistake == "dtype":
        Q = Q.int()
    elif mistake in ("argmax", "argmax length", "grad"):
        if function == "maxsim_forward":
            pytest.skip("an argument of the backward")
        if mistake == "argmax":
            head["argmax"] = torch.full((30,), 30000, dtype=torch.int16)
        elif mistake == "argmax length":
            head["argmax"] = head["argmax"][:7]
        else:
            head["grad"] = torch.ones(1)
    else:
        if mistake not in tail:
            pytest.skip(f"no {mistake} here")
        tail[mistake] = "nonsense"
    if function == "maxsim_forward":
        head = {}
    with pytest.raises((ValueError, TypeError, IndexError, RuntimeError)):
        op(**head, Q=Q, D=D, **arguments, **tail)


@pytest.mark.parametrize("layout", ["every", "packed queries", "pairs"])
def test_the_argmax_of_a_short_document(layout):
    """Documents of 10 tokens and of 1: what the first one has, the second has not."""
    D, cu_d = torch.ones(11, 8), torch.tensor([0, 10, 11])
    Q, cu_q = (torch.ones(3, 8), torch.tensor([0, 1, 3])) if layout == "packed queries" else (torch.ones(1, 2, 8), None)
    pairs = (torch.tensor([0, 0]), torch.tensor([1, 0])) if layout == "pairs" else (None, None)
    shape, good, bad = {
        "every": ((1, 2), [9, -1, 0, 0], [9, -1, 0, 1]),
        "packed queries": ((2, 2), [9, 0, 9, 9, 0, 0], [9, 0, 9, 9, 0, 9]),
        "pairs": ((2,), [0, 0, 9, 9], [9, 0, 9, 9]),
    }[layout]
    for argmax in (good, bad):
        argmax = torch.tensor(argmax, dtype=torch.int32)
        arguments = (
            torch.ones(shape),
            Q,
            D,
            argmax,
            None,
            None,
            cu_q,
            cu_d,
            *pairs,
            False,
            "exclude",
            "exact",
            True,
            True,
        )
        if argmax.tolist() == good:
            torch.ops.edgecolbert.maxsim_backward(*arguments)
        else:
            with pytest.raises(IndexError, match="argmax"):
                torch.ops.edgecolbert.maxsim_backward(*arguments)


def test_process_survives_every_mistake(python):
    """All of them in one fresh process, under glibc's strict heap checks: the exit is clean."""
    source = """
import test_errors
for name, (call, exception, _) in test_errors.MISTAKES.items():
    try:
        call()
    except exception:
        continue
    raise SystemExit(f"{name}: no error")
"""
    python(source, MALLOC_CHECK_="3", MALLOC_PERTURB_="165")
