"""Checkpoints that are there whole or not at all: written beside, brought to the disk, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training import config as settings

PROCESSES = "processes"  # in config.json, beside the tables of a configuration


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; those before it are untouched."""


def existing(output: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((output / "checkpoints").glob("step-" + "[0-9]" * 9))


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def save(accelerator: Any, output: Path, config: settings.Config, step: int) -> None:
    """What the steps after `step` need: parameters, optimisers, random states of every process, and the configuration."""
    place = output / "checkpoints"
    unfinished, whole = place / f".unfinished-{step:09d}", place / f"step-{step:09d}"
    if whole.exists():
        return
    try:
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            facts = asdict(config) | {PROCESSES: accelerator.num_processes}
            (unfinished / "config.json").write_text(json.dumps(facts), encoding="utf-8")
            publish(unfinished, whole)
    except Exception as error:  # a full disk shows as OSError, RuntimeError or SafetensorError, depending on the file
        shutil.rmtree(unfinished, ignore_errors=True)
        left = existing(output)
        kept = f"the last good one is {left[-1]}" if left else "there is none before it"
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {whole}: {error}; {kept}"
        ) from error
    if accelerator.is_main_process:
        for old in existing(output)[: -config.train.keep]:
            shutil.rmtree(old, ignore_errors=True)


def publish(unfinished: Path, whole: Path) -> None:
    """Rename a folder into place once its bytes are on the disk; an older one of that name makes room."""
    for path in [*unfinished.rglob("*"), unfinished]:
        _sync(path)
    if whole.exists():
        old = whole.with_name(f".old-{whole.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(whole, old)
        os.rename(unfinished, whole)
        shutil.rmtree(old)
    else:
        os.rename(unfinished, whole)
    _sync(whole.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clean(output: Path) -> None:
    """Remove what an interrupted run left unfinished."""
    for folder in (output / "checkpoints", output):
        for left in [*folder.glob(".unfinished-*"), *folder.glob(".old-*")]:
            shutil.rmtree(left, ignore_errors=True)


def resume(accelerator: Any, output: Path, config: settings.Config) -> int:
    """Load the last checkpoint, if there is one; the number of steps that are done."""
    found = existing(output)
    if not found:
        return 0
    last = found[-1]
    try:
        facts = json.loads((last / "config.json").read_text(encoding="utf-8"))
        now = accelerator.num_processes
        processes = facts.pop(PROCESSES, now)
        before = settings.build(facts, str(last / "config.json"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{last} cannot be read ({error}); remove it to go on from the one before") from error
    changed = settings.differences(before, config)
    if processes != now:  # a process without its random state would draw another dropout
        changed.append(f"it had {processes} processes, now there are {now}")
    if changed:
        listed = "; ".join(changed)
        raise settings.ConfigError(
            f"{last} belongs to another configuration: {listed}. Undo that, or choose another output"
        )
    try:
        accelerator.load_state(str(last))
    except Exception as error:
        raise CheckpointError(f"{last} cannot be read ({error}); remove it to go on from the one before") from error
    return step_of(last)
