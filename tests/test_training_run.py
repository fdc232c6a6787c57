"""Whole runs: every configuration file, a run that is killed at any moment, errors and what they say."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import tomllib
import torch

import tiny

pytest.importorskip("accelerate")
pytest.importorskip("ir_measures")
from training import checkpoint, config, evaluate, files, mine, model, score, sources, stages, teach, train

ROOT = Path(train.__file__).parent.parent
CONFIGS = sorted([*(ROOT / "training" / "configs").glob("*.toml"), *(ROOT / "demo" / "recipe").glob("*.toml")])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """What the configurations name, in small: data sets, an encoder, mined and scored rows."""
    place = tmp_path_factory.mktemp("place")
    for name in ("scifact", "nfcorpus", "medquad", "msmarco"):
        task = tiny.beir(place / "data" / "beir" / name, packed=name != "scifact")
        rows = place / f"{name}.jsonl"
        mine.mine(str(task), "bm25", rows, negatives=7, threshold=None)
        for out in (f"{name}-scored.jsonl", f"{name}-16way.jsonl"):
            score.score(rows, "bm25", place / "runs" / "data" / out, corpus=str(task))
        teach.teach(str(task), "bm25", place / "runs" / "data" / name)
    tiny.tuples(place / "tuples.jsonl")
    (place / "data" / "pairs").mkdir()
    tiny.tuples(place / "data" / "pairs" / "wordnet.jsonl")
    # What demo/recipe names, in the same folder.
    tiny.tuples(place / "data" / "names.jsonl")
    tiny.beir(place / "data" / "train")
    mine.mine(str(place / "data" / "train"), "bm25", place / "data" / "mined.jsonl", negatives=7, threshold=None)
    (place / "taught").mkdir()
    teach.teach(str(place / "data" / "train"), "bm25", place / "taught" / "scores")
    np.save(place / "taught" / "vectors.npy", np.zeros((60 + 48, 24), np.float16) + 1)
    tiny.encoder(place / "base")
    torch.manual_seed(0)
    teacher = model.create(config.Model(base=str(place / "base")), "contrastive")
    teacher.save(place / "teacher")
    return place


@pytest.fixture(autouse=True)
def another_run():
    """Accelerate's state is one a process, precision included."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def quick(place: Path, output: Path, stage: str = "colbert", **tables) -> config.Config:
    return config.build(tiny.settings(stage, place / "base", place / "tuples.jsonl", output, **tables))


def losses(output: Path) -> list[float]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_runs_two_steps(place, tmp_path, monkeypatch, path):
    monkeypatch.setenv("EDGECOLBERT_DATA", str(place / "data"))
    monkeypatch.setenv("DEMO", str(place))
    monkeypatch.chdir(place)
    wordnet = place / "data" / "pairs" / "wordnet.jsonl.gz"
    if not wordnet.exists():
        import gzip

        wordnet.write_bytes(gzip.compress(wordnet.with_suffix("").read_bytes()))
    config.load(path)
    small = [
        f"model.base={place / 'base'}",
        f"output={tmp_path}",
        "train.steps=2",
        "train.batch=8",
        "train.mini_batch=4",
    ]
    raw = tomllib.loads(path.read_text())
    # The encoder here is narrower, and the hub is out of reach.
    if "head" in raw["model"]:
        widths = "[64, 16]" if len(raw["model"]["head"]["widths"]) > 1 else "[16]"
        small += [f"model.head.widths={widths}", "model.dimension=16"]
    if raw["model"].get("freeze"):
        small += ["model.freeze=1"]
    if raw["model"].get("random"):
        small += ["model.random=false", f"model.tokenizer={place / 'base'}"]
    if any(source["path"].startswith("hub:") for source in raw["data"]["sources"]):
        stream = any(source.get("streaming") for source in raw["data"]["sources"])
        source = f'{{path = "{place / "tuples.jsonl"}", weight = 1, streaming = {str(stream).lower()}}}'
        if raw["stage"] == "distill":
            source = f'{{path = "{place / "data/beir/scifact"}", kind = "texts"}}'
        small += [f"data.sources=[{source}]"]
    if raw["stage"] == "distill":
        small += [f"teacher.model={place / 'teacher'}", "teacher.dimension=24", f"teacher.cache={tmp_path / 'cache'}"]
    folder = train.run(config.load(path, small))
    found = losses(tmp_path)
    assert found and all(math.isfinite(loss) for loss in found)
    loaded = model.load(folder)
    assert (loaded.head is not None) == (raw["stage"] == "colbert")


