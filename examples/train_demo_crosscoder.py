"""Train the demo's cross-layer transcoder on the demo language model, and measure what ships.

    replacement train examples/recipes/demo.toml --out runs/demo
    python examples/train_demo_crosscoder.py --run runs/demo --out replacement/demo/artifacts

The second command rounds the result of a run to bf16, writes it to `OUT/crosscoder`, measures the rounded weights on rows of
the corpus that no training drew, and writes `OUT/fidelity.json`. `examples/train_demo.py` does both, on the language model
it has just made.
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

from replacement import LanguageModel, checkpoint
from replacement.demo.corpus import held_out_rows
from replacement.fidelity import Fidelity, measure_fidelity
from replacement.training.run import run
from replacement.training.run_config import read_config

RECIPE = Path(__file__).parent / "recipes" / "demo.toml"
HELD_OUT_ROWS = 1024


def train_crosscoder(language_model: Path, folder: Path, overrides: Sequence[str] = ()) -> None:
    """One run of the recipe on a language model."""
    config = read_config(RECIPE, overrides=[f'model="{language_model}"', *overrides])
    with tqdm(total=config.training.n_steps, desc="crosscoder", unit="step") as bar:
        run(config, folder, resume=True, progress=lambda _: bar.update())


def ship(folder: Path, out: Path) -> Fidelity:
    """Round the result of a run, put it beside its language model in `out`, and measure it there."""
    lm = LanguageModel.from_pretrained(out / "language_model")
    settings = checkpoint.read_config(folder / "crosscoder")["training"] | {"model": "demo"}
    crosscoder = checkpoint.load(folder / "crosscoder")
    lm.name = crosscoder.model_name = "demo"
    # A run on other weights is not shipped.
    checkpoint.check_fits(crosscoder, lm.shape, model_name=lm.name, model_fingerprint=lm.fingerprint)
    checkpoint.save(crosscoder, out / "crosscoder", dtype=torch.bfloat16, training=settings)
    rows = torch.from_numpy(held_out_rows(lm.tokenizer, n_rows=HELD_OUT_ROWS, context=lm.context_length, seed=0))
    fidelity = measure_fidelity(lm, checkpoint.load(out / "crosscoder"), rows)
    report = {
        "total_l0": fidelity.total_l0,
        "mean_unexplained": fidelity.mean_unexplained,
        "cross_entropy_recovered": fidelity.cross_entropy_recovered,
        **fidelity._asdict(),
    }
    write_json(out / "fidelity.json", {"run": settings, **report})
    return fidelity


def crosscoder_stage(out: Path, overrides: Sequence[str] = ()) -> None:
    """Train, ship, and print the table."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        train_crosscoder(out / "language_model", Path(scratch) / "run", overrides)
        fidelity = ship(Path(scratch) / "run", out)
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")
    print_table(fidelity)


def print_table(fidelity: Fidelity) -> None:
    """What `fidelity.json` says, to read."""
    print(f"measured on {fidelity.n_tokens:,} held-out tokens")
    print(f"active features per token    {fidelity.total_l0:.1f} ({', '.join(f'{x:.1f}' for x in fidelity.l0)})")
    per_layer = ", ".join(f"{x:.4f}" for x in fidelity.unexplained)
    print(f"variance unexplained         {fidelity.mean_unexplained:.4f} ({per_layer})")
    print(f"KL, errors propagating       {fidelity.kl or 0:.4f} nats")
    print(f"cross-entropy recovered      {fidelity.cross_entropy_recovered or 0:.4f}")
    print(f"top-1 agreement, p >= 0.5    {fidelity.agreement or 0:.4f} (all tokens {fidelity.agreement_all or 0:.4f})")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the demo's crosscoder, or ship a finished run of it.")
    parser.add_argument("--out", type=Path, required=True, help="folder that holds language_model/")
    parser.add_argument("--run", type=Path, help="a finished run of `replacement train`; trained anew if not given")
    options = parser.parse_args()
    if options.run is None:
        crosscoder_stage(options.out)
    else:
        print_table(ship(options.run, options.out))


if __name__ == "__main__":
    main()
