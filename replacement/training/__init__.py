"""Training of crosscoders: `run` does what `replacement train` does; `train` and `Trainer` take batches of your own."""

from replacement.data.activation_stream import ActivationStream
from replacement.data.open_tokens import open_source, store_rows
from replacement.training.config import CrosscoderConfig, DataConfig, TrainingConfig
from replacement.training.losses import Auxiliary, L1OfNorms, L2OfNorms, Loss, Penalty, PreActivation, Tanh
from replacement.training.metrics_log import read_metrics
from replacement.training.run import Interrupted, run
from replacement.training.run_config import RunConfig, read_config
from replacement.training.trainer import Progress, Trainer, train

__all__ = [
    "ActivationStream",
    "Auxiliary",
    "CrosscoderConfig",
    "DataConfig",
    "Interrupted",
    "L1OfNorms",
    "L2OfNorms",
    "Loss",
    "Penalty",
    "PreActivation",
    "Progress",
    "RunConfig",
    "Tanh",
    "Trainer",
    "TrainingConfig",
    "open_source",
    "read_config",
    "read_metrics",
    "run",
    "store_rows",
    "train",
]
