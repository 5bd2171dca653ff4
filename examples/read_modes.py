"""What should a crosscoder read while it is trained: the original stream, or the one its own earlier layers produced?

    python examples/read_modes.py --out runs/read_modes

Trains a TopK cross-layer transcoder of the demo's size once in each mode, on the same tokens, and measures every result in
every mode: all MLPs replaced with clean reads, all replaced with errors propagating, and one layer replaced at a time.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from replacement import LanguageModel, checkpoint
from replacement.demo.corpus import held_out_rows
from replacement.loading import ARTIFACTS
from replacement.training.config import READS
from replacement.training.run import run
from replacement.training.run_config import read_config
from replacement.validation.fidelity import measure_fidelity
from replacement.validation.fidelity_reads import fidelity_by_reads

RECIPE = Path(__file__).parent / "recipes" / "demo.toml"
SETTINGS = ('crosscoder.activation={name="topk",k=[19,7,7,7]}', 'training.losses=[{name="auxiliary"}]')
HELD_OUT_ROWS = 512


def train_and_measure(reads: str, out: Path, n_tokens: int, lm: LanguageModel) -> dict[str, float]:
    """One run in its own folder, and its row of the table."""
    config = read_config(RECIPE, overrides=[*SETTINGS, f"training.reads={reads}", f"training.n_tokens={n_tokens}"])
    folder = out / reads
    with tqdm(total=config.training.n_steps, desc=reads, unit="step") as bar:
        run(config, folder, resume=True, progress=lambda _: bar.update())  # a finished run is left as it is
    rows = torch.from_numpy(held_out_rows(lm.tokenizer, n_rows=HELD_OUT_ROWS, context=lm.context_length, seed=0))
    crosscoder = checkpoint.load(folder / "crosscoder")
    change = fidelity_by_reads(lm, crosscoder, rows)
    return {
        "unexplained": measure_fidelity(lm, crosscoder, rows).mean_unexplained,
        **{f"kl_{name}": value.kl for name, value in change.items()},
        **{f"loss_{name}": value.cross_entropy_increase for name, value in change.items()},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs; finished ones are not repeated")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="training tokens of each run")
    arguments = parser.parse_args()
    lm = LanguageModel.from_pretrained(ARTIFACTS / "language_model")
    lm.name = "demo"
    table = {reads: train_and_measure(reads, arguments.out, arguments.tokens, lm) for reads in READS}
    columns = [
        "unexplained",
        "kl_clean",
        "kl_replaced",
        "kl_single_layer",
        "loss_clean",
        "loss_replaced",
        "loss_single_layer",
    ]
    print(f"{'trained on':12}" + "".join(f"{column:>19}" for column in columns))
    for reads, row in table.items():
        print(f"{reads:12}" + "".join(f"{row[column]:19.4f}" for column in columns))
    print(json.dumps({"tokens": arguments.tokens, "modes": table}))


if __name__ == "__main__":
    main()
