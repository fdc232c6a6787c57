"""Train one stage: `python -m training.train CONFIG.toml [key=value ...]`.

On several devices: `accelerate launch -m training.train CONFIG.toml`, or torchrun. A run that was stopped, in whatever way,
goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs
from torch.utils.data import DataLoader
from tqdm import tqdm

from edgecolbert_kernels import GradCache
from training import checkpoint, data, formats, losses, model, optim, stages
from training import config as settings
from training.files import BadRow
from training.sources import Stream

PCA_TEXTS = 256


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(f"{__doc__}\nSettings and their defaults: training/config.py")
        return
    try:
        run(settings.load(given[0], given[1:]))
    except (settings.ConfigError, BadRow, checkpoint.CheckpointError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error


def run(config: settings.Config) -> Path:
    """Train as configured; the folder of the finished model."""
    output, train = Path(config.output), config.train
    check_trackers(train.trackers)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # without it several CPU processes would each believe to be alone
        mixed_precision="no" if train.precision == "fp32" else train.precision,
        log_with=train.trackers or None,
        project_dir=output,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=False),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    check_stella(config, accelerator.num_processes)
    main_process = accelerator.is_main_process
    if main_process:
        check_eval_sets(config)
    seed_everything(train.seed)
    encoder = model.create(config.model, config.stage)
    if train.dropout is not None:
        set_dropout(encoder, train.dropout)
    batches = data.Batches(config, None, accelerator.process_index, accelerator.num_processes)
    if main_process:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise settings.ConfigError(f"output is {config.output!r}, where no folder can be made: {error}") from None
        checkpoint.clean(output)
        tell_all(accelerator, batches.notes)
    fresh = not checkpoint.existing(output)
    head = config.model.head
    if fresh and config.stage == "colbert" and head is not None and head.init == "pca":
        encoder.start_at(principal_directions(encoder, batches, accelerator.device))
    stage = stages.build(config, encoder, teacher_vectors(config, batches, accelerator), batches.rows)
    batches.collate = stage.collate
    optimizers = optim.build(stage.model, config.optimizer)
    stage.model, *optimizers = accelerator.prepare(stage.model, *optimizers)
    done = checkpoint.resume(accelerator, output, config)
    if not done:
        seed_everything(train.seed + accelerator.process_index)  # dropout differs between ranks
    if train.trackers:
        accelerator.init_trackers("edgecolbert", {name: str(value) for name, value in settings.flat(config).items()})
    log = Log(output / "metrics.jsonl", done) if main_process else None
    if done:
        tell_all(accelerator, [f"going on after step {done} of {batches.steps}"])
    if due(config.eval, done, batches.steps):
        evaluate(config, encoder, accelerator, log, done)  # a run that was killed meanwhile

    cache = grad_cache(stage, train.mini_batch)
    stage.model.train()
    start = time.perf_counter()
    loader: Any = DataLoader(
        batches,  # type: ignore[arg-type]
        batch_size=None,
        sampler=range(done, batches.steps),
        num_workers=train.workers,
        generator=torch.Generator(),  # else it draws from the one that dropout draws from, and a resumed run once more
        pin_memory=accelerator.device.type == "cuda",
    )
    bar = tqdm(
        total=batches.steps, initial=done, desc=config.stage, unit="step", disable=not main_process, mininterval=1
    )
    for step, batch in enumerate(loader, start=done):
        share = optim.factor(step, batches.steps, config.optimizer)
        optim.set_lr(optimizers, share)
        try:
            loss = gradients(stage, move(batch, accelerator.device), accelerator, train.mini_batch, cache)
            clip = config.optimizer.clip or math.inf
            norm = float(accelerator.clip_grad_norm_(stage.model.parameters(), clip))
            if not math.isfinite(norm):
                raise FloatingPointError(f"the loss is {float(loss)}, its gradient has the norm {norm}")
        except FloatingPointError as error:
            raise FloatingPointError(where(error, step, batch, output)) from error
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        mean = float(accelerator.reduce(loss, "mean"))
        bar.update()
        if log and ((step + 1) % train.log_every == 0 or step + 1 == batches.steps):
            bar.set_postfix(loss=f"{mean:.4f}")
            facts = {"loss": mean, "lr": config.optimizer.lr * share, "norm": norm}
            log.write(step + 1, facts | {"seconds": round(time.perf_counter() - start, 3), "source": batch["source"]})
            accelerator.log(facts, step=step + 1)
        if (step + 1) % train.save_every == 0 or step + 1 == batches.steps:
            checkpoint.save(accelerator, output, config, step + 1)
        if due(config.eval, step + 1, batches.steps):
            evaluate(config, encoder, accelerator, log, step + 1)
            stage.model.train()
    bar.close()
    if main_process:
        if encoder.frozen is not None:
            encoder.frozen.save()
        export(encoder, config, output / "model")
        tell_all(accelerator, [f"the model is in {output / 'model'}"])
    evaluate(config, encoder, accelerator, log, batches.steps)
    if train.trackers:
        accelerator.end_training()
    return output / "model"


def grad_cache(stage: stages.Stage, mini_batch: int) -> GradCache:
    models = [stage.model] if hasattr(stage.model, "no_sync") else []
    return GradCache(stage.encode, stage.loss, mini_batch, models=models)


def gradients(
    stage: stages.Stage, batch: stages.Batch, accelerator: Accelerator, mini_batch: int, cache: GradCache
) -> torch.Tensor:
    """Leave the gradients of a batch on the parameters; its loss. A loss that is not finite raises before they are touched."""
    if not stage.separable:
        if max(len(each["input_ids"]) for each in batch["inputs"]) > mini_batch:
            return cache.step(*batch["inputs"], **batch["options"])
        cut = [(batch["inputs"], batch["options"], 1.0)]  # it fits: no need to encode twice
    else:
        cut = stages.parts(batch, mini_batch)
    total = torch.zeros((), device=accelerator.device)
    for number, (inputs, options, share) in enumerate(cut):
        last = number + 1 == len(cut)
        with contextlib.nullcontext() if last else accelerator.no_sync(stage.model):
            loss = stage.loss(*(stage.encode(**features) for features in inputs), **options) * share
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the loss is {loss.item()}")
            loss.backward()
        total += loss.detach()
    return total


def where(error: Exception, step: int, batch: stages.Batch, output: Path) -> str:
    """The place of an error in the data and in the run."""
    rows = ", ".join(str(row + 1) for row in batch["rows"][:8]) + (", ..." if len(batch["rows"]) > 8 else "")
    found = checkpoint.existing(output)
    kept = f"the last checkpoint, {found[-1]}, is untouched" if found else "there is no checkpoint yet"
    return f"step {step + 1}, {batch['source']}, rows {rows}: {error}. No parameter has been changed by it, and {kept}"


def teacher_vectors(config: settings.Config, batches: data.Batches, accelerator: Accelerator) -> list[np.ndarray]:
    """Stage distill: the vectors of each source, from a file or made once by the main process and kept."""
    if config.stage != "distill":
        return []
    from training.score import vectors

    with accelerator.main_process_first():
        found = [
            vectors(source, rows, config.teacher) for source, rows in zip(batches.sources, batches.rows, strict=True)
        ]
    sizes = {each.shape[1] for each in found}
    if len(sizes) > 1:
        raise settings.ConfigError(
            f"data.sources: their teacher vectors have {sorted(sizes)} dimensions; want one number"
        )
    return found


@torch.no_grad()
def principal_directions(encoder: model.Encoder, batches: data.Batches, device: torch.device) -> torch.Tensor:
    """The orthonormal directions `[hidden, dimension]` that keep most of the inner products of document tokens.

    Not centred: MaxSim compares by inner product, to which a common shift is not neutral.
    """
    rng, texts = np.random.default_rng(0), []
    for rows in batches.rows:
        if isinstance(rows, Stream):
            texts += [text for row in rows.rows(0, PCA_TEXTS) for text in row.documents]
        else:
            chosen = rng.permutation(len(rows))[:PCA_TEXTS]
            texts += [text for n in chosen for text in rows.row(int(n), rng).documents]
    texts = [texts[int(n)] for n in rng.permutation(len(texts))[:PCA_TEXTS]]
    encoder = encoder.to(device).eval()
    total: Any = 0.0
    for start in range(0, len(texts), 16):
        features = encoder.tokenize(texts[start : start + 16], is_query=False)
        hidden = encoder.states(features["input_ids"].to(device), features["attention_mask"].to(device))
        rows_kept = torch.nn.functional.normalize(hidden[features["score_mask"].to(device)].double(), dim=-1)
        total = total + rows_kept.T @ rows_kept
    directions = torch.linalg.eigh(total).eigenvectors[:, -encoder.dimension :]
    # An eigenvector's sign is the library's choice.
    sign = directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    return (directions * sign).float()


def check_trackers(names: Sequence[str]) -> None:
    """Accelerate leaves out without a word what is not installed."""
    there = ["all", *map(str, get_available_trackers())]
    for name in names:
        if name not in there:
            raise settings.ConfigError(f"train.trackers has {name!r}; want one that is installed: {', '.join(there)}")


def check_stella(config: settings.Config, devices: int) -> None:
    """Raise what the first step would, before the teacher's vectors are made."""
    texts = config.train.batch // devices
    if config.stage == "distill" and config.loss.stella and texts > losses.MOST_STELLA:
        raise settings.ConfigError(
            f"train.batch is {config.train.batch}, {texts} texts a device; loss.stella compares every pair of their "
            f"similarities: want at most {losses.MOST_STELLA}"
        )


