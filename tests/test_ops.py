"""The registered ops under everything PyTorch does to an op: opcheck, gradcheck, compile, export, vmap, fakes, autocast."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import edgecolbert_kernels as ek
from cases import STORAGES, embeddings, grid, holes, packed, ragged, storage_name
from layouts import LAYOUTS, flat, gradients
from marks import inductor

OP = torch.ops.edgecolbert


def samples():
    """Arguments of the forward op without precision and with_argmax: every layout, masks, options, an empty one."""
    q_mask, d_mask = holes(3, 5, seed=1), holes(4, 7, seed=2)
    Q, D, own = grid(3, 5, 8, seed=1), grid(4, 7, 8, seed=2), grid(3, 2, 7, 8, seed=3)
    Qp, cu_q = packed(ragged((2, 0, 5), 8, make=grid, seed=4))
    Dp, cu_d = packed(ragged((3, 6, 0, 1), 8, make=grid, seed=5))
    index = torch.tensor([2, 0, 2]), torch.tensor([3, 3, 1])
    none = (None,) * 6
    return {
        "in-batch": (Q, D, *none, False, "exclude"),
        "masked": (Q, D, q_mask, d_mask, *none[2:], False, "exclude"),
        "zero": (Q, D, q_mask, d_mask, *none[2:], False, "zero"),
        "normalize": (Q + 0.3, D + 0.1, *none, True, "exclude"),
        "one query": (Q[0], D, *none, False, "exclude"),
        "own": (Q, own, *none, False, "exclude"),
        "packed": (Qp, Dp, None, None, cu_q, cu_d, None, None, False, "exclude"),
        "packed queries": (Qp, D, None, d_mask, cu_q, None, None, None, False, "exclude"),
        "packed documents": (Q, Dp, q_mask, None, None, cu_d, None, None, False, "exclude"),
        "indexed": (Q, D, q_mask, d_mask, None, None, *index, False, "exclude"),
        "half": (Q.half(), D.bfloat16(), *none, False, "exclude"),
        "strided": (Q.mT.contiguous().mT, D[:, ::2], *none, False, "exclude"),
        "empty": (Q[:0], D[:, :0], *none, False, "exclude"),
    }


SAMPLES = samples()


def with_leaves(arguments):
    return tuple(a.detach().clone().requires_grad_() if i < 2 else a for i, a in enumerate(arguments))


@pytest.mark.parametrize("with_argmax", [False, True])
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck_forward(name, with_argmax):
    arguments = (*SAMPLES[name], "exact", with_argmax)
    torch.library.opcheck(OP.maxsim_forward.default, arguments)
    torch.library.opcheck(OP.maxsim_forward.default, with_leaves(arguments))


@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck_backward(name, need):
    Q, D, *rest = SAMPLES[name]
    scores, argmax = OP.maxsim_forward(Q, D, *rest, "exact", True)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        OP.maxsim_backward.default, (torch.ones_like(scores), Q, D, argmax, *rest, "exact", *need), test_utils=utils
    )


@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize("mask_mode", ["exclude", "zero"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout, mask_mode, normalized):
    """Numerical differences in float64, which PyTorch's own arithmetic answers."""
    case = LAYOUTS[layout](5, torch.float64, torch.float64)
    case.Q, case.D = ([t[:, :] for t in rows] if isinstance(rows, list) else rows for rows in (case.Q, case.D))
    Q, D = case.leaves()
    count = len(flat(Q))

    def function(*leaves):
        q, d = leaves[:count], leaves[count:]
        return case(
            list(q) if isinstance(Q, list) else q[0],
            list(d) if isinstance(D, list) else d[0],
            normalize=normalized,
            mask_mode=mask_mode,
            out_dtype=torch.float64,
        )

    assert torch.autograd.gradcheck(function, (*flat(Q), *flat(D)), fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile(backend, layout):
    """One graph forward and backward, the same bits as eager."""
    torch.compiler.reset()
    case = LAYOUTS[layout](16, torch.float32, torch.float32, make=grid)
    grad = grid(*case.shape, seed=5)
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    wanted = case(case.Q, case.D), gradients(case, *case.leaves(), grad)
    case.function = compiled
    assert torch.equal(case(case.Q, case.D), wanted[0])
    assert all(map(torch.equal, gradients(case, *case.leaves(), grad), wanted[1]))


@inductor
@pytest.mark.parametrize("masked", [False, True])
def test_compile_with_inductor(masked):
    """As a part of a model, projections before it and a loss after it; dynamic sizes do not recompile for ever."""
    torch.compiler.reset()
    projection = torch.nn.Linear(16, 8, bias=False)

    def loss(x, y, mask):
        q, d = projection(x), projection(y)
        scores = ek.maxsim(q, d, None, mask, normalize=True)
        return torch.nn.functional.cross_entropy(scores / 0.05, torch.arange(len(x)))

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for batch in (3, 4, 6):
        x, y = embeddings(batch, 5, 16, seed=1), embeddings(batch, 9, 16, seed=2)
        mask = holes(batch, 9, seed=3) if masked else None
        results = []
        for function in (loss, compiled):
            projection.zero_grad()
            value = function(x, y, mask)
            value.backward()
            results.append((value.detach(), projection.weight.grad.clone()))
        torch.testing.assert_close(results[1], results[0])


def test_export(tmp_path):
    """A model with the op exports, saves, loads and runs; sizes may stay symbolic."""

    class Scorer(torch.nn.Module):
        def forward(self, Q, D, d_mask):
            return ek.maxsim(Q, D, None, d_mask)

    Q, D, mask = grid(3, 5, 8, seed=1), grid(4, 7, 8, seed=2), holes(4, 7, seed=3)
    documents, length = torch.export.Dim("documents", min=2), torch.export.Dim("length", min=2)
    shapes = {"Q": None, "D": {0: documents, 1: length}, "d_mask": {0: documents, 1: length}}
    program = torch.export.export(Scorer(), (Q, D, mask), dynamic_shapes=shapes)
    assert any("edgecolbert.maxsim_forward" in str(node.target) for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "scorer.pt2")
    loaded = torch.export.load(tmp_path / "scorer.pt2").module()
    for count, tokens in ((4, 7), (6, 13)):
        D, mask = grid(count, tokens, 8, seed=2), holes(count, tokens, seed=3)
        assert torch.equal(loaded(Q, D, mask), ek.maxsim(Q, D, None, mask))


def test_vmap(backend):
    """Over either side, over both, over masks, nested: what a loop over the batch gives."""
    Q, D, mask = grid(6, 3, 5, 8, seed=1), grid(6, 4, 7, 8, seed=2), holes(6, 4, 7, seed=3)
    both = torch.stack([ek.maxsim(q, d) for q, d in zip(Q, D, strict=True)])
    assert torch.equal(torch.vmap(ek.maxsim)(Q, D), both)
    assert torch.equal(torch.vmap(ek.maxsim, in_dims=(0, None))(Q, D[0]), torch.stack([ek.maxsim(q, D[0]) for q in Q]))
    assert torch.equal(
        torch.vmap(ek.maxsim, in_dims=(None, 1))(Q[0], D.movedim(0, 1)), torch.stack([ek.maxsim(Q[0], d) for d in D])
    )
    masked = torch.vmap(lambda q, d, m: ek.maxsim(q, d, None, m))(Q, D, mask)
    assert torch.equal(masked, torch.stack([ek.maxsim(q, d, None, m) for q, d, m in zip(Q, D, mask, strict=True)]))
    one_by_one = torch.vmap(torch.vmap(ek.maxsim, in_dims=(0, None)), in_dims=(None, 0))(Q[0], D)
    assert torch.equal(one_by_one, torch.stack([ek.maxsim(Q[0], d) for d in D]).view(6, 3, 4))


def test_per_sample_gradients(backend):
    """vmap over grad, the functorch way to per-sample gradients."""
    Q, D = grid(6, 5, 8, seed=1), grid(6, 4, 7, 8, seed=2)
    per_sample = torch.vmap(torch.func.grad(lambda q, d: ek.maxsim(q, d).sum()))(Q, D)
    for q, d, mine in zip(Q, D, per_sample, strict=True):
        leaf = q.clone().requires_grad_()
        ek.maxsim(leaf, d).sum().backward()
        assert torch.equal(mine, leaf.grad)


def test_functional_transforms(backend):
    Q, D = grid(3, 5, 8, seed=1), grid(4, 7, 8, seed=2)
    leaf = Q.clone().requires_grad_()
    ek.maxsim(leaf, D).sum().backward()
    assert torch.equal(torch.func.grad(lambda q: ek.maxsim(q, D).sum())(Q), leaf.grad)
    scores, pull_back = torch.func.vjp(ek.maxsim, Q, D)
    assert torch.equal(pull_back(torch.ones_like(scores))[0], leaf.grad)
    assert torch.equal(torch.func.functionalize(ek.maxsim)(Q, D), scores)


@pytest.mark.parametrize("function", [torch.func.jvp, torch.autograd.forward_ad])
def test_forward_mode_is_right_or_refused(backend, function):
    """There is no forward-mode rule: an error, never a silent zero tangent."""
    Q, D = grid(3, 5, 8, seed=1), grid(4, 7, 8, seed=2)
    with pytest.raises((NotImplementedError, RuntimeError)):
        if function is torch.func.jvp:
            torch.func.jvp(lambda q: ek.maxsim(q, D), (Q,), (torch.ones_like(Q),))
        else:
            with torch.autograd.forward_ad.dual_level():
                ek.maxsim(torch.autograd.forward_ad.make_dual(Q, torch.ones_like(Q)), D)


def test_double_backward_is_refused(backend):
    """MaxSim is piecewise bilinear, but the backward op has no derivative: a clear error, not a wrong one."""
    Q, D = grid(3, 5, 8, seed=1).requires_grad_(), grid(4, 7, 8, seed=2).requires_grad_()
    first = torch.autograd.grad(ek.maxsim(Q, D).square().sum(), Q, create_graph=True)[0]
    with pytest.raises((NotImplementedError, RuntimeError), match=r"second|twice|double"):
        first.square().sum().backward()


def test_fake_tensors(backend):
    """Shapes and dtypes without data; a kernel that read a fake tensor's memory would crash."""
    for name, arguments in SAMPLES.items():
        real = OP.maxsim_forward(*arguments, "exact", True)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            fake = OP.maxsim_forward(*fakes, "exact", True)
        for f, r in zip(fake, real, strict=True):
            assert (f.shape, f.dtype, f.device) == (r.shape, r.dtype, r.device), name


def test_fake_tensors_through_the_public_functions(backend):
    with FakeTensorMode():
        Q, D = torch.empty(3, 5, 8, requires_grad=True), torch.empty(4, 7, 8)
        scores = ek.maxsim(Q, D)
        scores.sum().backward()
        assert scores.shape == (3, 4)
        assert Q.grad.shape == Q.shape
        assert ek.maxsim_pairs(Q, D[:3]).shape == (3,)
        assert ek.maxsim(Q, D.expand(3, 4, 7, 8)).shape == (3, 4)
        assert ek.maxsim(Q, D, out_dtype=torch.float16).dtype == torch.float16


def test_meta_tensors(backend):
    Q, D = torch.empty(3, 5, 8, device="meta"), torch.empty(4, 7, 8, device="meta")
    scores = ek.maxsim(Q, D)
    assert scores.device.type == "meta"
    assert scores.shape == (3, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    """Inputs are scored as they arrive, fp32 next to bf16; scores stay fp32 and gradients come in each input's dtype."""
    layer = torch.nn.Linear(16, 8, bias=False)
    x, D = embeddings(3, 5, 16, seed=1), embeddings(4, 7, 8, seed=2).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        Q = layer(x)
        assert Q.dtype == dtype
        Q.retain_grad()
        scores = ek.maxsim(Q, D)
        assert scores.dtype == torch.float32
        compiled = torch.compile(ek.maxsim, fullgraph=True, backend="aot_eager")(Q, D)
    assert torch.equal(scores, ek.maxsim(Q.detach(), D.detach()))
    assert torch.equal(scores, compiled)
    scores.sum().backward()
    assert Q.grad.dtype == dtype
    assert D.grad.dtype == torch.float32
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend, mode):
    Q, D = grid(3, 5, 8, seed=1).requires_grad_(), grid(4, 7, 8, seed=2)
    with mode():
        scores = ek.maxsim(Q, D)
        inside = ek.maxsim(Q + 0, D + 0)
        assert torch.equal(ek.maxsim(list(Q), list(D)), scores)
    assert not scores.requires_grad
    assert torch.equal(scores, ek.maxsim(Q, D).detach())
    assert torch.equal(inside, scores)


def test_inference_tensors_outside_inference_mode(backend):
    with torch.inference_mode():
        D = grid(4, 7, 8, seed=2) + 0
    Q = grid(3, 5, 8, seed=1)
    assert torch.equal(ek.maxsim(Q, D), ek.maxsim(Q, D.clone()))


class Tagged(torch.Tensor):
    """A tensor subclass that says when a function reaches it."""

    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, arguments, kwargs or {})


