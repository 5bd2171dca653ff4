"""The weights of a language model under the names of the Hugging Face model that TransformerLens wraps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from replacement.files import atomic_folder
from replacement.language_model.boot import quiet
from replacement.language_model.fingerprint import model_fingerprint
from replacement.language_model.language_model import LanguageModel

_WRAPPED = "_original_component."


def trainable_weights(lm: LanguageModel) -> dict[str, nn.Parameter]:
    """The weights that decide the logits, by TransformerLens's names; training them in place trains the Hugging Face model.

    TransformerLens computes with parts of some fused weights, such as the queries of GPT-2: views of the same memory, of which
    the parts are trained and the whole follows.

    Raises:
        ValueError: the architecture computes with copies of its weights, which a saved model would lack.
    """
    module = lm.parts.bridge.original_model.requires_grad_(True)
    tokens_1T = torch.arange(min(6, lm.context_length), device=lm.device)[None] % lm.vocabulary_size
    with torch.enable_grad():
        lm.run(tokens_1T, {}).logsumexp(-1).sum().backward()
    named = dict(module.named_parameters())
    used = {_memory(weight) for weight in named.values() if weight.grad is not None}
    # Experts that no token of the probe was sent to have no gradient, but memory of their own.
    trained = {
        name.replace(_WRAPPED, ""): weight
        for name, weight in named.items()
        if weight.grad is not None or _memory(weight) not in used
    }
    module.zero_grad(set_to_none=True)
    module.requires_grad_(False)
    stored = {_memory(weight) for weight in hugging_face_weights(lm).values()}
    for name, weight in trained.items():
        if _memory(weight) not in stored:
            raise ValueError(
                f"{lm.name} cannot be trained: {lm.parts.architecture} computes with a copy of its weights ({name}), which "
                "the saved model would lack"
            )
    return trained


def hugging_face_weights(lm: LanguageModel) -> dict[str, Tensor]:
    """The tensors that the Hugging Face model is saved as, by its own names, tied ones once; views of the memory that `lm`
    computes with."""
    module: Any = lm.parts.bridge.original_model
    with torch.device("meta"):
        names = type(module)(module.config).state_dict()
    held = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    by_name = {name.replace(_WRAPPED, ""): tensor.detach() for name, tensor in held.items()}
    first = {_memory(by_name[name]): name for name in reversed(names)}
    return {name: by_name[name] for name in names if first[_memory(by_name[name])] == name}


@torch.no_grad()
def randomise(lm: LanguageModel, *, seed: int) -> None:
    """Give a language model the weights that its architecture begins training with, as a function of the seed."""
    module: Any = lm.parts.bridge.original_model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(module)(module.config).state_dict()
    for name, tensor in hugging_face_weights(lm).items():
        tensor.copy_(fresh[name])


def save_language_model(lm: LanguageModel, folder: Path) -> None:
    """Write a language model and its tokenizer in Hugging Face layout, in place of files of the same names.

    Raises:
        ValueError: the folder cannot be written.
    """
    module: Any = lm.parts.bridge.original_model
    saved = type(module)(copy.deepcopy(module.config))
    saved.load_state_dict(hugging_face_weights(lm), strict=False)  # tied weights are there once
    with atomic_folder(folder, keep_others=True) as scratch, quiet():
        saved.to(lm.dtype).save_pretrained(scratch)
        if lm.tokenizer is not None:
            _without_added_roles(lm.tokenizer).save_pretrained(scratch)
        for file in scratch.iterdir():
            file.chmod(0o644)  # safetensors writes files only their owner may read


def _without_added_roles(tokenizer: Any) -> Any:
    """A tokenizer without the roles that TransformerLens gave to texts outside its vocabulary: read again, it would grow."""
    tokenizer = copy.deepcopy(tokenizer)
    for role in ("bos_token", "eos_token", "pad_token"):
        if getattr(tokenizer, role) not in tokenizer.get_vocab():
            setattr(tokenizer, role, None)
    return tokenizer


def fingerprint_now(lm: LanguageModel) -> str:
    """The fingerprint of a language model whose weights have changed since it was loaded."""
    return model_fingerprint(lm.parts)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
