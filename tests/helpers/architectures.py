"""Settings of a tiny model of every row of the architecture table."""

from __future__ import annotations

from typing import Any

from tiny import CAPS, CONTEXT, GPT2, GROUPED, MULTIPLIERS, SIZES, VOCABULARY, WINDOW

_GPT = {**GPT2, "eos_token_id": 1}
_ROTARY_GPT = {**_GPT, "rotary_dim": 4}
_LLAMA = {**SIZES, **GROUPED}
_GROUPED = {**SIZES, "num_key_value_heads": 2}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_FALCON_40B = {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": True, "bias": False}
_OPT = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}
_LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
_NAMED = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2}

SETTINGS: dict[str, dict[str, Any]] = {
    "Apertus": _LLAMA,
    "Arcee": _LLAMA,
    "BLOOM": {**_NAMED, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "CodeGen": _ROTARY_GPT,
    "Cohere (Command R)": _GROUPED,
    "Cohere (Command R+, norms of queries and keys)": {**_GROUPED, "use_qk_norm": True},
    "Cohere 2": {**_GROUPED, **WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "ERNIE 4.5": _LLAMA,
    "EXAONE 4": {**_LLAMA, **WINDOW, "sliding_window_pattern": 2},
    "Falcon (7B: parallel, one norm)": {**SIZES, "multi_query": True, "parallel_attn": True, "bias": False},
    "Falcon (40B, 180B: parallel, two norms)": _FALCON_40B,
    "Falcon (RW: ALiBi, sequential)": {
        **SIZES,
        "multi_query": False,
        "parallel_attn": False,
        "alibi": True,
        "bias": True,
    },
    "Gemma": _LLAMA,
    "Gemma 2": {**_LLAMA, **WINDOW, **CAPS},
    "Gemma 3": {**_LLAMA, **WINDOW},
    "GLM": _LLAMA,
    "GLM 4": _LLAMA,
    "GPT-2": _GPT,
    "GPT-BigCode (StarCoder)": _GPT,
    "GPT-J": _ROTARY_GPT,
    "GPT-Neo": {
        **_NAMED,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "max_position_embeddings": CONTEXT,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
    },
    "GPT-NeoX (Pythia)": SIZES,
    "GPT-NeoX (sequential)": {**SIZES, "use_parallel_residual": False},
    "GPT-OSS": {**_LLAMA, **WINDOW, **_LOCAL},
    "Granite": {**_GROUPED, **MULTIPLIERS},
    "Granite MoE": {**_GROUPED, **MULTIPLIERS, **_LOCAL},
    "HunYuan": _LLAMA,
    "Llama": _LLAMA,
    "Ministral 3": _LLAMA,
    "Mistral": {**_LLAMA, **WINDOW},
    "Mixtral": {**_LLAMA, **_LOCAL},
    "MPT": {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": CONTEXT},
    "Nemotron": _LLAMA,
    "OLMo": _GROUPED,
    "OLMo 2": _GROUPED,
    "OLMo 3": {**_GROUPED, **WINDOW},
    "OLMoE": {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "OPT": _OPT,
    "Phi": SIZES,
    "Phi 3": _GROUPED,
    "Qwen 2": _GROUPED,
    "Qwen 2 MoE": {**_GROUPED, **_QWEN_MOE, "shared_expert_intermediate_size": 16},
    "Qwen 3": _LLAMA,
    "Qwen 3 MoE": {**_LLAMA, **_QWEN_MOE},
    "Seed-OSS": _LLAMA,
    "SmolLM 3": {**_GROUPED, "no_rope_layer_interval": 2},
    "StableLM": _GROUPED,
    "StableLM (12B: parallel)": {**_GROUPED, "use_parallel_residual": True, "qk_layernorm": True},
    "StarCoder 2": _GROUPED,
    "VaultGemma": {**_LLAMA, **WINDOW},
    "BERT (as a decoder)": {**SIZES, "is_decoder": True},
    "DeepSeek V3": {**SIZES, "num_key_value_heads": 4, **_LATENT},
    "Falcon (11B: new decoder, one norm)": {**_FALCON_40B, "num_ln_in_parallel_attn": 1},
    "GPT": _GPT,
    "Mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2},
    "nanochat": _GROUPED,
    "OPT (350M)": {**_OPT, "do_layer_norm_before": False},
    "RecurrentGemma": _GROUPED,
    "T5": {"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8},
    "XGLM": {
        **_NAMED,
        "d_model": 32,
        "ffn_dim": 48,
        "num_layers": 3,
        "attention_heads": 4,
        "max_position_embeddings": CONTEXT,
    },
}
