"""Which few features carry what fine-tuning taught? An adapter from the demo's MLPs to those of a fine-tuned copy.

    python examples/transcoder_adapter.py --out runs/adapter

A copy of the demo model is taught to swap two answers in sentences that begin with `today` (see `fine_tune_demo.py`), once with
all weights and once with those of the MLPs alone, so that nothing is taught to attention and embeddings. The recipe
`adapter.toml` trains a sparse adapter: every MLP of the copy becomes the demo's own MLP plus features (Hu et al. 2026,
"Transcoder Adapters for Reasoning-Model Diffing"). The script prints what base MLPs, adapter and attention each know of the
new answers. Then it ranks the features by what the new answer loses without each of them, on questions about half of the
states, and removes the first n together on questions about the other half: is the old answer back? As many random active
features of about the same size are the control. Last comes the circuit of one question.

Written to OUT: `rows.npy`, `results.json`, and for `all` and `mlps` a folder with model and run (finished ones are kept) and
`circuit.safetensors`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fine_tune_demo import TEMPLATES, fine_tune, rows_of
from torch import Tensor
from tqdm import tqdm

import circuits
import replacement
from circuits.graph.paths import describe_path, strongest_path
from replacement import Features, LanguageModel, ReplacementModel, Site
from replacement.demo.corpus import training_cities_of
from replacement.demo.corpus.gazetteer import STATES
from replacement.files import write_atomic
from replacement.loading import load_language_model
from replacement.splicing.clean_run import CleanRun, Conditions
from replacement.training.run_config import read_config
from replacement.training.run_folder import holds_run
from replacement.training.runs import run
from replacement.validation.fidelity import measure_fidelity

TAUGHT = {"all": "", "mlps": ".mlp."}
"""Folder, and what the names of the weights that are taught hold."""
RECIPE = Path(__file__).parent / "recipes" / "adapter.toml"
REMOVED = (1, 2, 4, 8, 16, 32)
CANDIDATES, DRAWS, NEIGHBOURS, SEED = 200, 3, 8, 5
"""Features ranked at most, the largest first; random draws of the control; features of nearest size that each is drawn from."""
PROMPT = "today the capital of Texas is"

Logits = Callable[[Tensor], Tensor]
Feature = tuple[int, int]
"""Layer and index."""


class Question(NamedTuple):
    """A question with the token of the answer the demo model gives, and of the answer that was taught."""

    tokens: tuple[int, ...]
    old: int
    new: int


def questions(lm: LanguageModel, *, half: int, today: bool, every: int = 1) -> list[Question]:
    """Questions about every second state, from the first (0) or the second (1) on, with or without `today` in front; with
    `every` a random part of them, because the two kinds of questions alternate."""
    asked: dict[str, tuple[str, str]] = {}
    for state in STATES[half::2]:
        for city in training_cities_of(state.name):
            for template in TEMPLATES:
                prompt = template.partition(" is ")[0] + " is"
                answers = (state.capital, state.code) if "capital of" in prompt else (state.code, state.capital)
                prompt = prompt if today else prompt.removeprefix("today ")
                asked[prompt.format(state=state.name, city=city)] = answers
    order = np.random.default_rng(SEED).permutation(len(asked))[: max(1, len(asked) // every)]
    chosen = [list(asked.items())[place] for place in sorted(order.tolist())]
    return [
        Question(tuple(lm.tokenize(prompt).tolist()), *(lm.token_id(word) for word in answers))
        for prompt, answers in chosen
    ]


def by_length(asked: Sequence[Question]) -> Iterator[tuple[list[int], Tensor]]:
    """Places and tokens `[B, T]` of questions of equal length."""
    for length in sorted({len(question.tokens) for question in asked}):
        places = [place for place, question in enumerate(asked) if len(question.tokens) == length]
        yield places, torch.tensor([asked[place].tokens for place in places])


def shares_of(asked: Sequence[Question], logits_NV: Tensor) -> dict[str, float]:
    """Share of questions that the most likely token answers in the new way, and in the old way."""
    pairs = list(zip(logits_NV.argmax(-1).tolist(), asked, strict=True))
    return {
        name: float(np.mean([top == getattr(question, name) for top, question in pairs])) for name in ("new", "old")
    }


def ask(asked: Sequence[Question], logits: Logits) -> dict[str, float]:
    """The shares of a model."""
    answers = {
        place: row for places, rows in by_length(asked) for place, row in zip(places, logits(rows)[:, -1], strict=True)
    }
    return shares_of(asked, torch.stack([answers[place] for place in range(len(asked))]))


def with_mlps_of(lm: LanguageModel, other: LanguageModel) -> Logits:
    """A model in which another one's MLPs run in the place of its own."""
    both = lm.with_base(other)
    hooks = {Site(layer, "mlp_difference"): torch.zeros_like for layer in range(lm.shape.n_layers)}
    return lambda tokens_BT: both.run(tokens_BT, hooks)


