"""When do features form? One crosscoder over ten snapshots of a training run.

    python examples/feature_birth.py --out runs/birth       # goes on where it stopped
    python examples/feature_birth.py --out runs/birth --steps 1024 --width 64 --layers 3 --tokens 250_000 --features 512

The demo's trainer leaves snapshots before its first step and each time the steps have doubled. One crosscoder reads and writes
the residual stream behind the middle layer of all of them. A feature is born at the snapshot from which on its decoder vector,
in units of the snapshot's own spread, has half of its largest norm; it dies where it falls below; it turns where its direction
changes from one snapshot to the next.

A decoder norm says what the crosscoder writes, not what the model has. So the table also tells how well a feature's activation
can be read linearly off the snapshot before its birth (R^2 on held-out tokens, median over the features born), beside the same
at its birth: near each other, the feature was there all along and was only written with less weight.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from many_models import activations_on, held_out, load, train_crosscoder
from matplotlib import pyplot
from plot_style import STYLE, save
from torch import Tensor
from train_demo import LanguageModelRun, evaluate, held_out_loss, train_language_model
from train_demo_files import N_SNAPSHOTS, snapshot_folders, write_json
from transformers import GPT2LMHeadModel

from replacement import Crosscoder
from replacement.demo.tokenizer import build_tokenizer
from replacement.validation.across_models import (
    decoder_cosines,
    decoder_norms_by_model,
    lifetimes,
    readability,
    spread,
)

FEWEST_FIRINGS = 10
"""Held-out tokens on which a feature must fire to be counted."""
TURNED = 0.5
"""Cosine of a feature's directions at its birth and in its last snapshot below which it has turned."""
COLUMNS = {
    "step": "5d", "loss": "6.3f", "top-1": "5.2f", "unexplained": "11.4f", "born": "5d", "died": "5d", "alive": "5d",
    "cosine": "6.2f", "R2 before": "9.2f", "R2 at birth": "11.2f",
}  # fmt: skip


def train_snapshots(run: LanguageModelRun, folders: Mapping[int, Path]) -> None:
    """Train a language model and leave snapshots, unless that is done."""
    if not all((folder / "tokenizer.json").exists() for folder in folders.values()):
        train_language_model(run, build_tokenizer(run.context), None, run.steps + 1, snapshots=folders)


def measure(crosscoder: Crosscoder, folders: Sequence[Path], *, n_rows: int) -> dict[str, Any]:
    """Births, deaths, directions and what can be read off every snapshot, on held-out rows."""
    models = load(folders)
    acts, features_NF = activations_on(models, crosscoder, held_out(models, n_rows))
    sites = sorted(acts, key=lambda site: site.model)
    norms_FM = decoder_norms_by_model(crosscoder, {site: spread(x_ND) for site, x_ND in acts.items()})
    counted_F = (features_NF != 0).sum(dim=0) >= FEWEST_FIRINGS
    born_F, died_F = lifetimes(norms_FM)
    cosines_FM = decoder_cosines(crosscoder)
    readable_MF = torch.stack([readability(acts[site], features_NF) for site in sites])
    at_birth = [
        crosscoder.decoder(0, sites[m])[f].detach() for f, m in enumerate(born_F.clamp(max=len(sites) - 1).tolist())
    ]
    at_end = [crosscoder.decoder(0, sites[m - 1])[f].detach() for f, m in enumerate(died_F.tolist())]
    whole_F = torch.nn.functional.cosine_similarity(torch.stack(at_birth), torch.stack(at_end), dim=1)
    rows = []
    for m in range(len(sites)):
        new_F = counted_F & (born_F == m)
        alive_F = counted_F & (born_F <= m) & (m < died_F)
        both_F = alive_F & (born_F < m)
        rows.append(
            {
                "born": int(new_F.sum()),
                "died": int((counted_F & (died_F == m)).sum()),
                "alive": int(alive_F.sum()),
                "cosine": _median(cosines_FM[both_F, m - 1]) if m else None,
                "R2 before": _median(readable_MF[m - 1, new_F]) if m else None,
                "R2 at birth": _median(readable_MF[m, new_F]),
            }
        )
    return {
        "rows": rows,
        "features": int(counted_F.sum()),
        "turned": int((counted_F & (whole_F < TURNED)).sum()),
        "norms": (norms_FM / norms_FM.amax(dim=1, keepdim=True))[counted_F][
            born_F[counted_F].argsort(stable=True)
        ].tolist(),
    }


