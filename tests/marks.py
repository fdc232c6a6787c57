"""Marks that several test files share."""

import pytest

from edgecolbert_kernels.backends import native

compiled = pytest.mark.skipif(native.module() is None, reason="the compiled module is not built")
