"""What does a wider model add: new features, or the same ones packed less densely?

    python examples/wider_models.py --out runs/wider        # goes on where it stopped
    python examples/wider_models.py --out runs/wider --widths 32 64 128 --steps 500 --layers 3 --tokens 150_000 --features 512

Language models of several widths are trained on the same text, and a dictionary of the same size and sparsity on the stream of
each (behind the middle layer), twice, with other seeds. Features of two dictionaries are compared by the correlation of their
activations over held-out tokens, which looks at no decoder: a feature has a counterpart where the largest correlation is at
least 0.7, and none where all are below 0.3. Only features that the second dictionary of their own model has, too, are counted;
what two trainings on one model do not agree on says nothing about another model.

- New, or merely not in the other's dictionary? R^2 of a feature's activation read linearly off the narrow model's stream.
- Packed less densely? For features with a counterpart in every model: the sum of squared cosines with all other decoder vectors
  of their dictionary, the variance that others put on its direction if all are equally strong.
- What does a crosscoder over all models say? Features whose decoder norm in the narrowest model is below a third of that in the
  widest look exclusive; their R^2 in the narrowest model says whether they are.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from many_models import activations_on, held_out, load, train_crosscoder
from matplotlib import pyplot
from plot_style import STYLE, save
from torch import Tensor
from torch.nn import functional
from train_demo import LanguageModelRun, held_out_loss, save_language_model, train_language_model
from train_demo_files import write_json
from transformers import GPT2LMHeadModel

from replacement import Crosscoder
from replacement.demo.tokenizer import build_tokenizer
from replacement.validation.across_models import (
    activation_correlations,
    decoder_norms_by_model,
    readability,
    spread,
)

WIDTHS = (64, 128, 256)
SEEDS = (0, 1)
FEWEST_FIRINGS = 10
"""Held-out tokens on which a feature must fire to be counted."""
COUNTERPART, NONE = 0.7, 0.3
"""Largest correlation from which a feature has a counterpart, and below which it has none."""
WEAK = 1 / 3
"""Decoder norm in the narrowest model, as a share of that in the widest, below which a joint feature looks exclusive."""


def train_model(run: LanguageModelRun, folder: Path) -> float:
    """Train a language model, unless that is done; its loss on held-out rows."""
    tokenizer = build_tokenizer(run.context)
    if not (folder / "tokenizer.json").exists():
        save_language_model(train_language_model(run, tokenizer, None, run.steps + 1)[0], tokenizer, folder)
    return held_out_loss(GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32), tokenizer, run.context)


class Dictionary:
    """What is known of the features of one autoencoder on held-out tokens.

    Attributes:
        x_ND: the model's activations.
        acts_NF: those of the features that fire often enough.
        decoders_FD: their directions, of norm 1.
    """

    def __init__(self, folder: Path, crosscoder: Crosscoder, *, n_rows: int) -> None:
        models = load([folder])
        acts, features_NF = activations_on(models, crosscoder, held_out(models, n_rows))
        (site,), (self.x_ND,) = acts.keys(), acts.values()
        fires_F = (features_NF != 0).sum(dim=0) >= FEWEST_FIRINGS
        self.acts_NF = features_NF[:, fires_F]
        self.decoders_FD = functional.normalize(crosscoder.decoder(0, site).detach()[fires_F], dim=1)

    def best(self, other: Dictionary) -> Tensor:
        """Largest correlation of every feature with one of another dictionary, `[F]`."""
        return activation_correlations(self.acts_NF, other.acts_NF).amax(dim=1)

    def density(self) -> Tensor:
        """Sum of squared cosines of every feature's direction with all others, `[F]`; `(F - 1) / D` if they were random."""
        return (self.decoders_FD @ self.decoders_FD.T).square().sum(dim=1) - 1


