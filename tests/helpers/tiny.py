"""Tiny randomly initialised models in Hugging Face layout, one per supported architecture, made by the tests."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

from replacement import Crosscoder, LanguageModel, Lorsa, QueryKeys, TopK, Wiring
from replacement.language_model.boot import copy_bridge

VOCABULARY = 97
CONTEXT = 32
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
WINDOW = {"sliding_window": 4}
CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}
MULTIPLIERS = {
    "residual_multiplier": 0.3,
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.2,
    "logits_scaling": 3.0,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT, "bos_token_id": 1}

HUGGING_FACE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**GPT2, "eos_token_id": 1}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**SIZES, **GROUPED}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**SIZES, **GROUPED, **WINDOW, **CAPS}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**SIZES, **GROUPED, **WINDOW}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**SIZES, **GROUPED}),
    "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SIZES),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {**SIZES, "num_key_value_heads": 2}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {**SIZES, "num_key_value_heads": 2, **MULTIPLIERS}),
}
ARCHITECTURES = (*HUGGING_FACE, "native")


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 ... w96; w0 is the unknown word, w1 begins a sentence."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w1", pad_token="w2")


def save_model(architecture: str, folder: Path) -> Path:
    """Write a model of one of the architectures above."""
    _, model_class, options = HUGGING_FACE[architecture]
    return write_model(model_class, options, folder)


def write_model(model_class: str, options: dict[str, Any], folder: Path) -> Path:
    """Write a model with every weight away from its default, so that no norm gain or bias is trivial."""
    torch.manual_seed(0)
    build = getattr(transformers, model_class)
    model = build(build.config_class(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * 0.3
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    model.save_pretrained(folder)
    words = tokenizer()
    words.eos_token = words.bos_token  # some classes of tokenizers add one of their own past the vocabulary
    words.save_pretrained(folder)
    return folder


def write_base(folder: Path, target: Path, *, layers: Collection[int] = (0, 1, 2)) -> Path:
    """Write a model that differs from that of a folder in the MLPs of some layers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name and any(f".{layer}." in name for layer in layers):
                parameter.mul_(0.7)
    model.save_pretrained(target)
    tokenizer().save_pretrained(target)
    return target


def native_model(dtype: torch.dtype) -> LanguageModel:
    """A TransformerLens native model: no tokenizer, LayerNorm, learned positions."""
    config = {
        "n_layers": 2,
        "d_model": 32,
        "n_heads": 4,
        "d_head": 8,
        "n_ctx": CONTEXT,
        "d_vocab": VOCABULARY,
        "act_fn": "gelu",
        "normalization_type": "LN",
        "seed": 0,
    }
    return LanguageModel(TransformerBridge.boot_native(config, dtype=dtype), name="tiny-native")


def crosscoder_for(
    lm: LanguageModel, *, wiring: Wiring | None = None, n_features: int = 48, **options: Any
) -> Crosscoder:
    """A random crosscoder whose decoders and biases are not zero."""
    return _randomised(Crosscoder, lm, wiring or Wiring.strictly_causal(lm), n_features=n_features, **options)


def lorsa_for(
    lm: LanguageModel,
    *,
    wiring: Wiring | None = None,
    query_keys: QueryKeys | None = None,
    n_features: int = 48,
    **options: Any,
) -> Lorsa:
    """Random low-rank sparse attention, with patterns that are far from uniform."""
    sizes = query_keys or QueryKeys(n_groups=4, width=6)
    lorsa = _randomised(Lorsa, lm, wiring or Wiring.lorsa(lm), query_keys=sizes, n_features=n_features, **options)
    with torch.no_grad():
        for parameter in (*lorsa.W_Q, *lorsa.W_K):
            parameter.mul_(10)
    return lorsa


def _randomised(make: Any, lm: LanguageModel, wiring: Wiring, **options: Any) -> Any:
    """A crosscoder of a class, with random weights everywhere."""
    options.setdefault("activation", TopK(5))
    names = {"model_name": lm.name, "model_fingerprint": lm.fingerprint}
    crosscoder = make(wiring, seed=0, dtype=lm.dtype, **names, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in crosscoder.named_parameters():
            if "W_enc" not in name and "threshold" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return crosscoder


def base_of(lm: LanguageModel, *, folder: Path | None = None, layers: Collection[int] | None = None) -> LanguageModel:
    """A model that differs from this one in the MLPs of some layers, all by default: one it may have been fine-tuned from.

    Args:
        folder: what this one was loaded from; TransformerLens's Granite cannot be copied in memory.
    """
    loaded = None if folder is None else LanguageModel.from_pretrained(folder, dtype=lm.dtype)
    bridge = copy_bridge(lm.parts.bridge) if loaded is None else loaded.parts.bridge
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in range(lm.shape.n_layers) if layers is None else layers:
            for parameter in bridge.blocks[layer].mlp.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
                parameter.mul_(0.8).add_(noise * 0.05)
    return LanguageModel(bridge, name=f"{lm.name}-base")


def adapter_for(lm: LanguageModel, base: LanguageModel, **options: Any) -> Crosscoder:
    """A random adapter from a base model to a fine-tuned one."""
    options.setdefault("wiring", Wiring.adapter(lm))
    return crosscoder_for(lm, base_name=base.name, base_fingerprint=base.fingerprint, **options)


def random_tokens(length: int = 10, *, seed: int = 0) -> torch.Tensor:
    """Token ids of a random prompt."""
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def with_massive_first_token(lm: LanguageModel) -> torch.Tensor:
    """Give one token a residual stream over 1,000 times larger, as an attention sink's is; returns a prompt it begins."""
    with torch.no_grad():
        lm.parts.bridge.embed.original_component.weight[3] *= (
            100_000  # attention and MLPs write 10 to 100 times what tokens do
        )
    return torch.cat([torch.tensor([3]), random_tokens().clamp(min=4)])
