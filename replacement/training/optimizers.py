"""Optimizers of crosscoders and language models: their state from the first step on, decay of weights, step sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn


def make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make the state that Adam would make in its first step, where it is not there yet."""
    for settings in optimizer.param_groups:
        for parameter in settings["params"]:
            if not optimizer.state[parameter]:
                # Contiguous, which weights that are parts of others are not; moments are saved.
                new = partial(torch.zeros_like, parameter, memory_format=torch.contiguous_format)
                # The fused Adam keeps its step counter as a tensor beside the moments.
                step = torch.zeros((), dtype=torch.float32, device=parameter.device if settings["fused"] else "cpu")
                optimizer.state[parameter] = {"step": step, "exp_avg": new(), "exp_avg_sq": new()}


def decaying_adamw(
    weights: Iterable[nn.Parameter], *, learning_rate: float, weight_decay: float, fused: bool | None = None
) -> torch.optim.AdamW:
    """AdamW for a language model: weight decay on matrices and none on biases and norms."""
    both: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for weight in weights:
        both[weight.ndim >= 2].append(weight)
    groups = [{"params": both[True], "weight_decay": weight_decay}, {"params": both[False], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=fused)


def warmup_and_cosine(step: int, *, n_steps: int, warmup_steps: int) -> float:
    """Share of the peak step size at a step, from 0: a linear warm-up, then a cosine from 1 to 0.05."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, n_steps - warmup_steps)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
