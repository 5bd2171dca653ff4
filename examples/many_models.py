"""What examples over several small language models share: a crosscoder over all of them, and activations on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from replacement import Crosscoder
from replacement.crosscoder.sites import Site
from replacement.data.open_tokens import open_source
from replacement.training.build import Models, load_models
from replacement.training.metrics_log import read_metrics
from replacement.training.run_config import run_config
from replacement.training.run_folder import holds_run
from replacement.training.runs import run
from replacement.validation.measure import evaluating

K = 16
"""Active features per token."""
HELD_OUT_ROWS = 64
ROWS_AT_ONCE = 64


def train_crosscoder(
    folders: Sequence[Path], out: Path, *, n_tokens: int, n_features: int, seed: int = 0
) -> tuple[Crosscoder, dict[str, float]]:
    """A crosscoder over the stream behind the middle layer of all models (an autoencoder of one), unless that is done, and the
    variance it leaves unexplained at each site of held-out rows."""
    crosscoder: dict[str, Any] = {
        "wiring": "model_diffing" if len(folders) > 1 else "autoencoder",
        "n_features": n_features,
        "activation": {"name": "batchtopk", "k": K},
        "undecomposed_positions": 1,
    }
    models = load(folders[:1])
    if len(folders) == 1:
        crosscoder["layers"] = [models.first.shape.n_layers // 2]
    names = [str(folder) for folder in folders]
    config = run_config(
        {
            "model": names[0] if len(names) == 1 else names,
            "data": {"source": "demo", "held_out_rows": HELD_OUT_ROWS, "context": models.first.context_length},
            "crosscoder": crosscoder,
            "training": {"n_tokens": n_tokens, "seed": seed},
        }
    )
    with tqdm(total=config.training.n_steps, desc=out.name, unit="step", disable=None) as bar:
        trained = run(
            config, out, resume=holds_run(out), progress=lambda _: bar.update()
        )  # a finished one is only read
    return trained, read_metrics(out, kind="held_out")[-1]["unexplained"]


def load(folders: Sequence[Path]) -> Models:
    """Language models from folders."""
    return load_models([str(folder) for folder in folders])


def held_out(models: Models, n_rows: int) -> Tensor:
    """Rows of the demo's corpus `[R, T]` that no language model and no crosscoder was trained on."""
    return open_source("demo", models.first, context=models.first.context_length, n_held_out=n_rows).held_out()


@torch.no_grad()
def activations_on(models: Models, crosscoder: Crosscoder, rows_RT: Tensor) -> tuple[dict[Site, Tensor], Tensor]:
    """Activations `[N, D]` at every site that a crosscoder reads and those of its features `[N, F]`, at all tokens of the rows
    but the first of each."""
    acts: dict[Site, list[Tensor]] = {site: [] for site in crosscoder.wiring.read_sites}
    features: list[Tensor] = []
    with evaluating(crosscoder):
        for tokens_BT in rows_RT.split(ROWS_AT_ONCE):
            read = models.read(tokens_BT, crosscoder.wiring.read_sites)
            for site, x_BTD in read.items():
                acts[site].append(x_BTD[:, 1:].flatten(0, 1))
            inputs = {site: parts[-1] for site, parts in acts.items()}
            n_rows = len(next(iter(inputs.values())))
            found = crosscoder.encode(inputs, positions=torch.full((n_rows,), crosscoder.undecomposed_positions))
            dense_NF = torch.zeros(n_rows, crosscoder.n_features)
            dense_NF[found.row, found.index] = found.activation
            features.append(dense_NF)
    return {site: torch.cat(parts) for site, parts in acts.items()}, torch.cat(features)
