"""Fused MaxSim for tiny late-interaction (ColBERT) models: scoring, training losses, packed token embeddings, exact search.

Importing this package loads neither torch nor numpy nor the compiled module: each comes in with the first call that needs
it.
"""

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from edgecolbert_kernels._version import __version__
from edgecolbert_kernels.backends import BackendUnsupported, backend
from edgecolbert_kernels.scoring import maxsim, maxsim_indexed, maxsim_pairs, maxsim_varlen

if TYPE_CHECKING:
    from edgecolbert_kernels.distributed import gather_with_gradient
    from edgecolbert_kernels.gradcache import GradCache
    from edgecolbert_kernels.integrations.functions import (
        colbert_kd_scores,
        colbert_scores,
        colbert_scores_pairwise,
        maxsim_st,
    )
    from edgecolbert_kernels.losses import contrastive_loss, distillation_loss
    from edgecolbert_kernels.modules import MaxSimScorer
    from edgecolbert_kernels.packed import PackedEmbeddings, PackedWriter
    from edgecolbert_kernels.packing import pack
    from edgecolbert_kernels.retrieval import search
    from edgecolbert_kernels.storage.header import PackedFormatError
    from edgecolbert_kernels.storage.lock import PackedLocked

__all__ = [
    "BackendUnsupported",
    "GradCache",
    "MaxSimScorer",
    "PackedEmbeddings",
    "PackedFormatError",
    "PackedLocked",
    "PackedWriter",
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
    "pack",
    "search",
]

# These need numpy or torch, so they are imported when they are first asked for.
_LATE = {
    "GradCache": "gradcache",
    "MaxSimScorer": "modules",
    "PackedEmbeddings": "packed",
    "PackedFormatError": "storage.header",
    "PackedLocked": "storage.lock",
    "PackedWriter": "packed",
    "colbert_kd_scores": "integrations.functions",
    "colbert_scores": "integrations.functions",
    "colbert_scores_pairwise": "integrations.functions",
    "contrastive_loss": "losses",
    "distillation_loss": "losses",
    "gather_with_gradient": "distributed",
    "maxsim_st": "integrations.functions",
    "pack": "packing",
    "search": "retrieval",
}

_OF_TORCH = ("distributed", "gradcache", "integrations.functions", "losses", "modules")


def _has_torch() -> bool:
    try:
        return importlib.util.find_spec("torch") is not None
    except (ImportError, ValueError):  # something that hides it, or stands in for it
        return "torch" in sys.modules


if not _has_torch():
    __all__ = [name for name in __all__ if _LATE.get(name) not in _OF_TORCH]


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        needs = f"{__name__}.{name} needs torch: pip install 'edgecolbert-kernels[torch]'"
        raise ModuleNotFoundError(needs, name="torch") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
