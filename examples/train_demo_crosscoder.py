"""Train the demo's crosscoders on the demo language model, and measure what ships.

    replacement train examples/recipes/demo.toml --out runs/demo
    python examples/train_demo_crosscoder.py --run runs/demo --out replacement/demo/artifacts
    replacement train examples/recipes/attention.toml --out runs/attention
    python examples/train_demo_crosscoder.py --run runs/attention --out replacement/demo/artifacts

The second command gives a BatchTopK result fixed thresholds (JumpReLU), rounds it to bf16, writes it to `OUT/crosscoder`,
measures the rounded weights on rows of the corpus that no training drew, and writes `OUT/fidelity.json`. The fourth does the
same for the attention crosscoder, in `OUT/attention_crosscoder` and `OUT/attention_fidelity.json`, which says under `both` what
replacing the MLPs as well costs. `examples/train_demo.py` does all of it, on the language model it has just made.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from train_demo_files import write_json

from replacement import BatchTopK, Crosscoder, LanguageModel, checkpoint
from replacement.crosscoder.formats import native
from replacement.crosscoder.jumprelu import to_jumprelu
from replacement.demo.corpus import held_out_rows
from replacement.demo.corpus.mixture import sample_rows
from replacement.splicing.splice import read_rows
from replacement.training.run_config import read_config
from replacement.training.run_folder import holds_run
from replacement.training.runs import run
from replacement.validation.fidelity import Fidelity, measure_fidelity

RECIPES = Path(__file__).parent / "recipes"
HELD_OUT_ROWS = 1024
CALIBRATION_ROWS = 1024
SHIPPED_L0 = (7.4, 4.0, 2.0, 2.0)
"""Features per token that the shipped thresholds leave in each layer, on rows of the training corpus.

With 7.8 in layer 0 features of states also fire on a few cities of other states; of 6.2 to 7.4, which all had 49 states of
F1 >= 0.9 on the choosing probes, 7.4 kept the most of the model's answers and had the most swaps.
"""


def train_crosscoder(language_model: Path, folder: Path, overrides: Sequence[str] = (), recipe: str = "demo") -> None:
    """One run of a recipe on a language model."""
    config = read_config(RECIPES / f"{recipe}.toml", overrides=[f'model="{language_model}"', *overrides])
    with tqdm(total=config.training.n_steps, desc=f"crosscoder ({recipe})", unit="step") as bar:
        run(config, folder, resume=holds_run(folder), progress=lambda _: bar.update())


def calibrated(crosscoder: Crosscoder, lm: LanguageModel) -> Crosscoder:
    """Thresholds measured once over many rows, in place of the running mean that training ends with."""
    rows = sample_rows(lm.tokenizer, n_rows=CALIBRATION_ROWS, context=lm.context_length, seed=0)
    _, activations = read_rows(lm, torch.from_numpy(rows), crosscoder.wiring.read_sites)
    return to_jumprelu(crosscoder, [activations], target_l0=SHIPPED_L0)


def ship(folder: Path, out: Path) -> Fidelity:
    """Round the result of a run, put it beside its language model in `out`, and measure it there."""
    lm = LanguageModel.from_pretrained(out / "language_model")
    settings = native.read_config(folder / "crosscoder")["training"] | {"model": "demo"}
    crosscoder = checkpoint.load(folder / "crosscoder")
    lm.name = crosscoder.model_name = "demo"
    # A run on other weights is not shipped.
    checkpoint.check_fits(crosscoder, lm)
    if isinstance(crosscoder.activation, BatchTopK):
        crosscoder = calibrated(crosscoder, lm)
    prefix = "attention_" if crosscoder.wiring.name == "attention" else ""
    target = out / f"{prefix}crosscoder"
    (target / "features.sqlite").unlink(missing_ok=True)  # the index of the crosscoder that is replaced
    checkpoint.save(crosscoder, target, dtype=torch.bfloat16, training=settings)
    rows = torch.from_numpy(held_out_rows(lm.tokenizer, n_rows=HELD_OUT_ROWS, context=lm.context_length, seed=0))
    shipped = checkpoint.load(target)
    fidelity = measure_fidelity(lm, shipped, rows)
    report = {"run": settings, **fidelity.to_dict()}
    if prefix:
        mlps = checkpoint.load(out / "crosscoder")
        report["both"] = measure_fidelity(lm, [mlps, shipped], rows).to_dict()
    write_json(out / f"{prefix}fidelity.json", report)
    return fidelity


def crosscoder_stage(out: Path, overrides: Sequence[str] = (), recipe: str = "demo") -> None:
    """Train, ship, and print the table; the attention crosscoder comes after that of the MLPs."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        train_crosscoder(out / "language_model", Path(scratch) / "run", overrides, recipe)
        fidelity = ship(Path(scratch) / "run", out)
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")
    print_table(fidelity)


def print_table(fidelity: Fidelity) -> None:
    """What a file of fidelities says, to read."""
    print(f"measured on {fidelity.n_tokens:,} held-out tokens")
    print(f"active features per token    {fidelity.total_l0:.1f} ({', '.join(f'{x:.1f}' for x in fidelity.l0)})")
    per_layer = ", ".join(f"{x:.4f}" for x in fidelity.unexplained)
    print(f"variance unexplained         {fidelity.mean_unexplained:.4f} ({per_layer})")
    print(f"KL, errors propagating       {fidelity.kl or 0:.4f} nats")
    print(f"cross-entropy recovered      {fidelity.cross_entropy_recovered or 0:.4f}")
    print(f"top-1 agreement, p >= 0.5    {fidelity.agreement or 0:.4f} (all tokens {fidelity.agreement_all or 0:.4f})")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train a crosscoder of the demo, or ship a finished run of it.")
    parser.add_argument("--out", type=Path, required=True, help="folder that holds language_model/")
    parser.add_argument("--run", type=Path, help="a finished run of `replacement train`; trained anew if not given")
    parser.add_argument("--recipe", choices=("demo", "attention"), default="demo", help="what is trained without --run")
    options = parser.parse_args()
    if options.run is None:
        crosscoder_stage(options.out, recipe=options.recipe)
    else:
        print_table(ship(options.run, options.out))


if __name__ == "__main__":
    main()
