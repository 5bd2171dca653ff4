"""Training of crosscoders: `run` does what `replacement train` does; `train` and `Trainer` take batches of your own."""

from __future__ import annotations

import importlib
from typing import Any

# Imported on first use: the settings that `replacement train --help` lists must not wait for torch.
_MODULES = {
    "ActivationStream": "replacement.data.activation_stream",
    "Auxiliary": "replacement.training.losses",
    "CrosscoderConfig": "replacement.training.config",
    "DataConfig": "replacement.training.config",
    "Interrupted": "replacement.training.runs",
    "L1OfNorms": "replacement.training.losses",
    "L2OfNorms": "replacement.training.losses",
    "Loss": "replacement.training.losses",
    "Penalty": "replacement.training.losses",
    "PreActivation": "replacement.training.losses",
    "Progress": "replacement.training.trainer",
    "RunConfig": "replacement.training.config",
    "Tanh": "replacement.training.losses",
    "Trainer": "replacement.training.trainer",
    "TrainingConfig": "replacement.training.config",
    "holds_run": "replacement.training.run_folder",
    "open_source": "replacement.data.open_tokens",
    "read_config": "replacement.training.run_config",
    "read_metrics": "replacement.training.metrics_log",
    "run": "replacement.training.runs",
    "settings_table": "replacement.training.settings",
    "store_rows": "replacement.data.open_tokens",
    "train": "replacement.training.trainer",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'replacement.training' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