def test_training_learns_and_is_evaluated(place, tmp_path):
    """Thirty steps of a contrastive warm-up on a task where words of a topic stand for each other."""
    task = place / "data" / "beir" / "scifact"
    settings = quick(
        place,
        tmp_path,
        data={"sources": [{"path": str(task)}]},
        model={"head": {"widths": [16], "residual": False, "init": "pca"}},
        loss={"kind": "contrastive", "temperature": 0.5},
        train={"batch": 16, "mini_batch": 16, "steps": 30},
        optimizer={"lr": 3e-3, "schedule": "constant"},
        eval={"sets": [f"{task}:dev"], "every": 15},
    )
    train.run(settings)
    found = losses(tmp_path)
    assert sum(found[-5:]) < 0.8 * sum(found[:5])
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "eval" in record] == [15, 30]
    again = evaluate.evaluate_encoder(model.load(tmp_path / "model"), task, "dev")
    assert again["nDCG@10"] == records[-1]["nDCG@10"]
    kept = (tmp_path / "eval" / "step-000000030" / "scifact-dev.jsonl").read_text().splitlines()
    assert len(kept) == 10 and set(json.loads(kept[0])) == {"query_id", *evaluate.MEASURES}


def test_a_set_that_cannot_be_read_stops_before_the_first_step(place, tmp_path):
    task = place / "data" / "beir" / "scifact"
    for name, message in ((f"{task}x", "corpus.jsonl does not exist"), (f"{task}:dve", "dve.tsv does not exist")):
        with pytest.raises(config.ConfigError, match=message):
            train.run(quick(place, tmp_path, eval={"sets": [str(task), name]}))
    assert not list(tmp_path.iterdir())


def test_an_interrupted_evaluation_is_made_again_and_a_finished_one_is_not(place, tmp_path, monkeypatch):
    task = place / "data" / "beir" / "scifact"
    settings = quick(place, tmp_path, train={"steps": 6, "save_every": 2}, eval={"sets": [str(task)], "every": 2})
    real, begun = evaluate.evaluate_encoder, set()

    def interrupted(*arguments, keep, **options):
        if keep not in begun:
            begun.add(keep)
            raise KeyboardInterrupt
        return real(*arguments, keep=keep, **options)

    def evaluated() -> list[int]:
        records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        return [record["step"] for record in records if "eval" in record]

    monkeypatch.setattr(evaluate, "evaluate_encoder", interrupted)
    for done in ([], [2], [2, 4]):
        with pytest.raises(KeyboardInterrupt):
            train.run(settings)
        assert evaluated() == done and (tmp_path / "model").exists() == (done == [2, 4])
    train.run(settings)
    assert evaluated() == [2, 4, 6]
    log = (tmp_path / "metrics.jsonl").read_bytes()
    train.run(settings)
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


