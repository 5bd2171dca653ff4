"""What does a trace of a real model of thirty layers cost? Seconds by stage, peak memory, and the identity error.

    python examples/smollm2.py --out runs/smollm2      once: converts SmolLM2-135M-Instruct and trains a transcoder
    python benchmarks/real_model.py --model runs/smollm2/language_model --crosscoder runs/smollm2/run/crosscoder
    python benchmarks/real_model.py --model runs/smollm2/language_model --random strictly_causal --out runs/random

`--random` measures with random features instead: 4,096 in each layer, 32 of them active, with decoders as large as what they
stand for, so that influence runs through features. It writes the crosscoder to `OUT`, in 16 bits, unless it is there (a causal
one takes 2.2 GB). Memory is the kernel's own count for the process; the peak while loading and the peak of all that
follows are told apart, where the kernel can reset its count.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from machine import machine, peak_bytes, reset_peak

import circuits
import replacement
from circuits import CircuitGraph, NodeKind
from circuits.graph.exporters import file_formats
from replacement import Crosscoder, LanguageModel, ReplacementModel, TopK, Wiring, checkpoint
from replacement.allocator import keep_freed_memory

PROMPT = "When Mary and John went to the store, John gave a drink to"
COMPLETIONS = {"The capital of France is": " Paris", PROMPT: " Mary"}
N_FEATURES, N_ACTIVE = 4096, 32
WIRINGS: dict[str, Callable[..., Wiring]] = {
    "per_layer": Wiring.per_layer,
    "strictly_causal": Wiring.strictly_causal,
}


def write_random(folder: Path, model: Path, wiring: str) -> None:
    """Write a crosscoder with random features; the outputs that it writes have the norm of the MLPs' outputs."""
    lm = LanguageModel.from_pretrained(model)
    crosscoder = Crosscoder(
        WIRINGS[wiring](lm, read="mlp_in"),
        n_features=N_FEATURES,
        activation=TopK(N_ACTIVE),
        dtype=torch.bfloat16,
        model_fingerprint=lm.fingerprint,
        undecomposed_positions=1,
        seed=0,
    )
    sites = crosscoder.wiring
    x_TD = lm.read(lm.tokenize(PROMPT), {*sites.read_sites, *sites.write_sites})
    features = crosscoder.encode({site: x_TD[site].to(torch.bfloat16) for site in sites.read_sites})
    n_positions = features.n_rows - 1  # the first has no features
    squares = [
        float(features.of(g).activation.detach().double().square().sum()) / n_positions for g in range(sites.n_groups)
    ]
    norm = {site: float(x_TD[site][1:].norm(dim=1).mean()) for site in sites.write_sites}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for group, weight_FWD in enumerate(crosscoder.W_dec):
            weight_FWD.normal_(generator=generator)
            for place, site in enumerate(sites.writes[group]):
                total = sum(squares[writer] for writer in sites.writers(site)) * weight_FWD.shape[-1]
                weight_FWD[:, place] *= norm[site] / total**0.5
    checkpoint.save(crosscoder, folder, dtype=torch.bfloat16)