def _median(values: Tensor) -> float | None:
    return float(values.nanmedian()) if bool(values.isfinite().any()) else None


def facts_of_model(folder: Path, context: int) -> dict[str, float]:
    """Held-out loss of a snapshot, and the mean share of the demo's probes that it answers."""
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    tokenizer = build_tokenizer(context)
    accuracy = [row.top1 for row in evaluate(model, tokenizer)]
    return {"loss": held_out_loss(model, tokenizer, context), "top-1": sum(accuracy) / len(accuracy)}


def print_table(result: dict[str, Any]) -> None:
    """One line per snapshot."""
    widths = {name: len(f"{0:{form}}") for name, form in COLUMNS.items()}
    print("  ".join(f"{name:>{max(widths[name], len(name))}}" for name in COLUMNS))
    for row in result["rows"]:
        cells = ("-" if row[name] is None else f"{row[name]:{form}}" for name, form in COLUMNS.items())
        print("  ".join(f"{cell:>{max(widths[name], len(name))}}" for cell, name in zip(cells, COLUMNS, strict=True)))
    born = sum(row["born"] for row in result["rows"][1:])
    died = sum(row["died"] for row in result["rows"])
    print(
        f"{result['features']} features: {born} born after the first snapshot, {died} died, {result['turned']} turned"
    )


def draw(result: dict[str, Any], target: Path) -> None:
    """Births over the loss, and the decoder norms of all features over the snapshots, as TARGET.svg and .png."""
    rows = result["rows"]
    places, labels = range(len(rows)), [f"{row['step']:,}" for row in rows]
    with pyplot.rc_context(STYLE):
        figure, (counts, norms) = pyplot.subplots(1, 2, figsize=(10, 3.6))
        counts.bar(places, [row["born"] for row in rows], color="#0072b2", label="born")
        counts.bar(places, [-row["died"] for row in rows], color="#d55e00", label="died")
        counts.set_ylabel("features")
        counts.legend(loc="lower left")
        loss = counts.twinx()
        loss.plot(places, [row["loss"] for row in rows], color="black", marker="o", markersize=3)
        loss.set_ylabel("held-out loss (line)")
        loss.grid(visible=False)
        picture = norms.imshow(
            np.array(result["norms"]), aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1
        )
        norms.set_ylabel("features, by birth")
        norms.grid(visible=False)
        figure.colorbar(picture, ax=norms, label="decoder norm / its largest")
        for ax in (counts, norms):
            ax.set_xticks(places, labels, rotation=60)
            ax.set_xlabel("training step of the snapshot")
        figure.tight_layout()
        save(figure, target)


def run_all(
    run: LanguageModelRun,
    out: Path,
    *,
    n_tokens: int,
    n_features: int,
    n_rows: int = 256,
    n_snapshots: int = N_SNAPSHOTS,
) -> dict[str, Any]:
    """Language model, crosscoder and measurements; what is finished in OUT is kept."""
    by_step = snapshot_folders(out / "snapshots", run.steps, n_snapshots)
    train_snapshots(run, by_step)
    steps, folders = list(by_step), list(by_step.values())
    crosscoder, unexplained = train_crosscoder(folders, out / "crosscoder", n_tokens=n_tokens, n_features=n_features)
    result = measure(crosscoder, folders, n_rows=n_rows)
    facts = [facts_of_model(folder, run.context) for folder in folders]
    by_site = [unexplained[str(site)] for site in sorted(crosscoder.wiring.write_sites, key=lambda site: site.model)]
    for row, step, fact, value in zip(result["rows"], steps, facts, by_site, strict=True):
        row.update(fact, step=step, unexplained=value)
    result["setting"] = {**dataclasses.asdict(run), "tokens": n_tokens, "n_features": n_features, "rows": n_rows}
    write_json(out / "results.json", result)
    draw(result, out / "feature_birth")
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for models and runs; finished ones are kept")
    parser.add_argument("--steps", type=int, default=3000, help="training steps of the language model")
    parser.add_argument("--width", type=int, default=128, help="its d_model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=500_000, help="training tokens of the crosscoder")
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--no-compile", action="store_true", help="do not compile the language model's training step")
    options = parser.parse_args()
    run = LanguageModelRun(
        n_layers=options.layers, d_model=options.width, steps=options.steps, compile=not options.no_compile
    )
    print_table(run_all(run, options.out, n_tokens=options.tokens, n_features=options.features))


if __name__ == "__main__":
    main()
