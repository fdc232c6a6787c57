"""colpali-engine on these kernels: `score_multi_vector` and the late-interaction losses.

Where the host has `utils.maxsim` (0.3.18 does), both of its functions are patched: scores and the hard maximum of all
losses. 0.3.14 has its losses written out in einsum: there only `score_multi_vector` is reached, and a warning says so. The
smooth maximum (`use_smooth_max`) is no MaxSim and stays, as do a loss's positive pairs where it writes them out.

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

from edgecolbert_kernels.integrations import functions
from edgecolbert_kernels.integrations.patching import Patch, Report, Target, hit, original
from edgecolbert_kernels.scoring import maxsim

MAXSIM = "colpali_engine.utils.maxsim"
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
    targets = [Target(f"{MAXSIM}:{name}", _scorer(f"{MAXSIM}:{name}")) for name in ("maxsim_inbatch", "maxsim_kd")]
    # Without that module the first warns of the losses; scores have another way.
    return targets if importlib.util.find_spec(MAXSIM) else [*targets[:1], Target(SCORE, _score_multi_vector)]


def _scorer(name: str) -> Callable[..., Tensor]:
    ranks = (3, 4 if name.endswith("kd") else 3)

    def scorer(query: Tensor, doc: Tensor) -> Tensor:
        auto = os.environ.get(VARIABLE, "auto") == "auto"
        if auto and (query.ndim, doc.ndim) == ranks and doc.shape[-2] and functions.fused(query, doc):
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
    if cpu and len(qs) and len(ps) and functions.fused(qs, ps):

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


_patch = Patch("colpali-engine", _targets, ("0.3.14", "0.4"))
