"""Fused MaxSim scoring for tiny late-interaction (ColBERT) models, packed token embeddings, and exact search.

Importing this package loads neither torch nor numpy nor the compiled module: each comes in with the first call that needs
it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from edgecolbert_kernels._version import __version__
from edgecolbert_kernels.backends import BackendUnsupported, backend
from edgecolbert_kernels.scoring import maxsim, maxsim_indexed, maxsim_pairs, maxsim_varlen

if TYPE_CHECKING:
    from edgecolbert_kernels.packed import PackedEmbeddings, PackedWriter
    from edgecolbert_kernels.packing import pack
    from edgecolbert_kernels.retrieval import search
    from edgecolbert_kernels.storage.header import PackedFormatError
    from edgecolbert_kernels.storage.lock import PackedLocked

__all__ = [
    "BackendUnsupported",
    "PackedEmbeddings",
    "PackedFormatError",
    "PackedLocked",
    "PackedWriter",
    "__version__",
    "backend",
    "maxsim",
    "maxsim_indexed",
    "maxsim_pairs",
    "maxsim_varlen",
    "pack",
    "search",
]

# These need numpy, so they are imported when they are first asked for.
_LATE = {
    "PackedEmbeddings": "packed",
    "PackedFormatError": "storage.header",
    "PackedLocked": "storage.lock",
    "PackedWriter": "packed",
    "pack": "packing",
    "search": "retrieval",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
