"""How fast is attribution? Explicit transport against the flop floor of this machine and against automatic differentiation.

    python benchmarks/attribution.py                 both models, three interleaved repeats
    python benchmarks/attribution.py --model random  only the 12-layer model with random weights

Three things are timed in turns, so that a noisy machine hurts all of them alike, and medians are printed:

    matmul    the rate of one [2048, D] x [D, D] product: the machine's speed limit for this width
    explicit  everything between a localized prompt and its finished rows: transport, identity check, sparse rows, influence
    autograd  rows of the same features by backward passes (`tests/helpers/autograd_oracle.py`)

Memory is watched in runs of its own, because watching costs time. The nominal floor counts, per target, position in its
causal cone and layer below, `4 D^2` flops for the value and output matrices and the mixing over positions, plus decoder
products. The explicit walk does less than that: a target is at one position until its first attention layer, and attention 0
is passed by pushing the embeddings up once. The reduced floor leaves both out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformer_lens.model_bridge import TransformerBridge

import replacement
from circuits.attribution.expansion import Attributor
from circuits.attribution.targets import output_weights, resolve_logit, top_logits
from replacement import Crosscoder, LanguageModel, LocalReplacement, ReplacementModel, Site, TopK, Wiring

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
from autograd_oracle import AutogradOracle

PROMPT = "the capital of the state containing Dallas is"
PAGE = 4096


def random_model() -> tuple[ReplacementModel, torch.Tensor]:
    """12 layers, d_model 768, 32 tokens, 8 features per layer and token: 3,072 active features."""
    config = {
        "n_layers": 12,
        "d_model": 768,
        "n_heads": 12,
        "d_head": 64,
        "n_ctx": 64,
        "d_vocab": 1000,
        "act_fn": "gelu",
        "normalization_type": "LN",
        "seed": 0,
    }
    lm = LanguageModel(TransformerBridge.boot_native(config), name="random-12x768")
    crosscoder = Crosscoder(Wiring.strictly_causal(lm), n_features=2048, activation=TopK(8), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in crosscoder.named_parameters():
            if "dec" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return ReplacementModel(lm, crosscoder), torch.randint(0, 1000, (32,), generator=generator)


def demo_model() -> tuple[ReplacementModel, torch.Tensor]:
    """The shipped model on the Dallas prompt."""
    model = replacement.load("demo")
    return model, model.language_model.tokenize(PROMPT)


def explicit(model: ReplacementModel, local: LocalReplacement) -> Attributor:
    """Rows of every feature that the top logits depend on."""
    logits = [resolve_logit(one, local, model.language_model) for one in top_logits(local)]
    attributor = Attributor(local, logits)
    output = np.zeros(attributor.rows.n_nodes)
    output[attributor.rows.n_columns :] = output_weights(logits)
    attributor.expand(output, coverage=1.0, max_nodes=None)
    return attributor


def matmul_rate(width: int) -> float:
    """Flops per second of the products that transport is made of, at a size that suits the machine best."""
    a, b = torch.randn(2048, width), torch.randn(width, width)
    for _ in range(3):
        a @ b
    repeats, started = int(2e11 / (2 * 2048 * width**2)), time.perf_counter()  # about a second
    for _ in range(repeats):
        a @ b
    return repeats * 2 * 2048 * width**2 / (time.perf_counter() - started)


def floor_flops(local: LocalReplacement, expanded_S: np.ndarray) -> tuple[float, float]:
    """Nominal and reduced flops of the walks of the expanded features (see the head of this file)."""
    features, shape = local.features, local.shape
    D, HK = shape.d_model, shape.n_heads * shape.d_head
    layer_S, position_S = features.group.numpy()[expanded_S], features.row.numpy()[expanded_S]
    cone = position_S + 1.0
    attention = ((layer_S + 1) * (cone * 4 * D * HK + cone * (cone + 1) * HK)).sum()
    first_layer = (cone - 1) * 2 * D * HK  # the product with W_O, at all positions but one
    saved = np.where(layer_S > 0, first_layer + cone * 4 * D * HK, cone * 4 * D * HK).sum()
    # Sources (features and one error) that write layer w at positions up to t.
    crosscoder, T = local.crosscoder, local.n_positions
    writers = np.zeros((shape.n_layers, T))
    for layer in range(shape.n_layers):
        for group in crosscoder.wiring.writers(Site(layer, "mlp_out")):
            writers[layer] += np.bincount(features.of(group).row.numpy(), minlength=T)
    met = np.cumsum(np.cumsum(writers + 1, axis=1), axis=0)
    below = np.where(layer_S > 0, met[np.maximum(layer_S, 1) - 1, position_S], 0)
    decoders = (2 * D * below).sum()
    return float(attention + decoders), float(attention - saved + decoders)


def seconds_of(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one run."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def peak_memory(run: Callable[[], object]) -> float:
    """Peak growth of resident memory (MiB) while running."""
    statm, stop, peak = Path("/proc/self/statm"), threading.Event(), [0]

    def resident() -> int:
        return int(statm.read_text().split()[1]) * PAGE if statm.exists() else 0

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], resident())

    before = resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    stop.set()
    watcher.join()
    return max(0, peak[0] - before) / 2**20


def measure(name_of_model: str, model: ReplacementModel, tokens: torch.Tensor, *, repeats: int, batch: int) -> None:
    """Print one model's table."""
    started = time.perf_counter()
    local = model.localize(tokens)
    localize_seconds = time.perf_counter() - started
    attributor = explicit(model, local)
    rows = attributor.rows
    expanded = np.flatnonzero(rows.expanded[attributor.columns.features.start : rows.n_columns])
    chosen = torch.from_numpy(expanded)
    nominal, reduced = floor_flops(local, expanded)
    runs: dict[str, Callable[[], object]] = {
        "explicit": lambda: explicit(model, local),
        "autograd": lambda: AutogradOracle(model, local, batch_size=batch).feature_rows(chosen),
    }
    memory = {name: peak_memory(run) for name, run in runs.items()}  # first, while freed memory is not there to reuse
    rates, times = [], {name: [] for name in runs}
    for _ in range(repeats):
        rates.append(matmul_rate(model.language_model.shape.d_model))
        for name, run in runs.items():
            times[name].append(seconds_of(run))
    rate, seconds = statistics.median(rates), {name: statistics.median(found) for name, found in times.items()}
    ratio = statistics.median(a / e for e, a in zip(times["explicit"], times["autograd"], strict=True))
    shape = model.language_model.shape
    print(f"\n{name_of_model}: {shape.n_layers} layers, d_model {shape.d_model}, {len(tokens)} tokens")
    print(f"  active features / expanded     {len(local.features)} / {len(expanded)}")
    print(f"  edges                          {sum(len(b.source) for bs in rows.blocks.values() for b in bs):,}")
    print(f"  identity error                 {rows.identity_error:.1e}")
    print(f"  localize                       {localize_seconds:.3f} s")
    for name in runs:
        print(f"  {name:<30} {seconds[name]:.3f} s   peak memory +{memory[name]:,.0f} MiB")
    print(f"  matmul rate                    {rate / 1e9:.0f} Gflop/s")
    for label, flops in (("nominal floor", nominal), ("reduced floor", reduced)):
        over = seconds["explicit"] * rate / flops
        print(f"  {label:<30} {flops / 1e9:,.2f} Gflop = {flops / rate:.3f} s; explicit takes {over:.2f}x of it")
    print(f"  flops over the matmul rate     {reduced / rate / seconds['explicit']:.0%} (of the reduced floor)")
    print(f"  autograd / explicit            {ratio:.1f}x")


def main() -> None:
    """Parse the options and print."""
    parser = argparse.ArgumentParser(description="Time attribution against its flop floor and against autograd.")
    parser.add_argument("--model", choices=("demo", "random", "both"), default="both")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repeats; medians are printed")
    parser.add_argument("--batch", type=int, default=64, help="targets per backward pass of the autograd oracle")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    with torch.no_grad():
        if options.model in ("demo", "both"):
            measure("demo", *demo_model(), repeats=options.repeats, batch=options.batch)
        if options.model in ("random", "both"):
            measure("random", *random_model(), repeats=options.repeats, batch=options.batch)


if __name__ == "__main__":
    main()
