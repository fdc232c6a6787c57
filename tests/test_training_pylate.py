"""A whole step of stage 4 beside PyLate's own: tokens, model, Distillation, gradients of every parameter.

Runs in an environment of PyLate's (docs/development.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tiny
import tiny_colbert

pytest.importorskip("pylate")
pytest.importorskip("accelerate")

from accelerate import Accelerator
from pylate import losses

from training import config, data, model, stages, train

ROWS, WAYS = 6, 4


def theirs(name: str) -> str:
    """PyLate's name of a parameter of ours."""
    if name.startswith("backbone."):
        return name.replace("backbone.", "0.auto_model.", 1)
    number, rest = name.removeprefix("head.").split(".", 1)
    return f"{int(number) + 1}.{rest}"


@pytest.mark.parametrize("mini_batch", [3, 1000])
@pytest.mark.parametrize("normalized", [True, False])
def test_a_step_has_the_gradients_of_pylates_distillation(tmp_path, mini_batch, normalized):
    made = tiny_colbert.make(
        tmp_path / "base", query_length=12, document_length=20, dropout=0.0, do_query_expansion=False
    )
    made.save(str(tmp_path / "model"))
    rows = tiny.tuples(tmp_path / "rows.jsonl", rows=ROWS, ways=WAYS)
    loss = {
        "mask_mode": "zero",
        "teacher_normalization": "none",
        "student_normalization": "minmax" if normalized else "none",
    }
    raw = tiny.settings("colbert", tmp_path / "model", rows, tmp_path / "out", loss=loss)
    raw["model"] = {"base": str(tmp_path / "model")}
    raw["train"] |= {"batch": ROWS}
    settings = config.build(raw)
    stage = stages.build(settings, model.create(settings.model, "colbert"))
    batches = data.Batches(settings, stage.collate)
    batch, order = batches[0], [row.index for row in batches.rows_of(0)]
    value = train.gradients(stage, batch, Accelerator(cpu=True), mini_batch, train.grad_cache(stage, mini_batch))

    records = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    records = [records[n] for n in order]
    made.train()
    features = [
        made.tokenize([record["query"] for record in records], is_query=True),
        made.tokenize([text for record in records for text in record["documents"]], is_query=False),
    ]
    labels = torch.tensor([record["scores"] for record in records])
    distillation = losses.Distillation(made, normalize_scores=normalized)
    expected = distillation(features, labels)
    expected.backward()

    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = {name: each.grad for name, each in made.named_parameters() if each.grad is not None}
    found = {theirs(name): each.grad for name, each in stage.model.named_parameters() if each.grad is not None}
    assert found.keys() == wanted.keys() and len(found) > 30
    largest = max(float(each.abs().max()) for each in wanted.values())
    for name, each in wanted.items():
        torch.testing.assert_close(
            found[name], each, rtol=1e-4, atol=1e-5 * largest, msg=lambda text, n=name: f"{n}: {text}"
        )
