"""How many threads PyTorch works with."""

from __future__ import annotations

import os

import torch

SMALL_WIDTH = 256
"""Width of the residual stream below which operations are too short to be shared by threads."""


def fit_threads(width: int) -> None:
    """Use one thread where the model is narrow: several would wait for each other longer than they work.

    The number of threads never grows, so a smaller one that was set before stays, and one given by `OMP_NUM_THREADS` or
    `MKL_NUM_THREADS` is kept. It depends on the width and the machine alone, so a resumed run adds up in the same order.

    Args:
        width: of the residual stream, which all matrix products share.
    """
    if width < SMALL_WIDTH and not (os.environ.get("OMP_NUM_THREADS") or os.environ.get("MKL_NUM_THREADS")):
        torch.set_num_threads(1)