class Stages:
    """Named stages, in order: seconds of the clock, CPU time of all threads of the process together, and peak memory."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        """Largest resident memory during the stage, in bytes; since the process began where the kernel resets no count."""
        self.notes: dict[str, str] = {}
        """What is said of a stage behind its times."""

    def expect(self, cost: circuits.Estimate) -> None:
        """Note what the trace was expected to cost."""
        self.notes["trace"] = f"expected: {cost}"

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """While open, time and memory count for a stage."""
        reset_peak()
        started, worked = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = time.perf_counter() - started
        self.cpu_seconds[name] = time.process_time() - worked
        self.peaks[name] = peak_bytes()

    def print(self, *, parts: tuple[str, ...]) -> None:
        """One line per stage, and their sum without the stages that are no part of the work, or part of another."""
        for name, seconds in self.seconds.items():
            cpu, peak, note = self.cpu_seconds[name], self.peaks[name] / 1e9, self.notes.get(name, "")
            print(f"  {name:<25} {seconds:7.2f} s   {cpu:7.2f} s of CPU time   {peak:5.2f} GB   {note}".rstrip())
        total, cpu = (
            sum(seconds for name, seconds in column.items() if name not in parts)
            for column in (self.seconds, self.cpu_seconds)
        )
        print(f"  {'total without loading':<25} {total:7.2f} s   {cpu:7.2f} s of CPU time")
        print(f"  {'peak memory, loading':<25} {self.peaks['load'] / 1e9:7.2f} GB")
        print(
            f"  {'peak memory afterwards':<25} {max(self.peaks[name] for name in self.peaks if name != 'load') / 1e9:7.2f} GB"
        )


def check_completions(lm: LanguageModel) -> None:
    """Print the next word of two prompts, and stop if one is wrong."""
    for prompt, expected in COMPLETIONS.items():
        probability_V = lm(prompt)[-1].softmax(-1)
        (word,) = lm.token_strings([int(probability_V.argmax())])
        print(f"  {prompt} ->{word} ({float(probability_V.max()):.0%})")
        if word != expected:
            raise SystemExit(f"error: expected{expected}: the model is another, or its conversion went wrong")


def trace(model: ReplacementModel, stages: Stages, *, max_nodes: int, files: bool) -> tuple[CircuitGraph, CircuitGraph]:
    """Everything that `circuits trace` does, stage by stage: the full graph, and the pruned one.

    Args:
        files: whether heads are named and files written, too.
    """
    with stages.measured("trace"):
        graph = circuits.trace(model, PROMPT, max_nodes=max_nodes, coverage=0.9999, announce=stages.expect)
    with stages.measured("prune"):
        circuit = graph.prune()
    if not files:
        return graph, circuit
    with stages.measured("heads"):
        circuit = circuits.with_heads(model, circuit)
    with tempfile.TemporaryDirectory() as folder:
        with stages.measured("save the full graph"):
            graph.save(Path(folder) / "graph.safetensors")
        for name, exporter in file_formats().items():
            if exporter.fallback is None:  # pictures by Graphviz are left to `circuits export`
                with stages.measured(f"export {name}"):
                    path = circuit.export(name, Path(folder) / f"circuit{exporter.suffix}")
                stages.notes[f"export {name}"] = f"{path.stat().st_size / 1e6:,.1f} MB"
    return graph, circuit


def measure(model_folder: Path, crosscoder: Path, *, max_nodes: int, dtype: str, files: bool, lazy: bool) -> None:
    """Print one table."""
    stages = Stages()
    with stages.measured("load"):
        model = replacement.load(model_folder, crosscoder=crosscoder, dtype=dtype, lazy=lazy)
    lm, width = model.language_model, model.crosscoder.n_features
    shape, tokens_T = lm.shape, lm.tokenize(PROMPT)
    print(f"{lm.name}: {shape.n_layers} layers, d_model {shape.d_model}, {len(tokens_T)} tokens, {dtype}")
    check_completions(lm)
    with stages.measured("localize (part of trace)"):
        local = model.localize(tokens_T)
    n_active = len(local.features)
    per_layer = n_active / shape.n_layers / (len(tokens_T) - model.crosscoder.undecomposed_positions)
    del local
    print(f"  crosscoder                {crosscoder}: {model.crosscoder.n_groups} x {width} features,")
    print(f"                            {n_active:,} active, {per_layer:.1f} for each layer and token")
    graph, circuit = trace(model, stages, max_nodes=max_nodes, files=files)
    expanded = int((graph.nodes.expanded & graph.nodes.mask(NodeKind.FEATURE)).sum())
    print(f"  graph                     {expanded:,} features expanded, {len(graph.edges):,} edges, {graph.scores()}")
    print(f"  circuit                   {len(circuit.nodes):,} nodes, {len(circuit.edges):,} edges, {circuit.scores()}")
    print(f"  identity error            {graph.identity_error:.1e}")
    if "logit_gap_16bit" in graph.metadata:
        print(f"  logits, 16 bits to exact  {graph.metadata['logit_gap_16bit']:.2f} at most apart")
    stages.print(parts=("load", "localize (part of trace)"))


def main() -> None:
    """Parse the options and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2, as examples/smollm2.py converts it")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--crosscoder", type=Path, help="folder of a crosscoder for it")
    source.add_argument("--random", choices=WIRINGS, help="random features with this wiring, written to --out")
    parser.add_argument("--out", type=Path, default=Path("runs/random"), help="folder for random crosscoders")
    parser.add_argument("--max-nodes", type=int, default=1000, help="features expanded")
    parser.add_argument("--dtype", default="float32", help="dtype of the language model and the crosscoder")
    parser.add_argument("--trace-only", action="store_true", help="stop before heads and files")
    parser.add_argument("--lazy", action="store_true", help="leave the crosscoder's weights in their file")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    crosscoder = options.crosscoder or options.out / options.random
    if options.random and not crosscoder.exists():
        process = multiprocessing.get_context("spawn").Process(
            target=write_random, args=(crosscoder, options.model, options.random)
        )  # whose memory is gone when it ends
        process.start()
        process.join()
    print(f"{machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    measure(
        options.model,
        crosscoder,
        max_nodes=options.max_nodes,
        dtype=options.dtype,
        files=not options.trace_only,
        lazy=options.lazy,
    )


if __name__ == "__main__":
    main()
