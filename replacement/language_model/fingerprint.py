"""Digest of all that decides what a language model computes, independent of how TransformerLens names and wraps it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from replacement.crosscoder.fingerprint import fingerprint
from replacement.language_model.bridge_parts import BridgeParts

# Entries of a Hugging Face configuration that change no activation. All others count; those that are off (None, False, empty)
# are left out, so that a later version of the library may add one without changing the digest of old models.
_IDLE = {
    "architectures",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "initializer_range",
    "label2id",
    "problem_type",
}
_IDLE |= {"pretraining_tp", "return_dict", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache"}
_IDLE_WORDS = ("_name_or_path", "attn_implementation", "dropout", "pdrop", "output_", "summary_", "token_id")
# What TransformerLens's own models are configured by.
_NATIVE = {
    "act_fn",
    "attention_dir",
    "d_head",
    "eps",
    "n_heads",
    "n_key_value_heads",
    "normalization_type",
    "gated_mlp",
}
_NATIVE |= {"attn_scores_soft_cap", "output_logits_soft_cap", "parallel_attn_mlp", "positional_embedding_type"}
_NATIVE |= {"rotary_base", "rotary_dim", "use_attn_scale", "attn_scale", "window_size"}


def model_fingerprint(parts: BridgeParts) -> str:
    """`2:` and 16 hexadecimal digits of a SHA-256 of parameters, buffers, activation functions and settings.

    Tensors are those of the wrapped model, in the order of its modules and without their names. An activation function is
    what it makes of a few numbers. Settings are the configuration, and the norms' epsilons and the scales of attention scores
    that the modules themselves hold.
    """
    module = parts.bridge.original_model
    tensors = [("", tensor) for tensor in _tensors(module)]
    return fingerprint(tensors, json.dumps(_settings(parts), sort_keys=True, default=str))


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    """Modules of the wrapped model, depth first: where TransformerLens wraps one, the one inside, not its additions."""
    original = module._modules.get("_original_component")
    if original is not None:
        yield from _modules(original)
        return
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _modules(child)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers that are not zero (TransformerLens adds biases of zeros), and probed activation functions."""
    seen: set[int] = set()
    for part in _modules(module):
        parameters = [tensor for tensor in part._parameters.values() if tensor is not None]
        buffers = [tensor for tensor in part._buffers.values() if tensor is not None]
        for tensor in [*parameters, *(tensor for tensor in buffers if bool(tensor.any()))]:
            if id(tensor) not in seen:  # tied weights count once
                seen.add(id(tensor))
                yield tensor
        if not part._modules and not parameters and not buffers:
            probe = torch.linspace(-4, 4, 33, dtype=torch.float64)
            with contextlib.suppress(Exception):  # no function of one tensor, hence no activation function
                answer = part(probe)
                if isinstance(answer, Tensor) and not torch.equal(answer, probe):
                    yield answer


def _settings(parts: BridgeParts) -> dict[str, Any]:
    config = getattr(parts.bridge.original_model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        settings = _without_idle(config.to_dict())
    else:
        settings = _without_idle({name: getattr(parts.bridge.cfg, name, None) for name in _NATIVE})
    return {
        "configuration": settings,
        "epsilons": [parts.norm_epsilon(path) for path in parts.norm_paths],
        "scores": [parts.score_scale_and_cap(layer) for layer in range(parts.shape.n_layers)],
    }


def _without_idle(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in settings.items():
        if name in _IDLE or any(word in name for word in _IDLE_WORDS):
            continue
        if isinstance(value, dict):
            value = _without_idle(value)
        if value is not None and value is not False and value != {} and value != []:
            kept[name] = value
    return kept
