"""Fused MaxSim scoring for tiny late-interaction (ColBERT) models.

Importing this package loads neither torch nor the compiled module: each comes in with the first call that needs it.
"""

from edgecolbert_kernels._version import __version__
from edgecolbert_kernels.backends import BackendUnsupported, backend
from edgecolbert_kernels.scoring import maxsim, maxsim_indexed, maxsim_pairs, maxsim_varlen

__all__ = [
    "BackendUnsupported",
    "__version__",
    "backend",
    "maxsim",
    "maxsim_indexed",
    "maxsim_pairs",
    "maxsim_varlen",
]
