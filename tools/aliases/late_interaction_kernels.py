"""late-interaction-kernels' functions under their names, on edgecolbert_kernels: stands for that package in its tests.

One file for all of its modules; its pure PyTorch `reference`, which the tests compare with, is its own and lies beside.
"""

import sys

import torch
from torch import Tensor

import edgecolbert_kernels as ek

_BACKWARDS = (None, "auto", "unified", "lowmem")


def maxsim(
    Q: Tensor, D: Tensor, q_mask=None, d_mask=None, *, normalize: bool = False, backward: str | None = None
) -> Tensor:
    if backward not in _BACKWARDS:
        raise ValueError(f"backward is {backward!r}; want one of {_BACKWARDS}")
    if D.ndim == 2:
        return maxsim(Q, D[None], q_mask, None if d_mask is None else d_mask[None], normalize=normalize)[..., 0]
    return ek.maxsim(Q, D, q_mask, d_mask, normalize=normalize)


def maxsim_pairs(Q: Tensor, D: Tensor, q_mask=None, d_mask=None, *, normalize: bool = False, backward=None) -> Tensor:
    return ek.maxsim_pairs(Q, D, q_mask, d_mask, normalize=normalize)


def maxsim_varlen(Q: Tensor, D: Tensor, cu_q: Tensor, cu_d: Tensor, max_seqlen_q=None, max_seqlen_d=None) -> Tensor:
    return ek.maxsim_varlen(Q, D, cu_q, cu_d)


def score_pairs_packed(
    Q: Tensor, D: Tensor, cu_q: Tensor, cu_d: Tensor, query: Tensor, document: Tensor, **longest
) -> Tensor:
    Q, D = (list(X.split(cu.diff().tolist())) for X, cu in ((Q, cu_q), (D, cu_d)))
    return ek.maxsim_indexed(Q, D, query, document)


def maxsim_padded(Q: Tensor, D: Tensor, query_lengths: Tensor, doc_lengths: Tensor, *, validate=False) -> Tensor:
    masks = (torch.arange(X.shape[-2]) < n[..., None] for X, n in ((Q, query_lengths), (D, doc_lengths)))
    return ek.maxsim(Q, D, *masks)


def pack_padded(*arguments, **options):
    raise NotImplementedError("a change of layout without a kernel: its tests are not run")


def maxsim_topk(
    Q: Tensor, D: Tensor, k: int, q_mask=None, d_mask=None, *, normalize: bool = False, chunk_size=None
) -> tuple[Tensor, Tensor]:
    if normalize:
        Q, D = (torch.nn.functional.normalize(X, dim=-1) for X in (Q, D))
    documents = list(D) if d_mask is None else [d[kept] for d, kept in zip(D, d_mask, strict=True)]
    scores, indices = ek.search(Q, documents, k, q_mask=q_mask)
    return scores[..., : len(documents)], indices[..., : len(documents)]


def retrieve(
    Q: Tensor, D: Tensor, top_k: int, q_mask=None, d_mask=None, *, normalize: bool = True, chunk=None
) -> tuple[Tensor, Tensor]:
    if top_k <= 0:
        raise ValueError(f"top_k is {top_k}; want at least 1")
    if Q.device != D.device:
        raise ValueError(f"Q and D are not on the same device: {Q.device} and {D.device}")
    return maxsim_topk(Q, D, top_k, q_mask, d_mask, normalize=normalize)


class MaxSimScorer(ek.MaxSimScorer):
    def __init__(self, *, normalize: bool = True, backward: str = "auto", mask_pad_token: int | None = None) -> None:
        super().__init__(normalize=normalize)
        if backward not in _BACKWARDS:
            raise ValueError(f"backward is {backward!r}; want one of {_BACKWARDS}")
        self.backward, self.mask_pad_token = backward, mask_pad_token

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backward={self.backward!r}"

    def score(self, *arguments, **options) -> Tensor:
        with torch.no_grad():
            return self(*arguments, **options)

    def retrieve(self, Q: Tensor, D: Tensor, top_k: int, q_mask=None, d_mask=None, **options) -> tuple[Tensor, Tensor]:
        return retrieve(Q, D, top_k, q_mask, d_mask, normalize=self.normalize, **options)

    def forward_with_ids(self, Q: Tensor, D: Tensor, q_ids: Tensor, d_ids: Tensor) -> Tensor:
        if self.mask_pad_token is None:
            raise ValueError("mask_pad_token is not set")
        return self(Q, D, q_ids != self.mask_pad_token, d_ids != self.mask_pad_token)


__all__ = ["MaxSimScorer", "maxsim", "maxsim_padded", "maxsim_pairs", "maxsim_varlen", "retrieve"]
for _module in ("autograd", "padded", "score_pairs", "topk", "varlen"):
    sys.modules[f"{__name__}.{_module}"] = sys.modules[__name__]
