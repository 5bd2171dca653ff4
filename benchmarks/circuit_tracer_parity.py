"""circuit-tracer and this package on the same models and crosscoders: every number of their graphs, seconds and memory.

    python -m venv PEER && PEER/bin/pip install circuit-tracer==0.5.0 torch==2.13.0
    python benchmarks/circuit_tracer_parity.py --peer PEER/bin/python       nine small models, about 2 minutes
    python benchmarks/circuit_tracer_parity.py --install PEER               the same, making that environment first
    python benchmarks/circuit_tracer_parity.py --peer PEER/bin/python --speed         a CLT of 12 layers of 768, three times

circuit-tracer needs older versions of transformers and TransformerLens than this package, hence an environment of its own.
Random models in the shapes of GPT-2, Llama and Gemma 2, and random crosscoders in circuit-tracer's own layout, are written to
disk and loaded by both; each measurement is a process of its own, and both take turns. circuit-tracer makes rows for all active
features, this package for those that can reach an output (most features of the last layer cannot). Compared are

    features      the sets of (layer, position, index) that are active
    activations   largest difference, relative to the largest activation
    rows          how many there are here; features without one have no effect on any row, which is part of the comparison
    adjacency     largest difference of an entry of these rows, relative to the largest entry of its row
    nodes, edges  in the pruned graph, with how many only one side kept. circuit-tracer sums in float32, so that a node or edge
                  at the very threshold may fall on either side: where the sets differ they are compared again with its own
                  pruning in float64, and both numbers are shown
    scores        largest difference of the replacement and completeness scores
    faster        ratio of seconds per row

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
from circuit_tracer_files import Setting, write_crosscoder, write_model
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
LARGE = (Setting("GPT-2", "CLT", "jumprelu", n_layers=12, d_model=768, n_features=2048, n_active=9, n_tokens=32),)
TOLERANCE = {"activations": 1e-5, "adjacency": 1e-5, "scores": 1e-4}
_KINDS = (NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN, NodeKind.LOGIT)


def trace(options: argparse.Namespace) -> dict[str, float]:
    """Trace in this process, and write the graph as circuit-tracer's peer script writes its own."""
    model = replacement.load(options.model, crosscoder=options.crosscoder)
    started, cpu = time.perf_counter(), time.process_time()
    graph = circuits.trace(model, options.tokens, coverage=1.0, max_nodes=options.nodes, conventions="circuit-tracer")
    facts = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu, "peak": peak_bytes() / 2**30}
    scores = graph.scores()
    facts |= {"replacement": scores.replacement, "completeness": scores.completeness}
    facts["rows"] = int(graph.nodes.expanded.sum())
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
    """Differences of two graphs; without numbers where they do not have the same features and logits."""
    same = all(np.array_equal(ours[name], peer[name]) for name in ("features", "logits"))
    result: dict[str, Any] = {"features": f"{len(ours['features']):,} equal" if same else "different"}
    if not same:
        return result
    largest = np.abs(peer["activations"]).max()
    result["activations"] = float(np.abs(ours["activations"] - peer["activations"]).max() / largest)
    rows = ours["rows"]
    result["rows"] = f"{len(rows):,}"
    row_max = np.abs(peer["adjacency"][rows]).max(1, keepdims=True)
    result["adjacency"] = float((np.abs(ours["adjacency"][rows] - peer["adjacency"][rows]) / row_max).max())
    for name in ("nodes", "edges"):
        kept = ours[f"kept_{name}"]
        apart = [int((kept != peer[f"kept_{name}{bits}"]).sum()) for bits in ("", "_64")]
        result[name] = f"{int(kept.sum()):,}" + (
            "" if not any(apart) else f" ({apart[0]} apart, {apart[1]} in float64)"
        )
        result[f"{name}_apart"] = apart[1]
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
            runs[name].append(run_apart(*command, *arguments, str(folder / name), *numbers))
    row: dict[str, Any] = {"": str(setting)}
    row |= compare(load_file(folder / "ours"), load_file(folder / "peer"))
    last = [runs[name][-1] for name in ("ours", "peer")]
    row["scores"] = max(abs(last[0][name] - last[1][name]) for name in ("replacement", "completeness"))
    ok = row["features"] != "different" and all(row[name] <= limit for name, limit in TOLERANCE.items())
    ok = ok and not row.pop("nodes_apart") and not row.pop("edges_apart")
    for name in ("seconds", "peak"):
        row[name] = " / ".join(f"{statistics.median(run[name] for run in runs[side]):.2g}" for side in ("ours", "peer"))
    per_row = last[0]["rows"] / last[1]["rows"]
    pairs = zip(runs["ours"], runs["peer"], strict=True)
    row["faster"] = f"{statistics.median(peer['seconds'] / ours['seconds'] for ours, peer in pairs) * per_row:.1f}x"
    return row, ok


def run_apart(*command: str) -> dict[str, Any]:
    """The JSON that another process prints last."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])} failed: {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    """Print the table, one row when it is ready."""
    parser = argparse.ArgumentParser(description="Compare graphs with circuit-tracer's.")
    parser.add_argument("--peer", help="Python of an environment that has circuit-tracer")
    parser.add_argument("--install", type=Path, help="folder to make such an environment in")
    parser.add_argument("--speed", action="store_true", help="the large model instead of the nine small ones")
    parser.add_argument(
        "--rounds", type=int, default=0, help="runs of both, of which the median counts (1; 3 with --speed)"
    )
    parser.add_argument("--batch", type=int, default=64, help="targets of one backward pass of circuit-tracer")
    parser.add_argument("--only", default="", help="only the rows with this text in their name")
    options = parser.parse_args()
    if options.install is not None:
        options.peer = install(options.install)
    if not options.peer:
        parser.error("expected --peer PYTHON or --install FOLDER")
    print(f"{machine()}; seconds and peak GiB are ours / circuit-tracer's")
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