def compare_pairs(dictionaries: dict[int, list[Dictionary]]) -> list[dict[str, Any]]:
    """For every ordered pair of widths, what has a counterpart; the pairs of a width with itself are the ceiling."""
    rows = []
    for width, (first, second) in dictionaries.items():
        robust_F = first.best(second) >= COUNTERPART
        for other, (there, _) in dictionaries.items():
            best_F = first.best(second if other == width else there)
            new_F = robust_F & (best_F < NONE)
            read_F = readability(there.x_ND, first.acts_NF)
            rows.append(
                {
                    "features of": width,
                    "in": other,
                    "fire": len(best_F),
                    "counterpart": _share(best_F >= COUNTERPART),
                    "robust": int(robust_F.sum()),
                    "robust with counterpart": _share(best_F[robust_F] >= COUNTERPART),
                    "robust without": int(new_F.sum()),
                    "R2, counterpart": _median(read_F[robust_F & (best_F >= COUNTERPART)]),
                    "R2, without": _median(read_F[new_F]),
                    "correlations": [round(value, 3) for value in best_F[robust_F].tolist()],
                }
            )
    return rows


def packing(dictionaries: dict[int, list[Dictionary]]) -> list[dict[str, Any]]:
    """How much others share the directions of features that have a counterpart at every width."""
    rows = []
    for width, (first, _) in dictionaries.items():
        others = [there for other, (there, _) in dictionaries.items() if other != width]
        shared_F = torch.stack([first.best(there) for there in others]).amin(dim=0) >= COUNTERPART
        n_features, d_model = first.decoders_FD.shape
        rows.append(
            {
                "width": width,
                "shared": int(shared_F.sum()),
                "squared cosines": _median(first.density()[shared_F]),
                "of other features": _median(first.density()[~shared_F]),
                "if random": (n_features - 1) / d_model,
            }
        )
    return rows


def joint(folders: Sequence[Path], crosscoder: Crosscoder, *, n_rows: int) -> dict[str, Any]:
    """Features of a crosscoder over all widths that look exclusive to the widest, and whether the narrowest has them."""
    models = load(folders)
    acts, features_NF = activations_on(models, crosscoder, held_out(models, n_rows))
    sites = sorted(acts, key=lambda site: site.model)
    norms_FM = decoder_norms_by_model(crosscoder, {site: spread(x_ND) for site, x_ND in acts.items()})
    fires_F = (features_NF != 0).sum(dim=0) >= FEWEST_FIRINGS
    looks_F = fires_F & (norms_FM[:, 0] < WEAK * norms_FM[:, -1])
    narrow_F, wide_F = (readability(acts[site], features_NF) for site in (sites[0], sites[-1]))
    return {
        "fire": int(fires_F.sum()),
        "look exclusive to the widest": int(looks_F.sum()),
        "look exclusive to the narrowest": int((fires_F & (norms_FM[:, -1] < WEAK * norms_FM[:, 0])).sum()),
        "R2 of the exclusive in the narrowest, widest": [_median(narrow_F[looks_F]), _median(wide_F[looks_F])],
        "R2 of the others in the narrowest, widest": [_median(r_F[fires_F & ~looks_F]) for r_F in (narrow_F, wide_F)],
    }


def _share(mask: Tensor) -> float | None:
    return float(mask.float().mean()) if len(mask) else None


def _median(values: Tensor) -> float | None:
    return float(values.nanmedian()) if bool(values.isfinite().any()) else None


