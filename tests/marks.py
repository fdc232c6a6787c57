"""Marks that several test files share."""

import shutil

import pytest

from edgecolbert_kernels.backends import native

compiled = pytest.mark.skipif(native.module() is None, reason="the compiled module is not built")
inductor = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="PyTorch's inductor finds no C++ compiler"
)
