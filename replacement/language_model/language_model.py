"""Thin adapter over TransformerLens's `TransformerBridge`: tokens, logits, activations at sites, and frozen prompts."""

from __future__ import annotations

import contextlib
import copy
import numbers
import reprlib
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

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
from replacement.language_model.queries_and_keys import FrozenQueryKey
from replacement.token_texts import alone, in_a_row, token_bytes

Hook = Callable[[Tensor], Tensor | None]
"""Receives the activation `[B, T, D]` at a site; returns its replacement, or None to leave it."""


Prompt = str | Sequence[int] | Tensor
"""Text, a list of token ids, or a 1-D integer tensor of them."""


def is_batch(prompt: Prompt) -> TypeGuard[Tensor]:
    """Whether this is several prompts of one length, given as a 2-D tensor `[B, T]`, instead of one."""
    return isinstance(prompt, Tensor) and prompt.ndim == 2


class EnoughSeen(Exception):  # noqa: N818 - not an error
    """Raised by a hook to end a pass of `LanguageModel.run_to` whose later layers nobody needs."""


class LanguageModel:
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
        self.name = name or str(bridge.cfg.model_name)
        check_finite(bridge, self.name)
        self.parts = BridgeParts(bridge.eval().requires_grad_(False))
        self.tokenizer: Any = bridge.tokenizer
        self.context_length = int(bridge.cfg.n_ctx)
        self._check_special_tokens()
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
            raise ValueError(f"{self.name} has no tokenizer: give token ids instead of text")
        check_text("the prompt", prompt)
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
        return self.tokens(ids)

    def tokens(self, prompt: Prompt) -> Tensor:
        """Token ids `[T]` of a prompt, on the model's device; every entry point that reads a prompt reads it through here.

        Args:
            prompt: text, a list of token ids, or a 1-D integer tensor of them. Ids are taken as they are, without a
                beginning-of-sequence token.

        Raises:
            ValueError: another type, nothing in it, more tokens than the context holds, ids outside the vocabulary, or words
                the tokenizer does not know.
        """
        if isinstance(prompt, str):
            return self.tokenize(prompt)
        if isinstance(prompt, Tensor):
            if prompt.ndim != 1:
                raise ValueError(f"expected a 1-D tensor of token ids, got one of shape {tuple(prompt.shape)}")
            return self._check_ids(prompt)
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
            expected = "expected a prompt (text, a list of token ids or a 1-D tensor of them)"
            raise ValueError(f"{expected}, got {type(prompt).__name__}")
        foreign = [token for token in prompt if isinstance(token, bool) or not isinstance(token, numbers.Integral)]
        if foreign:
            raise ValueError(
                f"expected a list of integer token ids, got one that holds {reprlib.repr(foreign[0])}; "
                "several prompts at once are a 2-D tensor"
            )
        ids = [int(token) for token in prompt]
        self._check_range(min(ids, default=0), max(ids, default=0))  # before torch, whose integers end at 2^63
        return self._check_ids(torch.tensor(ids, dtype=torch.int64))

    def batch(self, prompts: Prompt) -> Tensor:
        """Token ids `[B, T]` on the model's device: of a 2-D tensor, or of a single prompt as the only row.

        Raises:
            ValueError: as `tokens`.
        """
        return self._check_ids(prompts) if is_batch(prompts) else self.tokens(prompts)[None]

    def _check_ids(self, tokens: Tensor) -> Tensor:
        """Integer ids `[T]` or `[B, T]` as int64 on the model's device, if the model can read them."""
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise ValueError(f"expected integer token ids, got a tensor of {tokens.dtype}")
        if tokens.layout != torch.strided or tokens.is_meta:
            raise ValueError(f"expected a dense tensor of token ids, got a {tokens.layout} one on {tokens.device}")
        tokens = tokens.to(torch.int64)  # some kinds of integers have no minimum
        if not tokens.numel():
            raise ValueError(f"expected at least one token id, got a tensor of shape {tuple(tokens.shape)}")
        if tokens.shape[-1] > self.context_length:
            raise ValueError(
                f"the prompt has {tokens.shape[-1]} tokens: {self.name} reads at most {self.context_length}"
            )
        self._check_range(int(tokens.min()), int(tokens.max()))
        return tokens.to(self.device)

    def _check_range(self, low: int, high: int) -> None:
        if low < 0 or high >= self.vocabulary_size:
            raise ValueError(f"token ids must lie in [0, {self.vocabulary_size}), got {low} to {high}")

    def token_id(self, text: str) -> int:
        """Id of a text that is exactly one token.

        A word may be a token with and without a leading space; inside a sentence it is the one with the space, so
        that one is meant unless the text is not a token with it.

        Raises:
            ValueError: the text is not one known token.
        """
        if self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer: name target tokens by id")
        check_text("a token", text)
        forms = (text,) if text.startswith(" ") else (" " + text, text)
        for form in forms:
            ids = self.tokenizer(form, add_special_tokens=False)["input_ids"]
            if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id:
                return int(ids[0])
        raise ValueError(f"{reprlib.repr(text)} is not a single token of {self.name}'s vocabulary")

    def token_strings(self, token_ids: Iterable[int]) -> list[str]:
        """Text of each token alone, with the space it begins with; `#id` for a model without a tokenizer.

        Bytes that are no whole character are written `<E2>`; `replacement.token_texts.visible` shows spaces and line ends too.
        """
        return alone(self._token_bytes(token_ids))

    def prompt_strings(self, token_ids: Iterable[int]) -> list[str]:
        """Text of each token of a prompt: as `token_strings`, but a character made of several tokens is the last one's text."""
        return in_a_row(self._token_bytes(token_ids))

    def _token_bytes(self, token_ids: Iterable[int]) -> list[bytes]:
        numbers = [int(token) for token in token_ids]
        if self.tokenizer is None:
            return [f"#{token}".encode() for token in numbers]
        return token_bytes(self.tokenizer, numbers)

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens V in the embedding."""
        return int(self.parts.bridge.cfg.d_vocab)

    def _check_special_tokens(self) -> None:
        """Only tokens that end up in prompts count: some tokenizers list more (Gemma 3 one for images)."""
        for name in ("bos", "eos", "pad", "unk") if self.tokenizer is not None else ():
            token = getattr(self.tokenizer, f"{name}_token_id", None)
            if token is not None and not 0 <= token < self.vocabulary_size:
                raise ValueError(
                    f"{self.name}: the tokenizer's {name} token has the id {token}, but the model's vocabulary ends at "
                    f"{self.vocabulary_size - 1}: the tokenizer belongs to another model"
                )

    def _refuse_unknown_words(self, prompt: str, ids: list[int], encoding: Any) -> None:
        unknown = self.tokenizer.unk_token_id
        if unknown is None or unknown not in ids:
            return
        if not self.tokenizer.is_fast:
            raise ValueError("the prompt holds words the tokenizer does not know")
        offsets = encoding["offset_mapping"]
        words = [prompt[slice(*offsets[i])] for i, token in enumerate(ids) if token == unknown]
        listed = ", ".join(reprlib.repr(word) for word in dict.fromkeys(words))
        raise ValueError(f"{self.name}'s tokenizer does not know {textwrap.shorten(listed, 80, placeholder=' ...')}")

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


def check_text(name: str, text: str) -> None:
    """Refuse lone surrogates with a `ValueError`, because tokenizers do: bytes that are not UTF-8 become them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: expected text that UTF-8 can hold, got {reprlib.repr(text)}") from None


def _as_bridge_hook(hook: Hook) -> Any:
    return lambda x, hook=None, run=hook: run(x)
