"""Training of crosscoders."""

from replacement.training.activations import activation_batches
from replacement.training.config import TrainingConfig
from replacement.training.losses import L1OfNorms, L2OfNorms, Penalty, Tanh
from replacement.training.trainer import Progress, train

__all__ = ["L1OfNorms", "L2OfNorms", "Penalty", "Progress", "Tanh", "TrainingConfig", "activation_batches", "train"]
