"""sentence-transformers 6 on these kernels: `maxsim`, `maxsim_pairwise`, their means, evaluators, losses and `similarity`.

All of these score in two functions, a chunk of documents at a time; these two are patched. So everything around them stays:
`a_mask`, `b_mask`, `chunk_elements`, `length_normalize` and `device`, devices, warnings, and -1e9 for a document without a
token. XTR scores are no MaxSim and stay. `maxsim` itself is patched for two cases: a list of documents as `encode_document`
returns it is scored where it lies, without padding, chunks or a mask, and of a padded batch the rows that count, those that
are not all zero, are found faster.

A call that no kernel takes (a GPU without one, float64), query masks that are weights other than 0 and 1, and wrong input
go to the host's own code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from edgecolbert_kernels.integrations import functions, inputs
from edgecolbert_kernels.integrations.patching import Patch, Report, Target, hit, original
from edgecolbert_kernels.scoring import maxsim, maxsim_pairs

MODULE = "sentence_transformers.util.similarity"


def patch_sentence_transformers() -> Report:
    """Let sentence-transformers 6 score on these kernels, until `unpatch_sentence_transformers`; twice is harmless.

    Returns:
        What was reached, and the calls that the kernels answered (`hits`). What could not be reached is a warning.

    Raises:
        ImportError: sentence-transformers is not installed.
    """
    return _patch.apply()


def unpatch_sentence_transformers() -> None:
    """Give sentence-transformers its own functions back, once no `using_sentence_transformers` block is open."""
    _patch.undo()


def using_sentence_transformers() -> AbstractContextManager[Report]:
    """`patch_sentence_transformers` for a `with` block; for all threads."""
    return _patch.using()


def _targets() -> Sequence[Target]:
    names: dict[str, Callable[..., Tensor]] = {"_maxsim_score_documents": maxsim, "_maxsim_score_pairs": maxsim_pairs}
    chunks = [Target(f"{MODULE}:{name}", _scorer(f"{MODULE}:{name}", function)) for name, function in names.items()]
    return [*chunks, Target(WHOLE, _score_whole)]


def _scorer(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def scorer(a: Tensor, b: Tensor, a_mask: Tensor | None, b_mask: Tensor | None) -> Tensor:
        if b.shape[1] and inputs.fused(a, b):
            try:
                kept = None if b_mask is None else b_mask.bool()
                scores = function(a, b, None if a_mask is None else inputs.binary(a_mask), kept)
            except (TypeError, ValueError):
                pass  # An input that is not what we take: the host takes it, or says so in its own words.
            else:
                if not torch.compiler.is_compiling():
                    hit(name)
                return scores if kept is None else _without_tokens(scores, ~kept.any(-1))
        return original(name)(a, b, a_mask, b_mask)

    return scorer


WHOLE = f"{MODULE}:maxsim"


def _score_whole(
    a: Any, b: Any, a_mask: Any, b_mask: Any, chunk_elements: int | None, length_normalize: bool, device: Any
) -> Tensor:
    # Who asks for chunks of a size gets the host's.
    plain = b_mask is chunk_elements is device is None and not torch.compiler.is_compiling()
    if plain and len(a) and inputs.fused(a, b) and (kept := _kept(b)) is not False:
        try:
            scores = functions.maxsim_st(a, b, a_mask, kept, length_normalize=length_normalize)
        except (TypeError, ValueError):
            pass
        else:
            hit(WHOLE)
            return scores
    return original(WHOLE)(a, b, a_mask, b_mask, chunk_elements, length_normalize, device)


def _kept(b: Any) -> Tensor | bool | None:
    """The mask of documents that are scored whole; False: they are not, as of one without a token the host warns."""
    if isinstance(b, list):
        return None if b and all(len(document) for document in b) else False
    if not isinstance(b, Tensor) or b.ndim != 3 or b.device.type != "cpu":
        return False
    kept = inputs.has_values(b)
    return kept if kept.any(-1).all() else False


def _without_tokens(scores: Tensor, empty: Tensor) -> Tensor:
    """The host's own score and warning for a document without a token."""
    fill: Any = getattr(sys.modules[MODULE], "_fill_empty_document_scores", None)
    return scores.masked_fill(empty, functions.EMPTY_DOCUMENT) if fill is None else fill(scores, empty)


_patch = Patch("sentence-transformers", _targets, ("6.0", "7"))
