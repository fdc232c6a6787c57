"""Shows why a document was found: the words that win the maximum for some query token."""

import re
from itertools import accumulate

from rich.text import Text
from torch import Tensor

Span = tuple[int, int]  # first character, one past the last

WORD = re.compile(r"\w+")
UNBROKEN = re.compile(r"\S+")


def winning_words(query: Tensor, document: Tensor, spans: list[Span], text: str) -> list[Span]:
    """The words of `text` that hold a token which is the nearest to at least one query token, in text order.

    query: [Lq, d]. document: [Ld, d]. spans: where each document token stands in `text`, Ld of them; empty ones
    (special tokens) and those that touch no word (punctuation) mark nothing.
    """
    winners = (query.float() @ document.float().T).argmax(dim=1).unique().tolist()
    tokens = [spans[winner] for winner in winners]
    return [
        (word.start(), word.end())
        for word in WORD.finditer(text)
        if any(start < word.end() and word.start() < stop for start, stop in tokens)
    ]


def excerpt(text: str, marked: list[Span], num_words: int = 60, *, colour: bool) -> Text:
    """The `num_words` words in a row that hold most of the marked ones, these in colour or between «»."""
    start, stop = _densest_stretch(text, marked, num_words)
    shown = Text("… " if start else "")
    position = start
    for first, last in marked:
        if start <= first and last <= stop:
            shown.append(text[position:first])
            shown.append(text[first:last] if colour else f"«{text[first:last]}»", style="bold yellow")
            position = last
    shown.append(text[position:stop])
    return shown.append(" …" if stop < len(text) else "")


def _densest_stretch(text: str, marked: list[Span], num_words: int) -> Span:
    """Cuts at white space, so no marked word is cut; the earliest of equals."""
    words = [word.span() for word in UNBROKEN.finditer(text)]
    if len(words) <= num_words:
        return 0, len(text)
    marks_before = [0, *accumulate(sum(start <= first < stop for first, _ in marked) for start, stop in words)]
    begin = max(
        range(len(words) - num_words + 1), key=lambda begin: marks_before[begin + num_words] - marks_before[begin]
    )
    return words[begin][0], words[begin + num_words - 1][1]
