"""Rows that are all zero, which padded batches of sentence-transformers mark padding with."""

import pytest
import torch

from edgecolbert_kernels.integrations.inputs import has_values


@pytest.mark.parametrize("dim", [0, 1, 2, 3, 7, 8, 48, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_has_values(dtype, dim):
    X = torch.zeros(5, 6, dim, dtype=dtype)
    if dim:
        X[0, 0, -1] = 1
        X[0, 1] = -0.0
        X[2, 3, dim // 2] = float("nan")
        X[3, 2, 0] = torch.finfo(dtype).smallest_subnormal
    for layout in (X, X.transpose(0, 1), X[:, ::2], X[..., ::2], X.flip(0), X.requires_grad_()):
        assert torch.equal(has_values(layout), (layout != 0).any(-1))
