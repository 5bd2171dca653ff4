"""Access to the norms of a TransformerLens bridge: which there are, what they compute, and hooks that compute them again.

A norm is named by its path, `blocks.{layer}.{name}` or `ln_final`. Letters: T tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from replacement.crosscoder.sites import ModelShape
from replacement.language_model.frozen_layers import NormWeights
from replacement.language_model.sixteen_bits import raised_dtype

NamedHook = tuple[str, Any]
"""Name of a hook of TransformerLens, and the function to run there."""


class BridgeNorms:
    """The norms of one bridge; `BridgeParts` adds attention, MLPs and the unembedding."""

    def __init__(self, bridge: TransformerBridge) -> None:
        self.bridge = bridge
        self.dtype = next(bridge.parameters()).dtype
        self.device = next(bridge.parameters()).device
        cfg = bridge.cfg
        parallel = bool(getattr(cfg, "parallel_attn_mlp", False))
        self.shape = ModelShape(cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.d_head, parallel)

    @property
    def exact_dtype(self) -> torch.dtype:
        """Dtype of exact arithmetic: that of the weights, float32 where they have 16 bits."""
        return raised_dtype(self.dtype)

    @property
    def norm_paths(self) -> list[str]:
        """Every norm that reads the residual stream or what a branch writes to it; not those of queries and keys."""
        layers = range(self.shape.n_layers)
        return [f"blocks.{layer}.{name}" for layer in layers for name in self.norm_names(layer)] + ["ln_final"]

    def norm_names(self, layer: int) -> list[str]:
        """Norms of one layer, in forward order; `_post` ones act on what a branch writes (Gemma 2 and 3)."""
        return [name for name in ("ln1", "ln1_post", "ln2", "ln2_post") if name in self.bridge.blocks[layer]._modules]

    def norm_before(self, layer: int, part: str) -> str | None:
        """Path of the norm through which `attention` or `mlp` reads the stream; None where it reads the stream itself.

        Parallel blocks may share one norm (Phi, GPT-J, Falcon, Cohere); OLMo 2 has norms behind its sub-layers only.
        """
        shared = ("ln2", "ln1") if self.shape.parallel else ("ln2",)
        present = [name for name in (("ln1",) if part == "attention" else shared) if name in self.norm_names(layer)]
        return f"blocks.{layer}.{present[0]}" if present else None

    def head_norms(self, layer: int) -> list[str]:
        """Norms of queries and keys: over the channels of a head (Gemma 3, Qwen 3) or over all heads at once (OLMo 2)."""
        modules = self.bridge.blocks[layer].attn._modules
        weights = {name: getattr(modules.get(name), "weight", None) for name in ("q_norm", "k_norm")}
        gains = [name for name, weight in weights.items() if weight is not None and weight.ndim > 0]
        return [f"blocks.{layer}.attn.{name}" for name in gains]

    def norm_acts_on_heads(self, path: str) -> bool:
        """Whether a norm of queries or keys divides each head by a scale of its own, not all heads by one (OLMo 2)."""
        weight = getattr(self._component(path), "weight", None)
        return weight is None or weight.ndim == 2 or weight.numel() == self.shape.d_head

    def norm_weights(self, path: str | None) -> NormWeights:
        """Gain and offset of the norm at `blocks.{layer}.{name}` or `ln_final`; the identity for None."""
        if path is None:
            zeros_D = torch.zeros(self.shape.d_model, dtype=self.exact_dtype, device=self.device)
            return NormWeights(zeros_D + 1, zeros_D, centred=False)
        norm = self._component(path)
        original = norm.original_component
        weight, bias = (
            None if (stored := getattr(original, name, None)) is None else stored.detach().to(self.exact_dtype)
            for name in ("weight", "bias")
        )
        width = self.shape.d_model if weight is None else weight.numel()  # norms of queries and keys are not over D
        zeros_D = torch.zeros(width, dtype=self.exact_dtype, device=self.device)
        weight_D = zeros_D + 1 if weight is None else weight.flatten() + (1 if norm.uses_weight_offset else 0)
        return NormWeights(weight_D, zeros_D if bias is None else bias, centred=not norm.uses_rms_norm)

    def norm_epsilon(self, path: str) -> float:
        """What a norm adds to the mean square."""
        norm = self._component(path)
        original = norm.original_component
        return float(getattr(original, "variance_epsilon", getattr(original, "eps", norm.config.eps)))

    def normalized_map(self, path: str, scale_T1: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """A norm before its gain as a function of `[..., D]`: `c / sqrt(mean c^2 + epsilon)`, c = x centred or not.

        Args:
            scale_T1: a scale to divide by instead of that of x.
        """
        epsilon, weights = self.norm_epsilon(path), self.norm_weights(path)

        def apply(x: Tensor) -> Tensor:
            c = x.to(weights.weight_D.dtype)  # models compute the norms of 16-bit activations in float32 too
            c = c - c.mean(-1, keepdim=True) if weights.centred else c
            return c / ((c.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() if scale_T1 is None else scale_T1)

        return apply

    def gain_map(self, path: str) -> Callable[[Tensor], Tensor]:
        """What a norm does to its normalised input, as a function of `[..., D]`: `x * weight + bias`."""
        weights = self.norm_weights(path)

        def apply(x: Tensor) -> Tensor:
            gain, offset = (w.unflatten(0, (-1, x.shape[-1])) for w in (weights.weight_D, weights.bias_D))
            return x * gain + offset

        return apply

    def norm_map(self, path: str, scale_T1: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """A norm as a function of `[..., D]`; see `normalized_map` and `gain_map`."""
        normalize, gain = self.normalized_map(path, scale_T1), self.gain_map(path)
        return lambda x: gain(normalize(x)).to(x.dtype)

    def norm_scale_hooks(self, scales: Mapping[str, Tensor]) -> tuple[list[NamedHook], list[NamedHook]]:
        """Hooks that hold the scale `[..., T, 1]` of each norm named by its path, whatever it reads.

        Returns:
            Hooks to run behind all others, which keep each norm's input, and hooks to run in front of them, which compute its
            output: what others make of an output stays.
        """
        pairs = [self._redone_norm(path, scale_T1) for path, scale_T1 in scales.items()]
        return [keep for keep, _ in pairs], [redo for _, redo in pairs]

    def _float64_norm_hooks(self) -> tuple[list[NamedHook], list[NamedHook]]:
        """In float64, redo the norms of other classes than PyTorch's: Hugging Face computes them in float32 in any dtype.

        Returns:
            Hooks that keep each norm's input, and hooks that compute its output from it.
        """
        if self.dtype != torch.float64:
            return [], []
        head_norms = [path for layer in range(self.shape.n_layers) for path in self.head_norms(layer)]
        paths = [*head_norms, *self.norm_paths]
        redone = [path for path in paths if not isinstance(self._component(path).original_component, nn.LayerNorm)]
        pairs = [self._redone_norm(path) for path in redone]
        return [keep for keep, _ in pairs], [redo for _, redo in pairs]

    def _redone_norm(self, path: str, scale_T1: Tensor | None = None) -> tuple[NamedHook, NamedHook]:
        """A hook that keeps a norm's input, and one that computes its output from it; see `norm_map`."""
        norm = self.norm_map(path, scale_T1)
        seen: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: Any) -> None:
            seen["x"] = x

        def redo(y: Tensor, hook: Any) -> Tensor:
            return norm(seen.pop("x")).to(y.dtype)

        return (f"{path}.hook_in", keep), (f"{path}.hook_out", redo)

    def _component(self, path: str) -> Any:
        component: Any = self.bridge
        for part in path.split("."):
            component = component[int(part)] if part.isdigit() else getattr(component, part)
        return component