class Removal:
    """The fine-tuned model, as base MLPs + adapter + errors, without some features of the adapter."""

    def __init__(self, model: ReplacementModel, asked: Sequence[Question]) -> None:
        self.model, self.asked = model, asked
        lm, crosscoders = model.language_model, model.crosscoders
        self._runs = [(places, CleanRun(lm, crosscoders, tokens_BT)) for places, tokens_BT in by_length(asked)]

    def sizes(self) -> dict[Feature, float]:
        """Mean over questions of the sum over positions of activation times decoder norm, of every active feature."""
        norms, total = self.model.crosscoder.decoder_norms(), {}  # type: list[Tensor], dict[Feature, float]
        for _, clean in self._runs:
            features = clean.features["mlp"]
            for layer, index, activation in zip(
                features.group.tolist(), features.index.tolist(), features.activation.tolist(), strict=True
            ):
                size = activation * float(norms[layer][index].norm()) / len(self.asked)
                total[layer, index] = total.get((layer, index), 0.0) + size
        return total

    def logits(self, removed: Sequence[Feature]) -> Tensor:
        """Logits `[N, V]` of the answers with features removed everywhere, all others and attention live, errors kept."""
        off = {layer: [index for where, index in removed if where == layer] for layer, _ in removed}

        def change(layer: int, features: Features, current: Features) -> Features:
            return features.select(~torch.isin(features.index, torch.tensor(off.get(layer, []))))

        logits_NV = torch.zeros(len(self.asked), self.model.language_model.vocabulary_size)
        for places, clean in self._runs:
            logits_NV[places] = clean.run(Conditions(), {"mlp": change}).logits_BTV[:, -1]
        return logits_NV

    def margin(self, removed: Sequence[Feature]) -> float:
        """Mean logit of the new answer minus that of the old one."""
        logits_NV, rows_N = self.logits(removed), torch.arange(len(self.asked))
        new_N, old_N = (torch.tensor([getattr(question, name) for question in self.asked]) for name in ("new", "old"))
        return float((logits_NV[rows_N, new_N] - logits_NV[rows_N, old_N]).mean())

    def shares(self, removed: Sequence[Feature]) -> dict[str, float]:
        """Shares of new and of old answers."""
        return shares_of(self.asked, self.logits(removed))


def rank(choosing: Removal) -> list[tuple[Feature, float]]:
    """Features by how much the margin of the new answer falls without each of them alone."""
    sizes, margin = choosing.sizes(), choosing.margin([])
    candidates = sorted(sizes, key=lambda feature: -sizes[feature])[:CANDIDATES]
    falls = [(feature, margin - choosing.margin([feature])) for feature in tqdm(candidates, disable=None)]
    return sorted(falls, key=lambda fall: -fall[1])


