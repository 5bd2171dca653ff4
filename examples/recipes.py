"""Train every recipe on the demo model and compare what comes out, in one table.

    python examples/recipes.py --out runs/recipes                  # all of them: some minutes each
    python examples/recipes.py plt clt_jumprelu --out runs/recipes # these

A recipe is a file in `examples/recipes`, the same that `replacement train` takes. Runs that are finished are not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from replacement import checkpoint
from replacement.training.run_config import read_config
from replacement.training.run_folder import holds_run
from replacement.training.runs import run

FOLDER = Path(__file__).parent / "recipes"
COLUMNS = ("features", "L0", "unexplained", "KL", "CE recovered", "agreement", "dead", "tokens/s")


def recipes() -> list[str]:
    """Names of all recipes but that of the shipped crosscoder, those of models to be trained first, and that which
    changes the language model."""
    others = ("demo", "many_models", "adapter", "co_training")
    return sorted(path.stem for path in FOLDER.glob("*.toml") if path.stem not in others)


def train_recipe(name: str, out: Path, *, overrides: Sequence[str] = ()) -> dict[str, float | None]:
    """Train one recipe, unless that is done, and return its row of the table.

    Raises:
        ValueError: the folder holds a run of other settings.
    """
    config = read_config(FOLDER / f"{name}.toml", overrides=overrides)
    with tqdm(total=config.training.n_steps, desc=name, unit="step", disable=None) as bar:
        run(config, out, resume=holds_run(out), progress=lambda _: bar.update())  # a finished run is only read
    return table_row(out)


def table_row(out: Path) -> dict[str, float | None]:
    """The last measurement of a finished run, and its size and speed."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained, held_out = (_last(records, kind) for kind in ("train", "held_out"))
    speeds = [record["tokens_per_second"] for record in records if record["kind"] == "train"]
    unexplained = held_out["unexplained"].values()
    crosscoder = checkpoint.load(out / "crosscoder")
    values = (
        crosscoder.n_groups * crosscoder.n_features,
        held_out["l0_total"],
        sum(unexplained) / len(unexplained),
        held_out["kl"],
        held_out["cross_entropy_recovered"],
        held_out["agreement_all"],
        trained["dead_fraction"],
        sorted(speeds)[len(speeds) // 2],
    )
    return dict(zip(COLUMNS, values, strict=True))


def _last(records: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    return [record for record in records if record["kind"] == kind][-1]


def print_table(rows: dict[str, dict[str, float | None]]) -> None:
    """One line per recipe."""
    formats = dict(zip(COLUMNS, ("8d", "8.1f", "11.4f", "8.4f", "12.4f", "9.4f", "8.1%", "8.0f"), strict=True))
    print(f"{'recipe':16}" + "".join(f"  {name:>{_width(formats[name])}}" for name in COLUMNS))
    for recipe, row in rows.items():
        cells = (
            f"{'-':>{_width(formats[name])}}" if row[name] is None else f"{row[name]:{formats[name]}}"
            for name in COLUMNS
        )
        print(f"{recipe:16}" + "".join(f"  {cell}" for cell in cells))


def _width(format_spec: str) -> int:
    return int("".join(character for character in format_spec.split(".")[0] if character.isdigit()))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*recipes(), []], metavar="NAME", help=", ".join(recipes()))
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs, one below it for each recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting for all recipes")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = arguments.names or recipes()
    print_table({name: train_recipe(name, arguments.out / name, overrides=arguments.set) for name in names})


if __name__ == "__main__":
    main()