KILLED = """
import os, random, signal, sys, time
import torch
from training import config, train
raw = {raw!r}
def child(output, after):
    # A fork of a process that has run nothing in parallel yet: one import serves all runs.
    process = os.fork()
    if not process:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        torch.set_num_threads(1)
        try:
            train.run(config.build(raw | {{"output": output}}))
        finally:
            os._exit(0)
    if after is not None:
        path, size = os.path.join(output, "metrics.jsonl"), 0
        while True:
            size = open(path).read().count("\\n") if os.path.exists(path) else 0
            if size >= after[0] or os.waitpid(process, os.WNOHANG)[0]:
                break
            time.sleep(0.005)
        time.sleep(after[1])
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            return
    os.waitpid(process, 0)
child({whole!r}, None)
rng = random.Random(0)
for after in ((2, 0.0), (4, 0.03), (7, 0.01)):
    child({killed!r}, after)
child({killed!r}, None)
"""


@pytest.mark.parametrize("stage, loss", [("colbert", {"kind": "contrastive"})])
def test_a_run_killed_again_and_again_has_the_same_losses_and_weights(place, tmp_path, python, stage, loss):
    raw = tiny.settings(
        stage,
        place / "base",
        place / "tuples.jsonl",
        tmp_path,
        loss=loss,
        optimizer={"name": "muon"},
        train={"steps": 10, "save_every": 2, "precision": "fp32"},
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    python(KILLED.format(raw=raw, whole=str(whole), killed=str(killed)), timeout=200)
    assert len(losses(whole)) == 10 and losses(killed) == losses(whole)
    a, b = (model.load(folder / "model").state_dict() for folder in (whole, killed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def repeated(place: Path, path: Path) -> Path:
    """Rows that share queries and right documents, and have unequal numbers of negatives."""
    records = [json.loads(line) for line in (place / "tuples.jsonl").read_text().splitlines()[:8]]
    rows = [
        {"query": a["query"], "documents": [b["documents"][0], *a["documents"][1:ways]]}
        for a in records
        for ways, b in enumerate(records)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "stage, loss, data",
    [
        ("colbert", 'kind = "contrastive"', "tuples"),
        ("colbert", 'kind = "contrastive"', "repeated"),
        ("finetune", "angle = 0.0", "repeated"),  # of a device's own triplets
        ("colbert", "bonus = 1.0", "taught"),
    ],
)
def test_two_processes_have_the_losses_of_one(place, tmp_path, stage, loss, data):
    """The whole batch and the documents of all ranks, whoever encodes them; without dropout, which ranks draw apart."""
    one, two = tmp_path / "one", tmp_path / "two"
    path = tmp_path / "run.toml"
    source = place / "runs" / "data" / "scifact" if data == "taught" else place / "tuples.jsonl"
    source = repeated(place, tmp_path / "rows.jsonl") if data == "repeated" else source
    path.write_text(
        f"""stage = "{stage}"
output = "{two}"
[model]
base = "{place / "base"}"
dimension = 16
document_length = 32
[data]
sources = [{{path = "{source}", corpus = "{place / "data" / "beir" / "scifact"}"}}]
[loss]
{loss}
[train]
batch = 8
mini_batch = 2
steps = 4
log_every = 1
dropout = 0.0
"""
    )
    launch(2, path)
    train.run(config.load(path, [f"output={one}"]))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.parametrize("batch", [3, 6], ids=["whole", "chunks"])
def test_a_process_without_a_document(place, tmp_path, batch):
    """Three processes share the two documents of a batch; without a document a process still joins every exchange."""
    task = tiny.beir(tmp_path / "task")
    (task / "qrels" / "train.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"q{n}\td{d}\t{1 + d}\n" for n in range(12) for d in (0, 1))
    )
    teach.teach(str(task), "bm25", tmp_path / "taught")
    path = tmp_path / "run.toml"
    path.write_text(
        f"""stage = "colbert"
output = "{tmp_path / "three"}"
[model]
base = "{place / "base"}"
dimension = 16
[data]
sources = [{{path = "{tmp_path / "taught"}", corpus = "{task}", hard = 0, about = 0}}]
[loss]
bonus = 1.0
student_normalization = "none"
[optimizer]
lr = 0.01
[train]
batch = {batch}
mini_batch = 1
steps = 4
log_every = 1
dropout = 0.0
"""
    )
    launch(3, path)
    train.run(config.load(path, [f"output={tmp_path / 'one'}"]))
    assert losses(tmp_path / "three") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert len(set(losses(tmp_path / "one"))) == 4, "the model learns"


def launch(processes: int, path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "training.train", str(path)]
    paths = {"PYTHONPATH": str(Path(train.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


def test_another_configuration_does_not_go_on(place, tmp_path):
    train.run(quick(place, tmp_path))
    with pytest.raises(config.ConfigError, match=r"optimizer.lr was 5e-05, is 0.1"):
        train.run(quick(place, tmp_path, optimizer={"lr": 0.1}))
    train.run(quick(place, tmp_path, train={"save_every": 7}))  # nothing that changes a step


def test_another_number_of_processes_does_not_go_on(place, tmp_path):
    train.run(quick(place, tmp_path))
    told = checkpoint.existing(tmp_path)[-1] / "config.json"
    facts = json.loads(told.read_text())
    told.write_text(json.dumps(facts | {"processes": 2}))
    with pytest.raises(config.ConfigError, match="it had 2 processes, now there are 1"):
        train.run(quick(place, tmp_path))
    assert facts.pop("processes") == 1
    told.write_text(json.dumps(facts))  # as it was written before
    train.run(quick(place, tmp_path))


def test_a_full_disk_leaves_the_checkpoints_there_are(place, tmp_path, monkeypatch):
    from accelerate import Accelerator

    settings = quick(place, tmp_path, train={"steps": 6, "save_every": 2})
    real = Accelerator.save_state

    def full(self, folder, **options):
        if "000000004" in folder:
            (Path(folder) / "half").write_bytes(b"x" * 100)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, folder, **options)

    monkeypatch.setattr(Accelerator, "save_state", full)
    with pytest.raises(
        checkpoint.CheckpointError, match=r"step 4 could not be written .*No space left.*step-000000002"
    ):
        train.run(settings)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000002"]
    monkeypatch.undo()
    train.run(settings)
    other = tmp_path / "other"
    train.run(quick(place, other, train={"steps": 6, "save_every": 2}))
    assert losses(tmp_path) == losses(other)


@pytest.mark.parametrize("stage, loss", [("colbert", {}), ("contrastive", {})])
def test_a_loss_that_is_not_a_number_stops_before_the_step(place, tmp_path, monkeypatch, stage, loss):
    settings = quick(place, tmp_path, stage, train={"steps": 4, "save_every": 2})
    real, calls = stages.Stage.encode, []

    def broken(self, **features):
        vectors, mask = real(self, **features)
        calls.append(1)
        return (vectors * math.nan if len(list((tmp_path / "checkpoints").glob("step*"))) else vectors), mask

    monkeypatch.setattr(stages.Stage, "encode", broken)
    with pytest.raises(
        FloatingPointError, match=r"step 3, .*tuples.jsonl, rows \d+.*nan.*step-000000002, is untouched"
    ):
        train.run(settings)


def test_a_broken_checkpoint_is_named(place, tmp_path):
    train.run(quick(place, tmp_path))
    (last,) = checkpoint.existing(tmp_path)
    (last / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(checkpoint.CheckpointError, match="step-000000002 cannot be read"):
        train.run(quick(place, tmp_path))


@pytest.mark.parametrize(
    "change, message",
    [
        ("train.stepz=3", r"a.toml: train.stepz is not a setting; did you mean steps\?"),
        ("train.steps=many", "a.toml: train.steps is 'many'; want a whole number"),
        ("train.batch=0", "train.batch is 0; want more than 0"),
        ("stage=fifth", "a.toml: stage is 'fifth'; want 'contrastive' or"),
        ("data.sources=[{name='x'}]", r"a.toml: data.sources\[0\].path is missing"),
        ("data.sources=[]", "data.sources is empty"),
        ("optimizer.name=sgd", "optimizer.name is 'sgd'; want 'adamw' or 'muon'"),
        ("model.base=$NOT_SET_ANYWHERE/x", "model.base is .* NOT_SET_ANYWHERE is not set"),
        ("train", "want key=value"),
        ("loss.kind=kl", None),
        ("model.head.widths=[4.5]", r"model.head.widths\[0\] is 4.5; want a whole number"),
        ("model.head.widths=[0, 16]", r"a.toml: model.head.widths\[0\] is 0; want more than 0"),
        ("data.sources=[{path='x', weight=-1}]", r"data.sources\[0\].weight is -1.0; want 0 or more"),
        ("data.sources=[{path='x', weight=nan}]", r"data.sources\[0\].weight is nan; want a finite number"),
        ("data.sources=[{path='x', weight=0}, {path='y', weight=0}]", "data.sources have no weight but 0"),
        ("data.sources=[{path='x', streaming=true, buffer=0}]", r"data.sources\[0\].buffer is 0; want more than 0"),
        (
            "data.sources=[{path='x', columns={qurey='text'}}]",
            r"a key of data.sources\[0\].columns is 'qurey'; want 'query'",
        ),
        ("data.negatives=-1", "data.negatives is -1; want 0 or more"),
        ("data.limit=-5", "data.limit is -5; want more than 0"),
        ("loss.temperature=0", "loss.temperature is 0.0; want more than 0"),
        ("loss.teacher_temperature=0.0", "loss.teacher_temperature is 0.0; want more than 0"),
        ("loss.margin=-1.0", "loss.margin is -1.0; want more than 0"),
        ("optimizer.clip=-1.0", "optimizer.clip is -1.0; want 0 or more"),
        ("optimizer.lr=-0.001", "optimizer.lr is -0.001; want 0 or more"),
        ("optimizer.lr=nan", "optimizer.lr is nan; want a finite number"),
        ("optimizer.betas=[2.0, 3.0]", r"optimizer.betas\[0\] is 2.0; want 0 or more and below 1"),
        ("train.epochs=inf", "train.epochs is inf; want a finite number"),
        ("train.seed=-1", "train.seed is -1; want 0 or more"),
        ("train.dropout=2.0", "train.dropout is 2.0; want 0 or more and below 1"),
    ],
)
def test_settings_that_are_wrong(tmp_path, change, message):
    path = tmp_path / "a.toml"
    path.write_text('stage = "colbert"\noutput = "x"\n[model]\nbase = "b"\n[data]\nsources = [{path = "p"}]\n')
    if message is None:
        assert config.load(path, [change]).loss.kind == "kl"
        return
    with pytest.raises(config.ConfigError, match=message):
        config.load(path, [change])


def test_every_number_has_a_range_and_every_column_a_name():
    def numbers(kind, key: str = "") -> set[str]:
        """The settings of a type that are numbers or lists of them, under their full names."""
        if dataclasses.is_dataclass(kind):
            hints = typing.get_type_hints(kind)
            return set().union(*(numbers(each, f"{key}.{name}".lstrip(".")) for name, each in hints.items()))
        if kind in (int, float):
            return {key}
        return set().union(*(numbers(each, key) for each in typing.get_args(kind)))

    assert numbers(config.Config) == config.RANGES.keys()
    assert sources.COLUMNS.keys() == set(typing.get_args(config.Column))


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path, place):
    with pytest.raises(SystemExit, match=r"error: .*nowhere.toml: there is no such file"):
        train.main([str(tmp_path / "nowhere.toml")])
    (tmp_path / "broken.toml").write_text("stage = ")
    with pytest.raises(SystemExit, match=r"error: .*broken.toml: Invalid value"):
        train.main([str(tmp_path / "broken.toml")])
    with pytest.raises(SystemExit, match=r"error: .*does not exist"):
        evaluate.main(["bm25", str(tmp_path)])


@pytest.mark.parametrize(
    "tables, message",
    [
        ({"train": {"trackers": ["foo"]}}, "train.trackers has 'foo'; want one that is installed"),
        ({"model": {"base": "package:json"}}, "package:json has no encoder: .* 'get_model_path'"),
        ({"model": {"tokenizer": "/nowhere"}}, "model.tokenizer '/nowhere' has no tokenizer"),
        (
            {"model": {"head": {"widths": [32, 16], "residual": False, "init": "pca"}}},
            "model.head: one that starts at a projection needs a residual",
        ),
    ],
)
def test_mistakes_that_only_a_run_finds(place, tmp_path, tables, message):
    with pytest.raises(config.ConfigError, match=message):
        train.run(quick(place, tmp_path, **tables))


@pytest.mark.parametrize("batch, devices, refused", [(192, 1, False), (193, 1, True), (384, 2, False), (386, 2, True)])
def test_stella_has_a_largest_batch(place, tmp_path, batch, devices, refused):
    wanted = quick(place, tmp_path, "distill", loss={"stella": True}, train={"batch": batch})
    if not refused:
        train.check_stella(wanted, devices)
        return
    with pytest.raises(config.ConfigError, match=rf"train.batch is {batch}, 193 texts a device; .* at most 192"):
        train.check_stella(wanted, devices)
    train.check_stella(dataclasses.replace(wanted, loss=config.Loss(stella=False)), devices)
    if devices == 1:
        with pytest.raises(config.ConfigError, match="193 texts a device"):
            train.run(wanted)


def test_folders_that_a_run_cannot_use(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(config.ConfigError, match=r"output is .*file/out', where no folder can be made"):
        train.run(quick(place, tmp_path / "file" / "out"))
    texts = {"sources": [{"path": str(place / "data" / "beir" / "scifact"), "kind": "texts"}]}
    teacher = {"model": "/nowhere", "cache": str(tmp_path / "cache")}
    with pytest.raises(config.ConfigError, match="/nowhere: there is no such folder"):
        train.run(quick(place, tmp_path / "out", "distill", data=texts, teacher=teacher))


def test_a_bad_row_stops_the_run_with_its_line(place, tmp_path):
    lines = (place / "tuples.jsonl").read_text().splitlines()
    lines[5] = lines[5][:20]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    settings = config.build(tiny.settings("colbert", place / "base", tmp_path / "bad.jsonl", tmp_path / "out"))
    settings.train.steps = 5
    with pytest.raises(files.BadRow, match=r"bad.jsonl:6: not JSON"):
        train.run(settings)


def test_schedules():
    from training import optim

    wanted = config.Optimizer(schedule="cosine", warmup=10)
    shares = [optim.factor(step, 110, wanted) for step in range(110)]
    assert shares[0] == 0.1 and shares[9] == 1 and shares[60] == pytest.approx(0.5) and shares[109] < 0.001
    assert optim.factor(5, 100, config.Optimizer(schedule="constant")) == 1
    assert optim.factor(75, 100, config.Optimizer(schedule="linear", warmup=0.5)) == pytest.approx(0.5)


def test_muon_takes_hidden_matrices_alone(place):
    from training import optim

    encoder = model.create(config.Model(base=str(place / "base"), dimension=16), "colbert")
    adamw, muon = optim.build(encoder, config.Optimizer(name="muon"))
    names = {id(p): name for name, p in encoder.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert taken and all("encoder.layer" in name and name.endswith("weight") for name in taken)
    rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert not taken & rest and len(taken | rest) == sum(p.requires_grad for p in encoder.parameters())


def test_clean_removes_only_what_is_unfinished(tmp_path):
    for name in (".unfinished-000000004", "step-000000002"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    checkpoint.clean(tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == ["step-000000002"]
    shutil.rmtree(tmp_path)