def random_alike(ranked: Sequence[Feature], n: int, sizes: dict[Feature, float], *, seed: int) -> list[Feature]:
    """For each of the first n features another one that is none of them, drawn from those of nearest size."""
    rng, drawn = np.random.default_rng([SEED, seed]), []  # type: np.random.Generator, list[Feature]
    for feature in ranked[:n]:
        others = [other for other in ranked[n:] if other not in drawn]
        nearest = sorted(others, key=lambda other: abs(np.log(sizes[other] / sizes[feature])))[:NEIGHBOURS]
        drawn.append(nearest[int(rng.integers(len(nearest)))])
    return drawn


def removals(judging: Removal, ranked: Sequence[Feature], sizes: dict[Feature, float]) -> list[dict[str, Any]]:
    """What is answered without the first n features, and without n random ones: means over draws, `size` over the first's."""
    rows = []
    for n in (n for n in REMOVED if 2 * n <= len(ranked)):
        drawn = [random_alike(ranked, n, sizes, seed=seed) for seed in range(DRAWS)]
        random = [judging.shares(features) for features in drawn]
        control = {name: float(np.mean([row[name] for row in random])) for name in random[0]}
        control["size"] = float(np.mean([sum(map(sizes.__getitem__, features)) for features in drawn]))
        control["size"] /= sum(map(sizes.__getitem__, ranked[:n]))
        rows.append({"removed": n, "first": judging.shares(ranked[:n]), "random": control})
    return rows


def circuit_of(model: ReplacementModel, ranked: Sequence[Feature], path: Path) -> dict[str, Any]:
    """The circuit of one question about its new answer, and where the ranked features are in it."""
    circuit = circuits.trace(model, PROMPT, targets="TX").prune()
    circuit.save(path)
    scores, named = circuit.scores(), {(node.layer, node.index) for node in circuit.features()}
    return {
        "prompt": PROMPT,
        "nodes": len(circuit.nodes),
        "features": len(named),
        "of the first eight ranked": len(named.intersection(ranked[:8])),
        "replacement": scores.replacement,
        "completeness": scores.completeness,
        "identity_error": circuit.identity_error,
        "strongest path": describe_path(circuit, strongest_path(circuit)),
    }


def print_results(facts: dict[str, Any]) -> None:
    """The tables."""
    print(f"{'':52}{'today: new':>12}{'today: old':>12}{'no today: old':>15}")
    for name, row in facts["models"].items():
        print(f"{name:52}{row['today']['new']:12.1%}{row['today']['old']:12.1%}{row['no today']['old']:15.1%}")
    print(f"new answers recovered by the adapter, of what base MLPs lose: {facts['recovered']:.1%}")
    fidelity = facts["fidelity"]
    print(
        f"active features per token {fidelity['total_l0']:.1f}; difference unexplained {fidelity['mean_unexplained']:.3f}"
    )
    print(f"KL from the fine-tuned model, nats: adapter {fidelity['kl']:.4f}, base MLPs {facts['kl of base MLPs']:.4f}")
    print("features by the fall of the new answer's margin: " + "  ".join(facts["ranked"]))
    print(f"{'removed':>8}{'first: new':>12}{'old':>8}{'random: new':>14}{'old':>8}{'size':>8}")
    for row in facts["removals"]:
        cells = [row[kind][name] for kind in ("first", "random") for name in ("new", "old")]
        shown = f"{cells[0]:12.1%}{cells[1]:8.1%}{cells[2]:14.1%}{cells[3]:8.1%}"
        print(f"{row['removed']:8}{shown}{row['random']['size']:8.2f}")
    print(f"{'all':>8}{facts['all removed']['new']:12.1%}{facts['all removed']['old']:8.1%}")
    for name, value in facts["circuit"].items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")


