"""Fused MaxSim scoring for tiny late-interaction (ColBERT) models.

Importing this package loads neither torch nor the compiled module: each comes in with the first call that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgecolbert_kernels._version import __version__
from edgecolbert_kernels.backends import BackendUnsupported, backend
from edgecolbert_kernels.scoring import maxsim, maxsim_indexed, maxsim_pairs, maxsim_varlen

if TYPE_CHECKING:
    from edgecolbert_kernels.distributed import gather_with_gradient
    from edgecolbert_kernels.gradcache import GradCache
    from edgecolbert_kernels.losses import contrastive_loss, distillation_loss
    from edgecolbert_kernels.modules import MaxSimScorer

__all__ = [
    "BackendUnsupported",
    "GradCache",
    "MaxSimScorer",
    "__version__",
    "backend",
    "contrastive_loss",
    "distillation_loss",
    "gather_with_gradient",
    "maxsim",
    "maxsim_indexed",
    "maxsim_pairs",
    "maxsim_varlen",
]

# Those whose modules import torch, each with its module.
_NEED_TORCH = {
    "GradCache": "gradcache",
    "MaxSimScorer": "modules",
    "contrastive_loss": "losses",
    "distillation_loss": "losses",
    "gather_with_gradient": "distributed",
}


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