def test_tensor_subclass(backend):
    """A subclass goes through the dispatcher, where its own rules apply."""
    Q, D = grid(3, 5, 8, seed=1), grid(4, 7, 8, seed=2)
    scores = ek.maxsim(Q.as_subclass(Tagged), D)
    assert torch.equal(scores.as_subclass(torch.Tensor), ek.maxsim(Q, D))


def test_parameter(backend):
    weight = torch.nn.Parameter(grid(4, 7, 8, seed=2))
    ek.maxsim(grid(3, 5, 8, seed=1), weight).sum().backward()
    assert weight.grad.shape == weight.shape


def test_dispatch_modes_see_the_op(backend):
    """Profilers, counters and tracers that work by dispatch mode do not lose the call."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            self.names.append(str(function))
            return function(*arguments, **(kwargs or {}))

    Q, D = grid(3, 5, 8, seed=1).requires_grad_(), grid(4, 7, 8, seed=2)
    with Record() as record:
        ek.maxsim(Q, D).sum().backward()
    assert any("edgecolbert.maxsim_forward" in name for name in record.names)
    assert any("edgecolbert.maxsim_backward" in name for name in record.names)


def test_lazy_views(backend):
    """Conjugate and negative bits are resolved, not read past."""
    Q, D = grid(3, 5, 8, seed=1), grid(4, 7, 8, seed=2)
    negated = torch._neg_view(D)
    assert torch.equal(ek.maxsim(Q, negated), ek.maxsim(Q, -D))
    imaginary = torch.complex(torch.zeros_like(D), D).conj().imag
    assert torch.equal(ek.maxsim(Q, imaginary), ek.maxsim(Q, -D))
    assert torch.equal(ek.maxsim(list(Q), list(negated)), ek.maxsim(Q, -D))
    zeros = torch._efficientzerotensor((4, 7, 8))
    assert (ek.maxsim(Q, zeros) == 0).all()


def test_tensor_without_storage(backend):
    """A tensor whose memory was taken away is refused, not read."""
    Q, D = grid(3, 5, 8, seed=1), grid(4, 7, 8, seed=2)
    D.untyped_storage().resize_(0)
    with pytest.raises((RuntimeError, ValueError)):
        ek.maxsim(Q, D)


def test_make_fx(backend):
    """Tracing records the op instead of running past it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    Q, D = grid(3, 5, 8, seed=1), grid(4, 7, 8, seed=2)
    graph = make_fx(lambda q, d: ek.maxsim(q, d) * 2)(Q, D)
    assert torch.equal(graph(Q + 1, D), ek.maxsim(Q + 1, D) * 2)


