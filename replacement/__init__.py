"""Crosscoders, and the replacement model that a crosscoder makes of a language model.

>>> import replacement
>>> model = replacement.load("demo")                        # language model + crosscoder that ship with the project
>>> tokens = model.language_model.tokenize("the capital of the state containing Dallas is")
>>> logits = model(tokens)                                  # every MLP replaced, errors propagate
>>> exact = model(tokens, errors="keep")                    # equals the original model
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from replacement import checkpoint
    from replacement.activation import BatchTopK, JumpReLU, ReLU, TopK
    from replacement.crosscoder import Crosscoder, CrosscoderOutput
    from replacement.features import Features
    from replacement.interventions import Intervened, Intervention, UnknownFeatureError, swap
    from replacement.language_model import LanguageModel
    from replacement.local import Decomposition, LocalReplacement
    from replacement.model import ReplacementModel
    from replacement.ready_made import load
    from replacement.sites import ModelShape, Site
    from replacement.wiring import Wiring

__all__ = [
    "BatchTopK",
    "Crosscoder",
    "CrosscoderOutput",
    "Decomposition",
    "Features",
    "Intervened",
    "Intervention",
    "JumpReLU",
    "LanguageModel",
    "LocalReplacement",
    "ModelShape",
    "ReLU",
    "ReplacementModel",
    "Site",
    "TopK",
    "UnknownFeatureError",
    "Wiring",
    "checkpoint",
    "load",
    "swap",
]

# Imported on first use: `replacement --help` and `replacement show` must not wait for torch and transformer_lens.
_LAZY = {
    "BatchTopK": "replacement.activation",
    "Crosscoder": "replacement.crosscoder",
    "CrosscoderOutput": "replacement.crosscoder",
    "Decomposition": "replacement.local",
    "Features": "replacement.features",
    "Intervened": "replacement.interventions",
    "Intervention": "replacement.interventions",
    "JumpReLU": "replacement.activation",
    "LanguageModel": "replacement.language_model",
    "LocalReplacement": "replacement.local",
    "ModelShape": "replacement.sites",
    "ReLU": "replacement.activation",
    "ReplacementModel": "replacement.model",
    "Site": "replacement.sites",
    "TopK": "replacement.activation",
    "UnknownFeatureError": "replacement.interventions",
    "Wiring": "replacement.wiring",
    "load": "replacement.ready_made",
    "swap": "replacement.interventions",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name == "checkpoint":
        return importlib.import_module("replacement.checkpoint")
    raise AttributeError(f"module 'replacement' has no attribute {name!r}")
