"""Does a crosscoder trained to match the MLPs' Jacobians give graphs that predict more? What does it cost?

    python examples/jacobian_matching.py --out runs/jacobian

Trains the demo's cross-layer transcoder with several coefficients of the loss `jacobian`, on the same tokens. Every result is
measured on held-out rows (fidelity) and on graphs of held-out probes (what `circuits validate` says). The probes are others
than those of `examples/validate_circuits.py`, so that a coefficient may be chosen here and judged there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

import circuits
from circuits.validation.validate import validate
from replacement import LanguageModel, ReplacementModel, checkpoint
from replacement.demo.corpus import behaviours, held_out_rows
from replacement.loading import ARTIFACTS
from replacement.training.run_config import read_config
from replacement.training.run_folder import holds_run
from replacement.training.runs import run
from replacement.validation.fidelity import measure_fidelity

RECIPE = Path(__file__).parent / "recipes" / "demo.toml"
COEFFICIENTS = (0.0, 0.1, 0.4)
PROBES = slice(3, 6)
HELD_OUT_ROWS = 512


def train(coefficient: float, out: Path, n_tokens: int) -> Path:
    """One run in its own folder; a finished one is left as it is."""
    losses = '{name="auxiliary"}' + (f',{{name="jacobian",coefficient={coefficient}}}' if coefficient else "")
    config = read_config(RECIPE, overrides=[f"training.n_tokens={n_tokens}", f"training.losses=[{losses}]"])
    folder = out / f"{coefficient:g}"
    with tqdm(total=config.training.n_steps, desc=f"jacobian {coefficient:g}", unit="step", disable=None) as bar:
        run(config, folder, resume=holds_run(folder), progress=lambda _: bar.update())
    return folder / "crosscoder"


def measure(lm: LanguageModel, folder: Path, prompts: list[str], *, n_rows: int = HELD_OUT_ROWS) -> dict[str, float]:
    """A row of the table."""
    crosscoder = checkpoint.load(folder)
    rows = torch.from_numpy(held_out_rows(lm.tokenizer, n_rows=n_rows, context=lm.context_length, seed=0))
    fidelity = measure_fidelity(lm, crosscoder, rows)
    assert fidelity.kl is not None, "the held-out rows have tokens to predict"
    model = ReplacementModel(lm, crosscoder)
    facts = [validate(model, circuits.trace(model, prompt)) for prompt in tqdm(prompts, desc="graphs", disable=None)]
    found = {"unexplained": fidelity.mean_unexplained, "KL": fidelity.kl}
    for kind in ("encoder", "random", "upstream"):
        wanted = {"kind": kind, "patterns": "frozen", "distance": 1}
        found[kind] = _mean(facts, "perturbations", wanted, "cosine")
    live = {"patterns": "live"}
    found["among features"] = _mean(facts, "influence_among_features", live, "spearman")
    found["one layer"] = _mean(facts, "one_layer_cosine", live | {"norms": "live", "change": "ablated"}, "cosine")
    found["ablation"] = _mean(facts, "influence_against_ablation", live | {"patching": "original"}, "spearman")
    return found


def _mean(facts: list[dict[str, Any]], table: str, wanted: dict[str, Any], figure: str) -> float:
    rows = [row for one in facts for row in one[table] if wanted.items() <= row.items()]
    return fmean(row[figure] for row in rows if row[figure] is not None)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs; finished ones are not repeated")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="training tokens of each run")
    arguments = parser.parse_args()
    lm = LanguageModel.from_pretrained(ARTIFACTS / "language_model")
    lm.name = "demo"
    prompts = [probe.prompt for skill in behaviours() for probe in skill.probes[PROBES]]
    table = {c: measure(lm, train(c, arguments.out, arguments.tokens), prompts) for c in COEFFICIENTS}
    print(f"{'coefficient':12}" + "".join(f"{name:>16}" for name in next(iter(table.values()))))
    for coefficient, row in table.items():
        print(f"{coefficient:<12g}" + "".join(f"{value:16.4f}" for value in row.values()))


if __name__ == "__main__":
    main()
