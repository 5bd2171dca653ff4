"""Thin adapter over TransformerLens's `TransformerBridge`: logits, activations at sites, and frozen prompts."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from replacement.crosscoder.fingerprint import legacy_fingerprint
from replacement.crosscoder.sites import ModelShape, Site
from replacement.language_model.base_model import MLPMap, base_mlps, difference_hooks
from replacement.language_model.boot import boot, check_finite
from replacement.language_model.bridge_norms import NamedHook
from replacement.language_model.bridge_parts import NORMALIZED, BridgeParts
from replacement.language_model.fingerprint import model_fingerprint
from replacement.language_model.freezing import FrozenPrompt, freeze, freeze_query_key
from replacement.language_model.prompts import Prompt, PromptReader, is_batch
from replacement.language_model.queries_and_keys import FrozenQueryKey

Hook = Callable[[Tensor], Tensor | None]
"""Receives the activation `[B, T, D]` at a site; returns its replacement, or None to leave it."""


class EnoughSeen(Exception):  # noqa: N818 - not an error
    """Raised by a hook to end a pass of `LanguageModel.run_to` whose later layers nobody needs."""


class LanguageModel(PromptReader):
    """A causal language model, reached through TransformerLens.

    Attributes:
        name: hub name or folder name; written into crosscoder checkpoints.
        fingerprint: digest `2:<16 hex>` of all that decides what the model computes (weights, buffers, activation functions,
            settings), equal for weights loaded as bfloat16, float32 or float64; see `fingerprint.model_fingerprint`.
        tokenizer: a Hugging Face tokenizer, or None for a model without one.
        context_length: longest prompt in tokens.
        base: the model that this one was fine-tuned from, where that is given (`with_base`).
        base_mlps: by layer the base model's MLP, where fine-tuning changed it; see `base_model.base_mlps`.
    """

    base: LanguageModel | None = None

    def __init__(self, bridge: TransformerBridge, *, name: str | None = None) -> None:
        """Wrap a bridge: `TransformerBridge.boot_transformers(...)` or `.boot_native(...)`.

        A short prompt is rebuilt from its frozen parts, which `trace` relies on; in float32 arithmetic where the weights have
        16 bits.

        Raises:
            ValueError: the architecture cannot be linearised exactly, a weight is not finite, or the tokenizer begins, ends,
                pads or replaces with a token that the model does not have.
        """
        name = name or str(bridge.cfg.model_name)
        check_finite(bridge, name)
        super().__init__(BridgeParts(bridge.eval().requires_grad_(False)), name)
        self._is_linearisable = False
        self.base_mlps: dict[int, MLPMap] = {}
        self.check_linearisable()
        self.fingerprint = model_fingerprint(self.parts)

    def __repr__(self) -> str:
        return f"LanguageModel({self.name}: {self.shape.n_layers} layers, d_model {self.shape.d_model})"

    @classmethod
    def from_pretrained(
        cls, name_or_folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> LanguageModel:
        """Load a hub name or a local folder in Hugging Face layout.

        Raises:
            ValueError: the folder is missing, incomplete, damaged or of an unknown architecture.
        """
        bridge, name = boot(name_or_folder, dtype=dtype, device=device)
        return cls(bridge, name=name)

    @property
    def legacy_fingerprint(self) -> str:
        """What `fingerprint` was in earlier versions and their files: a digest of a sample of the parameters."""
        return legacy_fingerprint(self.parts.bridge.named_parameters())

    def has_fingerprint(self, recorded: str) -> bool:
        """Whether a recorded fingerprint, of this or an earlier version, is this model's."""
        return recorded == self.fingerprint or (":" not in recorded and recorded == self.legacy_fingerprint)

    def with_base(self, base: LanguageModel) -> LanguageModel:
        """This model with the sites `mlp_difference`: what its MLPs write beyond what those of a base model write for the same
        input, the residual stream of this model. Weights are shared, and the fingerprint stays.

        Raises:
            ValueError: a base model of another kind, see `base_model.base_mlps`.
        """
        made = copy.copy(self)
        made.base, made.base_mlps = base, base_mlps(self.parts, base.parts)
        return made

    @property
    def shape(self) -> ModelShape:
        """Sizes that a crosscoder is wired to."""
        return self.parts.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.parts.dtype

    # Activations ------------------------------------------------------------------------------------------------

    def __call__(self, prompt: Prompt) -> Tensor:
        """Logits `[T, V]` of a prompt, or `[B, T, V]` of a 2-D tensor of token ids, as the original model gives them.

        Raises:
            ValueError: a prompt the model cannot read; see `tokens`.
        """
        return self.run(prompt, {})

    def run(
        self,
        prompt: Prompt,
        hooks: Mapping[Site, Hook],
        *,
        patterns: Sequence[Tensor] | None = None,
        norm_scales: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Logits with hooks at sites; a hook sees `[B, T, D]` and may return a replacement.

        Args:
            prompt: one prompt, or a 2-D tensor of token ids.
            patterns: attention patterns `[B, H, T, T]` to hold, one per layer, such as `read_patterns` gives; computed from
                queries and keys, as the model does, if None.
            norm_scales: scales of the stream's norms to hold, such as `read_norm_scales` gives; computed if None.

        Raises:
            ValueError: a prompt the model cannot read, or a site it does not have.
        """
        named: list[NamedHook] = [] if patterns is None else self.parts.pattern_hooks(patterns)
        for site in sorted(hooks):
            if site.kind == "resid_mid":
                named += self._mid_hooks(site, hooks[site])
            elif site.kind in NORMALIZED:
                self.parts.hook_name(site)  # refuses a layer that does not exist
                named += self.parts.normalized_hooks(site, hooks[site], norm_scales or {})
            elif site.kind == "mlp_difference":
                named += difference_hooks(self.parts, site, self._base_mlp(site), hooks[site], norm_scales or {})
            else:
                named.append((self.parts.hook_name(site), _as_bridge_hook(hooks[site])))
        keep, redo = self.parts.norm_scale_hooks(norm_scales or {})
        logits_BTV = self.parts.run(self.batch(prompt), [*redo, *named, *keep])
        return logits_BTV if is_batch(prompt) else logits_BTV[0]

    def _base_mlp(self, site: Site) -> MLPMap | None:
        if self.base is None:
            raise ValueError(f"{site} is what a fine-tuned MLP adds to that of its base model: give the base model")
        return self.base_mlps.get(site.layer)

    def _mid_hooks(self, site: Site, hook: Hook) -> list[NamedHook]:
        """Hooks that let a replacement of `resid_mid` reach the residual stream, not only the MLP's norm.

        TransformerLens hooks that norm's input, which is off the residual path; the change is added back after the MLP.
        """
        change: list[Tensor] = []

        def replace(x_BTD: Tensor) -> Tensor | None:
            y_BTD = hook(x_BTD)
            if y_BTD is not None:
                change.append(y_BTD - x_BTD)
            return y_BTD

        def add_back(x_BTD: Tensor) -> Tensor | None:
            return x_BTD + change.pop() if change else None

        after = Site(site.layer, "resid_post")
        return [
            (self.parts.hook_name(site), _as_bridge_hook(replace)),
            (self.parts.hook_name(after), _as_bridge_hook(add_back)),
        ]

    def read(self, prompt: Prompt, sites: Iterable[Site]) -> dict[Site, Tensor]:
        """Activations at sites, from one forward pass; `attn_z` has its heads concatenated.

        Returns:
            `[T, D]` per site of one prompt, `[B, T, D]` of a 2-D tensor of token ids.
        """
        seen: dict[Site, Tensor] = {}
        wanted, several = set(sites), is_batch(prompt)

        def keep(site: Site) -> Hook:
            def hook(x: Tensor) -> None:
                seen[site] = x.flatten(2) if several else x[0].flatten(1)
                if len(seen) == len(wanted):
                    raise EnoughSeen

            return hook

        self.run_to(prompt, {site: keep(site) for site in wanted})
        return seen

    @torch.no_grad()
    def read_patterns(self, prompts: Prompt) -> list[Tensor]:
        """Attention patterns `[B, H, T, T]` (query, key) of every layer, of one run of the original model."""
        seen: list[Tensor] = []

        def keep(pattern_BHTT: Tensor, hook: Any) -> None:
            seen.append(pattern_BHTT)
            if len(seen) == self.shape.n_layers:
                raise EnoughSeen

        with contextlib.suppress(EnoughSeen):
            self.parts.run(self.batch(prompts), [(name, keep) for name in self.parts.pattern_names])
        return seen

    def read_norm_scales(self, prompt: Prompt) -> dict[str, Tensor]:
        """Scale `[T, 1]` of every norm of the residual stream, of one run of the original model; for `run`."""
        names = {f"{path}.hook_scale": path for path in self.parts.norm_paths}
        return {
            names[name]: scale_T1 for name, scale_T1 in self.parts.capture(self.tokens(prompt), set(names))[1].items()
        }

    def run_to(self, prompt: Prompt, hooks: Mapping[Site, Hook]) -> None:
        """Run with hooks until one of them raises `EnoughSeen`, or to the end; saves the later layers and the unembedding.

        Raises:
            ValueError: a site the model does not have.
        """
        with contextlib.suppress(EnoughSeen):
            self.run(prompt, hooks)

    def freeze(self, prompt: Prompt, *, sites: Iterable[Site] = ()) -> FrozenPrompt:
        """Run one prompt and fix its attention patterns and norm scales; see `replacement.language_model.freezing.freeze`."""
        return freeze(self.parts, self.tokens(prompt), sites=sites)

    def freeze_query_key(self, prompt: Prompt, *, layer: int) -> FrozenQueryKey:
        """Run one prompt and fix what makes one layer's attention scores; see `freezing.freeze_query_key`."""
        return freeze_query_key(self.parts, self.tokens(prompt), layer=layer)

    def check_linearisable(self) -> None:
        """Refuse the architecture by name unless a short prompt is rebuilt exactly from its frozen parts; checked once.

        Raises:
            ValueError: which part of the model could not be rebuilt, and how far off it was.
        """
        if not self._is_linearisable:
            length = min(6, self.context_length)
            self.freeze(torch.arange(length, device=self.device) % self.vocabulary_size)
            self._is_linearisable = True


def _as_bridge_hook(hook: Hook) -> Any:
    return lambda x, hook=None, run=hook: run(x)
