"""The part of the comparisons that runs in circuit-tracer's environment: it attributes a prompt and writes what it found.

PEER/bin/python benchmarks/circuit_tracer_peer.py MODEL CROSSCODER RESULT.safetensors TOKENS --nodes N --batch B

MODEL and CROSSCODER are folders as `circuit_tracer_files.py` writes them. Nothing is downloaded: the model goes through the
converters of TransformerLens, with the same options as `ReplacementModel.from_pretrained`. TopK, which circuit-tracer has but
its loaders do not set, is put in place where `config.yaml` asks for it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from circuit_tracer import attribute
from circuit_tracer.graph import compute_graph_scores, prune_graph
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.activation_functions import TopK
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from circuit_tracer.utils.hf_utils import load_transcoders
from machine import peak_bytes
from safetensors.torch import save_file
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import (
    convert_gemma_weights,
    convert_gpt2_weights,
    convert_llama_weights,
)


def load_model(folder: Path, crosscoder: Path) -> TransformerLensReplacementModel:
    """A replacement model from two local folders."""
    source = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    convert, settings = FAMILIES[source.config.model_type]
    cfg = HookedTransformerConfig(**settings(source.config), device="cpu", dtype=torch.float32)
    model = TransformerLensReplacementModel(cfg)
    model.load_and_process_state_dict(
        convert(source, cfg), fold_ln=False, center_writing_weights=False, center_unembed=False
    )
    model._configure_replacement_model(load_crosscoder(crosscoder, source.config.num_hidden_layers))
    model.tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="w0", eos_token="w0", pad_token="w0", unk_token="w0"
    )
    return model


def common_settings(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    """Settings of TransformerLens that every family has."""
    return {
        "d_vocab": config.vocab_size,
        "model_name": "random",
        "n_ctx": config.max_position_embeddings,
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
    }


def gpt2_settings(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    """Settings of TransformerLens for GPT-2."""
    return common_settings(config) | {
        "d_head": config.n_embd // config.n_head,
        "act_fn": "gelu_new",
        "normalization_type": "LN",
        "eps": config.layer_norm_epsilon,
    }


def llama_settings(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    """Settings of TransformerLens for Llama."""
    return common_settings(config) | {
        "d_head": config.head_dim,
        "d_mlp": config.intermediate_size,
        "n_key_value_heads": config.num_key_value_heads,
        "eps": config.rms_norm_eps,
        "act_fn": "silu",
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_base": config.rope_theta,
        "rotary_dim": config.head_dim,
        "rotary_adjacent_pairs": False,
        "gated_mlp": True,
        "final_rms": True,
    }


def gemma2_settings(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    """Settings of TransformerLens for Gemma 2."""
    kinds = [kind.split("_")[0].replace("sliding", "local").replace("full", "global") for kind in config.layer_types]
    return llama_settings(config) | {
        "act_fn": "gelu_pytorch_tanh",
        "use_attn_scale": True,
        "attn_scale": config.query_pre_attn_scalar**0.5,
        "use_local_attn": True,
        "window_size": config.sliding_window,
        "attn_types": kinds,
        "attn_scores_soft_cap": config.attn_logit_softcapping,
        "output_logits_soft_cap": config.final_logit_softcapping,
        "use_normalization_before_and_after": True,
    }


FAMILIES = {
    "gpt2": (convert_gpt2_weights, gpt2_settings),
    "llama": (convert_llama_weights, llama_settings),
    "gemma2": (convert_gemma_weights, gemma2_settings),
}
"""Converter of weights and settings of each family of models."""


def load_crosscoder(folder: Path, n_layers: int) -> torch.nn.Module:
    """Transcoders or a cross-layer transcoder from a local folder, read as circuit-tracer reads them by default."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    cpu = torch.device("cpu")
    if config["model_kind"] == "cross_layer_transcoder":
        hooks = {name: config[name] for name in ("feature_input_hook", "feature_output_hook", "scan")}
        crosscoder = load_clt(str(folder), device=cpu, dtype=torch.float32, **hooks)
    else:
        config["transcoders"] = [str(folder / f"layer_{layer}.safetensors") for layer in range(n_layers)]
        crosscoder = load_transcoders(config, cpu, torch.float32)
    if config.get("activation") == "topk":
        for part in crosscoder if hasattr(crosscoder, "transcoders") else [crosscoder]:
            part.activation_function = TopK(config["k"])
    return crosscoder


def main() -> None:
    """Attribute, prune, and print seconds and memory as JSON."""
    parser = argparse.ArgumentParser(description="Attribute one prompt with circuit-tracer.")
    parser.add_argument("model", type=Path)
    parser.add_argument("crosscoder", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("tokens", type=int, nargs="+")
    parser.add_argument("--nodes", type=int, help="most features in the graph; all by default")
    parser.add_argument("--batch", type=int, default=64, help="targets of one backward pass")
    options = parser.parse_args()
    model = load_model(options.model, options.crosscoder)
    started, cpu = time.perf_counter(), time.process_time()
    graph = attribute(torch.tensor(options.tokens), model, batch_size=options.batch, max_feature_nodes=options.nodes)
    facts = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu, "peak": peak_bytes() / 2**30}
    facts["replacement"], facts["completeness"] = compute_graph_scores(graph)
    pruned = prune_graph(graph)
    tensors = {
        "features": graph.active_features[graph.selected_features],  # layer, position, index
        "activations": graph.activation_values[graph.selected_features],
        "adjacency": graph.adjacency_matrix,
        "logits": graph.logit_token_ids,
        "probabilities": graph.logit_probabilities,
        "kept_nodes": pruned.node_mask,
        "kept_edges": pruned.edge_mask,
    }
    graph.adjacency_matrix = graph.adjacency_matrix.double()
    torch.set_default_dtype(torch.float64)
    pruned = prune_graph(graph)
    tensors |= {"kept_nodes_64": pruned.node_mask, "kept_edges_64": pruned.edge_mask}
    save_file({name: value.contiguous() for name, value in tensors.items()}, options.result)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
