"""Thin adapter over TransformerLens's `TransformerBridge`: tokens, logits, activations at sites, and frozen prompts.

Letters: B batch, T tokens, D d_model, H heads, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from replacement.crosscoder.sites import ModelShape, Site
from replacement.language_model.boot import boot, check_finite, fingerprint
from replacement.language_model.bridge_parts import BridgeParts, NamedHook
from replacement.language_model.freezing import FrozenPrompt, freeze, freeze_query_key
from replacement.language_model.queries_and_keys import FrozenQueryKey

Hook = Callable[[Tensor], Tensor | None]
"""Receives the activation `[B, T, D]` at a site; returns its replacement, or None to leave it."""


class EnoughSeen(Exception):  # noqa: N818 - not an error
    """Raised by a hook to end a pass of `LanguageModel.run_to` whose later layers nobody needs."""


class LanguageModel:
    """A causal language model, reached through TransformerLens.

    Attributes:
        name: hub name or folder name; written into crosscoder checkpoints.
        fingerprint: short digest of the weights, equal for every dtype they are loaded in.
        tokenizer: a Hugging Face tokenizer, or None for a model without one.
        context_length: longest prompt in tokens.
    """

    def __init__(self, bridge: TransformerBridge, *, name: str | None = None) -> None:
        """Wrap a bridge: `TransformerBridge.boot_transformers(...)` or `.boot_native(...)`.

        Raises:
            ValueError: the architecture lacks a part that must be frozen, or a weight is not finite.
        """
        self.name = name or str(bridge.cfg.model_name)
        check_finite(bridge, self.name)
        self.parts = BridgeParts(bridge.eval().requires_grad_(False))
        self.tokenizer: Any = bridge.tokenizer
        self.context_length = int(bridge.cfg.n_ctx)
        self.fingerprint = fingerprint(bridge)

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
    def shape(self) -> ModelShape:
        """Sizes that a crosscoder is wired to."""
        return self.parts.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.parts.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.parts.device

    # Tokens -----------------------------------------------------------------------------------------------------

    def tokenize(self, prompt: str) -> Tensor:
        """Token ids `[T]` of a prompt, with the beginning-of-sequence token where the model was trained with one.

        Raises:
            ValueError: empty prompt, words the tokenizer does not know, more tokens than the context holds.
        """
        if not prompt.strip():
            raise ValueError("the prompt is empty: expected at least one word")
        if self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer: pass a 1-D tensor of token ids instead of text")
        # Not verbose: a prompt over the limit is our error to report, in one line.
        options = {"add_special_tokens": False, "return_offsets_mapping": self.tokenizer.is_fast, "verbose": False}
        encoding = self.tokenizer(prompt, **options)
        ids = list(encoding["input_ids"])
        if not ids:
            raise ValueError("the prompt is empty: the tokenizer finds no token in it")
        self._refuse_unknown_words(prompt, ids, encoding)
        bos = self.tokenizer.bos_token_id
        if bos is not None and self.parts.bridge.cfg.default_prepend_bos and ids[:1] != [bos]:
            ids = [bos, *ids]
        return self.check_tokens(torch.tensor(ids, device=self.device))

    def check_tokens(self, tokens_T: Tensor) -> Tensor:
        """Return 1-D token ids, on the model's device, if the model can read them.

        Raises:
            TypeError: no tensor.
            ValueError: empty, not 1-D integers, longer than the context, or outside the vocabulary.
        """
        self._check_tensor(tokens_T)
        if tokens_T.ndim != 1:
            raise ValueError(
                f"expected a 1-D tensor of at least one token id, got one of shape {tuple(tokens_T.shape)}"
            )
        return self.check_batch(tokens_T[None])[0]

    def check_batch(self, tokens_BT: Tensor) -> Tensor:
        """The same for rows of token ids `[B, T]`."""
        self._check_tensor(tokens_BT)
        if tokens_BT.ndim != 2 or tokens_BT.is_floating_point() or not tokens_BT.numel():
            raise ValueError(
                f"expected at least one token id per row, got {tokens_BT.dtype} of shape {tuple(tokens_BT.shape)}"
            )
        if tokens_BT.shape[1] > self.context_length:
            n_tokens = tokens_BT.shape[1]
            raise ValueError(f"the prompt has {n_tokens} tokens: {self.name} reads at most {self.context_length}")
        low, high = int(tokens_BT.min()), int(tokens_BT.max())
        if low < 0 or high >= self.vocabulary_size:
            raise ValueError(f"token ids must lie in [0, {self.vocabulary_size}), got {low} to {high}")
        return tokens_BT.to(self.device)

    def _check_tensor(self, tokens: object) -> None:
        if not isinstance(tokens, Tensor):
            how = "language_model.tokenize(text)" if isinstance(tokens, str) else "torch.tensor"
            raise TypeError(f"expected a tensor of token ids, got {type(tokens).__name__}: make one with {how}")

    def token_id(self, text: str) -> int:
        """Id of a text that is exactly one token.

        A word may be a token with and without a leading space; inside a sentence it is the one with the space, so
        that one is meant unless the text is not a token with it.

        Raises:
            ValueError: the text is not one known token.
        """
        if self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer: name target tokens by id")
        forms = (text,) if text.startswith(" ") else (" " + text, text)
        for form in forms:
            ids = self.tokenizer(form, add_special_tokens=False)["input_ids"]
            if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id:
                return int(ids[0])
        raise ValueError(f"{text!r} is not a single token of {self.name}'s vocabulary")

    def token_strings(self, token_ids: Iterable[int]) -> list[str]:
        """Readable text of each token; `#id` for a model without a tokenizer."""
        if self.tokenizer is None:
            return [f"#{int(token)}" for token in token_ids]
        return [str(self.tokenizer.decode([int(token)])) for token in token_ids]

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens V in the embedding."""
        return int(self.parts.bridge.cfg.d_vocab)

    def _refuse_unknown_words(self, prompt: str, ids: list[int], encoding: Any) -> None:
        unknown = self.tokenizer.unk_token_id
        if unknown is None or unknown not in ids:
            return
        if not self.tokenizer.is_fast:
            raise ValueError("the prompt holds words the tokenizer does not know")
        offsets = encoding["offset_mapping"]
        words = [prompt[slice(*offsets[i])] for i, token in enumerate(ids) if token == unknown]
        listed = ", ".join(repr(word) for word in dict.fromkeys(words))
        raise ValueError(f"{self.name}'s tokenizer does not know {listed}")

    # Activations ------------------------------------------------------------------------------------------------

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits `[B, T, V]` of tokens `[B, T]`, or `[T, V]` of tokens `[T]`, as the original model gives them."""
        return self.run(tokens, {})

    def run(
        self,
        tokens: Tensor,
        hooks: Mapping[Site, Hook],
        *,
        patterns: Sequence[Tensor] | None = None,
        norm_scales: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Logits with hooks at sites; a hook sees `[B, T, D]` and may return a replacement.

        Args:
            patterns: attention patterns `[B, H, T, T]` to hold, one per layer, such as `read_patterns` gives; computed from
                queries and keys, as the model does, if None.
            norm_scales: scales of the stream's norms to hold, such as `read_norm_scales` gives; computed if None.

        Raises:
            ValueError: a site the model does not have.
        """
        named: list[NamedHook] = [] if patterns is None else self.parts.pattern_hooks(patterns)
        for site in sorted(hooks):
            if site.kind == "resid_mid":
                named += self._mid_hooks(site, hooks[site])
            else:
                named.append((self.parts.hook_name(site), _as_bridge_hook(hooks[site])))
        keep, redo = self.parts.norm_scale_hooks(norm_scales or {})
        logits = self.parts.run(tokens if tokens.ndim == 2 else tokens[None], [*redo, *named, *keep])
        return logits if tokens.ndim == 2 else logits[0]

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

    def read(self, tokens: Tensor, sites: Iterable[Site]) -> dict[Site, Tensor]:
        """Activations `[B, T, D]` (or `[T, D]`) at sites, from one forward pass; `attn_z` has its heads concatenated."""
        seen: dict[Site, Tensor] = {}

        wanted = set(sites)

        def keep(site: Site) -> Hook:
            def hook(x: Tensor) -> None:
                seen[site] = x.flatten(2) if tokens.ndim == 2 else x[0].flatten(1)
                if len(seen) == len(wanted):
                    raise EnoughSeen

            return hook

        self.run_to(tokens, {site: keep(site) for site in wanted})
        return seen

    @torch.no_grad()
    def read_patterns(self, tokens_BT: Tensor) -> list[Tensor]:
        """Attention patterns `[B, H, T, T]` (query, key) of every layer, of one run of the original model."""
        seen: list[Tensor] = []

        def keep(pattern_BHTT: Tensor, hook: Any) -> None:
            seen.append(pattern_BHTT)
            if len(seen) == self.shape.n_layers:
                raise EnoughSeen

        with contextlib.suppress(EnoughSeen):
            self.parts.run(tokens_BT, [(name, keep) for name in self.parts.pattern_names])
        return seen

    def read_norm_scales(self, tokens_T: Tensor) -> dict[str, Tensor]:
        """Scale `[T, 1]` of every norm of the residual stream, of one run of the original model; for `run`."""
        names = {f"{path}.hook_scale": path for path in self.parts.norm_paths}
        return {names[name]: scale_T1 for name, scale_T1 in self.parts.capture(tokens_T, set(names))[1].items()}

    def run_to(self, tokens: Tensor, hooks: Mapping[Site, Hook]) -> None:
        """Run with hooks until one of them raises `EnoughSeen`, or to the end; saves the later layers and the unembedding.

        Raises:
            ValueError: a site the model does not have.
        """
        with contextlib.suppress(EnoughSeen):
            self.run(tokens, hooks)

    def freeze(self, tokens_T: Tensor, *, sites: Iterable[Site] = ()) -> FrozenPrompt:
        """Run one prompt and fix its attention patterns and norm scales; see `replacement.language_model.freezing.freeze`."""
        return freeze(self.parts, tokens_T, sites=sites)

    def freeze_query_key(self, tokens_T: Tensor, *, layer: int) -> FrozenQueryKey:
        """Run one prompt and fix what makes one layer's attention scores; see `freezing.freeze_query_key`."""
        return freeze_query_key(self.parts, tokens_T, layer=layer)

    def check_linearisable(self) -> None:
        """Refuse the architecture by name unless a short prompt is rebuilt exactly from its frozen parts.

        Raises:
            ValueError: which part of the model could not be rebuilt, and how far off it was.
        """
        length = min(6, self.context_length)
        self.freeze(torch.arange(length, device=self.device) % self.vocabulary_size)


def _as_bridge_hook(hook: Hook) -> Any:
    return lambda x, hook=None, run=hook: run(x)
