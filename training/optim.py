"""Muon for the hidden matrices and AdamW for the rest, or AdamW alone; the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from training import config as settings


def build(model: nn.Module, wanted: settings.Optimizer) -> list[torch.optim.Optimizer]:
    """Optimisers over the parameters that have gradients; each group remembers its `peak_lr`."""
    hidden: list[nn.Parameter] = []
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_head = name.startswith(("head.", "projector.")) or ".head." in name
        if wanted.name == "muon" and parameter.ndim == 2 and not in_head and "embed" not in name:
            hidden.append(parameter)
        else:
            # Norms and biases are not decayed.
            groups.setdefault((in_head, parameter.ndim > 1), []).append(parameter)
    head_lr = wanted.lr if wanted.head_lr is None else wanted.head_lr
    listed = [
        {
            "params": parameters,
            "lr": head_lr if in_head else wanted.lr,
            "weight_decay": wanted.weight_decay if decayed else 0.0,
        }
        for (in_head, decayed), parameters in groups.items()
    ]
    first, second = wanted.betas
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(listed, betas=(first, second))]
    if hidden:
        # "original": the step's size as in Muon's own text, the reading closest to the paper's learning rate of 1e-3.
        options: dict[str, Any] = {
            "lr": wanted.muon_lr,
            "weight_decay": wanted.weight_decay,
            "adjust_lr_fn": "original",
        }
        optimizers.append(torch.optim.Muon(hidden, **options))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def factor(step: int, steps: int, wanted: settings.Optimizer) -> float:
    """Share of the peak learning rate at a step, counted from 0."""
    warmup = round(wanted.warmup * steps) if wanted.warmup < 1 else int(wanted.warmup)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if wanted.schedule == "linear":
        return max(0.0, 1 - done)
    if wanted.schedule == "cosine":
        return (1 + math.cos(math.pi * min(1.0, done))) / 2
    return 1.0


def set_lr(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
