"""Training of crosscoders: `run` does what `replacement train` does; `train` and `Trainer` take batches of your own."""

from __future__ import annotations

import importlib
from typing import Any

# Imported on first use: the settings that `replacement train --help` lists must not wait for torch.
_NAMES = {
    "replacement.data.activation_stream": ("ActivationStream",),
    "replacement.data.open_tokens": ("open_source", "store_rows"),
    "replacement.training.config": ("CrosscoderConfig", "DataConfig", "RunConfig", "TrainingConfig"),
    "replacement.training.dead_features": ("Auxiliary", "PreActivation"),
    "replacement.training.losses": ("Loss", "Strongest"),
    "replacement.training.metrics_log": ("read_metrics",),
    "replacement.training.penalties": ("Distance", "L1OfNorms", "L2OfNorms", "Penalty", "Tanh"),
    "replacement.training.run_config": ("read_config",),
    "replacement.training.run_folder": ("holds_run",),
    "replacement.training.runs": ("Interrupted", "run"),
    "replacement.training.settings": ("settings_table",),
    "replacement.training.trainer": ("Progress", "Trainer", "train"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'replacement.training' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
