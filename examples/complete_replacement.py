"""What does it cost to replace attention outputs too: how faithful is the model with MLPs, attention, or both replaced?

    python examples/complete_replacement.py

Measures the demo's crosscoders on rows of its corpus that no training drew, errors propagating: variance unexplained and
active features per token on clean activations, then the output with everything named in the row replaced at once.
"""

import argparse
from collections.abc import Mapping

import torch

import replacement
from replacement import ReplacementModel
from replacement.demo.corpus import held_out_rows
from replacement.fidelity import fidelity_by_parts

NAMES = {"mlp": "MLPs", "attention": "attention", "both": "both"}
COLUMNS = {
    "unexplained": "11.4f",
    "L0": "6.1f",
    "KL (nats)": "9.4f",
    "agreement, p >= 0.5": "19.4f",
    "agreement": "9.4f",
}
"""Columns of the table, and how their values are written."""


def measure(model: ReplacementModel, n_rows: int) -> dict[str, dict[str, float]]:
    """One row of the table for each choice of what is replaced."""
    lm = model.language_model
    rows = torch.from_numpy(held_out_rows(lm.tokenizer, n_rows=n_rows, context=lm.context_length, seed=0))
    table = {}
    for part, fidelity in fidelity_by_parts(model, rows).items():
        values = (fidelity.mean_unexplained, fidelity.total_l0, fidelity.kl, fidelity.agreement, fidelity.agreement_all)
        table[NAMES[part]] = {
            column: float("nan") if value is None else value for column, value in zip(COLUMNS, values, strict=True)
        }
    return table


def print_table(table: Mapping[str, Mapping[str, float]]) -> None:
    """One line per choice."""
    widths = {column: max(len(column), len(f"{0:{form}}")) for column, form in COLUMNS.items()}
    print("replaced   " + "".join(f"  {column:>{widths[column]}}" for column in COLUMNS))
    for name, row in table.items():
        cells = (f"{row[column]:{form}}".strip() for column, form in COLUMNS.items())
        aligned = (f"  {cell:>{width}}" for cell, width in zip(cells, widths.values(), strict=True))
        print(f"{name:11}" + "".join(aligned))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024, help="held-out rows of 64 tokens")
    arguments = parser.parse_args()
    print_table(measure(replacement.load("demo", attention="demo"), arguments.rows))


if __name__ == "__main__":
    main()
