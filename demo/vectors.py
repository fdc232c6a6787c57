"""Token vectors of many texts, back to back."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenVectors:
    """`values` float16 [T, d], rows of text i from `offsets[i]` to `offsets[i + 1]`; `offsets` int64 [N + 1].

    Unit rows lose less to float16 than MaxSim can see, and take half the memory of float32.
    """

    values: Tensor
    offsets: Tensor

    @classmethod
    def from_texts(cls, texts: Iterable[Tensor]) -> "TokenVectors":
        """From one [tokens, d] tensor a text."""
        rows = [text.to(torch.float16) for text in texts]
        lengths = torch.tensor([0, *(len(text) for text in rows)])
        return cls(torch.cat(rows), lengths.cumsum(0))

    @property
    def lengths(self) -> Tensor:
        """Tokens of each text, int64 [N]."""
        return self.offsets.diff()

    def views(self) -> list[Tensor]:
        """One [tokens, d] tensor a text, sharing memory."""
        return [self.values[start:stop] for start, stop in pairwise(self.offsets.tolist())]

    def padded(self) -> tuple[Tensor, Tensor]:
        """float16 [N, L, d], zero beyond each text, and the bool mask [N, L] of what is text."""
        values = torch.nn.utils.rnn.pad_sequence(self.views(), batch_first=True)
        return values, torch.arange(values.shape[1]) < self.lengths[:, None]
