"""The folder that holds packed token vectors: `header`, `reader`, `writer`, `lock`. docs/packed-format.md describes it.

Bytes, sizes and checksums; what the vectors mean is for `edgecolbert_kernels.packed`.
"""
