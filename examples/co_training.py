"""Does a language model gain by being trained together with its transcoders?

    python examples/co_training.py --out runs/co_training      # goes on where it stopped

A small language model is trained on the demo's corpus from nothing, and the demo's own goes on learning from it, in several
ways at equal compute: transcoders after the fact (the language model alone, then a transcoder for each MLP on the frozen
model), both in every step with the KL of the spliced model as a further loss (a random subset of the MLPs replaced, one of
them, or all), in turns of one step, and in long turns in which the transcoders are frozen and then catch up.

Compute is the floating-point operations of matrix products, counted by PyTorch over a few steps of every kind (the sparse
products of the transcoders' decoders, which are few, are not counted). Ways whose steps are cheaper get more of them. Nothing
here is chosen by results: coefficient, step sizes and seed are set before.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from result_rows import append_row, find_row, read_rows
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from train_demo import LanguageModelRun, build_model, save_language_model
from train_demo_files import write_json

import replacement
from replacement.demo.corpus import held_out_rows
from replacement.demo.families import FAMILIES
from replacement.demo.family_cases import CHOOSE, JUDGE
from replacement.demo.feature_families import choose_features, judge_features, read_firings
from replacement.demo.tokenizer import build_tokenizer
from replacement.files import read_json
from replacement.index.build import IndexSettings, build_index
from replacement.index.store import FeatureIndex
from replacement.training.build import load_models
from replacement.training.run_config import run_config
from replacement.training.run_folder import holds_run
from replacement.training.runs import run
from replacement.training.trainer import Progress
from replacement.validation.fidelity import measure_fidelity

BATCH_TOKENS = 1024
K = 8
"""Active features per layer and token."""
KL = 1.0
"""Coefficient of the KL between the model and the spliced one."""
LEARNING_RATES = {"scratch": 2e-3, "fine-tuned": 3e-4}
"""Peak step sizes of the language model."""
SHARE_OF_STEPS = {"scratch": 1.0, "fine-tuned": 0.3}
"""Fine-tuning is the shorter of the two."""
CYCLES = 5
"""Long turns of each kind in a run."""
PILOT_STEPS = 24
STATE = next(family for family in FAMILIES if family.name == "state")


@dataclass(frozen=True)
class Way:
    """One way to come by a language model and its transcoders."""

    reads: str = "subset"
    """Which MLPs a step replaces."""
    schedule: str = "every step"


WAYS = {
    "after the fact": Way(schedule="one after the other"),
    "every step, a subset": Way(),
    "in turn": Way(schedule="in turn"),
    "frozen, caught up": Way(schedule="long turns"),
    "every step, one": Way(reads="one"),
    "every step, all": Way(reads="propagated"),
}
COLUMNS = {
    "steps": "11", "loss": "7.3f", "spliced": "8.3f", "KL": "7.4f", "KL, one": "8.4f", "unexplained": "11.4f", "L0": "5.1f",
    "label F1": "8.3f", "unclear": "7.0%", "state F1": "8.3f", "CPU s": "6.0f",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Study:
    """Sizes of all runs."""

    n_layers: int = 3
    """Of the language model that is trained from nothing."""
    d_model: int = 64
    fine_tuned: str = "demo"
    """The language model that is fine-tuned."""
    steps: int = 400
    """Steps in which both move; other ways get as many as the same compute buys."""
    n_features: int = 512
    n_rows: int = 256
    """Held-out rows for losses."""
    label_tokens: int = 50_000
    """Tokens that labels are made from; a quarter as many score them."""


def settings(study: Study, model: str | Path, way: Way, start: str, n_steps: int, turns: Sequence[int] | None) -> Any:
    """The settings of one run."""
    return run_config(
        {
            "model": str(model),
            "checkpoint_every": n_steps,
            "data": {"source": "demo", "context": 64, "held_out_rows": 16, "shards": 8},
            "crosscoder": {
                "wiring": "per_layer",
                "read": "mlp_in",
                "n_features": study.n_features,
                "activation": {"name": "topk", "k": K},
                "undecomposed_positions": 1,
            },
            "training": {
                "n_tokens": n_steps * BATCH_TOKENS,
                "batch_tokens": BATCH_TOKENS,
                "learning_rate": 0.2 / math.sqrt(study.n_features),
                "reads": way.reads,
            },
            "language_model": {
                "learning_rate": LEARNING_RATES[start],
                "kl": KL,
                **({} if turns is None else {"turns": list(turns)}),
            },
        }
    )


def operations(study: Study, model: str | Path, way: Way, turns: Sequence[int] | None) -> list[int]:
    """Floating-point operations of each of the first steps of a run."""
    counts = [0]
    with tempfile.TemporaryDirectory() as scratch, FlopCounterMode(display=False) as counter:

        def note(_: Progress) -> None:
            counts.append(counter.get_total_flops())

        run(settings(study, model, way, "scratch", PILOT_STEPS, turns), Path(scratch) / "run", progress=note)
    steps = [after - before for before, after in pairwise(counts)]
    return steps[1:]  # the first includes what is measured before


def count_compute(study: Study, model: str | Path) -> dict[str, float]:
    """Operations per step of every kind, in units of a step of the language model alone."""
    half = PILOT_STEPS // 2
    alone = operations(study, model, Way(), (half, half))
    in_turn = operations(study, model, Way(), (1, 1))
    both = {reads: operations(study, model, Way(reads=reads), None) for reads in ("subset", "one", "propagated")}
    n_layers = load_models(str(model)).first.shape.n_layers
    costs = {
        "language model": fmean(alone[: half - 1]),
        "subset": over_subsets(both["subset"], n_layers),
        "one": fmean(both["one"]),
        "propagated": fmean(both["propagated"]),
        "language model with frozen transcoders": over_subsets(in_turn[1::2], n_layers),
        "transcoders": over_subsets(in_turn[::2], n_layers),
    }
    return {name: value / costs["language model"] for name, value in costs.items()}


def over_subsets(counts: Sequence[int], n_layers: int) -> float:
    """Expected operations of a step that replaces 0 to `n_layers` MLPs, each number as often, from those of some steps.

    A step that replaces none costs less; the others hardly differ, whatever they replace.
    """
    least, most = min(counts), max(counts)
    if most < 1.1 * least:  # no step replaced none, or it makes no difference
        return fmean(counts)
    some = [count for count in counts if count > (least + most) / 2]
    return (least + n_layers * fmean(some)) / (n_layers + 1)


def plan(n_steps: int, way: Way, costs: dict[str, float]) -> tuple[int, tuple[int, int] | None]:
    """Steps and turns of a way, at the compute of `n_steps` steps in which both move and a subset is replaced."""
    budget = n_steps * costs["subset"]
    if way.schedule == "every step":
        return round(budget / costs[way.reads]), None
    if way.schedule == "one after the other":
        turns = n_steps, max(1, round((budget - n_steps) / costs["transcoders"]))
        return sum(turns), turns
    pairs = budget / (costs["language model with frozen transcoders"] + costs["transcoders"])
    length = 1 if way.schedule == "in turn" else max(1, round(pairs / CYCLES))
    return 2 * length * max(1, round(pairs / length)), (length, length)


@torch.no_grad()
def measure(study: Study, folder: Path) -> dict[str, float]:
    """Everything the table says of a finished run, on text that no training read."""
    model = replacement.load(folder / "language_model", crosscoder=folder)
    lm = model.language_model
    rows = held_out_rows(lm.tokenizer, n_rows=study.n_rows, context=lm.context_length, seed=0)
    rows_RT = torch.from_numpy(rows)
    fidelity = measure_fidelity(lm, model.crosscoder, rows_RT)
    index = folder / "features.sqlite"
    build_index(model, index, IndexSettings(data="demo", n_tokens=study.label_tokens))
    with FeatureIndex.open(index) as opened:
        labels = opened.facts["labels"]
    choosing, judging = STATE.of(CHOOSE), STATE.of(JUDGE)
    chosen = choose_features(read_firings(model, choosing), choosing)
    state_f1 = judge_features(chosen, read_firings(model, judging), judging)
    return {
        "loss": fidelity.cross_entropy_original,
        "spliced": fidelity.cross_entropy,
        "KL": fidelity.kl,
        "KL, one": one_replaced(model, rows_RT),
        "unexplained": fidelity.mean_unexplained,
        "L0": fidelity.total_l0,
        "label F1": labels["mean_f1"],
        "unclear": labels["unclear"],
        "state F1": fmean(state_f1.values()),
    }


def one_replaced(model: Any, rows_RT: torch.Tensor) -> float:
    """Mean KL where one layer's MLP is replaced alone."""
    kls = []
    for chunk_RT in rows_RT.split(32):
        log_p = model.language_model(chunk_RT).log_softmax(-1)
        for layer in range(model.language_model.shape.n_layers):
            log_q = model(chunk_RT, layers=[layer]).log_softmax(-1)
            kls.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
    return fmean(kls)


