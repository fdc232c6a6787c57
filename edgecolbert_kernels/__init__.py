"""Fused MaxSim scoring and training losses for tiny late-interaction (ColBERT) models.

Importing this package loads neither torch nor the compiled module: each comes in with the first call that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from edgecolbert_kernels._version import __version__
from edgecolbert_kernels.backends import BackendUnsupported, backend
from edgecolbert_kernels.scoring import maxsim, maxsim_indexed, maxsim_pairs, maxsim_varlen

if TYPE_CHECKING:
    from edgecolbert_kernels.distributed import gather_with_gradient as gather_with_gradient
    from edgecolbert_kernels.gradcache import GradCache as GradCache
    from edgecolbert_kernels.integrations.functions import colbert_kd_scores as colbert_kd_scores
    from edgecolbert_kernels.integrations.functions import colbert_scores as colbert_scores
    from edgecolbert_kernels.integrations.functions import colbert_scores_pairwise as colbert_scores_pairwise
    from edgecolbert_kernels.integrations.functions import maxsim_st as maxsim_st
    from edgecolbert_kernels.losses import contrastive_loss as contrastive_loss
    from edgecolbert_kernels.losses import distillation_loss as distillation_loss
    from edgecolbert_kernels.modules import MaxSimScorer as MaxSimScorer

# What is looked up when it is first asked for, and where: these modules need torch, or are not always wanted.
_LATER = {
    "GradCache": "gradcache",
    "MaxSimScorer": "modules",
    "colbert_kd_scores": "integrations.functions",
    "colbert_scores": "integrations.functions",
    "colbert_scores_pairwise": "integrations.functions",
    "contrastive_loss": "losses",
    "distillation_loss": "losses",
    "gather_with_gradient": "distributed",
    "maxsim_st": "integrations.functions",
}

__all__ = [
    "BackendUnsupported",
    "GradCache",
    "MaxSimScorer",
    "__version__",
    "backend",
    "colbert_kd_scores",
    "colbert_scores",
    "colbert_scores_pairwise",
    "contrastive_loss",
    "distillation_loss",
    "gather_with_gradient",
    "maxsim",
    "maxsim_indexed",
    "maxsim_pairs",
    "maxsim_st",
    "maxsim_varlen",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
