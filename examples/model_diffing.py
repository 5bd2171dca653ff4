"""What did fine-tuning add? A crosscoder over a model and its fine-tuned copy, trained with L1 and with BatchTopK.

    python examples/model_diffing.py --out runs/model_diffing

A copy of the demo model is taught to swap two answers in sentences that begin with `today` (see `fine_tune_demo.py`), and
crosscoders that read and write the residual stream of both models are trained on text of both kinds. A feature whose decoder
vector is much longer in the fine-tuned model looks like one it gained. Latent scaling (Minder et al. 2025, "Robustly
identifying concepts introduced during chat fine-tuning using crosscoders") tells which of these the first model really lacks:
an L1 penalty makes features look exclusive that are not.

Written to OUT: both models' crosscoders, `model_diffing.svg` and `.png` with the decoder norms, `results.json`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fine_tune_demo import fine_tune, rows_of, shares_known
from matplotlib import pyplot
from plot_style import STYLE, save
from result_rows import append_row
from torch import Tensor
from tqdm import tqdm

from replacement import Crosscoder
from replacement.crosscoder.sites import Site
from replacement.loading import ARTIFACTS
from replacement.training.build import Models, load_models
from replacement.training.run_config import run_config
from replacement.training.run_folder import holds_run
from replacement.training.runs import run
from replacement.validation.latent_scaling import (
    MAX_NU_ERROR,
    MAX_NU_RECONSTRUCTION,
    latent_scaling,
    relative_decoder_norms,
)

METHODS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "L1": ({"name": "relu"}, [{"name": "l1", "coefficient": 1e-2}]),
    "BatchTopK": ({"name": "batchtopk", "k": 16}, [{"name": "auxiliary"}]),
}
"""Activation and losses."""
LAYER = 2
EXCLUSIVE = 2 / 3
"""Relative decoder norm from which a feature looks like the fine-tuned model's own: its vector there is twice as long.

In large models, trained for longer, such norms come close to 1, and 0.9 is a common limit; here, after few steps of both kinds
of training, no feature is above it."""
BINS = 10


def train(name: str, out: Path, *, n_tokens: int, n_features: int, held_out_rows: int = 128) -> Crosscoder:
    """Train one crosscoder over the two models on text of both kinds, unless that is done.

    Raises:
        ValueError: the folder holds a run of other settings.
    """
    activation, losses = METHODS[name]
    folder, rows = out / name, out / "rows.npy"
    if not rows.exists():
        lm = load_models("demo").first
        n_rows = 2 * n_tokens // lm.context_length + held_out_rows
        ids = rows_of(lm.tokenizer, n_rows=n_rows, context=lm.context_length, seed=1)
        np.save(rows, ids.numpy())
    batch_tokens = min(2048, n_tokens // 2)
    buffer_tokens = min(131_072, 2 * n_tokens)
    config = run_config(
        {
            "model": ["demo", str(out / "fine_tuned")],
            "data": {"source": str(rows), "buffer_tokens": buffer_tokens, "held_out_rows": held_out_rows},
            "crosscoder": {
                "wiring": "model_diffing",
                "layers": [LAYER],
                "n_features": n_features,
                "activation": activation,
                "undecomposed_positions": 0,
            },
            "training": {
                "n_tokens": n_tokens,
                "batch_tokens": batch_tokens,
                "learning_rate": 0.1 / math.sqrt(n_features),
                "losses": losses,
                "sparsity_warmup": 0.05,
            },
        }
    )
    with tqdm(total=config.training.n_steps, desc=name, unit="step", disable=None) as bar:
        return run(
            config, folder, resume=holds_run(folder), progress=lambda _: bar.update()
        )  # a finished run is only read


def read(models: Models, crosscoder: Crosscoder, rows_RT: Tensor) -> Iterator[dict[Site, Tensor]]:
    """Activations `[tokens, D]` of both models, some rows at a time."""
    for tokens_BT in rows_RT.split(32):
        acts = models.read(tokens_BT, crosscoder.wiring.read_sites)
        yield {site: x_BTD.flatten(0, 1) for site, x_BTD in acts.items()}


@torch.no_grad()
def firing_rates(crosscoder: Crosscoder, batches: Iterator[dict[Site, Tensor]]) -> Tensor:
    """Share of the tokens on which each feature fires, `[F]`."""
    counts_F, n_tokens = torch.zeros(crosscoder.n_features), 0
    for batch in batches:
        features = crosscoder.encode(batch)
        counts_F += torch.bincount(features.index[features.activation > 0], minlength=len(counts_F))
        n_tokens += features.n_rows
    return counts_F / n_tokens


def compare(name: str, crosscoder: Crosscoder, models: Models, *, n_rows: int = 256) -> dict[str, Any]:
    """What latent scaling makes of the features that look like the fine-tuned model's own, on fresh text."""
    lm = models.first
    rows = {
        kind: rows_of(lm.tokenizer, n_rows=n_rows, context=lm.context_length, seed=2, new_share=share)
        for kind, share in {"all": 0.5, "new": 1.0, "old": 0.0}.items()
    }
    scaling = latent_scaling(crosscoder, read(models, crosscoder, rows["all"]))
    new_F, old_F = (firing_rates(crosscoder, read(models, crosscoder, rows[kind])) for kind in ("new", "old"))
    norms_F, fires_F = relative_decoder_norms(crosscoder), scaling.fired > 0
    looks_F = fires_F & (norms_F > EXCLUSIVE)
    chosen = {"features that fire": fires_F, "look exclusive": looks_F}
    chosen["truly exclusive"] = looks_F & scaling.is_exclusive()
    return {
        "name": name,
        "l0": float(scaling.fired.sum()) / rows["all"].numel(),
        "features that fire": int(fires_F.sum()),
        "first model only": int((fires_F & (norms_F < 1 - EXCLUSIVE)).sum()),
        "look exclusive": int(looks_F.sum()),
        "nu_error too high": int((looks_F & ~(scaling.nu_error < MAX_NU_ERROR)).sum()),
        "nu_reconstruction too high": int((looks_F & ~(scaling.nu_reconstruction < MAX_NU_RECONSTRUCTION)).sum()),
        "truly exclusive": int(chosen["truly exclusive"].sum()),
        "on new text": {kind: median_share(new_F[mask_F], old_F[mask_F]) for kind, mask_F in chosen.items()},
        "norms": [round(norm, 4) for norm in norms_F[fires_F].tolist()],
    }