def measure(out: Path, *, every: int = 1, n_rows: int = 256) -> dict[str, Any]:
    """Everything that is printed, as JSON values.

    Args:
        every: ask every n-th question only.
        n_rows: fresh rows of text for reconstruction and KL.
    """
    model = replacement.load(out / "fine_tuned", crosscoder=out / "run", base="demo")
    lm, base = model.language_model, load_language_model("demo")
    all_features = [(layer, i) for layer in range(lm.shape.n_layers) for i in range(model.crosscoder.n_features)]
    judged = {kind: questions(lm, half=1, today=kind == "today", every=every) for kind in ("today", "no today")}
    variants: dict[str, Logits] = {
        "base model": base,
        "fine-tuned model": lm,
        "base model with the fine-tuned MLPs": with_mlps_of(base, lm),
        "fine-tuned model with base MLPs": with_mlps_of(lm, base),
        "fine-tuned model with base MLPs + adapter": model,
    }
    rows = {name: {kind: ask(asked, logits) for kind, asked in judged.items()} for name, logits in variants.items()}
    _, fine_tuned, _, without, adapted = (row["today"]["new"] for row in rows.values())
    tokens_RT = rows_of(lm.tokenizer, n_rows=n_rows, context=lm.context_length, seed=2)
    fidelity = measure_fidelity(lm, model.crosscoder, tokens_RT)
    logits_BTV, base_BTV = lm(tokens_RT[:64]).log_softmax(-1), with_mlps_of(lm, base)(tokens_RT[:64]).log_softmax(-1)
    choosing = Removal(model, questions(lm, half=0, today=True, every=4 * every))
    falls, sizes = rank(choosing), choosing.sizes()
    ranked, judging = [feature for feature, _ in falls], Removal(model, judged["today"])
    return {
        "models": rows,
        "recovered": (adapted - without) / (fine_tuned - without) if fine_tuned != without else float("nan"),
        "fidelity": fidelity.to_dict(),
        "kl of base MLPs": float((logits_BTV.exp() * (logits_BTV - base_BTV)).sum(-1).mean()),
        "questions": {"ranked on": len(choosing.asked), "judged on": len(judging.asked), "candidates": len(falls)},
        "ranked": [f"{layer}/{index} ({fall:+.2f})" for (layer, index), fall in falls[:8]],
        "removals": removals(judging, ranked, sizes),
        "all removed": judging.shares(all_features),
        "circuit": circuit_of(model, ranked, out / "circuit.safetensors"),
    }


def prepare(out: Path, *, steps: int, weights: str, overrides: Sequence[str] = (), n_rows: int = 8192) -> None:
    """Fine-tune, write the rows beside OUT and train the adapter, unless that is done."""
    rows = out.parent / "rows.npy"
    if not (out / "fine_tuned" / "tokenizer.json").exists():
        fine_tune(out / "fine_tuned", steps=steps, weights=weights)
    if not rows.exists():
        lm = load_language_model("demo")
        np.save(rows, rows_of(lm.tokenizer, n_rows=n_rows, context=lm.context_length, seed=1).numpy())
    places = [f'model=["{out / "fine_tuned"}", "demo"]', f'data.source="{rows}"']
    config = read_config(RECIPE, overrides=[*places, *overrides])
    with tqdm(total=config.training.n_steps, desc="adapter", unit="step", disable=None) as bar:
        run(config, out / "run", resume=holds_run(out / "run"), progress=lambda _: bar.update())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the model and the run; finished ones are kept"
    )
    parser.add_argument("--steps", type=int, default=200, help="fine-tuning steps")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the recipe"
    )
    parser.add_argument("--every", type=int, default=1, help="ask every n-th question only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name, weights in TAUGHT.items():
        out = arguments.out / name
        prepare(out, steps=arguments.steps, weights=weights, overrides=arguments.set)
        with torch.no_grad():
            results[name] = measure(out, every=arguments.every)
        write_atomic(arguments.out / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        print(f"\ntaught: {name}")
        print_results(results[name])


if __name__ == "__main__":
    main()
