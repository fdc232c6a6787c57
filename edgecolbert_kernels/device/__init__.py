"""Packed token embeddings on an accelerator: made there, kept there, streamed there, and searched.

Everything here is torch; `packed` and `packing`, which work on numpy alone, import it when a tensor on a device arrives.
"""
