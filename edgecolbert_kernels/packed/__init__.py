"""Token vectors of many documents back to back, in memory or in a folder.

`PackedEmbeddings` is a view that never changes: what adds, removes or picks documents returns another view of the same
memory. `PackedWriter` is the way to change a folder.

    tokens      where the vectors lie and how kernels get at them
    making      arrays and tensors to storage
    embeddings  the view: ids, slices, appending, files
    room        memory that views append to
    folder      between a view and the bytes of a folder
    writer      commits to a folder
"""

from edgecolbert_kernels.packed.embeddings import PackedEmbeddings
from edgecolbert_kernels.packed.writer import PackedWriter

__all__ = ["PackedEmbeddings", "PackedWriter"]