def test_activation_checkpointing(backend):
    from torch.utils.checkpoint import checkpoint

    Q, D = grid(3, 5, 8, seed=1).requires_grad_(), grid(4, 7, 8, seed=2)
    ek.maxsim(Q, D).square().sum().backward()
    wanted, Q.grad = Q.grad, None
    checkpoint(lambda q: ek.maxsim(q, D).square(), Q, use_reentrant=False).sum().backward()
    assert torch.equal(Q.grad, wanted)


def test_saved_tensors_may_leave_memory(backend):
    """Offloaded and restored by hooks, as activation offloading does."""
    Q, D = grid(3, 5, 8, seed=1).requires_grad_(), grid(4, 7, 8, seed=2).requires_grad_()
    wanted = torch.autograd.grad(ek.maxsim(Q, D).sum(), (Q, D))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True).copy(), torch.from_numpy):
        scores = ek.maxsim(Q, D)
    assert all(map(torch.equal, torch.autograd.grad(scores.sum(), (Q, D)), wanted))


def test_backward_in_another_thread(backend):
    """The backward follows the forward's backend, not the thread's."""
    Q, D = grid(3, 5, 8, seed=1).requires_grad_(), grid(4, 7, 8, seed=2)
    wanted = torch.autograd.grad(ek.maxsim(Q, D).sum(), Q)[0]
    scores = ek.maxsim(Q, D).sum()
    errors = []

    def run():
        try:
            scores.backward()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors
    assert torch.equal(Q.grad, wanted)


def test_module_with_scores_can_be_copied(backend):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.documents = torch.nn.Parameter(grid(4, 7, 8, seed=2))

        def forward(self, Q):
            return ek.maxsim(Q, self.documents)

    model = Model()
    Q = grid(3, 5, 8, seed=1)
    assert torch.equal(copy.deepcopy(model)(Q), model(Q))


@pytest.mark.parametrize("dtype", STORAGES, ids=storage_name)
def test_op_and_public_function_agree(backend, dtype):
    """Direct path and dispatcher: the same bits."""
    Q, D = embeddings(3, 5, 48, seed=1, dtype=dtype), embeddings(4, 7, 48, seed=2, dtype=dtype)
    q_mask, d_mask = holes(3, 5, seed=3), holes(4, 7, seed=4)
    for mask_mode in ("exclude", "zero"):
        for precision in ("exact", "fast"):
            scores, empty = OP.maxsim_forward(
                Q, D, q_mask, d_mask, None, None, None, None, True, mask_mode, precision, False
            )
            wanted = ek.maxsim(Q, D, q_mask, d_mask, normalize=True, mask_mode=mask_mode, precision=precision)
            assert empty.numel() == 0
            assert torch.equal(scores, wanted)
