"""Other libraries' scoring and losses on these kernels: one module a library, none of which is imported or required here.

    from edgecolbert_kernels.integrations.pylate import patch_pylate

    print(patch_pylate())          # what was reached

Each has `patch_x()`, `unpatch_x()` and the context manager `using_x()`; `patching` and `targets` are how they do it.
"""
