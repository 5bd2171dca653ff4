"""Does training MLPs and attention together close the gap that replacing both leaves?

    python examples/joint_training.py --out runs/joint

Replaced together, crosscoders of MLPs and attention that were trained apart cost more than the sum of what each costs alone:
neither has met the errors of the other. Here two crosscoders (sizes: `recipes/joint.toml`) are trained apart, each with its
default reads, and then, with equal features, active features and tokens, as one joint crosscoder that reads the clean stream
(`clean`), that with random subsets of outputs replaced (`subset`) or with all of them replaced (`propagated`), and random
subsets with a loss on the output besides (`output_kl`). Last, those trained apart are joined and trained further with a seventh
of the tokens and a third of the step size: on the clean stream (`then clean`: neither part meets the other, so that this is
what more training alone gives), on the propagated stream, and on that with the loss on the output.

Every result is measured on rows of the corpus that no training drew, errors propagating. Finished runs are not repeated, a
killed one goes on. `CPU s` is the time of this process in training.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from result_rows import append_row, find_row
from tqdm import tqdm

from replacement import Crosscoder, LanguageModel, checkpoint
from replacement.crosscoder.joint import join, split
from replacement.demo.corpus import held_out_rows
from replacement.loading import ARTIFACTS
from replacement.training.run_config import read_config
from replacement.training.run_folder import holds_run
from replacement.training.runs import run
from replacement.validation.fidelity import measure_fidelity

RECIPE = Path(__file__).parent / "recipes" / "joint.toml"
APART, THEN = "apart", "then "
CLEAN, SUBSET, PROPAGATED = (f"training.reads={reads}" for reads in ("clean", "subset", "propagated"))
OUTPUT_KL = 'training.losses=[{name="auxiliary"},{name="output_kl",coefficient=1.0}]'
TOGETHER = {
    "clean": [CLEAN],
    "subset": [SUBSET],
    "propagated": [PROPAGATED],
    "output_kl": [SUBSET, OUTPUT_KL],
    "then clean": [CLEAN],
    "then propagated": [PROPAGATED],
    "then output_kl": [PROPAGATED, OUTPUT_KL],
}
"""Settings of the joint runs that differ from the recipe; those that begin with `then` go on from the parts trained apart."""
CHOICES = (APART, *TOGETHER)
DEFAULT = tuple(choice for choice in CHOICES if choice != "output_kl")  # which takes much longer than the others
COLUMNS = {
    "KL MLPs": "9.4f",
    "KL attention": "12.4f",
    "sum": "8.4f",
    "KL both": "9.4f",
    "both / sum": "10.2f",
    "agreement, p >= 0.5": "19.4f",
    "unexplained": "11.4f",
    "CPU s": "7,.0f",
}
"""Columns of the table, and how their values are written."""


def runs_of(choice: str, out: Path, overrides: Sequence[str]) -> dict[str, list[str]]:
    """The runs that a choice takes, by the name of their folders, and the settings in which they differ from the recipe."""
    recipe = read_config(RECIPE, overrides=overrides)
    if choice == APART:
        k = recipe.crosscoder.activation.k
        of_mlps, of_attention = (f'crosscoder.activation={{name="topk",k={list(half)}}}' for half in (k[:4], k[4:]))
        attention = ["crosscoder.wiring=attention", "crosscoder.read=attn_z", of_attention]
        return {"mlps": ["crosscoder.wiring=strictly_causal", of_mlps], "attention": attention}
    changes = list(TOGETHER[choice])
    if choice.startswith(THEN):
        checkpoint.save(join(*train(APART, out, overrides)), out / "joined")
        n_tokens = recipe.training.n_tokens // 7
        changes += [
            f"crosscoder.start={out / 'joined'}",
            f"training.n_tokens={n_tokens}",
            "training.learning_rate=1e-3",
        ]
    return {choice.replace(" ", "_"): changes}


def train(choice: str, out: Path, overrides: Sequence[str]) -> list[Crosscoder]:
    """The crosscoders of MLPs and attention, trained in folders of their own unless that is done."""
    parts = []
    for name, changes in runs_of(choice, out, overrides).items():
        config = read_config(RECIPE, overrides=[*overrides, *changes])
        with tqdm(total=config.training.n_steps, desc=name, unit="step", disable=None) as bar:
            run(config, out / name, resume=holds_run(out / name), progress=lambda _, bar=bar: bar.update())
        parts += split(checkpoint.load(out / name / "crosscoder"))
    return parts


def measure(lm: LanguageModel, parts: Sequence[Crosscoder], n_rows: int) -> dict[str, float]:
    """What each part costs alone, and what both cost together."""
    rows = torch.from_numpy(held_out_rows(lm.tokenizer, n_rows=n_rows, context=lm.context_length, seed=0))
    mlps, attention, both = (measure_fidelity(lm, chosen, rows) for chosen in (*parts, parts))
    kl = [fidelity.kl or 0.0 for fidelity in (mlps, attention, both)]
    values = (*kl[:2], sum(kl[:2]), kl[2], kl[2] / sum(kl[:2]), both.agreement or 0.0, both.mean_unexplained)
    return dict(zip(COLUMNS, values, strict=False)) | {"L0": both.total_l0}


def print_table(rows: Sequence[dict[str, float]]) -> None:
    """One line for every choice, and what it gains against training apart."""
    widths = {column: int(form.split(".")[0].rstrip(",")) for column, form in COLUMNS.items()}
    print(f"{'trained':16}" + "".join(f"{column:>{width}}  " for column, width in widths.items()))
    for row in rows:
        print(f"{row['name']:16}" + "".join(f"{row[column]:{form}}  " for column, form in COLUMNS.items()))
    excess = {row["name"]: row["KL both"] - row["sum"] for row in rows}
    if APART in excess:
        for row in rows[1:]:
            gap, change = excess[row["name"]], row["KL both"] / rows[0]["KL both"] - 1
            print(f"{row['name']}: both minus sum {gap:+.4f} (apart {excess[APART]:+.4f}), KL both {change:+.0%}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs; finished ones are not repeated")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="training tokens of each run")
    parser.add_argument("--features", type=int, default=1024, help="features of each group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=512, help="held-out rows of 64 tokens")
    parser.add_argument("--only", nargs="+", choices=CHOICES, default=DEFAULT, help="some of the runs")
    arguments = parser.parse_args()
    lm = LanguageModel.from_pretrained(ARTIFACTS / "language_model")
    lm.name = "demo"
    sizes = {"tokens": arguments.tokens, "features": arguments.features, "seed": arguments.seed, "rows": arguments.rows}
    folder = arguments.out / "-".join(f"{name}{size}" for name, size in list(sizes.items())[:3])
    overrides = [f"training.n_tokens={arguments.tokens}", f"crosscoder.n_features={arguments.features}"]
    table = []
    for choice in arguments.only:
        row = find_row(arguments.out / "results.json", name=choice, **sizes)
        if row is None:
            begin = time.process_time()
            parts = train(choice, folder, [*overrides, f"training.seed={arguments.seed}"])
            seconds = time.process_time() - begin
            row = {"name": choice, **sizes, **measure(lm, parts, arguments.rows), "CPU s": seconds}
            append_row(arguments.out / "results.json", row)
        table.append(row)
    print_table(table)


if __name__ == "__main__":
    main()
