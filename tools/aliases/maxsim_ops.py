"""The nine native ops of ErikKaum/maxsim, on the kernels of edgecolbert_kernels: stands for the `_ops` of its package.

Its Python on top, with its argument checks and its autograd functions, stays as it is. Queries of a pair list are padded
here, as the kernels take them so; an argmax of -1, where there is no token to choose, is a 0 there.
"""

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from edgecolbert_kernels.ops.maxsim import backward_op, forward_op

OPTIONS = False, "exclude", "exact"


def _forward(*inputs: Tensor | None) -> Tensor:
    return forward_op(*inputs, *OPTIONS, False)[0].flatten()


def _with_argmax(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    scores, argmax = forward_op(*inputs, *OPTIONS, True)
    return scores.flatten(), argmax.int().clamp_min(0)


def _backward(grad: Tensor, argmax: Tensor, Q: Tensor, D: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients in float32, as there, so of float32 copies; here they come in the inputs' dtype."""
    return backward_op(grad, Q.float(), D.float(), argmax.flatten(), *rest, *OPTIONS, True, True)


def _first(lengths: Tensor, longest: int) -> Tensor:
    return torch.arange(longest) < lengths[..., None]


# Padded: every query with its own candidates.


def _padded(Q: Tensor, lengths_q: Tensor, D: Tensor, lengths_d: Tensor, longest_q: int, longest_d: int, count: int):
    shape_q, shape_d = (len(lengths_q), longest_q, -1), (len(lengths_q), count, longest_d, -1)
    masks = _first(lengths_q, longest_q), _first(lengths_d, longest_d).view(shape_d[:3])
    return Q.view(shape_q), D.view(shape_d), *masks, None, None, None, None


def maxsim_padded_forward(*arguments):
    return _forward(*_padded(*arguments))


def maxsim_padded_forward_with_argmax(*arguments):
    return _with_argmax(*_padded(*arguments))


def maxsim_padded_backward(grad, Q, D, lengths_q, lengths_d, argmax, *shape):
    inputs = _padded(Q, lengths_q, D, lengths_d, *shape)
    grads = _backward(grad.view(inputs[1].shape[:2]), argmax, *inputs)
    return tuple(g.flatten(0, -2) for g in grads)


# Packed: chosen pairs.


def _packed(Q: Tensor, offsets_q: Tensor, D: Tensor, offsets_d: Tensor, query: Tensor, document: Tensor, longest: int):
    lengths = offsets_q.diff()
    queries = pad_sequence(Q.split(lengths.tolist()), batch_first=True)
    queries = torch.nn.functional.pad(queries, (0, 0, 0, longest - queries.shape[1]))
    return queries, D, _first(lengths, longest), None, None, offsets_d.long(), query.long(), document.long()


def maxsim_forward(*arguments):
    return _forward(*_packed(*arguments))


def maxsim_packed_forward_with_argmax(*arguments):
    scores, argmax = _with_argmax(*_packed(*arguments))
    return scores, argmax.view(len(scores), -1)


def maxsim_packed_backward(grad, Q, offsets_q, D, offsets_d, query, document, argmax, longest):
    inputs = _packed(Q, offsets_q, D, offsets_d, query, document, longest)
    grad_q, grad_d = _backward(grad, argmax, *inputs)
    return grad_q[inputs[2]], grad_d


# Contrastive: padded queries, packed documents, every pair.


def _contrastive(Q: Tensor, D: Tensor, offsets: Tensor):
    return Q, D, None, None, None, offsets.long(), None, None


def maxsim_contrastive_forward(*arguments):
    return _forward(*_contrastive(*arguments)).view(len(arguments[0]), -1)


def maxsim_contrastive_forward_with_argmax(Q, D, offsets):
    scores, argmax = _with_argmax(*_contrastive(Q, D, offsets))
    return scores.view(len(Q), -1), argmax.view(len(Q), -1, Q.shape[1])


def maxsim_contrastive_backward(grad, Q, D, offsets, argmax):
    return _backward(grad, argmax, *_contrastive(Q, D, offsets))


ops = SimpleNamespace(**{name: value for name, value in globals().items() if name.startswith("maxsim_")})
