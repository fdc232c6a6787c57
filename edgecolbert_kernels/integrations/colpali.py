"""colpali-engine on these kernels: `score_multi_vector` and the late-interaction losses.

From 0.3.17 on the host has `utils.maxsim`, whose two functions are patched: scores and the hard maximum of all losses; a
loss's positive pairs, which it writes out, stay. Before, `score_multi_vector` is patched, and the losses, which are written
out, get a `torch` whose `einsum` waits for the maximum and the sum: all pairs, positive ones too. The smooth maximum
(`use_smooth_max`) is no MaxSim and stays.

Padding is the host's, zeros without a mask. Of equal similarities the gradient goes to the first, where the host's `amax`
spreads it. Half precision is scored and returned in float32. A GPU without a kernel, float64,
COLPALI_SCORES_BACKEND other than "auto" and wrong input stay with the host.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from edgecolbert_kernels.integrations import inputs
from edgecolbert_kernels.integrations.patching import Patch, Report, Target, hit, original
from edgecolbert_kernels.scoring import maxsim, maxsim_pairs

MAXSIM = "colpali_engine.utils.maxsim"
LOSSES = "colpali_engine.loss.late_interaction_losses:torch"
SCORE = "colpali_engine.utils.processing_utils:BaseVisualRetrieverProcessor.score_multi_vector"
VARIABLE = "COLPALI_SCORES_BACKEND"


def patch_colpali() -> Report:
    """Let colpali-engine score on these kernels, until `unpatch_colpali`; twice is harmless.

    Returns:
        What was reached, and the calls that the kernels answered (`hits`). What could not be reached is a warning.

    Raises:
        ImportError: colpali-engine is not installed.
    """
    return _patch.apply()


def unpatch_colpali() -> None:
    """Give colpali-engine its own functions back, once no `using_colpali` block is open."""
    _patch.undo()


def using_colpali() -> AbstractContextManager[Report]:
    """`patch_colpali` for a `with` block; for all threads."""
    return _patch.using()


def _targets() -> Sequence[Target]:
    if importlib.util.find_spec(MAXSIM):
        return [Target(name, _scorer(name)) for name in (f"{MAXSIM}:maxsim_inbatch", f"{MAXSIM}:maxsim_kd")]
    return [Target(SCORE, _score_multi_vector), Target(LOSSES, _Torch(), attribute=True)]


def _scorer(name: str) -> Callable[..., Tensor]:
    ranks = (3, 4 if name.endswith("kd") else 3)

    def scorer(query: Tensor, doc: Tensor) -> Tensor:
        auto = os.environ.get(VARIABLE, "auto") == "auto"
        if auto and (query.ndim, doc.ndim) == ranks and doc.shape[-2] and inputs.fused(query, doc):
            try:
                scores = maxsim(query, doc)
            except (TypeError, ValueError):
                pass  # An input that is not what we take: the host takes it, or says so in its own words.
            else:
                if not torch.compiler.is_compiling():
                    hit(name)
                return scores
        return original(name)(query, doc)

    return scorer


def _score_multi_vector(qs: Any, ps: Any, batch_size: int, device: Any) -> Tensor:
    cpu = (device is None and not torch.cuda.is_available()) or str(device) == "cpu"
    if cpu and len(qs) and len(ps) and inputs.fused(qs, ps):

        def batches(X: Any) -> list[Tensor]:
            pad = torch.nn.utils.rnn.pad_sequence
            return [pad(list(X[n : n + batch_size]), batch_first=True) for n in range(0, len(X), batch_size)]

        try:
            # Padded as the host does it: its zeros take part in the maximum.
            documents = batches(ps)
            scores = torch.cat([torch.cat([maxsim(q, d) for d in documents], 1) for q in batches(qs)])
        except (TypeError, ValueError):
            pass
        else:
            hit(SCORE)
            return scores
    return original(SCORE)(qs, ps, batch_size, device)


class _Torch:
    """torch, but for an `einsum` that waits until it is known what becomes of the similarities."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def einsum(equation: str, query: Tensor, doc: Tensor) -> _Similarities:
        return _Similarities(equation, query, doc)


class _Similarities:
    """`einsum(equation, query, doc)`, in one of three layouts: in the batch "bcns", of pairs "bns", of candidates "blns"."""

    def __init__(self, equation: str, query: Tensor, doc: Tensor) -> None:
        self.equation, self.query, self.doc = equation, query, doc

    def amax(self, dim: int) -> _Similarities:
        """The last dimension, document tokens: a sum over query tokens follows."""
        return self

    def sum(self, dim: int) -> Tensor:
        if self.doc.shape[-2] and inputs.fused(self.query, self.doc):
            try:
                pairs = len(self.equation.split("->")[1]) == 3
                scores = (maxsim_pairs if pairs else maxsim)(self.query, self.doc)
            except (TypeError, ValueError):
                pass
            else:
                if not torch.compiler.is_compiling():
                    hit(LOSSES)
                return scores
        return self._all().amax(-1).sum(-1)

    def __truediv__(self, tau: float) -> Tensor:
        """The smooth maximum goes on with these."""
        return self._all() / tau

    def _all(self) -> Tensor:
        return torch.einsum(self.equation, self.query, self.doc)


_patch = Patch("colpali-engine", _targets, ("0.3.14", "0.4"))
