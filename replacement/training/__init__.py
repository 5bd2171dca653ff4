"""Training of crosscoders."""

from replacement.training.activations import activation_batches
from replacement.training.config import CrosscoderConfig, DataConfig, TrainingConfig
from replacement.training.losses import Auxiliary, L1OfNorms, L2OfNorms, Loss, Penalty, PreActivation, Tanh
from replacement.training.trainer import Progress, Trainer, train

__all__ = [
    "Auxiliary",
    "CrosscoderConfig",
    "DataConfig",
    "L1OfNorms",
    "L2OfNorms",
    "Loss",
    "Penalty",
    "PreActivation",
    "Progress",
    "Tanh",
    "Trainer",
    "TrainingConfig",
    "activation_batches",
    "train",
]
