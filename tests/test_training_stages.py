"""The stages' losses and gradients against plain formulas on the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import tiny

pytest.importorskip("accelerate")
from accelerate import Accelerator

from training import config, data, files, losses, model, sources, stages, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("stages")
    tiny.encoder(place / "base", dropout=0.0)
    tiny.beir(place / "task")
    tiny.tuples(place / "tuples.jsonl")
    return place


def build(folder: Path, stage: str, source: str, vectors: Any = (), **tables: Any):
    raw = tiny.settings(stage, folder / "base", folder / source, folder / "out", **tables)
    settings = config.build(raw)
    torch.manual_seed(0)
    built = stages.build(settings, model.create(settings.model, stage), vectors)
    batches = data.Batches(settings, built.collate)
    return built, batches[0]


def gradients(built: stages.Stage, batch: Any, mini_batch: int) -> tuple[float, list[torch.Tensor]]:
    built.model.zero_grad()
    loss = train.gradients(built, batch, Accelerator(cpu=True), mini_batch, train.grad_cache(built, mini_batch))
    return float(loss), [p.grad.clone() for p in built.model.parameters() if p.grad is not None]


def apart(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """The distance of two gradients over all parameters, relative to their size."""
    x, y = (torch.cat([each.flatten().double() for each in side]) for side in (a, b))
    return float((x - y).norm() / y.norm())


def pylate_kd(Q, D, q_mask, d_mask, teacher):
    """PyLate 1.6: colbert_kd_scores, min-max, kl_div; as it is written there."""
    scores = torch.einsum("ash,abth->abst", Q, D) * d_mask[:, :, None]
    scores = (scores.max(-1).values * q_mask[:, None]).sum(-1)
    low, high = scores.min(1, keepdim=True).values, scores.max(1, keepdim=True).values
    student = F.log_softmax((scores - low) / (high - low + 1e-8), dim=-1)
    return F.kl_div(student, F.log_softmax(teacher, -1), reduction="batchmean", log_target=True)


def pylate_gradients(encoder, batch):
    """The loss, and its gradients to all parameters, in their dtype."""
    encoder.zero_grad()
    queries, documents = batch["inputs"]
    Q = encoder(queries["input_ids"], queries["attention_mask"])
    D = encoder(documents["input_ids"], documents["attention_mask"])
    teacher = batch["options"]["teacher_scores"]
    kept = documents["score_mask"].unflatten(0, teacher.shape)
    loss = pylate_kd(Q, D.unflatten(0, teacher.shape), queries["score_mask"], kept, teacher.to(Q.dtype))
    loss.backward()
    return loss.item(), [p.grad.clone() for p in encoder.parameters() if p.grad is not None]


@pytest.mark.parametrize("mini_batch", [4, 1000])
def test_a_kd_step_has_the_gradients_of_pylates_formula(folder, mini_batch):
    loss = {"mask_mode": "zero", "teacher_normalization": "none"}
    built, batch = build(folder, "colbert", "tuples.jsonl", loss=loss)
    value, found = gradients(built, batch, mini_batch)
    expected, exact = pylate_gradients(built.model.double(), batch)
    assert value == pytest.approx(expected, rel=1e-5)
    assert apart(found, exact) < 1e-5


@pytest.mark.parametrize(
    "stage, loss", [("contrastive", {}), ("finetune", {"cosine": 0.1}), ("colbert", {"kind": "contrastive"})]
)
def test_chunks_have_the_gradients_of_the_whole_batch(folder, stage, loss):
    built, batch = build(folder, stage, "tuples.jsonl", loss=loss)
    whole, expected = gradients(built, batch, 1000)
    value, found = gradients(built, batch, 3)
    assert value == pytest.approx(whole, rel=1e-5)
    assert apart(found, expected) < 1e-5


def test_the_contrastive_loss_is_cross_entropy_over_the_batch(folder):
    built, batch = build(folder, "contrastive", "tuples.jsonl")
    value, _ = gradients(built, batch, 1000)
    with torch.no_grad():
        Q, D = (built.model(each["input_ids"], each["attention_mask"])[:, 0] for each in batch["inputs"])
        expected = F.cross_entropy(Q @ D.T / 0.02, torch.arange(len(Q)))
    assert value == pytest.approx(expected.item(), rel=1e-5)


def test_right_documents_of_other_rows_are_no_negatives():
    rows = [
        sources.Row("a", ["x", "n"], None, ["x", "y"], frozenset(["x", "y"])),
        sources.Row("b", ["y"], None, ["y"], frozenset(["y"])),
        sources.Row("c", ["z"], None, ["z"], frozenset(["z"])),
    ]
    excluded = stages.false_negatives([rows], 0, [["x", "y", "z", "y"]])
    assert excluded.tolist() == [
        [False, True, False, True],
        [False, False, False, True],
        [False, False, False, False],
    ]
    assert stages.false_negatives([rows[2:]], 0, [["z", "n"]]) is None
    # The same documents by ranks, of which the second has the rows b and c.
    parts, keys = [rows[:1], rows[1:]], [["x", "y"], ["y", "z"]]
    assert stages.false_negatives(parts, 0, keys).tolist() == [[False, True, True, False]]
    assert stages.false_negatives(parts, 1, keys).tolist() == [
        [False, True, False, False],
        [False, False, False, False],
    ]


@pytest.mark.parametrize("stella", [False, True])
def test_distillation_to_any_dimension(folder, stella):
    vectors = np.random.default_rng(0).normal(size=(200, 24)).astype(np.float16)
    built, batch = build(
        folder,
        "distill",
        "task",
        [vectors],
        data={"sources": [{"path": str(folder / "task"), "kind": "texts"}]},
        loss={"stella": stella},
    )
    whole, expected = gradients(built, batch, 1000)
    value, found = gradients(built, batch, 3)
    assert value == pytest.approx(whole, rel=1e-5)
    assert apart(found, expected) < 1e-5
    if not stella:
        with torch.no_grad():
            given = F.normalize(
                built.model(*(batch["inputs"][0][name] for name in ("input_ids", "attention_mask")))[:, 0]
            )
        wanted = F.normalize(torch.from_numpy(vectors[batch["rows"]].astype(np.float32)), dim=-1)
        assert whole == pytest.approx((given - wanted).square().sum(1).mean().item(), rel=1e-5)


def test_angle_as_written_with_complex_numbers():
    torch.manual_seed(0)
    z, w = torch.randn(6, 8), torch.randn(6, 8)
    labels = torch.tensor([1.0, 1, 1, 0, 0, 0])
    s = []
    for a, b in zip(z.double(), w.double(), strict=True):
        quotient = torch.complex(a[:4], a[4:]) / b.norm() ** 2 * torch.complex(b[:4], -b[4:])
        quotient = quotient / (a.norm() / b.norm())
        s.append(20 * abs(float(quotient.real.sum() + quotient.imag.sum())))
    total = sum(np.exp(s[i] - s[j]) for i in range(6) for j in range(6) if labels[i] < labels[j])
    assert losses.angle(z, w, labels).item() == pytest.approx(np.log1p(total), rel=1e-4)


def test_stella_is_zero_only_in_its_first_terms_for_the_teacher_itself():
    vectors = torch.randn(5, 7)
    # What is left is the margin, where the teacher's own differences are smaller than it.
    assert -1e-5 <= losses.stella(vectors, vectors).item() <= 20 * 0.015
    assert losses.stella(torch.randn(5, 7), vectors) > 1


def test_rows_with_fewer_documents_leave_the_others_alone(folder, tmp_path):
    lines = (folder / "tuples.jsonl").read_text().splitlines()
    record = files.parse_object(lines[0], "here")
    short = {**record, "documents": record["documents"][:2], "scores": record["scores"][:2]}
    rows = [sources.parse(each, "here", config.Source("x"), None) for each in (record, short)]
    built, _ = build(folder, "colbert", "tuples.jsonl")
    inputs, options = built.batch([rows], 0, 0)
    both = built.loss(*(built.encode(**each) for each in inputs), **options)
    alone = []
    for row in rows:
        inputs, options = built.batch([[row]], 0, 0)
        alone.append(built.loss(*(built.encode(**each) for each in inputs), **options))
    assert both.item() == pytest.approx(sum(alone).item() / 2, rel=1e-5)


@pytest.mark.parametrize("symmetric, margin, excludes", [(False, None, False), (False, 0.95, True), (True, 0.9, True)])
def test_info_nce_in_blocks_is_info_nce(monkeypatch, symmetric, margin, excludes):
    """In float64 against the plain formula, values and gradients, with a batch that fits into no block."""
    torch.manual_seed(0)
    n, m, d = 37, 53, 6
    Q, D = (F.normalize(torch.randn(k, d, dtype=torch.double), dim=-1).requires_grad_() for k in (n, m))
    target = torch.arange(n) + 5
    exclude = torch.rand(n, m) < 0.2 if excludes else None
    scores = Q @ D.T
    dropped = torch.zeros(n, m, dtype=torch.bool) if exclude is None else exclude.clone()
    if margin:
        own = scores.detach().gather(1, target[:, None])
        dropped |= scores.detach() >= own - (1 - margin) * own.abs()
    dropped[torch.arange(n), target] = False
    scores = scores.masked_fill(dropped, -torch.inf) / 0.1
    expected = F.cross_entropy(scores, target)
    if symmetric:
        expected = (expected + F.cross_entropy(scores[:, target].T, torch.arange(n))) / 2
    wanted = torch.autograd.grad(expected, (Q, D))
    for most in (1 << 24, 5 * m, 1):
        monkeypatch.setattr(losses, "MOST_SCORES", most)
        options = {"exclude": exclude, "margin": margin, "symmetric": symmetric}
        found = losses.info_nce(Q, D, target, 0.1, **options)
        torch.testing.assert_close(found, expected)
        for one, other in zip(torch.autograd.grad(found, (Q, D)), wanted, strict=True):
            torch.testing.assert_close(one, other)
