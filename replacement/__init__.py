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
    from replacement.crosscoder import checkpoint
    from replacement.crosscoder.activation import JumpReLU, ReLU
    from replacement.crosscoder.crosscoder import Crosscoder, CrosscoderOutput
    from replacement.crosscoder.features import Features
    from replacement.crosscoder.lorsa import Lorsa
    from replacement.crosscoder.query_keys import QueryKeys
    from replacement.crosscoder.sites import ModelShape, Site
    from replacement.crosscoder.topk import BatchTopK, JointTopK, TopK
    from replacement.crosscoder.wiring import Wiring
    from replacement.index.build import build_index
    from replacement.index.store import FeatureIndex
    from replacement.language_model.language_model import LanguageModel
    from replacement.loading import load
    from replacement.splicing.feature_changes import swap
    from replacement.splicing.intervened import Intervened
    from replacement.splicing.intervention import Intervention, UnknownFeatureError
    from replacement.splicing.local_replacement import Decomposition, LocalReplacement
    from replacement.splicing.replacement_model import ReplacementModel

__all__ = [
    "BatchTopK",
    "Crosscoder",
    "CrosscoderOutput",
    "Decomposition",
    "FeatureIndex",
    "Features",
    "Intervened",
    "Intervention",
    "JointTopK",
    "JumpReLU",
    "LanguageModel",
    "LocalReplacement",
    "Lorsa",
    "ModelShape",
    "QueryKeys",
    "ReLU",
    "ReplacementModel",
    "Site",
    "TopK",
    "UnknownFeatureError",
    "Wiring",
    "build_index",
    "checkpoint",
    "load",
    "swap",
]

# Imported on first use: `replacement --help` and `replacement show` must not wait for torch and transformer_lens.
_LAZY = {
    "BatchTopK": "replacement.crosscoder.topk",
    "Crosscoder": "replacement.crosscoder.crosscoder",
    "CrosscoderOutput": "replacement.crosscoder.crosscoder",
    "Decomposition": "replacement.splicing.local_replacement",
    "FeatureIndex": "replacement.index.store",
    "Features": "replacement.crosscoder.features",
    "Intervened": "replacement.splicing.intervened",
    "Intervention": "replacement.splicing.intervention",
    "JointTopK": "replacement.crosscoder.topk",
    "JumpReLU": "replacement.crosscoder.activation",
    "LanguageModel": "replacement.language_model.language_model",
    "LocalReplacement": "replacement.splicing.local_replacement",
    "Lorsa": "replacement.crosscoder.lorsa",
    "ModelShape": "replacement.crosscoder.sites",
    "QueryKeys": "replacement.crosscoder.query_keys",
    "ReLU": "replacement.crosscoder.activation",
    "ReplacementModel": "replacement.splicing.replacement_model",
    "Site": "replacement.crosscoder.sites",
    "TopK": "replacement.crosscoder.topk",
    "UnknownFeatureError": "replacement.splicing.intervention",
    "Wiring": "replacement.crosscoder.wiring",
    "build_index": "replacement.index.build",
    "load": "replacement.loading",
    "swap": "replacement.splicing.feature_changes",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name == "checkpoint":
        return importlib.import_module("replacement.crosscoder.checkpoint")
    raise AttributeError(f"module 'replacement' has no attribute {name!r}")
