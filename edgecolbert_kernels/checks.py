"""What a valid call looks like, and every error message, stated once.

torch tensors and numpy arrays share it, as it goes by names, shapes and dtypes; values are looked at only where a wrong one
would make a kernel read outside a buffer. TypeError: not an array, or a dtype that cannot be read. ValueError: a shape, an
option or a boundary. IndexError: a query or a document that does not exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from edgecolbert_kernels.signatures import MaskMode, Precision

if TYPE_CHECKING:
    import numpy as np

MASK_MODES = get_args(MaskMode)
PRECISIONS = get_args(Precision)

FLOATS = "float32, float16, bfloat16 or float64"
INTEGERS = "an integer dtype"


def options(mask_mode: str, precision: str) -> None:
    if mask_mode not in MASK_MODES:
        raise ValueError(f"mask_mode is {mask_mode!r}; want one of {MASK_MODES}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; want one of {PRECISIONS}")


def not_an_array(name: str, seen: object, wanted: str = "a torch tensor or a numpy array") -> TypeError:
    return TypeError(f"{name} is a {type(seen).__name__}; want {wanted}")


def wrong_dtype(name: str, seen: object, wanted: str) -> TypeError:
    return TypeError(f"{name} has dtype {_plain(seen)}; want {wanted}")


def nested(name: str) -> TypeError:
    return TypeError(f"{name} is a nested tensor; want a padded one, or a list: {name}.unbind()")


def wrong_layout(name: str, seen: object) -> TypeError:
    return TypeError(f"{name} has layout {_plain(seen)}; want a dense (strided) tensor")


def wrong_shape(name: str, seen: Sequence[Any], wanted: str) -> ValueError:
    return ValueError(f"{name} has shape {_show(seen)}; want {wanted}")


def no_storage(shape: Sequence[Any]) -> ValueError:
    return ValueError(f"a tensor of shape {_show(shape)} has no storage; its memory was given back")


def out_dtype(seen: object, framework: str) -> TypeError:
    return TypeError(f"out_dtype is {_plain(seen)!r}; want a float dtype of {framework}")


def storage_dtype(seen: object, known: tuple[str, ...]) -> ValueError:
    return ValueError(f"dtype is {_plain(seen)!r}; want one of {known}")


def storage_range(name: str, dtype: str) -> ValueError:
    return ValueError(f"{name} has values that {dtype} cannot hold; want finite ones within its range")


def stored_mask() -> ValueError:
    return ValueError("d_mask is given for stored documents; their masked tokens were dropped when they were packed")


def offsets(name: str, values: np.ndarray, num_tokens: int) -> None:
    """Boundaries of stored documents, from 0 to the last token."""
    _cu_seqlens(name, values, "tokens", num_tokens)
    if values[-1] != num_tokens:
        raise ValueError(f"{name} ends at {values[-1]}; want {num_tokens}, the number of tokens")


def scales(values: np.ndarray, num_documents: int, finite: bool) -> None:
    if values.shape != (num_documents,):
        raise wrong_shape("scales", values.shape, f"[{num_documents}], one for each document")
    if not finite:
        raise ValueError("scales has values that are negative or not finite")


def ids(seen: object, wanted: str) -> ValueError:
    return ValueError(f"ids: {seen}; want {wanted}")


def no_such_document(index: int, count: int) -> IndexError:
    return IndexError(f"document {index} is asked for; there are {count}, counted from 0")


def no_such_id(seen: object) -> KeyError:
    return KeyError(f"no document has the id {seen!r}")


def at_least(name: str, seen: object, least: int) -> None:
    if not hasattr(type(seen), "__index__") or isinstance(seen, bool):
        raise TypeError(f"{name} is a {type(seen).__name__}; want an integer")
    if int(seen) < least:  # type: ignore[call-overload]
        raise ValueError(f"{name} is {seen}; want at least {least}")


def rank(name: str, shape: Sequence[Any], ranks: tuple[int, ...], wanted: str) -> None:
    if len(shape) not in ranks:
        raise wrong_shape(name, shape, wanted)


def shape(name: str, seen: Sequence[Any], wanted: Sequence[Any], meaning: str) -> None:
    if tuple(seen) != tuple(wanted):
        raise wrong_shape(name, seen, f"{_show(wanted)}, {meaning}")


def not_positive(name: str, seen: object) -> ValueError:
    return ValueError(f"{name} is {seen}; want a number above 0")


def one_of(name: str, seen: object, known: Sequence[str]) -> None:
    if seen not in known:
        raise ValueError(f"{name} is {seen!r}; want one of {tuple(known)}")


def between(name: str, seen: float, lowest: float, highest: float) -> None:
    if not lowest <= seen <= highest:
        raise ValueError(f"{name} is {seen}; want {lowest} to {highest}")


def target(highest: int, num_documents: int) -> None:
    if highest >= num_documents:
        raise IndexError(f"target names document {highest}; there are {num_documents}, counted from 0")


def same_dim(queries: Sequence[Any], documents: Sequence[Any]) -> None:
    if queries[-1] != documents[-1]:
        raise ValueError(f"Q has shape {_show(queries)} and D {_show(documents)}; want the same last dimension")
    if queries[-1] < 1:
        raise wrong_shape("Q", queries, "a last dimension of at least 1")


def stored_dim(seen: int, wanted: int) -> None:
    if seen != wanted:
        raise ValueError(f"the added documents have dim {seen}; want {wanted}, as those before them have")


def same_batch(queries: Sequence[Any], documents: Sequence[Any]) -> None:
    count = queries[0] if len(queries) == 3 else 1
    if documents[0] != count:
        raise ValueError(f"Q has shape {_show(queries)} and D {_show(documents)}; want {count} as D's first dimension")


def same_shape(first: str, first_shape: Sequence[Any], second: str, second_shape: Sequence[Any]) -> None:
    if tuple(first_shape) != tuple(second_shape):
        raise ValueError(f"{first} has shape {_show(first_shape)} and {second} {_show(second_shape)}; want the same")


def same_count(first: str, first_count: Any, second: str, second_count: Any) -> None:
    if first_count != second_count:
        raise ValueError(f"{first} has {first_count} entries and {second} has {second_count}; want as many")


def pairs(queries: Sequence[Any], documents: Sequence[Any]) -> ValueError:
    return ValueError(
        f"Q has shape {_show(queries)} and D {_show(documents)}; chosen pairs want both indices, "
        "Q [Nq, Lq, d] and D [Nd, Ld, d] or a list"
    )


def mask(name: str, shape: Sequence[Any], of: str, tokens: Sequence[Any]) -> None:
    """One value a token: the shape of the tokens without the last dimension."""
    if tuple(shape) != tuple(tokens[:-1]):
        raise wrong_shape(name, shape, f"{_show(tokens[:-1])}, one value for each token of {of} {_show(tokens)}")


def token_list(name: str, matrices: Sequence[Any]) -> None:
    """Every entry `[L, d]`, with the d and the dtype of the first."""
    if not matrices:
        return
    first, dtype = matrices[0].shape, matrices[0].dtype
    rank(f"{name}[0]", first, (2,), "[L, d]")
    for n, matrix in enumerate(matrices):
        shape = matrix.shape
        if len(shape) != 2 or shape[1] != first[1]:
            raise wrong_shape(f"{name}[{n}]", shape, f"[L, {first[1]}], as {name}[0] has")
        if matrix.dtype != dtype:
            raise wrong_dtype(f"{name}[{n}]", matrix.dtype, f"{_plain(dtype)}, as {name}[0] has")


def mask_list(name: str, seen: object, of: str, count: int) -> None:
    if not isinstance(seen, (list, tuple)):
        raise not_an_array(name, seen, f"a list of masks, as {of} is a list")
    if len(seen) != count:
        raise ValueError(f"{name} has {len(seen)} entries; want {count}, one for each of {of}")


def on_accelerator(X: Any) -> bool:
    """Whether an array, or the first of a list, lies on a device other than the CPU."""
    first = X[0] if isinstance(X, (list, tuple)) and X else X
    return getattr(getattr(first, "device", None), "type", "cpu") != "cpu"


def same_device(name: str, seen: object, wanted: object, of: str = "Q") -> None:
    if seen != wanted:
        raise ValueError(f"{name} is on {seen}; want {wanted}, the device of {of}")


def boundaries(name: str, shape: Sequence[Any]) -> None:
    if len(shape) != 1 or shape[0] < 1:
        raise wrong_shape(name, shape, "[N + 1]: one boundary more than there are sequences")


def values(
    queries: Sequence[int],
    documents: Sequence[int],
    cu_q: np.ndarray | None,
    cu_d: np.ndarray | None,
    query_index: np.ndarray | None,
    document_index: np.ndarray | None,
) -> None:
    """Boundaries and indices that stay inside Q and D, whose shapes are given."""
    if cu_q is not None:
        _cu_seqlens("cu_seqlens_q", cu_q, "Q", queries[0])
    if cu_d is not None:
        _cu_seqlens("cu_seqlens_d", cu_d, "D", documents[0])
    if query_index is not None:
        index("query_index", query_index, queries[0], "queries")
    if document_index is not None:
        index("document_index", document_index, documents[0] if cu_d is None else len(cu_d) - 1)


def argmax(lowest: int, highest: int, longest: int) -> None:
    if lowest < -1 or highest >= longest:
        raise IndexError(f"argmax spans {lowest} to {highest}; want -1 to {longest - 1}, the tokens of D")


def _cu_seqlens(name: str, boundaries: np.ndarray, of: str, num_tokens: int) -> None:
    if boundaries[0] != 0:
        raise ValueError(f"{name} starts at {boundaries[0]}; want 0")
    if (boundaries[1:] < boundaries[:-1]).any():
        raise ValueError(f"{name} decreases; want boundaries in order")
    if boundaries[-1] > num_tokens:
        raise ValueError(f"{name} ends at {boundaries[-1]}; want at most {num_tokens}, the tokens of {of}")


def index(name: str, index: np.ndarray, count: int, of: str = "documents") -> None:
    if index.size and not (index.min() >= 0 and index.max() < count):
        raise IndexError(f"{name} spans {index.min()} to {index.max()}; there are {count} {of}, counted from 0")


def _plain(dtype_or_layout: object) -> str:
    return str(dtype_or_layout).removeprefix("torch.")


def _show(shape: Sequence[Any]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"