def run_all(
    run: LanguageModelRun, widths: Sequence[int], out: Path, *, n_tokens: int, n_features: int, n_rows: int = 256
) -> dict[str, Any]:
    """Language models, dictionaries, the joint crosscoder and measurements; what is finished in OUT is kept."""
    sizes = {"n_tokens": n_tokens, "n_features": n_features}
    folders = {width: out / f"model-{width}" for width in widths}
    models, dictionaries = [], {}
    for width, folder in folders.items():
        loss = train_model(dataclasses.replace(run, d_model=width), folder)
        trained = [train_crosscoder([folder], out / f"sae-{width}-{seed}", seed=seed, **sizes) for seed in SEEDS]
        unexplained = [next(iter(by_site.values())) for _, by_site in trained]
        models.append({"width": width, "loss": loss, "unexplained": unexplained})
        dictionaries[width] = [Dictionary(folder, crosscoder, n_rows=n_rows) for crosscoder, _ in trained]
    name = "joint-" + "-".join(map(str, widths))
    together, by_site = train_crosscoder(list(folders.values()), out / name, **sizes)
    result = {
        "models": models,
        "pairs": compare_pairs(dictionaries),
        "packing": packing(dictionaries),
        "joint": {**joint(list(folders.values()), together, n_rows=n_rows), "unexplained": by_site},
        "setting": {
            "steps": run.steps,
            "layers": run.n_layers,
            "tokens": n_tokens,
            "n_features": n_features,
            "rows": n_rows,
        },
    }
    write_json(out / "results.json", result)
    draw(result, out / "wider_models")
    return result


def print_tables(result: dict[str, Any]) -> None:
    """Models, pairs, packing, and the joint crosscoder."""
    for row in result["models"]:
        unexplained = ", ".join(f"{value:.4f}" for value in row["unexplained"])
        print(f"width {row['width']:4d}: held-out loss {row['loss']:.3f}, dictionaries leave unexplained {unexplained}")
    for title in ("pairs", "packing"):
        rows = [{name: cell for name, cell in row.items() if name != "correlations"} for row in result[title]]
        print("\n" + "  ".join(f"{name:>11}" for name in rows[0]))
        for row in rows:
            cells = ((_text(cell), max(11, len(name))) for name, cell in row.items())
            print("  ".join(f"{text:>{width}}" for text, width in cells))
    print()
    for name, value in result["joint"].items():
        print(f"joint crosscoder, {name}: {_text(value)}")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(cell)}" for name, cell in value.items())
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def draw(result: dict[str, Any], target: Path) -> None:
    """Largest correlations of the widest model's robust features, and packing, as TARGET.svg and .png."""
    widest = result["models"][-1]["width"]
    with pyplot.rc_context(STYLE):
        figure, (matches, density) = pyplot.subplots(1, 2, figsize=(10, 3.4))
        for row in (row for row in result["pairs"] if row["features of"] == widest):
            values = sorted(row["correlations"])
            label = "itself, other seed" if row["in"] == widest else f"width {row['in']}"
            matches.plot(values, torch.linspace(0, 1, len(values)).tolist(), label=label)
        matches.axvline(COUNTERPART, color="black", linewidth=0.8, linestyle=":")
        matches.set_xlabel(f"largest correlation of a feature of width {widest} with one of")
        matches.set_ylabel("share of its robust features, cumulative")
        matches.legend()
        widths = [str(row["width"]) for row in result["packing"]]
        for name, style in (("squared cosines", "o-"), ("of other features", "s-"), ("if random", "k:")):
            label = "features with a counterpart everywhere" if name == "squared cosines" else name
            values = [float("nan") if row[name] is None else row[name] for row in result["packing"]]
            density.plot(widths, values, style, label=label)
        density.set_xlabel("width of the model")
        density.set_ylabel("squared cosines with all others, sum")
        density.set_ylim(bottom=0)
        density.legend(loc="upper right")
        figure.tight_layout()
        save(figure, target)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for models and runs; finished ones are kept")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=WIDTHS, help="d_model of the language models, ascending"
    )
    parser.add_argument("--steps", type=int, default=1200, help="training steps of each")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=500_000, help="training tokens of each dictionary")
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--no-compile", action="store_true", help="do not compile the language models' training step")
    options = parser.parse_args()
    run = LanguageModelRun(n_layers=options.layers, steps=options.steps, compile=not options.no_compile)
    print_tables(run_all(run, options.widths, options.out, n_tokens=options.tokens, n_features=options.features))


if __name__ == "__main__":
    main()
