"""What a language model reads: prompts to token ids, ids to texts, and what it refuses."""

from __future__ import annotations

import numbers
import reprlib
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from replacement.language_model.bridge_parts import BridgeParts
from replacement.token_texts import alone, in_a_row, token_bytes

Prompt = str | Sequence[int] | Tensor
"""Text, a list of token ids, or a 1-D integer tensor of them."""


def is_batch(prompt: Prompt) -> TypeGuard[Tensor]:
    """Whether this is several prompts of one length, given as a 2-D tensor `[B, T]`, instead of one."""
    return isinstance(prompt, Tensor) and prompt.ndim == 2


class PromptReader:
    """The tokenizer of a language model and the checks of what the model can read; `LanguageModel` runs it.

    Attributes:
        parts: access to the model.
        name: hub name or folder name.
        tokenizer: a Hugging Face tokenizer, or None for a model without one.
        context_length: longest prompt in tokens.

    Raises:
        ValueError: the tokenizer begins, ends, pads or replaces with a token that the model does not have.
    """

    def __init__(self, parts: BridgeParts, name: str) -> None:
        self.parts, self.name = parts, name
        self.tokenizer: Any = parts.bridge.tokenizer
        self.context_length = int(parts.bridge.cfg.n_ctx)
        self._check_special_tokens()

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.parts.device

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens V in the embedding."""
        return int(self.parts.bridge.cfg.d_vocab)

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


def check_text(name: str, text: str) -> None:
    """Refuse lone surrogates with a `ValueError`, because tokenizers do: bytes that are not UTF-8 become them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: expected text that UTF-8 can hold, got {reprlib.repr(text)}") from None
