"""Attribution of long prompts: time against the flop floor, peak memory, and circuit-tracer on the same model in the same run.

    python benchmarks/long_prompts.py                                    32, 256 and 1,024 tokens, 2,000 features expanded
    python benchmarks/long_prompts.py --peer PEER/bin/python             also circuit-tracer, installed in its own environment

The model has the shapes of GPT-2 small (12 layers, d_model 768) and random weights; its crosscoder is a CLT with thresholds
(JumpReLU) that leave 8 features active for each layer and token, about 100 in all, unevenly over positions. Every measurement
is a process of its own, so that its peak memory is its own. Times are those of a whole trace, and of the rows alone: everything
between a localized prompt and its finished rows. `floor` is the number of floating-point operations (see
`benchmarks/attribution.py`) over the speed of one [2048, D] x [D, D] product, measured before and after in the same process.

The peer (`pip install circuit-tracer==0.5.0 torch==2.13.0`) is given the same weights, targets and number of features, at
lengths where its memory allows it. Where all features are expanded (`--nodes 100000`), logit rows of both are compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attribution import floor_flops, matmul_rate
from machine import machine, peak_bytes
from safetensors.torch import save_file
from transformer_lens.model_bridge import TransformerBridge

import circuits
from circuits import NodeKind
from circuits.attribution.expansion import Attributor
from circuits.attribution.targets import output_weights, resolve_logit, top_logits
from replacement import Crosscoder, JumpReLU, LanguageModel, LocalReplacement, ReplacementModel, Wiring

L, D, H, V, F, ACTIVE = 12, 768, 12, 1000, 2048, 8
PEER = Path(__file__).with_name("long_prompts_peer.py")


def random_model(n_tokens: int) -> tuple[ReplacementModel, torch.Tensor]:
    """The model, and a prompt of random tokens."""
    config = {"n_layers": L, "d_model": D, "n_heads": H, "d_head": D // H, "n_ctx": 1024, "d_vocab": V}
    config |= {"act_fn": "gelu", "normalization_type": "LN", "seed": 0}
    lm = LanguageModel(TransformerBridge.boot_native(config), name="random-12x768")
    wiring = Wiring.strictly_causal(lm, read="resid_mid")
    crosscoder = Crosscoder(wiring, n_features=F, activation=JumpReLU(), undecomposed_positions=1, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in crosscoder.named_parameters():
        if "dec" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    tokens_T = torch.randint(0, V, (n_tokens,), generator=generator)
    inputs = lm.read(tokens_T, wiring.read_sites)
    for group in range(L):  # a threshold that leaves ACTIVE features for the average token
        (site,) = wiring.reads[group]
        pre_TF = inputs[site] @ crosscoder.encoder(group, site).T
        count = ACTIVE * n_tokens
        crosscoder.threshold.data[group] = pre_TF.flatten().topk(count + 1).values[-2:].mean().clamp(min=0)
    return ReplacementModel(lm, crosscoder), tokens_T


def save_for_peer(model: ReplacementModel, tokens_T: torch.Tensor, path: Path) -> None:
    """Weights under the names of HookedTransformer and of circuit-tracer's CLT."""
    native = model.language_model.parts.bridge.original_model.state_dict()
    weights = {name.replace("._original_component", ""): value for name, value in native.items()}
    tensors: dict[str, torch.Tensor] = {"tokens": tokens_T}
    names = {"tok_embed.weight": "embed.W_E", "pos.weight": "pos_embed.W_pos", "head.bias": "unembed.b_U"}
    names |= {"ln_out.weight": "ln_final.w", "ln_out.bias": "ln_final.b"}
    tensors |= {f"model.{target}": weights[name] for name, target in names.items()}
    tensors["model.unembed.W_U"] = weights["head.weight"].T
    for layer in range(L):
        source, target = f"layers.{layer}", f"model.blocks.{layer}"
        for norm in ("ln1", "ln2"):
            tensors |= {f"{target}.{norm}.{p[0]}": weights[f"{source}.{norm}.{p}"] for p in ("weight", "bias")}
        for name in "qkv":
            tensors[f"{target}.attn.W_{name.upper()}"] = (
                weights[f"{source}.attn.{name}.weight"].T.unflatten(1, (H, -1)).transpose(0, 1)
            )
            tensors[f"{target}.attn.b_{name.upper()}"] = weights[f"{source}.attn.{name}.bias"].unflatten(0, (H, -1))
        tensors[f"{target}.attn.W_O"] = weights[f"{source}.attn.o.weight"].T.unflatten(0, (H, -1))
        tensors[f"{target}.attn.b_O"] = weights[f"{source}.attn.o.bias"]
        for name in ("in", "out"):
            tensors[f"{target}.mlp.W_{name}"] = weights[f"{source}.mlp.{name}.weight"].T
            tensors[f"{target}.mlp.b_{name}"] = weights[f"{source}.mlp.{name}.bias"]
    crosscoder = model.crosscoder
    tensors["clt.W_enc"] = torch.stack(list(crosscoder.W_enc))
    tensors["clt.b_enc"], tensors["clt.b_dec"] = (
        torch.stack(list(crosscoder.b_enc)),
        torch.stack(list(crosscoder.b_dec)),
    )
    tensors["clt.threshold"] = crosscoder.threshold
    tensors |= {f"clt.W_dec.{group}": crosscoder.W_dec[group] for group in range(L)}
    save_file({name: value.detach().contiguous().clone() for name, value in tensors.items()}, path)


