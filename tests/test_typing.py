"""What a type checker tells a user: mypy reads this file (`make lint`), and pytest runs it to see that it is true."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import assert_type

from edgecolbert_kernels import (
    GradCache,
    PackedEmbeddings,
    PackedWriter,
    backend,
    checks,
    colbert_scores,
    contrastive_loss,
    distillation_loss,
    dtypes,
    gather_with_gradient,
    maxsim,
    maxsim_indexed,
    maxsim_pairs,
    maxsim_varlen,
    pack,
    search,
)
from edgecolbert_kernels.device import dtypes as device_dtypes
from edgecolbert_kernels.device.embeddings import DeviceEmbeddings
from edgecolbert_kernels.signatures import DeviceStorage, MaskMode, Precision, ScoreOptions, Storage

Found = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]

Q: np.ndarray = np.ones((2, 3, 8), np.float32)
D: np.ndarray = np.ones((4, 5, 8), np.float32)
Q_tensor, D_tensor = torch.from_numpy(Q), torch.from_numpy(D)
packed = PackedEmbeddings.from_list(list(D), ids=["a", "b", "c", "d"])


def test_scores_of_arrays() -> None:
    assert type(assert_type(maxsim(Q, D), np.ndarray)) is np.ndarray
    assert type(assert_type(maxsim(Q, [D[0], D[1]], precision="fast"), np.ndarray)) is np.ndarray
    assert type(assert_type(maxsim(Q, packed), np.ndarray)) is np.ndarray
    assert type(assert_type(maxsim_pairs(Q, D[:2], out_dtype=np.float16), np.ndarray)) is np.ndarray
    assert (
        type(assert_type(maxsim_varlen(Q.reshape(6, 8), D.reshape(20, 8), [0, 3], [0, 2, 5]), np.ndarray)) is np.ndarray
    )
    assert type(assert_type(maxsim_indexed(Q, packed, np.array([1, 1]), [0, 3]), np.ndarray)) is np.ndarray


def test_scores_of_tensors() -> None:
    assert type(assert_type(maxsim(Q_tensor, D_tensor), Tensor)) is Tensor
    assert type(assert_type(maxsim(Q_tensor, D, d_mask=D[..., 0] > 0), Tensor)) is Tensor
    assert type(assert_type(maxsim(Q_tensor.unbind(), list(D_tensor)), Tensor)) is Tensor
    assert type(assert_type(maxsim(Q_tensor, packed, mask_mode="zero"), Tensor)) is Tensor
    assert type(assert_type(maxsim_pairs(Q_tensor, D_tensor[:2], out_dtype=torch.float64), Tensor)) is Tensor
    assert type(assert_type(maxsim_varlen(Q_tensor[0], D_tensor[0], [0, 3], [0, 2, 5]), Tensor)) is Tensor
    assert type(assert_type(maxsim_indexed(Q_tensor, packed, torch.tensor([1, 1]), [0, 3]), Tensor)) is Tensor
    assert type(assert_type(colbert_scores(Q, D, backend="flash"), Tensor)) is Tensor


def test_scores_of_either() -> None:
    """A caller's own function that takes both, and options that are handed on."""

    def score(X: np.ndarray | Tensor, options: ScoreOptions) -> np.ndarray | Tensor:
        return assert_type(maxsim(X, packed, **options), np.ndarray | Tensor)

    assert type(score(Q, {"precision": "fast"})) is np.ndarray
    assert type(score(Q_tensor, {"normalize": True})) is Tensor


def test_search() -> None:
    scores, indices = assert_type(search(Q, packed, 2, ids=["a", "b"]), Found)
    assert (scores.dtype, indices.dtype) == (np.float32, np.int64)
    found = assert_type(search(Q_tensor, D_tensor, 2, candidates=[[0, 1], indices[0]]), tuple[Tensor, Tensor])
    assert [type(each) for each in found] == [Tensor, Tensor]


