"""Access to the parts of a TransformerLens bridge that the linear maps are made of: hooks, norms, attention weights.

Letters: T tokens, D d_model, H heads, K d_head. This file and `bridge_scores.py` alone know how TransformerLens names things.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from replacement.crosscoder.sites import ModelShape, Site
from replacement.language_model.frozen_layers import AttentionWeights, NormWeights
from replacement.language_model.sixteen_bits import Unembedding, raised, raised_dtype

HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "mlp_normalized": "mlp.hook_in",
    "mlp_in": "mlp.hook_in",
    "mlp_out": "hook_mlp_out",
    "attn_normalized": "attn.hook_in",
    "attn_in": "attn.hook_in",
    "attn_z": "attn.hook_z",
    "attn_out": "hook_attn_out",
}
"""TransformerLens hook of every site kind, below `blocks.{layer}.`; `hook_mlp_out` is after a post-norm where there is one.
`mlp_normalized` and `attn_normalized` are `hook_normalized` of the norm in front of MLP and attention, where there is one."""
NORMALIZED = {"mlp_normalized": "mlp", "attn_normalized": "attention"}
"""Sites between a norm and its gain, and the part that the norm is in front of."""

NamedHook = tuple[str, Any]


class BridgeParts:
    """Uniform access to one bridge.

    Raises:
        ValueError: the architecture lacks a part that must be frozen; it is named.
    """

    def __init__(self, bridge: TransformerBridge) -> None:
        self.bridge = bridge
        self.architecture = str(bridge.cfg.architecture)
        self.dtype = next(bridge.parameters()).dtype
        self.device = next(bridge.parameters()).device
        self._require_parts()
        cfg = bridge.cfg
        parallel = bool(getattr(cfg, "parallel_attn_mlp", False))
        self.shape = ModelShape(cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.d_head, parallel)

    @property
    def exact_dtype(self) -> torch.dtype:
        """Dtype of exact arithmetic: that of the weights, float32 where they have 16 bits."""
        return raised_dtype(self.dtype)

    def exact_arithmetic(self) -> AbstractContextManager[None]:
        """Within it the bridge computes in `exact_dtype`; 16-bit weights are raised layer by layer."""
        return nullcontext() if self.dtype == self.exact_dtype else raised(self.bridge, self.exact_dtype)

    def hook_name(self, site: Site) -> str:
        """TransformerLens name of a site.

        Raises:
            ValueError: the model has no such site.
        """
        parallel_mid = site.kind == "resid_mid" and self.shape.parallel
        if site.layer >= self.shape.n_layers or site.model != 0 or parallel_mid:
            why = "attention and MLP run in parallel" if parallel_mid else f"it has {self.shape.n_layers} layers"
            raise ValueError(f"the language model has no site {site}: {why}")
        norm = self.norm_before(site.layer, NORMALIZED[site.kind]) if site.kind in NORMALIZED else None
        return f"blocks.{site.layer}.{HOOKS[site.kind]}" if norm is None else f"{norm}.hook_normalized"

    def capture(self, tokens_T: Tensor, names: set[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits `[T, V]` and the activations at hooks for one prompt, batch axis dropped."""
        cache: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(x: Tensor, hook: Any) -> None:
                # Position embeddings arrive without a batch axis in some models.
                cache[name] = x[0].detach() if x.ndim > 2 else x.detach()

            return hook

        with torch.no_grad():
            logits_BTV = self.run(tokens_T[None], [(name, keep(name)) for name in sorted(names)])
        return logits_BTV[0], cache

    def run(self, tokens_BT: Tensor, hooks: list[NamedHook]) -> Tensor:
        """Logits of the bridge with forward hooks."""
        # What a hook makes of a norm's input must reach that norm, and what it makes of an output must stay.
        keep, redo = self._float64_norm_hooks()
        named: list[Any] = [*redo, *hooks, *keep]
        logits: Tensor = self.bridge.run_with_hooks(tokens_BT, fwd_hooks=named)
        return logits

    @property
    def pattern_names(self) -> list[str]:
        """Hooks at the attention patterns `[B, head, query, key]`, one per layer."""
        return [f"blocks.{layer}.attn.hook_pattern" for layer in range(self.shape.n_layers)]

    def pattern_hooks(self, patterns: Sequence[Tensor]) -> list[NamedHook]:
        """Hooks that hold every attention pattern at a given value, whatever the queries and keys.

        They mix the values themselves: some modules show a pattern only when it has been used (GPT-J, GPT-Neo, OPT).
        """
        pairs = [self._held_pattern(layer, pattern_BHTT) for layer, pattern_BHTT in enumerate(patterns)]
        return [hook for pair in pairs for hook in pair]

    def _held_pattern(self, layer: int, pattern_BHTT: Tensor) -> tuple[NamedHook, NamedHook]:
        seen: dict[str, Tensor] = {}

        def keep(v_BTGK: Tensor, hook: Any) -> None:
            seen["v"] = v_BTGK

        def mix(z_BTHK: Tensor, hook: Any) -> Tensor:
            v_BTHK = seen.pop("v").view(*z_BTHK.shape[:2], -1, z_BTHK.shape[-1])
            v_BTHK = v_BTHK.repeat_interleave(z_BTHK.shape[2] // v_BTHK.shape[2], 2)
            return torch.einsum("bhts,bshk->bthk", pattern_BHTT.to(z_BTHK).expand(len(z_BTHK), -1, -1, -1), v_BTHK)

        return (f"blocks.{layer}.attn.v.hook_out", keep), (f"blocks.{layer}.attn.hook_z", mix)

    @property
    def norm_paths(self) -> list[str]:
        """Every norm that reads the residual stream or what a branch writes to it; not those of queries and keys."""
        layers = range(self.shape.n_layers)
        return [f"blocks.{layer}.{name}" for layer in layers for name in self.norm_names(layer)] + ["ln_final"]

    def norm_scale_hooks(self, scales: Mapping[str, Tensor]) -> tuple[list[NamedHook], list[NamedHook]]:
        """Hooks that hold the scale `[..., T, 1]` of each norm named by its path, whatever it reads.

        Returns:
            Hooks to run behind all others, which keep each norm's input, and hooks to run in front of them, which compute its
            output: what others make of an output stays.
        """
        pairs = [self._redone_norm(path, scale_T1) for path, scale_T1 in scales.items()]
        return [keep for keep, _ in pairs], [redo for _, redo in pairs]

    def frozen_hook_names(self) -> set[str]:
        """Hooks that a frozen prompt is made of."""
        names = {"hook_embed", "ln_final.hook_in", "ln_final.hook_out", "ln_final.hook_scale"}
        if hasattr(self.bridge, "pos_embed"):
            names.add("hook_pos_embed")
        for layer in range(self.shape.n_layers):
            hooks = ["attn.hook_pattern", "hook_attn_out", "hook_resid_pre", "hook_resid_post", "mlp.hook_in"]
            hooks += [f"{name}.hook_scale" for name in self.norm_names(layer)]
            names |= {f"blocks.{layer}.{hook}" for hook in hooks}
        return names

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

    def score_scale_and_cap(self, layer: int) -> tuple[float, float | None]:
        """Factor of the inner product of query and key, and the soft-cap of scores where the layer has one."""
        original = self.bridge.blocks[layer].attn.original_component
        native_scale = getattr(original, "scale", None)  # TransformerLens's own modules divide by it
        scale = 1 / native_scale if native_scale else getattr(original, "scaling", self.shape.d_head**-0.5)
        soft_cap = getattr(original, "attn_logit_softcapping", None) or getattr(original, "attn_scores_soft_cap", None)
        return float(scale), float(soft_cap) if soft_cap and float(soft_cap) > 0 else None

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

    def unembedding(self) -> Unembedding:
        """The map from the final norm to the logits, a factor of all logits (Granite, Cohere) included."""
        b_U = self.bridge.b_U
        return Unembedding(
            stored_DV=self.bridge.W_U.detach(),
            bias_V=None if b_U is None or not b_U.any() else b_U.detach(),
            scale=self._logit_scale(),
        )

    def _logit_scale(self) -> float:
        """Slope at zero, where a soft-cap has slope 1, of what the model makes of the unembedding's output."""
        adapter = getattr(self.bridge, "adapter", None)
        near_zero = torch.tensor(2.0**-40, dtype=torch.float64)
        return 1.0 if adapter is None else float(adapter.apply_output_logits_transform(near_zero) / near_zero)

    def soft_cap(self, logits: Tensor) -> Tensor:
        """The model's last step: `cap * tanh(logits / cap)` where it has a soft-cap (Gemma 2), else the logits."""
        cap = float(getattr(self.bridge.cfg, "output_logits_soft_cap", -1.0) or -1.0)
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    def before_soft_cap(self, logits: Tensor) -> Tensor:
        """The inverse of `soft_cap`: logits as the unembedding gives them."""
        cap = float(getattr(self.bridge.cfg, "output_logits_soft_cap", -1.0) or -1.0)
        # In float64, where only a logit at the very cap is rounded to it.
        limit = 1 - torch.finfo(torch.float64).eps
        return (cap * torch.atanh((logits.double() / cap).clamp(-limit, limit))).to(logits) if cap > 0 else logits

    def attention_weights(self, layer: int) -> AttentionWeights:
        """Value and output weights of one layer, views of the model's own, and its norms."""
        attention = self.bridge.blocks[layer].attn
        b_V, b_O = attention.b_V, attention.b_O
        post = "ln1_post" in self.norm_names(layer)
        return AttentionWeights.fold(
            W_V=attention.W_V.detach(),
            W_O=attention.W_O.detach(),
            b_V=None if b_V is None else b_V.detach(),
            b_O=None if b_O is None else b_O.detach(),
            norm_in=self.norm_weights(self.norm_before(layer, "attention")),
            norm_out=self.norm_weights(f"blocks.{layer}.ln1_post") if post else None,
            residual_scale=self._residual_scale(layer),
        )

    def _residual_scale(self, layer: int) -> float:
        """What multiplies the outputs of attention and MLP before they are added to the stream (Granite)."""
        return float(getattr(self.bridge.blocks[layer], "residual_contribution_scale", 1.0))

    def _component(self, path: str) -> Any:
        component: Any = self.bridge
        for part in path.split("."):
            component = component[int(part)] if part.isdigit() else getattr(component, part)
        return component

    def _require_parts(self) -> None:
        if (why := self._missing_part()) is not None:
            raise ValueError(f"{self.architecture} cannot be linearised exactly: {why}")

    def _missing_part(self) -> str | None:
        blocks: Any = getattr(self.bridge, "blocks", None)
        if blocks is None:
            return "it has no plain stack of blocks"
        if getattr(getattr(self.bridge, "ln_final", None), "original_component", None) is None:
            return "it has no norm in front of the unembedding"
        for layer, block in enumerate(blocks):
            attention = block._modules.get("attn")
            present = {
                *block._modules,
                *(f"attn.{part}" for part in (attention._modules if attention is not None else ())),
            }
            for part in ("attn", "mlp", "attn.v", "attn.o"):
                if part not in present:
                    return f"layer {layer} has no '{part}' to freeze"
        return None

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

    def normalized_hooks(
        self, site: Site, run: Callable[[Tensor], Tensor | None], scales: Mapping[str, Tensor]
    ) -> list[NamedHook]:
        """Hooks that show `run` what a norm gives before its gain; a replacement reaches the part behind it alone.

        Args:
            scales: scales of norms that are held, as in `norm_scale_hooks`.
        """
        path, behind = self.norm_before(site.layer, NORMALIZED[site.kind]), f"blocks.{site.layer}.{HOOKS[site.kind]}"
        if path is None:
            return [(behind, lambda x, hook: run(x))]
        normalize, gain, seen = self.normalized_map(path, scales.get(path)), self.gain_map(path), dict[str, Tensor]()

        def keep(x: Tensor, hook: Any) -> None:
            seen["x"] = x

        def show(y: Tensor, hook: Any) -> Tensor | None:
            replaced = run(normalize(seen.pop("x")).to(y.dtype))
            return None if replaced is None else gain(replaced).to(y.dtype).view_as(y)

        return [(f"{path}.hook_in", keep), (behind, show)]

    def norm_epsilon(self, path: str) -> float:
        """What a norm adds to the mean square."""
        norm = self._component(path)
        original = norm.original_component
        return float(getattr(original, "variance_epsilon", getattr(original, "eps", norm.config.eps)))

    def mlp_map(self, layer: int, read: str) -> Callable[[Tensor], Tensor]:
        """The model's own map of rows `[B, D]` at a site in front of an MLP to `mlp_out`, norms included.

        Args:
            read: `mlp_in`, `mlp_normalized`, or the stream the MLP's norm reads: `resid_mid`, `resid_pre` in a parallel model.

        Raises:
            ValueError: another site, from which `mlp_out` depends on other positions too, or an architecture whose MLP is no
                module of its own (OPT).
        """
        stream = "resid_pre" if self.shape.parallel else "resid_mid"
        if read not in ("mlp_in", "mlp_normalized", stream):
            raise ValueError(
                f"mlp_out is a function of mlp_in, mlp_normalized or {stream} at each position, not of {read}"
            )
        mlp, scale = self._mlp(layer), self._residual_scale(layer)
        norm = self.norm_before(layer, "mlp")
        before = None
        if norm is not None and read != "mlp_in":
            gain = self.gain_map(norm)
            before = self.norm_map(norm) if read == stream else lambda x: gain(x).to(x.dtype)
        after = self.norm_map(f"blocks.{layer}.ln2_post") if "ln2_post" in self.norm_names(layer) else None

        def apply(x_BD: Tensor) -> Tensor:
            y_BD = mlp(before(x_BD) if before else x_BD)
            return (after(y_BD) if after else y_BD) * scale

        return apply

    def mlp_tensors(self, layer: int) -> list[Tensor]:
        """Parameters and buffers of the MLP of a layer and of the norms around it, all that `mlp_map` depends on."""
        post = f"blocks.{layer}.ln2_post" if "ln2_post" in self.norm_names(layer) else None
        paths = [path for path in (f"blocks.{layer}.mlp", self.norm_before(layer, "mlp"), post) if path is not None]
        modules = [self._component(path) for path in paths]
        return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]

    def _mlp(self, layer: int) -> Callable[[Tensor], Tensor]:
        """The module as a function of rows `[B, D]`; those of BLOOM and MPT add the stream they are given, zero here."""
        mlp = self.bridge.blocks[layer].mlp
        if mlp.name is None:
            raise ValueError(f"{self.architecture} has no MLP that can be computed apart from its layer")
        adds_stream = "residual" in inspect.signature(mlp.original_component.forward).parameters

        def apply(x_BD: Tensor) -> Tensor:
            stream_1BD = [torch.zeros_like(x_BD)[None]] if adds_stream else []
            y = mlp(x_BD[None], *stream_1BD)
            return (y[0] if isinstance(y, tuple) else y)[0]  # GPT-OSS gives the scores of its experts too

        return apply

    def _redone_norm(self, path: str, scale_T1: Tensor | None = None) -> tuple[NamedHook, NamedHook]:
        """A hook that keeps a norm's input, and one that computes its output from it; see `norm_map`."""
        norm = self.norm_map(path, scale_T1)
        seen: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: Any) -> None:
            seen["x"] = x

        def redo(y: Tensor, hook: Any) -> Tensor:
            return norm(seen.pop("x")).to(y.dtype)

        return (f"{path}.hook_in", keep), (f"{path}.hook_out", redo)