def check_eval_sets(config: settings.Config) -> None:
    """Raise what evaluation would, before the training that it would come after."""
    if config.eval.sets:
        from training.beir import read_beir
        from training.evaluate import split_of

        for name in config.eval.sets:
            read_beir(*split_of(name))


def due(wanted: settings.Eval, step: int, steps: int) -> bool:
    """Whether an evaluation stands between this step and the next; that after the last is due anyway."""
    return wanted.every > 0 and 0 < step < steps and step % wanted.every == 0


def evaluate(
    config: settings.Config, encoder: model.Encoder, accelerator: Accelerator, log: Log | None, step: int
) -> None:
    """On the main process alone; the others wait. What the log has is not evaluated again."""
    if log and config.eval.sets:
        from training.evaluate import evaluate_encoder, label, split_of

        # Evaluation draws no random number that training would miss.
        for name in config.eval.sets:
            if (step, name) in log.evaluated:
                continue
            folder, split = split_of(name)
            kept = Path(config.output) / "eval" / f"step-{step:09d}"
            means = evaluate_encoder(encoder, folder, split, batch=config.eval.batch, keep=kept)
            log.write(step, {"eval": name, **means})
            accelerator.log({f"{label(folder)}/{metric}": value for metric, value in means.items()}, step=step)
    accelerator.wait_for_everyone()