def test_packed_embeddings(tmp_path: Path) -> None:
    assert type(assert_type(packed[0], np.ndarray)) is np.ndarray
    assert type(assert_type(packed[packed.lengths.argmax()], np.ndarray)) is np.ndarray
    assert type(assert_type(packed[1:], PackedEmbeddings)) is PackedEmbeddings
    assert type(assert_type(packed[[3, 1]], PackedEmbeddings)) is PackedEmbeddings
    assert type(assert_type(packed[packed.lengths > 2], PackedEmbeddings)) is PackedEmbeddings
    assert type(assert_type(packed.to("int8"), PackedEmbeddings)) is PackedEmbeddings
    assert type(assert_type(packed.to(np.float32), PackedEmbeddings)) is PackedEmbeddings
    assert type(assert_type(packed.to("cpu"), PackedEmbeddings)) is PackedEmbeddings
    assert all(type(assert_type(rows, np.ndarray)) is np.ndarray for rows in packed)
    assert assert_type(packed.dtype, Storage) == "float16"
    assert assert_type(packed.ids, list[str | int] | None) == ["a", "b", "c", "d"]
    with PackedWriter(tmp_path / "index", dim=8, dtype=torch.bfloat16) as writer:
        assert assert_type(writer, PackedWriter) is writer
        writer.append([D[0], D_tensor[1]], ids=[1, 2])
        writer.upsert(PackedEmbeddings.from_padded(D_tensor[:1]), ids=[2])
        writer.remove(ids=[1])
    assert type(assert_type(PackedEmbeddings.load(tmp_path / "index"), PackedEmbeddings)) is PackedEmbeddings


def test_pack() -> None:
    assert type(assert_type(pack(D, dtype="int8"), PackedEmbeddings)) is PackedEmbeddings
    assert type(assert_type(pack([D_tensor[0]], [None]), PackedEmbeddings)) is PackedEmbeddings


def on_a_device(where: torch.device) -> None:
    """Read, not run."""
    assert_type(packed.to("cuda"), DeviceEmbeddings)
    assert_type(packed.to(where), PackedEmbeddings | DeviceEmbeddings)
    assert_type(packed.cuda()[0], Tensor)
    assert_type(packed.cuda()[:2], DeviceEmbeddings)
    assert_type(packed.cuda().to("float8_e4m3fn"), DeviceEmbeddings)
    assert_type(maxsim(Q_tensor, packed.cuda()), Tensor)
    assert_type(pack(D_tensor, dtype="float8_e4m3fn", device=where), PackedEmbeddings | DeviceEmbeddings)


def test_losses() -> None:
    def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows * scale, rows[..., 0] != 0

    def loss(queries: tuple[Tensor, Tensor], documents: tuple[Tensor, Tensor]) -> Tensor:
        return contrastive_loss(queries[0], documents[0], queries[1], documents[1])

    scale = torch.ones(8, requires_grad=True)
    assert type(assert_type(contrastive_loss(Q_tensor, D_tensor, reduction="none"), Tensor)) is Tensor
    taught = distillation_loss(Q_tensor, D_tensor, torch.rand(2, 4), objective="margin_mse")
    assert type(assert_type(taught, Tensor)) is Tensor
    assert type(assert_type(GradCache(encode, loss, 1).step(Q_tensor, D_tensor), Tensor)) is Tensor
    assert type(assert_type(gather_with_gradient(D_tensor).embeddings, Tensor)) is Tensor


def mistakes(unknown: Any) -> None:
    """Read, not run. mypy also complains of an `ignore` that hides nothing."""
    maxsim(Q, D, precision="fats")  # type: ignore[call-overload]
    maxsim(Q, D, mask_mod="zero")  # type: ignore[call-overload]
    maxsim(Q_tensor, "documents")  # type: ignore[arg-type]
    maxsim(Q_tensor, [[1.0]])  # type: ignore[list-item]
    search(Q, packed, "ten")  # type: ignore[call-overload]
    packed["a"]  # type: ignore[index]
    PackedEmbeddings.from_list(D, dtype="float61")  # type: ignore[arg-type]
    contrastive_loss(Q_tensor, D_tensor, reduction="avg")  # type: ignore[arg-type]
    backend("gpu")  # type: ignore[arg-type]
    assert_type(maxsim(unknown, unknown), Any)


def test_literals_are_what_is_taken() -> None:
    assert get_args(Precision) == checks.PRECISIONS == ("exact", "fast")
    assert get_args(MaskMode) == checks.MASK_MODES == ("exclude", "zero")
    assert set(get_args(Storage)) == set(dtypes.STORAGE)
    assert set(get_args(DeviceStorage)) == set(device_dtypes.STORAGE)
