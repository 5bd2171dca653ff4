"""What should a crosscoder read while it is trained: the original stream, or the one its own earlier layers produced?

    python examples/read_modes.py --out runs/read_modes

Trains a TopK cross-layer transcoder of the demo's size once in each mode, on the same tokens, and measures every result in
every mode: all MLPs replaced with clean reads, all replaced with errors propagating, and one layer replaced at a time.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

from replacement import LanguageModel, checkpoint
from replacement.demo.corpus import held_out_rows
from replacement.loading import ARTIFACTS
from replacement.training.config import READS
from replacement.training.run_config import read_config
from replacement.training.run_folder import holds_run
from replacement.training.runs import run
from replacement.validation.measure import measure
from replacement.validation.protocols import CLEAN, PROPAGATED, protocols, single
from replacement.validation.slices import batches_of

RECIPE = Path(__file__).parent / "recipes" / "demo.toml"
SETTINGS = ('crosscoder.activation={name="topk",k=[19,7,7,7]}', 'training.losses=[{name="auxiliary"}]')
HELD_OUT_ROWS = 512


def train_and_measure(reads: str, out: Path, n_tokens: int, lm: LanguageModel) -> dict[str, float]:
    """One run in its own folder, and its row of the table."""
    config = read_config(RECIPE, overrides=[*SETTINGS, f"training.reads={reads}", f"training.n_tokens={n_tokens}"])
    folder = out / reads
    with tqdm(total=config.training.n_steps, desc=reads, unit="step") as bar:
        resume = holds_run(folder)  # a finished run is left as it is
        run(config, folder, resume=resume, progress=lambda _: bar.update())
    rows = torch.from_numpy(held_out_rows(lm.tokenizer, n_rows=HELD_OUT_ROWS, context=lm.context_length, seed=0))
    crosscoder = checkpoint.load(folder / "crosscoder")
    known = protocols([crosscoder])
    groups = {
        CLEAN: [CLEAN],
        PROPAGATED: [PROPAGATED],
        "single_layer": [single(site) for site in crosscoder.wiring.write_sites],
    }
    chosen = [known[name] for names in groups.values() for name in names]
    measured = measure(lm, [crosscoder], batches_of(rows, lm), chosen)
    facts = measured.facts()
    row = {"unexplained": facts["reconstruction"]["unexplained_mean"]}
    outputs = {group: [facts["protocols"][name] for name in names] for group, names in groups.items()}
    row |= {f"kl_{group}": fmean(output["kl"]["mean"] for output in some) for group, some in outputs.items()}
    row |= {f"loss_{group}": fmean(o["cross_entropy_increase"] for o in some) for group, some in outputs.items()}
    return row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs; finished ones are not repeated")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="training tokens of each run")
    arguments = parser.parse_args()
    lm = LanguageModel.from_pretrained(ARTIFACTS / "language_model")
    lm.name = "demo"
    table = {reads: train_and_measure(reads, arguments.out, arguments.tokens, lm) for reads in READS}
    columns = list(next(iter(table.values())))
    print(f"{'trained on':12}" + "".join(f"{column:>19}" for column in columns))
    for reads, row in table.items():
        print(f"{reads:12}" + "".join(f"{row[column]:19.4f}" for column in columns))
    print(json.dumps({"tokens": arguments.tokens, "modes": table}))


if __name__ == "__main__":
    main()