def export(encoder: model.Encoder, config: settings.Config, folder: Path) -> None:
    """Write the finished model, whole or not at all."""
    unfinished = folder.with_name(f".unfinished-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    facts: dict[str, Any] = {
        "stage": config.stage,
        "data": ", ".join(Path(source.path).name for source in config.data.sources),
    }
    facts |= {"batch": config.train.batch, "optimizer": config.optimizer.name, "seed": config.train.seed}
    text = "## Training\n\nTrained with edgecolbert_kernels.\n\n" + "\n".join(f"- {k}: {v}" for k, v in facts.items())
    try:
        encoder.save(unfinished, formats.model_card(encoder, text))
        checkpoint.publish(unfinished, folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise checkpoint.CheckpointError(
            f"{folder} could not be written: {error}; the checkpoints are untouched"
        ) from error


class Log:
    """One JSON object a line; what an interrupted run wrote beyond its last checkpoint is taken out again."""

    def __init__(self, path: Path, done: int) -> None:
        kept = []
        self.evaluated: set[tuple[int, str]] = set()  # steps and sets
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    facts = json.loads(line)
                    step = facts["step"]
                except (ValueError, KeyError):
                    continue  # half a line, written as the run was killed
                if step <= done:
                    kept.append(line)
                    self.evaluated |= {(step, facts["eval"])} if "eval" in facts else set()
        unfinished = path.with_name(f".{path.name}")
        unfinished.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(unfinished, path)
        self.file = path.open("a", encoding="utf-8")

    def write(self, step: int, facts: dict[str, Any]) -> None:
        self.file.write(json.dumps({"step": step, **facts}) + "\n")
        self.file.flush()


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - whatever else in this process draws from it
    torch.manual_seed(seed)


def set_dropout(encoder: model.Encoder, share: float) -> None:
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = share
    # Fused attention reads it from the configuration or from an attribute of its own.
    for module in encoder.backbone.modules():
        for name in ("attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, share)


def move(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: move(each, device) for name, each in value.items()}
    return [move(each, device) for each in value] if isinstance(value, list) else value


def tell_all(accelerator: Accelerator, lines: Sequence[str]) -> None:
    for line in lines:
        accelerator.print(line, flush=True)


if __name__ == "__main__":
    main()