def train_and_measure(
    study: Study, name: str, start: str, model: str | Path, out: Path, costs: dict[str, float]
) -> dict[str, Any]:
    """One row; its run goes on where it stopped."""
    n_steps, turns = plan(round(SHARE_OF_STEPS[start] * study.steps), WAYS[name], costs)
    config = settings(study, model, WAYS[name], start, n_steps, turns)
    began = time.process_time()
    with tqdm(total=n_steps, desc=f"{start}: {name}", unit="step", disable=None) as bar:
        run(config, out, resume=holds_run(out), progress=lambda _: bar.update())
    seconds = time.process_time() - began
    steps = [n_steps] if turns is None else [n_steps * part // sum(turns) for part in turns]
    return {"name": name, "start": start, "steps": steps, "CPU s": seconds, **measure(study, out)}


def run_all(study: Study, out: Path, *, starts: Sequence[str] = tuple(LEARNING_RATES)) -> list[dict[str, Any]]:
    """Every way from every start; what is finished is kept in OUT/results.json."""
    results, compute = out / "results.json", out / "compute.json"
    models = {"scratch": out / "untrained", "fine-tuned": study.fine_tuned}
    if not (out / "untrained").exists():
        tokenizer = build_tokenizer(64)
        shape = LanguageModelRun(n_layers=study.n_layers, d_model=study.d_model)
        save_language_model(build_model(shape, tokenizer), tokenizer, out / "untrained")
    for start in starts:
        costs = read_json(compute) if compute.exists() else {}
        if start not in costs:
            write_json(compute, costs | {start: count_compute(study, models[start])})
        for name in WAYS:
            if find_row(results, name=name, start=start) is None:
                folder = out / f"{start}-{name}".replace(" ", "_").replace(",", "")
                row = train_and_measure(study, name, start, models[start], folder, read_json(compute)[start])
                append_row(results, row)
    return read_rows(results)


def print_table(rows: Sequence[dict[str, Any]], compute: dict[str, dict[str, float]]) -> None:
    """One line for each run, and what a step of each kind costs."""
    widths = {name: max(len(name), int(form.split(".")[0].rstrip("df%"))) for name, form in COLUMNS.items()}
    for start in dict.fromkeys(row["start"] for row in rows):
        print(f"{start:22}" + "".join(f"  {name:>{widths[name]}}" for name in COLUMNS))
        for row in (row for row in rows if row["start"] == start):
            cells = {name: row[name] for name in COLUMNS} | {"steps": " + ".join(map(str, row["steps"]))}
            texts = (f"{cells[name]:>{form}}" for name, form in COLUMNS.items())
            print(f"{row['name']:22}" + "".join(f"  {t:>{widths[n]}}" for t, n in zip(texts, COLUMNS, strict=True)))
        costs = ", ".join(f"{name} {value:.2f}" for name, value in compute[start].items())
        print(f"compute per step: {costs}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results; finished ones are kept")
    parser.add_argument("--steps", type=int, default=Study.steps, help="steps of the way in which both move")
    parser.add_argument("--width", type=int, default=Study.d_model, help="d_model of the language model")
    parser.add_argument("--features", type=int, default=Study.n_features, help="features per layer")
    parser.add_argument("--starts", nargs="+", choices=tuple(LEARNING_RATES), default=list(LEARNING_RATES))
    options = parser.parse_args()
    study = Study(steps=options.steps, d_model=options.width, n_features=options.features)
    rows = run_all(study, options.out, starts=options.starts)
    print_table(rows, read_json(options.out / "compute.json"))


if __name__ == "__main__":
    main()
