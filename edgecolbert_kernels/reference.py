r"""MaxSim in plain PyTorch: what every kernel is held to.

Everything is materialised and nothing is fast. It runs in the dtype of its inputs (pass float64 for the truth), and
PyTorch's own autograd gives its gradients.

With query tokens $q_i$, document tokens $d_j$, the kept tokens $K_q$, $K_d$ and $s_{ij} = \langle q_i, d_j \rangle$:

$$\text{score}(q, d) = \sum_{i \in K_q} \max_{j \in K_d} s_{ij}$$

- A document without a kept token scores 0.
- `mask_mode="zero"`: the maximum runs over every token of the document, with $s_{ij} = 0$ where $j \notin K_d$.
- `normalize=True`: $x \mapsto x / \max(\lVert x \rVert_2, 10^{-12})$ for every token first.
- argmax: the lowest $j$ among equals, the first NaN if there is one, and -1 where no kept token won or $i \notin K_q$.
  The gradient flows through this token alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit_rows

NO_TOKEN = -1


def score(
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    normalize: bool = False,
    mask_mode: str = "exclude",
) -> tuple[Tensor, Tensor]:
    """`Q [..., Lq, d]` against `D [..., Ld, d]`, leading dimensions broadcast -> scores `[...]`, argmax `[..., Lq]`."""
    q_kept = torch.ones_like(Q[..., 0], dtype=torch.bool) if q_mask is None else q_mask != 0
    d_kept = torch.ones_like(D[..., 0], dtype=torch.bool) if d_mask is None else d_mask != 0
    # Padding may hold anything, NaN included; as zeros it stays out of the gradient too.
    Q = Q.masked_fill(~q_kept[..., None], 0)
    D = D.masked_fill(~d_kept[..., None], 0)
    if normalize:
        Q, D = unit_rows(Q, dim=-1), unit_rows(D, dim=-1)

    similarity = Q @ D.mT
    kept = d_kept[..., None, :].expand_as(similarity)
    if mask_mode == "zero":
        similarity = similarity.masked_fill(~kept, 0)
    best = first_maximum(similarity, torch.ones_like(kept) if mask_mode == "zero" else kept)

    # An extra column of zeros is what a query token without a document token finds.
    with_none = torch.nn.functional.pad(similarity, (0, 1))
    column = best.where(best != NO_TOKEN, similarity.shape[-1])[..., None]
    maximum = with_none.gather(-1, column)[..., 0].masked_fill(~q_kept, 0)

    won_by_kept = torch.nn.functional.pad(kept, (0, 1)).gather(-1, column)[..., 0]
    return maximum.sum(-1), best.where(won_by_kept & q_kept, NO_TOKEN)


def first_maximum(similarity: Tensor, eligible: Tensor) -> Tensor:
    """The lowest eligible position of each row's maximum (NaN above all), -1 where none is eligible."""
    if similarity.shape[-1] == 0:
        return similarity.new_full(similarity.shape[:-1], NO_TOKEN, dtype=torch.int64)
    maximum, position = similarity.detach().masked_fill(~eligible, -torch.inf).max(-1)
    # Where all that is eligible is -inf, the first -inf may be a token that is not.
    first = eligible.int().argmax(-1)
    return position.where(maximum != -torch.inf, first).where(eligible.any(-1), NO_TOKEN)


def maxsim(
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    normalize: bool = False,
    mask_mode: str = "exclude",
) -> tuple[Tensor, Tensor]:
    """`Q [Nq, Lq, d]` against `D [Nd, Ld, d]` -> `[Nq, Nd]`, or against its own `D [Nq, K, Ld, d]` -> `[Nq, K]`.

    The argmax has an axis Lq more.
    """
    if D.ndim == 3:
        D, d_mask = D[None], None if d_mask is None else d_mask[None]
    q_mask = None if q_mask is None else q_mask[:, None]
    return score(Q[:, None], D, q_mask, d_mask, normalize=normalize, mask_mode=mask_mode)


def maxsim_pairs(
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    normalize: bool = False,
    mask_mode: str = "exclude",
) -> tuple[Tensor, Tensor]:
    """`Q [B, Lq, d]` against `D [B, Ld, d]`, row by row -> scores `[B]`, argmax `[B, Lq]`."""
    return score(Q, D, q_mask, d_mask, normalize=normalize, mask_mode=mask_mode)


def maxsim_indexed(
    Q: Tensor,
    D: Tensor,
    query_index: Tensor,
    document_index: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    normalize: bool = False,
    mask_mode: str = "exclude",
) -> tuple[Tensor, Tensor]:
    """Pairs `query_index[p]`, `document_index[p]` of `Q [Nq, Lq, d]` and `D [Nd, Ld, d]` -> `[P]`, argmax `[P, Lq]`."""
    q_mask = None if q_mask is None else q_mask[query_index]
    d_mask = None if d_mask is None else d_mask[document_index]
    return score(Q[query_index], D[document_index], q_mask, d_mask, normalize=normalize, mask_mode=mask_mode)


def maxsim_varlen(
    Q: Tensor,
    D: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_d: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    normalize: bool = False,
    mask_mode: str = "exclude",
) -> tuple[Tensor, list[list[Tensor]]]:
    """`Q [Tq, d]`, `D [Td, d]`, sequence n being rows `cu[n]` to `cu[n + 1]` -> `[Nq, Nd]`, argmax `[query][document]`."""

    def spans(cu_seqlens: Tensor) -> list[slice]:
        bounds = cu_seqlens.tolist()
        return [slice(bounds[n], bounds[n + 1]) for n in range(len(bounds) - 1)]

    def pair(query: slice, document: slice) -> tuple[Tensor, Tensor]:
        masks = None if q_mask is None else q_mask[query], None if d_mask is None else d_mask[document]
        return score(Q[query], D[document], *masks, normalize=normalize, mask_mode=mask_mode)

    pairs = [[pair(query, document) for document in spans(cu_seqlens_d)] for query in spans(cu_seqlens_q)]
    flat = [value for row in pairs for value, _ in row]
    shape = len(cu_seqlens_q) - 1, len(cu_seqlens_d) - 1
    scores = torch.stack(flat).reshape(shape) if flat else Q.new_zeros(shape)
    return scores, [[argmax for _, argmax in row] for row in pairs]
