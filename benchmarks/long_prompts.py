"""Attribution of long prompts: time against the flop floor, peak memory, and circuit-tracer on the same model in the same run.

    python benchmarks/long_prompts.py                                    32, 256 and 1,024 tokens, 2,000 features expanded
    python benchmarks/long_prompts.py --peer PEER/bin/python             also circuit-tracer, installed in its own environment
    python benchmarks/long_prompts.py --device cuda                      on a GPU: seconds of a second trace, and GPU memory

The model has the shapes of GPT-2 small (12 layers, d_model 768) and random weights; its crosscoder (a CLT by default) has
thresholds (JumpReLU) that leave 8 features active for each layer and token, about 100 in all, unevenly over positions. Both are
folders that circuit-tracer reads too (see `circuit_tracer_files.py`). Every measurement is a process of its own, so that its
peak memory is its own. Times are those of a whole trace, and of the rows alone: everything between a localized prompt and its
finished rows. `floor` is the number of floating-point operations (see `benchmarks/attribution.py`) over the speed of one
[2048, D] x [D, D] product, measured before and after in the same process.

The peer (`pip install circuit-tracer==0.5.0 torch==2.13.0`) is given the same number of features, at lengths where its memory
allows it. Whether its numbers are the same is what `circuit_tracer_parity.py` asks.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attribution import floor_flops, matmul_rate
from circuit_tracer_files import Setting, run_apart, write_crosscoder, write_model
from machine import machine, peak_bytes

import circuits
import replacement
from circuits.attribution.expansion import Attributor
from circuits.attribution.targets import output_weights, resolve_logit, top_logits
from replacement import LanguageModel, LocalReplacement

D = 768
PEER = Path(__file__).with_name("circuit_tracer_peer.py")


def write(n_tokens: int, crosscoder: str, folder: Path) -> list[str]:
    """Write the model, the crosscoder and a prompt; returns the arguments that say where they are."""
    setting = Setting(
        "GPT-2", crosscoder, "jumprelu", n_layers=12, d_model=D, n_features=2048, n_active=8, n_tokens=n_tokens
    )
    tokens_T = write_model(setting, folder / "model")
    write_crosscoder(setting, LanguageModel.from_pretrained(folder / "model"), tokens_T, folder / "crosscoder")
    return [str(folder / "model"), str(folder / "crosscoder"), *map(str, tokens_T.tolist())]


def measure_on_gpu(model_folder: str, crosscoder: str, tokens: list[int], n_nodes: int, device: str) -> dict[str, Any]:
    """Trace one prompt twice on a GPU and time the second trace, from the prompt to the graph in main memory."""
    model = replacement.load(model_folder, crosscoder=crosscoder, device=device)
    for _ in range(2):  # the first one loads kernels
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        graph = circuits.trace(model, tokens, coverage=1.0, max_nodes=n_nodes)
        seconds = time.perf_counter() - started
    return {
        "active": graph.metadata["active_features"],
        "expanded": n_nodes,
        "edges": len(graph.edges),
        "identity": graph.identity_error,
        "seconds": seconds,
        "peak": torch.cuda.max_memory_allocated() / 2**30,
    }


def measure(model_folder: str, crosscoder: str, tokens: list[int], n_nodes: int) -> dict[str, Any]:
    """Trace one prompt in this process."""
    model = replacement.load(model_folder, crosscoder=crosscoder)
    started, cpu = time.perf_counter(), time.process_time()
    graph = circuits.trace(model, tokens, coverage=1.0, max_nodes=n_nodes)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak, n_edges = peak_bytes() / 2**30, len(graph.edges)
    with torch.no_grad():
        local = model.localize(tokens)
        logits = [resolve_logit(target, local, model.language_model) for target in top_logits(local)]
        rate, begun = matmul_rate(D), time.perf_counter()
        attributor = Attributor(local, logits)
        output = np.zeros(attributor.rows.n_nodes)
        output[attributor.rows.n_columns :] = output_weights(logits)
        attributor.expand(output, coverage=1.0, max_nodes=n_nodes)
        rows = time.perf_counter() - begun
        rate = (rate + matmul_rate(D)) / 2
    expanded = np.flatnonzero(attributor.rows.expanded[attributor.columns.features])
    return {
        "active": len(local.features),
        "expanded": len(expanded),
        "edges": n_edges,
        "identity": graph.identity_error,
        "seconds": seconds,
        "cpu": cpu,
        "rows": rows,
        "floor": (floor_flops(local, expanded)[0] + logit_flops(local, len(logits))) / rate,
        "peak": peak,
    }


def logit_flops(local: LocalReplacement, n_logits: int) -> float:
    """The nominal floor of logit targets at the last position, above all layers."""
    cone, width = local.n_positions, local.shape.n_heads * local.shape.d_head
    attention = local.shape.n_layers * (cone * 4 * D * width + cone * (cone + 1) * width)
    writes = torch.tensor([len(sites) for sites in local.crosscoder.wiring.writes])
    rows = int(writes[local.features.group].sum()) + local.shape.n_layers * cone
    return float(n_logits * (attention + 2 * D * rows))


def main() -> None:
    """Measure every length and print the table."""
    parser = argparse.ArgumentParser(description="Time attribution of long prompts.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 256, 1024], help="tokens of the prompts")
    parser.add_argument("--nodes", type=int, default=2000, help="features expanded")
    parser.add_argument("--crosscoder", default="CLT", choices=("CLT", "PLT", "skip PLT"), help="kind of crosscoder")
    parser.add_argument("--peer", default="", help="Python of an environment that has circuit-tracer")
    parser.add_argument("--peer-lengths", type=int, nargs="*", default=[32, 256], help="lengths that the peer is given")
    parser.add_argument("--peer-batch", type=int, default=64, help="targets of one backward pass of the peer")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for seconds and GPU memory alone")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        model, crosscoder, *tokens = options.one
        prompt = list(map(int, tokens))
        on_cpu = options.device == "cpu"
        facts = (
            measure(model, crosscoder, prompt, options.nodes)
            if on_cpu
            else measure_on_gpu(model, crosscoder, prompt, options.nodes, options.device)
        )
        print(json.dumps(facts))
        return
    if options.device != "cpu":
        print(torch.cuda.get_device_name())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {machine()}")
    for length in options.lengths:
        with tempfile.TemporaryDirectory() as folder:
            files = write(length, options.crosscoder, Path(folder))
            chosen = ("--nodes", str(options.nodes), "--device", options.device)
            ours = run_apart(sys.executable, __file__, *chosen, "--one", *files)
            print(
                f"{length} tokens: {ours['active']:,} active features, {ours['expanded']:,} expanded, {ours['edges']:,} edges"
            )
            if options.device != "cpu":
                print(
                    f"  crosstrace       {ours['seconds']:8.2f} s, peak {ours['peak']:.1f} GiB on the GPU; "
                    f"identity error {ours['identity']:.0e}"
                )
                continue
            print(
                f"  crosstrace       {ours['seconds']:8.1f} s (CPU {ours['cpu']:.1f} s), peak {ours['peak']:.1f} GiB; "
                f"identity error {ours['identity']:.0e}; rows alone {ours['rows']:.1f} s, "
                f"{ours['rows'] / ours['floor']:.2f}x their floor of {ours['floor']:.1f} s"
            )
            if options.peer and length in options.peer_lengths:
                batch = str(max(1, min(options.peer_batch, 16384 // length)))
                result = str(Path(folder) / "peer")
                limits = ("--batch", batch, "--nodes", str(ours["expanded"]))
                peer = run_apart(options.peer, str(PEER), *limits, *files[:2], result, *files[2:])
                print(
                    f"  circuit-tracer   {peer['seconds']:8.1f} s (CPU {peer['cpu']:.1f} s), peak {peer['peak']:.1f} GiB; "
                    f"{peer['seconds'] / ours['seconds']:.1f}x as long"
                )


if __name__ == "__main__":
    main()
