"""colbert-ai 0.2.22 on these kernels: `colbert_score`, `colbert_score_packed`, and no compiler for `segmented_maxsim`.

Masked document tokens are -9999 in the padded form; the packed form takes the maximum with 0, as its C++ does. Half
precision is scored and returned in float32. A GPU, `interaction="flipr"` and wrong input stay with the host.

An object made while patched has not loaded the host's extension, so score with it while patched.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from edgecolbert_kernels.integrations import inputs
from edgecolbert_kernels.integrations.patching import Patch, Report, Target, hit, original
from edgecolbert_kernels.scoring import maxsim, maxsim_pairs, maxsim_varlen

MODULE = "colbert.modeling.colbert"
PADDED, PACKED = f"{MODULE}:colbert_score", f"{MODULE}:colbert_score_packed"
MASKED = -9999.0


def patch_colbert_ai() -> Report:
    """Let colbert-ai score on these kernels, until `unpatch_colbert_ai`; twice is harmless.

    Patch before the first `ColBERT`, `Checkpoint` or `Searcher` is made: that is what starts the compiler.

    Returns:
        What was reached, and the calls that the kernels answered (`hits`). What could not be reached is a warning.

    Raises:
        ImportError: colbert-ai is not installed.
    """
    return _patch.apply()


def unpatch_colbert_ai() -> None:
    """Give colbert-ai its own functions back, once no `using_colbert_ai` block is open."""
    _patch.undo()


def using_colbert_ai() -> AbstractContextManager[Report]:
    """`patch_colbert_ai` for a `with` block; for all threads."""
    return _patch.using()


def _targets() -> Sequence[Target]:
    targets = [Target(PADDED, _padded), Target(PACKED, _packed)]
    if not hasattr(importlib.import_module(MODULE).ColBERT, "loaded_extensions"):
        names = {"segmented_maxsim": staticmethod(segmented_maxsim), "loaded_extensions": True}
        targets += [Target(f"{MODULE}:ColBERT.{name}", value, attribute=True) for name, value in names.items()]
    return targets


def segmented_maxsim(scores: Tensor, lengths: Tensor) -> Tensor:
    """What the host compiles C++ for: `[Td, Lq]` similarities of documents back to back, `[Nd]` lengths, to `[Nd]`."""
    if not scores.shape[0]:
        return scores.new_zeros(lengths.shape)
    return torch.segment_reduce(scores, "max", lengths=lengths.long(), axis=0, initial=0).sum(1)


def _ours(config: Any, Q: Tensor, D: Tensor) -> bool:
    return config.interaction == "colbert" and not config.total_visible_gpus and inputs.fused(Q, D)


def _padded(Q: Tensor, D_padded: Tensor, D_mask: Tensor, config: Any) -> Tensor:
    if Q.dim() == D_padded.dim() == 3 and Q.shape[0] in (1, D_padded.shape[0]) and _ours(config, Q, D_padded):
        try:
            kept = D_mask.view(D_padded.shape[:2]).bool()
            one = Q.shape[0] == 1
            scores = maxsim(Q[0], D_padded, None, kept) if one else maxsim_pairs(Q, D_padded, None, kept)
        except (TypeError, ValueError, RuntimeError):
            pass  # An input that is not what we take: the host takes it, or says so in its own words.
        else:
            hit(PADDED)
            return scores.masked_fill(~kept.any(1), MASKED * Q.shape[1])
    return original(PADDED)(Q, D_padded, D_mask, config)


def _packed(Q: Tensor, D_packed: Tensor, D_lengths: Tensor, config: Any) -> Tensor:
    if D_packed.dim() == 2 and _ours(config, Q, D_packed):
        try:
            query, count = Q.squeeze(0), D_lengths.shape[0]
            # The maximum with 0: a token of zeros at the end of each document.
            lengths = D_lengths.long()
            at = torch.arange(len(D_packed)) + torch.repeat_interleave(torch.arange(count), lengths)
            D = D_packed.new_zeros(len(D_packed) + count, D_packed.shape[1]).index_copy(0, at, D_packed)
            ends = torch.nn.functional.pad((lengths + 1).cumsum(0), (1, 0))
            scores = maxsim_varlen(query, D, torch.tensor([0, len(query)]), ends)[0]
        except (TypeError, ValueError, RuntimeError, IndexError):
            pass
        else:
            hit(PACKED)
            return scores
    return original(PACKED)(Q, D_packed, D_lengths, config)


_patch = Patch("colbert-ai", _targets, ("0.2.22", "0.3"))
