"""`edgecolbert::contrastive_forward` and `edgecolbert::contrastive_backward`: schema, implementation, fake and autograd.

The forward returns the loss of every query and what the backward needs, of which `tiles.State` is the account. `losses` is
how the package calls it: past the dispatcher where tensors are plain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgecolbert_kernels import checks
from edgecolbert_kernels.backends import layout
from edgecolbert_kernels.ops import arguments, tiles
from edgecolbert_kernels.ops.plain import in_derivative, no_derivative, plain, refuse_tangents

_PROBLEM = (
    "Tensor Q, Tensor D, Tensor? q_mask, Tensor? d_mask, Tensor target, Tensor? exclude, Tensor temperature, "
    "float label_smoothing, float? margin, bool symmetric, bool normalize, str mask_mode"
)
_STATE = "Tensor rows, Tensor columns, Tensor scores, Tensor argmax"
_FORWARD = f"({_PROBLEM}, bool? save_scores, int max_saved_bytes) -> (Tensor loss, {_STATE})"
_BACKWARD = (
    f"(Tensor grad, {_PROBLEM}, {_STATE}, bool need_queries, bool need_documents, bool need_temperature)"
    " -> (Tensor grad_queries, Tensor grad_documents, Tensor grad_temperature)"
)
_PROBLEM_SIZE = len(tiles.Problem._fields)
_TENSORS = 7  # of these, tensors

_library = torch.library.Library("edgecolbert", "FRAGMENT")
_library.define("contrastive_forward" + _FORWARD, tags=(torch.Tag.pt2_compliant_tag,))
_library.define("contrastive_backward" + _BACKWARD, tags=(torch.Tag.pt2_compliant_tag,))
forward_op = torch.ops.edgecolbert.contrastive_forward.default
backward_op = torch.ops.edgecolbert.contrastive_backward.default


def losses(*args: Any) -> Tensor:
    """`[Nq]`, of the forward op's arguments."""
    Q, D, temperature = args[0], args[1], args[_TENSORS - 1]
    if plain(*args[:_TENSORS]):
        problem = _problem(args[:_PROBLEM_SIZE])
        kept = tiles.plan(Q, D, *args[_PROBLEM_SIZE:])
        if torch.is_grad_enabled() and (Q.requires_grad or D.requires_grad or temperature.requires_grad):
            loss: Tensor = Contrastive.apply(Q, D, temperature, problem, kept)
            return loss
        return tiles.forward(problem, kept, tiles.setting(problem))[0]
    if in_derivative():
        raise NotImplementedError(
            "contrastive_loss does not run inside torch.func.grad, vmap and the like; edgecolbert_kernels.reference does"
        )
    refuse_tangents(Q, D, temperature)
    return forward_op(*args)[0]


class Contrastive(torch.autograd.Function):
    """The loss of plain tensors. Without `setup_context`, for which PyTorch inspects the signature at every call."""

    @staticmethod
    def forward(
        ctx: Any, Q: Tensor, D: Tensor, temperature: Tensor, problem: tiles.Problem, kept: tiles.Plan
    ) -> Tensor:
        ctx.options, ctx.setting = problem[_TENSORS:], tiles.setting(problem)
        loss, state = tiles.forward(problem, kept, ctx.setting)
        ctx.save_for_backward(*problem[:_TENSORS], *state)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[:3]
        inputs, state = (*saved[:_TENSORS], *ctx.options), saved[_TENSORS:]
        if torch.is_grad_enabled() or not plain(grad):
            grads = _wanted(backward_op(grad, *inputs, *state, *needs), needs)
        else:
            grads = tiles.backward(grad, tiles.Problem(*inputs), tiles.State(*state), ctx.setting, *needs)
        return *grads, None, None


def _forward(*args: Any) -> tuple[Tensor, ...]:
    problem = _problem(args[:_PROBLEM_SIZE])
    kept = tiles.plan(problem.Q, problem.D, *args[_PROBLEM_SIZE:])
    loss, state = tiles.forward(problem, kept, tiles.setting(problem))
    return loss, *state


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    problem = tiles.Problem(*args[:_PROBLEM_SIZE])
    _check(problem)
    Q, D = problem.Q, problem.D
    kept = tiles.plan(Q, D, *args[_PROBLEM_SIZE:])
    num_queries, num_documents = Q.shape[0], D.shape[0]
    dtype = getattr(torch, arguments.arithmetic(Q, D))
    loss = Q.new_empty(num_queries, dtype=dtype)
    rows = Q.new_empty((len(tiles.Rows._fields), num_queries), dtype=torch.float64)
    of_columns = (len(tiles.Columns._fields), num_documents) if problem.symmetric else (0, 0)
    columns = Q.new_empty(of_columns, dtype=torch.float64)
    scores = Q.new_empty((num_queries, num_documents) if kept.keep_scores else (0,), dtype=dtype)
    if not kept.keep_argmax:
        return loss, rows, columns, scores, Q.new_empty(0, dtype=torch.int32)
    argmax_dtype = torch.int16 if layout.argmax_is_int16(D, None) else torch.int32
    return loss, rows, columns, scores, Q.new_empty(num_queries * num_documents * Q.shape[1], dtype=argmax_dtype)


def _backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    problem, rest = _problem(args[:_PROBLEM_SIZE]), args[_PROBLEM_SIZE:]
    state = tiles.State(*rest[: len(tiles.State._fields)])
    _check_state(grad, problem, state)
    grads = tiles.backward(grad, problem, state, tiles.setting(problem), *rest[len(state) :])
    return tuple(
        X.new_empty(0) if g is None else g
        for X, g in zip((problem.Q, problem.D, problem.temperature), grads, strict=True)
    )


