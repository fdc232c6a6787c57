"""Rows that are all zero, which padded batches of sentence-transformers mark padding with."""

import pytest
import torch

from edgecolbert_kernels.integrations.inputs import has_values

SMALLEST = {torch.float32: 1e-45, torch.float16: 6e-8, torch.bfloat16: 9.2e-41, torch.float64: 5e-324}


@pytest.mark.parametrize("dim", [0, 1, 2, 3, 7, 8, 48, 129])
@pytest.mark.parametrize("dtype", SMALLEST, ids=str)
def test_has_values(dtype, dim):
    X = torch.zeros(5, 6, dim, dtype=dtype)
    if dim:
        X[0, 0, -1] = 1
        X[0, 1] = -0.0
        X[2, 3, dim // 2] = float("nan")
        X[3, 2, 0] = SMALLEST[dtype]
    for layout in (X, X.transpose(0, 1), X[:, ::2], X[..., ::2], X.flip(0), X.requires_grad_()):
        assert torch.equal(has_values(layout), (layout != 0).any(-1))
