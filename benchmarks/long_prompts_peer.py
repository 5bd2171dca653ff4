"""The part of `long_prompts.py` that runs in circuit-tracer's environment: the same weights, the same number of features.

PEER/bin/python benchmarks/long_prompts_peer.py WEIGHTS.safetensors N_FEATURES BATCH
"""

from __future__ import annotations

import json
import sys
import time

import torch
from circuit_tracer import attribute
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
from machine import peak_bytes
from safetensors.torch import load_file
from transformer_lens import HookedTransformerConfig


class Tokenizer:
    """What circuit-tracer asks of a tokenizer when it is given token ids."""

    padding_side = "right"

    def __init__(self, first: int, vocab_size: int) -> None:
        self.all_special_ids, self.vocab_size = [first], vocab_size
        self.bos_token_id = self.pad_token_id = self.eos_token_id = first

    def decode(self, tokens: object) -> str:
        """No text."""
        return ""


def main() -> None:
    """Attribute, and print what was seen as JSON."""
    weights, n_features, batch = load_file(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    tokens_T = weights["tokens"]
    n_layers, n_per_layer, width = weights["clt.W_enc"].shape
    n_heads = weights["model.blocks.0.attn.W_Q"].shape[0]
    config = HookedTransformerConfig(
        n_layers=n_layers,
        d_model=width,
        n_heads=n_heads,
        d_head=width // n_heads,
        n_ctx=weights["model.pos_embed.W_pos"].shape[0],
        d_vocab=weights["model.embed.W_E"].shape[0],
        act_fn="gelu",
        normalization_type="LN",
        model_name="random",
    )
    clt = CrossLayerTranscoder(
        n_layers, n_per_layer, width, activation_function="jump_relu", lazy_decoder=False,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "b_dec"):
            getattr(clt, name).copy_(weights[f"clt.{name}"])
        clt.activation_function.threshold.copy_(weights["clt.threshold"][:, None])
        for layer in range(n_layers):
            clt.W_dec[layer].copy_(weights[f"clt.W_dec.{layer}"])
    model = TransformerLensReplacementModel.from_config(config, clt)
    state = {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
    own = model.state_dict()
    renamed = {
        name.replace(".mlp.", ".mlp.old_mlp.").replace("unembed.", "unembed.old_unembed."): v
        for name, v in state.items()
    }
    unknown = sorted(set(renamed) - set(own))
    assert not unknown, unknown
    model.load_state_dict(renamed, strict=False)
    model.tokenizer = Tokenizer(int(tokens_T[0]), config.d_vocab)
    started, cpu = time.perf_counter(), time.process_time()
    graph = attribute(tokens_T, model, batch_size=batch, max_feature_nodes=n_features)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    first_logit = graph.adjacency_matrix[-len(graph.logit_targets)]
    result = {
        "seconds": seconds,
        "cpu": cpu,
        "peak": peak_bytes() / 2**30,
        "active": len(graph.active_features),
        # Of the features that were selected, the only ones in its graph.
        "logit": float(first_logit[: len(graph.selected_features)].double().abs().sum()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
