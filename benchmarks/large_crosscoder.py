"""A cross-layer transcoder larger than memory: seconds to open its checkpoint, seconds to trace a prompt, peak memory.

    python benchmarks/large_crosscoder.py --folder SCRATCH             40 GB, in a file most of which is a hole

The file is written without ever being in memory: encoders and, of every group, the decoder rows of the features that the prompt
activates hold random numbers; the rest is a hole that the file system keeps no blocks for. Opening reads the header; tracing
reads every encoder once, group by group, and the decoder rows of the active features. What is mapped from the file counts as
resident while it is there, although the system may drop it at any time; memory that the process allocated is told apart.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import struct
import time
from pathlib import Path

import torch
from machine import allocated_bytes, machine, peak_bytes
from transformer_lens.model_bridge import TransformerBridge

import circuits
from replacement import Crosscoder, LanguageModel, ReplacementModel, TopK, Wiring, checkpoint
from replacement.crosscoder.formats.native import CONFIG_FILE, TENSOR_FILE, config_digest

L, D, V, T, ACTIVE = 12, 1024, 1000, 16, 16


def language_model() -> LanguageModel:
    """12 layers of width 1,024, random."""
    config = {"n_layers": L, "d_model": D, "n_heads": 16, "d_head": 64, "n_ctx": 64, "d_vocab": V}
    config |= {"act_fn": "gelu", "normalization_type": "LN", "seed": 0}
    return LanguageModel(TransformerBridge.boot_native(config), name="random-12x1024")


def write(folder: Path, lm: LanguageModel, tokens_T: torch.Tensor, n_features: int) -> int:
    """Write the checkpoint; returns its size in bytes."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        shapes = Crosscoder(
            Wiring.strictly_causal(lm, read="mlp_in"), n_features=n_features, activation=TopK(ACTIVE),
            dtype=torch.bfloat16, model_fingerprint=lm.fingerprint,
        )  # fmt: skip
    places, end = {}, 0
    for name, value in shapes.state_dict().items():
        places[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [end, end + 2 * value.numel()]}
        end += 2 * value.numel()
    header = json.dumps(places).encode()
    header += b" " * (-len(header) % 8)
    path = folder / TENSOR_FILE
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    generator, inputs = torch.Generator().manual_seed(0), lm.read(tokens_T, shapes.wiring.read_sites)
    with path.open("r+b") as file:

        def put(name: str, values: torch.Tensor, first: int = 0) -> None:
            file.seek(8 + len(header) + places[name]["data_offsets"][0] + 2 * first)
            file.write(values.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())

        for group in range(L):
            encoder_FD = torch.randn(n_features, D, generator=generator).mul_(D**-0.5)
            put(f"W_enc.{group}", encoder_FD)
            (site,) = shapes.wiring.reads[group]
            encoder_FD = encoder_FD.to(torch.bfloat16).float()
            active = torch.unique((inputs[site] @ encoder_FD.T).topk(2 * ACTIVE, dim=1).indices).tolist()
            n_numbers = len(shapes.wiring.writes[group]) * D
            for index in active:
                put(f"W_dec.{group}", torch.randn(n_numbers, generator=generator) * 0.02, index * n_numbers)
    config = {
        "format": "crosstrace crosscoder",
        "version": 2,
        "model_name": lm.name,
        "model_fingerprint": lm.fingerprint,
        **shapes.settings(),
        "dtype": "bfloat16",
        "training": {},
        "fingerprint": f"2:{hashlib.sha256(header).hexdigest()[:16]}",
        "tensors_sha256": "",
    }
    config = json.loads(json.dumps(config))
    config["config_sha256"] = config_digest(config)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return path.stat().st_size


def main() -> None:
    """Write, open, trace, print."""
    parser = argparse.ArgumentParser(description="Trace with a crosscoder larger than memory.")
    parser.add_argument(
        "--folder", type=Path, required=True, help="where to write the checkpoint, which is removed at the end"
    )
    parser.add_argument("--gigabytes", type=float, default=40.0, help="size of the checkpoint")
    parser.add_argument("--nodes", type=int, default=200, help="features expanded")
    options = parser.parse_args()
    numbers_per_feature = L * D + L * (L + 1) // 2 * D  # in all layers
    n_features = int(options.gigabytes * 1e9 / 2 / numbers_per_feature)
    lm = language_model()
    tokens_T = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(1))
    folder = options.folder / "large_crosscoder"
    try:
        size = write(folder, lm, tokens_T, n_features)
        started = time.perf_counter()
        crosscoder = checkpoint.load(folder, lazy=True)
        opened = time.perf_counter()
        model = ReplacementModel(lm, crosscoder)
        graph = circuits.trace(model, tokens_T, max_nodes=options.nodes)
        traced = time.perf_counter()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"torch {torch.__version__}, {machine()}")
    print(f"checkpoint: {size / 1e9:.1f} GB, {L} layers of {n_features:,} features, width {D}, bfloat16")
    print(f"opened in {opened - started:.2f} s; {T} tokens traced in {traced - opened:.1f} s")
    print(f"{graph.counts()['features']:,} features, identity error {graph.identity_error:.0e}")
    peak, allocated = peak_bytes() / 1e9, allocated_bytes() / 1e9
    print(f"peak resident memory {peak:.1f} GB (writing included); allocated at the end {allocated:.1f} GB")


if __name__ == "__main__":
    main()
