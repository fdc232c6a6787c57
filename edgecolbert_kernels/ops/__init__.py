"""The ops of `torch.ops.edgecolbert`; importing this package registers them."""

from edgecolbert_kernels.ops import maxsim as maxsim
