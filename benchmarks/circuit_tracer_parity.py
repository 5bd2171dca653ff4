"""circuit-tracer and this package on the same models and crosscoders: every number of their graphs, seconds and memory.

    python -m venv PEER && PEER/bin/pip install circuit-tracer==0.5.0 torch==2.13.0
    python benchmarks/circuit_tracer_parity.py --peer PEER/bin/python       nine small models, about 2 minutes
    python benchmarks/circuit_tracer_parity.py --install PEER               the same, making that environment first
    python benchmarks/circuit_tracer_parity.py --peer PEER/bin/python --speed --only CLT      12 layers of 768, three times

circuit-tracer needs older versions of transformers and TransformerLens than this package, hence an environment of its own.
Random models in the shapes of GPT-2, Llama and Gemma 2, and random crosscoders in circuit-tracer's own layout, are written to
disk and loaded by both; each measurement is a process of its own, and both take turns. circuit-tracer makes rows for all active
features, this package for those that can reach an output (most features of the last layer cannot). Compared are

    features      the sets of (layer, position, index) that are active
    activations   largest difference, relative to the largest activation
    rows          features and outputs with a row, ours / circuit-tracer's; features that have none here have no effect on any
                  row that there is, which is part of the comparison
    adjacency     largest difference of an entry of our rows, relative to the largest entry of its row
    nodes, edges  in the pruned graph, with how many only one side kept. circuit-tracer sums in float32, so that a node or edge
                  at the very threshold may fall on either side: where the sets differ they are compared again with its own
                  pruning in float64, and both numbers are shown
    scores        largest difference of the replacement and completeness scores
    seconds       of one processor, ours / circuit-tracer's: both run on one thread, and other work on the machine then matters
                  little
    peak          of resident memory in GiB, ours / circuit-tracer's, models and crosscoders included
    faster        ratio of the seconds

Exits with 1 when one of them is beyond its tolerance.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from circuit_tracer_files import Setting, run_apart, write_crosscoder, write_model
from machine import machine, peak_bytes
from safetensors.numpy import load_file, save_file

import circuits
import replacement
from circuits import CircuitGraph, NodeKind
from replacement import Features, LanguageModel

PEER = Path(__file__).with_name("circuit_tracer_peer.py")
REQUIREMENTS = ("circuit-tracer==0.5.0", "torch==2.13.0")
SMALL = tuple(
    Setting(model, crosscoder, activation)
    for model, activations in {
        "GPT-2": ("relu", "jumprelu", "topk"),
        "Llama": ("jumprelu", "topk", "relu"),
        "Gemma 2": ("topk", "relu", "jumprelu"),
    }.items()
    for crosscoder, activation in zip(("PLT", "skip PLT", "CLT"), activations, strict=True)
)
LARGE = tuple(
    Setting("GPT-2", crosscoder, activation, n_layers=12, d_model=768, n_features=2048, n_active=9, n_tokens=32)
    for crosscoder, activation in (("PLT", "relu"), ("skip PLT", "topk"), ("CLT", "jumprelu"))
)
TOLERANCE = {"activations": 1e-5, "adjacency": 1e-5, "scores": 1e-4}
_KINDS = (NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN, NodeKind.LOGIT)


def trace(options: argparse.Namespace) -> dict[str, float]:
    """Trace in this process, and write the graph as circuit-tracer's peer script writes its own."""
    model = replacement.load(options.model, crosscoder=options.crosscoder)
    started = time.process_time()
    graph = circuits.trace(model, options.tokens, coverage=1.0, max_nodes=options.nodes, conventions="circuit-tracer")
    facts = {"cpu": time.process_time() - started, "peak": peak_bytes() / 2**30}
    scores = graph.scores()
    facts |= {"replacement": scores.replacement, "completeness": scores.completeness}
    active = model.localize(options.tokens).features
    save_file(as_dense(graph, graph.prune(), active), options.result)
    return facts


def as_dense(graph: CircuitGraph, circuit: CircuitGraph, active: Features) -> dict[str, np.ndarray]:
    """A graph and its pruned circuit as arrays over nodes in circuit-tracer's order: features, errors, tokens, logits."""
    nodes, n_tokens = graph.nodes, len(graph.metadata["tokens"])
    features, errors, tokens, logits = (np.flatnonzero(nodes.mask(kind)) for kind in _KINDS)
    names = torch.stack([active.group, active.row, active.index], 1).tolist()
    number = {tuple(name): place for place, name in enumerate(names)}
    columns = (nodes.layer[features].tolist(), nodes.position[features].tolist(), nodes.index[features].tolist())
    place = np.full(len(nodes), -1)
    place[features] = [number[name] for name in zip(*columns, strict=True)]
    place[errors] = len(active) + nodes.layer[errors] * n_tokens + nodes.position[errors]
    first = len(active) + graph.metadata["n_layers"] * n_tokens
    place[tokens], place[logits] = first + np.arange(n_tokens), first + n_tokens + np.arange(len(logits))
    size, place_of = first + n_tokens + len(logits), dict(zip(nodes.ids(), place.tolist(), strict=True))
    kept = np.array([place_of[name] for name in circuit.nodes.ids()])
    kept_nodes, kept_edges, adjacency = np.zeros(size, bool), np.zeros((size, size), bool), np.zeros((size, size), "f4")
    kept_nodes[kept] = True
    kept_edges[kept[circuit.edges.target], kept[circuit.edges.source]] = True
    adjacency[place[graph.edges.target], place[graph.edges.source]] = graph.edges.weight
    return {
        "features": np.array(names),
        "activations": active.activation.numpy(),
        "adjacency": adjacency,
        "rows": place[nodes.expanded],
        "logits": nodes.index[logits],
        "kept_nodes": kept_nodes,
        "kept_edges": kept_edges,
    }