def _backward_fake(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    problem, needs = tiles.Problem(*args[:_PROBLEM_SIZE]), args[-3:]
    inputs = problem.Q, problem.D, problem.temperature
    return tuple(
        torch.empty_like(X, memory_format=torch.contiguous_format) if need else X.new_empty(0)
        for X, need in zip(inputs, needs, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], *output[1:])
    ctx.options = inputs[_TENSORS:_PROBLEM_SIZE]
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved, needed = ctx.saved_tensors, ctx.needs_input_grad
    needs = needed[0], needed[1], needed[_TENSORS - 1]
    grads = backward_op(grad, *saved[:_TENSORS], *ctx.options, *saved[_TENSORS:], *needs)
    grad_queries, grad_documents, grad_temperature = _wanted(grads, needs)
    none = (None,) * (_PROBLEM_SIZE - _TENSORS + 2)
    return grad_queries, grad_documents, None, None, None, None, grad_temperature, *none


def _wanted(grads: tuple[Tensor, ...], needs: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
    return tuple(each if need else None for each, need in zip(grads, needs, strict=True))


def _differentiate_twice(ctx: Any, *grads: Tensor) -> None:
    raise no_derivative("second", "contrastive_loss")


def _problem(args: tuple[Any, ...]) -> tiles.Problem:
    problem = tiles.Problem(*args)
    _check(problem)
    q_mask, d_mask = (None if mask is None else arguments.kept(mask) for mask in (problem.q_mask, problem.d_mask))
    target = problem.target
    if target.dtype != torch.bool:
        target = target.to(torch.int64)
        if target.numel() and tiles.looked_at(problem.Q):
            checks.target(int(target.max()), problem.D.shape[0])
    exclude = None if problem.exclude is None else problem.exclude.to(torch.bool)
    if tiles.looked_at(problem.Q):
        temperature = float(problem.temperature.detach())
        if not temperature > 0:
            raise checks.not_positive("temperature", temperature)
    return problem._replace(q_mask=q_mask, d_mask=d_mask, target=target, exclude=exclude)


def _check(problem: tiles.Problem) -> None:
    Q, D = problem.Q, problem.D
    checks.rank("Q", Q.shape, (3,), "[Nq, Lq, d]")
    checks.rank("D", D.shape, (3,), "[Nd, Ld, d]")
    arguments.check(Q, D, problem.q_mask, problem.d_mask, None, None, None, None)
    checks.options(problem.mask_mode, "exact")
    table = Q.shape[0], D.shape[0]
    if problem.target.dtype == torch.bool:
        checks.shape("target", problem.target.shape, table, "one entry for each query and document")
    elif problem.target.dtype not in arguments.INTEGERS:
        raise checks.wrong_dtype("target", problem.target.dtype, "an integer dtype or bool")
    else:
        checks.shape("target", problem.target.shape, table[:1], "one document for each query")
    if problem.exclude is not None:
        checks.shape("exclude", problem.exclude.shape, table, "one entry for each query and document")
        checks.same_device("exclude", problem.exclude.device, Q.device)
    checks.same_device("target", problem.target.device, Q.device)
    checks.shape("temperature", problem.temperature.shape, (), "a number")
    checks.same_device("temperature", problem.temperature.device, Q.device)


def _check_state(grad: Tensor, problem: tiles.Problem, state: tiles.State) -> None:
    """Kernels read all of these as the forward writes them."""
    queries, documents = problem.Q.shape[0], problem.D.shape[0]
    checks.shape("grad", grad.shape, (queries,), "one entry for each query")
    checks.shape("rows", state.rows.shape, (len(tiles.Rows._fields), queries), "what the forward returned")
    columns = (len(tiles.Columns._fields), documents) if problem.symmetric else (0, 0)
    checks.shape("columns", state.columns.shape, columns, "what the forward returned")
    if state.scores.numel():
        checks.shape("scores", state.scores.shape, (queries, documents), "what the forward returned")
    if state.argmax.numel():
        of_argmax = (queries * documents * problem.Q.shape[1],)
        checks.shape("argmax", state.argmax.shape, of_argmax, "what the forward returned")
        wanted = torch.int16 if layout.argmax_is_int16(problem.D, None) else torch.int32
        if state.argmax.dtype != wanted:
            raise checks.wrong_dtype("argmax", state.argmax.dtype, str(wanted))
        if tiles.looked_at(problem.Q):
            checks.argmax(int(state.argmax.amin()), int(state.argmax.amax()), problem.D.shape[1])
    arithmetic = getattr(torch, arguments.arithmetic(problem.Q, problem.D))
    for name, each, dtype in (
        ("rows", state.rows, torch.float64),
        ("columns", state.columns, torch.float64),
        ("scores", state.scores, arithmetic),
    ):
        if each.dtype != dtype:
            raise checks.wrong_dtype(name, each.dtype, str(dtype))
    for name, each in (("grad", grad), *zip(state._fields, state, strict=True)):
        checks.same_device(name, each.device, problem.Q.device)


for _op, _implementation, _fake, _setup, _gradient in (
    (forward_op, _forward, _forward_fake, _save, _differentiate),
    (backward_op, _backward, _backward_fake, None, _differentiate_twice),
):
    _library.impl(_op, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(_op, _fake, lib=_library)
    torch.library.register_autograd(_op, _gradient, setup_context=_setup, lib=_library)