def median_share(new_S: Tensor, old_S: Tensor) -> float | None:
    """Median over features of the part of their firing that new text has, where both kinds of text are equally long."""
    return float((new_S / (new_S + old_S)).nanmedian()) if len(new_S) else None


def print_comparison(rows: Sequence[dict[str, Any]]) -> None:
    """Both methods side by side, then their histograms."""
    print(f"{'':38}" + "".join(f"{row['name']:>12}" for row in rows))
    print(f"{'active features per token':38}" + "".join(f"{row['l0']:12.1f}" for row in rows))
    titles = {
        "features that fire": "features that fire",
        "first model only": f"relative decoder norm below {1 - EXCLUSIVE:.2f}",
        "look exclusive": f"relative decoder norm above {EXCLUSIVE:.2f}",
        "nu_error too high": f"  of these nu_error >= {MAX_NU_ERROR}",
        "nu_reconstruction too high": f"  of these nu_reconstruction >= {MAX_NU_RECONSTRUCTION}",
        "truly exclusive": "  of these truly exclusive",
    }
    for key, title in titles.items():
        print(f"{title:38}" + "".join(f"{row[key]:12d}" for row in rows))
    print("share of a feature's firing that is on new text, median (0.5: no preference)")
    for kind in rows[0]["on new text"]:
        shares = [row["on new text"][kind] for row in rows]
        print(f"  {kind:36}" + "".join(f"{'-':>12}" if share is None else f"{share:12.2f}" for share in shares))
    print("features by relative decoder norm")
    counts = [np.histogram(row["norms"], bins=BINS, range=(0, 1))[0] for row in rows]
    for place in range(BINS):
        print(f"  {place / BINS:.1f} to {(place + 1) / BINS:.1f}{'':26}" + "".join(f"{c[place]:12d}" for c in counts))


def draw(rows: Sequence[dict[str, Any]], target: Path) -> None:
    """Histograms of the relative decoder norms of features that fire, as TARGET.svg and .png."""
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, len(rows), figsize=(9, 3.2), sharex=True, sharey=True)
        for ax, row in zip(axes, rows, strict=True):
            ax.hist(row["norms"], bins=50, range=(0, 1), color="#0072b2")
            ax.set_yscale("symlog", linthresh=1)
            ax.axvspan(EXCLUSIVE, 1, color="#d55e00", alpha=0.12, linewidth=0)
            ax.set_title(row["name"], loc="left", fontweight="bold", fontsize=11)
            ax.set_xlabel("relative decoder norm (1: fine-tuned model only)")
        axes[0].set_ylabel("features that fire")
        figure.tight_layout()
        save(figure, target)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the models and runs; finished ones are kept"
    )
    parser.add_argument("--steps", type=int, default=200, help="fine-tuning steps")
    parser.add_argument("--tokens", type=int, default=1_500_000, help="training tokens of each crosscoder")
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    out: Path = arguments.out
    if not (out / "fine_tuned" / "tokenizer.json").exists():
        fine_tune(out / "fine_tuned", steps=arguments.steps)
    for title, folder in (("demo model", ARTIFACTS / "language_model"), ("fine-tuned", out / "fine_tuned")):
        print(
            f"{title}: knows " + ", ".join(f"{s:.0%} of the {kind} answers" for kind, s in shares_known(folder).items())
        )
    models = load_models(["demo", str(out / "fine_tuned")])
    size = {"n_tokens": arguments.tokens, "n_features": arguments.features}
    crosscoders = {name: train(name, out, **size) for name in METHODS}
    rows = [compare(name, crosscoder, models) for name, crosscoder in crosscoders.items()]
    print_comparison(rows)
    draw(rows, out / "model_diffing")
    (out / "results.json").unlink(missing_ok=True)
    for row in rows:
        append_row(out / "results.json", row)


if __name__ == "__main__":
    main()
