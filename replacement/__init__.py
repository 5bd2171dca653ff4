"""Crosscoders, and the replacement model that a crosscoder makes of a language model.

>>> import replacement
>>> model = replacement.load("demo")                        # language model + crosscoder that ship with the project
>>> tokens = model.language_model.tokenize("the capital of the state containing Dallas is")
>>> logits = model(tokens)                                  # every MLP replaced, errors propagate
>>> exact = model(tokens, errors="keep")                    # equals the original model
"""

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
