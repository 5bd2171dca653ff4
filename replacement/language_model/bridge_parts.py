"""Access to the parts of a TransformerLens bridge that the linear maps are made of: hooks, attention, MLPs, unembedding.

Letters: T tokens, D d_model, H heads, K d_head. This file, `bridge_norms.py` and `bridge_scores.py` alone know how
TransformerLens names things.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from replacement.crosscoder.sites import Site
from replacement.language_model.bridge_norms import BridgeNorms, NamedHook
from replacement.language_model.frozen_layers import AttentionWeights
from replacement.language_model.sixteen_bits import Unembedding, raised

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


class BridgeParts(BridgeNorms):
    """Uniform access to one bridge.

    Raises:
        ValueError: the architecture lacks a part that must be frozen; it is named.
    """

    def __init__(self, bridge: TransformerBridge) -> None:
        self.architecture = str(bridge.cfg.architecture)
        if (why := _missing_part(bridge)) is not None:
            raise ValueError(f"{self.architecture} cannot be linearised exactly: {why}")
        super().__init__(bridge)

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

    def score_scale_and_cap(self, layer: int) -> tuple[float, float | None]:
        """Factor of the inner product of query and key, and the soft-cap of scores where the layer has one."""
        original = self.bridge.blocks[layer].attn.original_component
        native_scale = getattr(original, "scale", None)  # TransformerLens's own modules divide by it
        scale = 1 / native_scale if native_scale else getattr(original, "scaling", self.shape.d_head**-0.5)
        soft_cap = getattr(original, "attn_logit_softcapping", None) or getattr(original, "attn_scores_soft_cap", None)
        return float(scale), float(soft_cap) if soft_cap and float(soft_cap) > 0 else None

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


def _missing_part(bridge: TransformerBridge) -> str | None:
    """Which part that must be frozen an architecture lacks; None where it has all."""
    blocks: Any = getattr(bridge, "blocks", None)
    if blocks is None:
        return "it has no plain stack of blocks"
    if getattr(getattr(bridge, "ln_final", None), "original_component", None) is None:
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