def compare(ours: dict[str, np.ndarray], peer: dict[str, np.ndarray]) -> dict[str, Any]:
    """Differences of two graphs.

    `apart` counts the nodes and edges that only one side's pruning keeps, circuit-tracer's in float64. There is nothing else to
    compare where the graphs do not have the same features and logits.
    """
    if any(not np.array_equal(ours[name], peer[name]) for name in ("features", "logits")):
        return {"features": "different", "activations": np.inf, "adjacency": np.inf, "apart": 1}
    result: dict[str, Any] = {"features": f"{len(ours['features']):,} equal", "apart": 0}
    largest = np.abs(peer["activations"]).max()
    result["activations"] = float(np.abs(ours["activations"] - peer["activations"]).max() / largest)
    rows = ours["rows"]
    result["rows"] = f"{len(rows):,} / {len(peer['features']) + len(peer['logits']):,}"
    row_max = np.abs(peer["adjacency"][rows]).max(1, keepdims=True)
    result["adjacency"] = float((np.abs(ours["adjacency"][rows] - peer["adjacency"][rows]) / row_max).max())
    for name in ("nodes", "edges"):
        kept = ours[f"kept_{name}"]
        apart, apart_64 = (int((kept != peer[f"kept_{name}{bits}"]).sum()) for bits in ("", "_64"))
        result["apart"] += apart_64
        result[name] = f"{int(kept.sum()):,}" + (
            f" ({apart} apart, {apart_64} in float64)" if apart or apart_64 else ""
        )
    return result


def measure(setting: Setting, options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    """One row of the table, and whether everything is within its tolerance."""
    tokens_T = write_model(setting, folder / "model")
    write_crosscoder(setting, LanguageModel.from_pretrained(folder / "model"), tokens_T, folder / "crosscoder")
    arguments = [str(folder / name) for name in ("model", "crosscoder")]
    numbers = [str(token) for token in tokens_T.tolist()]
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    commands = {
        "ours": [sys.executable, __file__, "--ours"],
        "peer": [options.peer, str(PEER), "--batch", str(options.batch)],
    }
    for _ in range(options.rounds or (3 if options.speed else 1)):
        for name, command in commands.items():
            runs[name].append(run_apart(*command, *arguments, str(folder / name), *numbers, threads=1))
    row: dict[str, Any] = {"": str(setting)}
    row |= compare(load_file(folder / "ours"), load_file(folder / "peer"))
    last = [runs[name][-1] for name in ("ours", "peer")]
    row["scores"] = max(abs(last[0][name] - last[1][name]) for name in ("replacement", "completeness"))
    ok = not row.pop("apart") and all(row[name] <= limit for name, limit in TOLERANCE.items())
    for name, key in (("seconds", "cpu"), ("peak", "peak")):
        row[name] = " / ".join(f"{statistics.median(run[key] for run in runs[side]):.2g}" for side in ("ours", "peer"))
    pairs = zip(runs["ours"], runs["peer"], strict=True)
    row["faster"] = f"{statistics.median(peer['cpu'] / ours['cpu'] for ours, peer in pairs):.1f}x"
    return row, ok


def main() -> None:
    """Print the table, one row when it is ready."""
    parser = argparse.ArgumentParser(description="Compare graphs with circuit-tracer's.")
    parser.add_argument("--peer", help="Python of an environment that has circuit-tracer")
    parser.add_argument("--install", type=Path, help="folder to make such an environment in")
    parser.add_argument("--speed", action="store_true", help="the large model instead of the nine small ones")
    parser.add_argument(
        "--rounds", type=int, default=0, help="runs of both, of which the median counts (1; 3 with --speed)"
    )
    parser.add_argument("--batch", type=int, default=32, help="targets of one backward pass of circuit-tracer")
    parser.add_argument("--only", default="", help="only the rows with this text in their name")
    options = parser.parse_args()
    if options.install is not None:
        options.peer = install(options.install)
    if not options.peer:
        parser.error("expected --peer PYTHON or --install FOLDER")
    print(machine())
    settings = [setting for setting in (LARGE if options.speed else SMALL) if options.only in str(setting)]
    all_ok = True
    for number, setting in enumerate(settings):
        with tempfile.TemporaryDirectory() as folder:
            row, ok = measure(setting, options, Path(folder))
        all_ok &= ok
        cells = [f"{value:.0e}" if isinstance(value, float) else str(value) for value in row.values()]
        if not number:
            print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
        print(f"| {' | '.join(cells)} |{'' if ok else ' BEYOND TOLERANCE'}", flush=True)
    raise SystemExit(not all_ok)


def install(folder: Path) -> str:
    """Make an environment with circuit-tracer; returns its Python."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    subprocess.run([str(python), "-m", "pip", "install", *REQUIREMENTS], check=True)
    return str(python)


def trace_alone(arguments: list[str]) -> None:
    """What the process for this package's side does."""
    parser = argparse.ArgumentParser()
    for name in ("model", "crosscoder", "result"):
        parser.add_argument(name, type=Path)
    parser.add_argument("tokens", type=int, nargs="+")
    parser.add_argument("--nodes", type=int)
    print(json.dumps(trace(parser.parse_args(arguments))))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ours"]:
        trace_alone(sys.argv[2:])
    else:
        main()
