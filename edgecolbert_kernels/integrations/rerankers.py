"""rerankers 0.10 on these kernels: its ColBERT ranker.

Every query token counts, masked or not, and the sum is divided by the number of those that are not masked, as there; a
document without a token scores as if all its similarities were -10000. Half precision is scored and returned in float32.
A GPU without a kernel, float64 and wrong input stay with the host. Its `PyLateRanker` is reached by `patch_pylate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from edgecolbert_kernels.integrations import inputs
from edgecolbert_kernels.integrations.patching import Patch, Report, Target, hit, original
from edgecolbert_kernels.scoring import maxsim

SCORE = "rerankers.models.colbert_ranker:_colbert_score"
MASKED = -1e4


def patch_rerankers() -> Report:
    """Let rerankers score on these kernels, until `unpatch_rerankers`; twice is harmless.

    Returns:
        What was reached, and the calls that the kernels answered (`hits`). What could not be reached is a warning.

    Raises:
        ImportError: rerankers is not installed.
    """
    return _patch.apply()


def unpatch_rerankers() -> None:
    """Give rerankers its own function back, once no `using_rerankers` block is open."""
    _patch.undo()


def using_rerankers() -> AbstractContextManager[Report]:
    """`patch_rerankers` for a `with` block; for all threads."""
    return _patch.using()


def _score(q_reps: Tensor, p_reps: Tensor, q_mask: Tensor, p_mask: Tensor) -> Tensor:
    if q_reps.shape[1] >= q_mask.shape[1] and inputs.fused(q_reps, p_reps):
        try:
            kept = p_mask != 0
            scores = maxsim(q_reps, p_reps, None, kept)
        except (TypeError, ValueError):
            pass  # An input that is not what we take: the host takes it, or says so in its own words.
        else:
            hit(SCORE)
            return scores.masked_fill(~kept.any(1), MASKED * q_reps.shape[1]) / q_mask.sum(-1, keepdim=True)
    return original(SCORE)(q_reps, p_reps, q_mask, p_mask)


def _targets() -> Sequence[Target]:
    return [Target(SCORE, _score)]


_patch = Patch("rerankers", _targets, ("0.10", "0.11"))