def measure(n_tokens: int, n_nodes: int, weights: Path | None) -> dict[str, Any]:
    """Trace one prompt in this process."""
    model, tokens_T = random_model(n_tokens)
    if weights is not None:
        save_for_peer(model, tokens_T, weights)
    started, cpu = time.perf_counter(), time.process_time()
    graph = circuits.trace(model, tokens_T, coverage=1.0, max_nodes=n_nodes)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = peak_bytes() / 2**30
    nodes, n_edges = graph.nodes, len(graph.edges)
    logit = int(np.flatnonzero(nodes.mask(NodeKind.LOGIT))[0])
    row = slice(graph.edges.indptr[logit], graph.edges.indptr[logit + 1])
    of_features = nodes.mask(NodeKind.FEATURE)[graph.edges.source[row]]
    first_logit = float(np.abs(graph.edges.weight[row][of_features].astype(np.float64)).sum())
    with torch.no_grad():
        local = model.localize(tokens_T)
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
        "logit": first_logit,
    }


def logit_flops(local: LocalReplacement, n_logits: int) -> float:
    """The nominal floor of logit targets at the last position, above all layers."""
    cone, width = local.n_positions, local.shape.n_heads * local.shape.d_head
    attention = local.shape.n_layers * (cone * 4 * D * width + cone * (cone + 1) * width)
    writes = torch.tensor([len(sites) for sites in local.crosscoder.wiring.writes])
    rows = int(writes[local.features.group].sum()) + local.shape.n_layers * cone
    return float(n_logits * (attention + 2 * D * rows))


def run_apart(*command: str) -> dict[str, Any]:
    """The JSON that another process prints last."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:100]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure every length and print the table."""
    parser = argparse.ArgumentParser(description="Time attribution of long prompts.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 256, 1024], help="tokens of the prompts")
    parser.add_argument("--nodes", type=int, default=2000, help="features expanded")
    parser.add_argument("--peer", default="", help="Python of an environment that has circuit-tracer")
    parser.add_argument("--peer-lengths", type=int, nargs="*", default=[32, 256], help="lengths that the peer is given")
    parser.add_argument("--peer-batch", type=int, default=64, help="targets of one backward pass of the peer")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.nodes, options.weights)))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {machine()}")
    for length in options.lengths:
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "weights.safetensors"
            asked = ["--weights", str(weights)] if options.peer and length in options.peer_lengths else []
            common = ("--one", str(length), "--nodes", str(options.nodes))
            ours = run_apart(sys.executable, __file__, *common, *asked)
            if "failed" in ours:
                raise SystemExit(ours["failed"])
            print(
                f"{length} tokens: {ours['active']:,} active features, {ours['expanded']:,} expanded, {ours['edges']:,} edges"
            )
            print(
                f"  crosstrace       {ours['seconds']:8.1f} s (CPU {ours['cpu']:.1f} s), peak {ours['peak']:.1f} GiB; "
                f"identity error {ours['identity']:.0e}; rows alone {ours['rows']:.1f} s, "
                f"{ours['rows'] / ours['floor']:.2f}x their floor of {ours['floor']:.1f} s"
            )
            if asked:
                batch = str(max(1, min(options.peer_batch, 16384 // length)))
                peer = run_apart(options.peer, str(PEER), str(weights), str(ours["expanded"]), batch)
                if "failed" in peer:
                    print(f"  circuit-tracer   failed: {peer['failed']}")
                    continue
                print(
                    f"  circuit-tracer   {peer['seconds']:8.1f} s (CPU {peer['cpu']:.1f} s), peak {peer['peak']:.1f} GiB; "
                    f"{peer['seconds'] / ours['seconds']:.1f}x as long; {peer['active']:,} active features"
                )
                if ours["expanded"] == ours["active"]:  # its graph has no other features than those it expanded
                    print(
                        f"  sum of the first logit's row: {abs(peer['logit'] / ours['logit'] - 1):.0e} relative apart"
                    )


if __name__ == "__main__":
    main()
