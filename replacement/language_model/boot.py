"""Boot a TransformerLens bridge from a hub name or a local folder, with one clear error for each way to fail; and copy one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import PretrainedConfig
from transformers.utils import logging as transformers_logging

from replacement.files import checked_path, read_json


def boot(name_or_folder: str | Path, *, dtype: torch.dtype, device: str) -> tuple[TransformerBridge, str]:
    """The bridge and the name its crosscoders will remember: the hub name, or the name in the folder's config.

    Raises:
        ValueError: a folder that is missing, incomplete or damaged; weights that are not finite; an unknown architecture.
    """
    folder = checked_path(name_or_folder)
    is_folder = isinstance(name_or_folder, Path) or folder.exists() or str(name_or_folder).startswith((".", "/", "~"))
    if is_folder:
        _check_folder(folder)
    try:
        with quiet():
            overrides = _falcon_overrides(PretrainedConfig.get_config_dict(str(name_or_folder))[0])
            bridge = TransformerBridge.boot_transformers(
                str(name_or_folder), dtype=dtype, device=device, hf_config_overrides=overrides
            )
            if overrides is not None:
                _split_falcon(bridge)
            model: Any = bridge.original_model
            if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
                model.set_experts_implementation("eager")  # the fused kernel knows no float64
    except Exception as error:  # the loaders below raise types of their own, tokenizers a bare Exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot load the language model {str(name_or_folder)!r}: {reason[:300]}") from error
    return bridge, _folder_name(folder.resolve()) if is_folder else str(name_or_folder)


def copy_bridge(bridge: TransformerBridge) -> TransformerBridge:
    """A copy with weights of its own.

    The last attention patterns, which TransformerLens keeps in some models, are left out: those of a pass with gradients cannot
    be copied.
    """
    patterns = (getattr(module, "_pattern", None) for module in bridge.modules())
    return copy.deepcopy(bridge, {id(pattern): None for pattern in patterns if pattern is not None})


def _folder_name(folder: Path) -> str:
    """Name of a model in a folder; of one in the hub's cache (`models--ORG--NAME/snapshots/COMMIT`) its name on the hub."""
    cached = folder.parent.parent.name
    if folder.parent.name == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/")
    return folder.name


def _falcon_overrides(config: dict[str, Any]) -> dict[str, Any] | None:
    """What the settings of Falcon 40B and 180B mean, said as TransformerLens 4.3 understands it; None for other models.

    There are several key heads whatever `multi_query` says, and two norms where their number is not given.
    """
    if not config.get("new_decoder_architecture"):
        return None
    return {"multi_query": False, "num_ln_in_parallel_attn": config.get("num_ln_in_parallel_attn") or 2}


@torch.no_grad()
def _split_falcon(bridge: TransformerBridge) -> None:
    """Take apart the fused projections of Falcon 40B and 180B: one group `[queries, key, value]` for every key head.

    TransformerLens 4.3 reads them as all queries, then all keys, then all values.
    """
    for block in bridge.blocks:
        attention: Any = block.attn
        fused = attention.original_component.query_key_value
        n_groups, d_head = attention.k.original_component.out_features // bridge.cfg.d_head, bridge.cfg.d_head
        for name in ("weight", "bias"):
            if getattr(fused, name, None) is None:
                continue
            groups = getattr(fused, name).unflatten(0, (n_groups, -1, d_head))
            for part, rows in (("q", slice(-2)), ("k", slice(-2, -1)), ("v", slice(-1, None))):
                target = getattr(getattr(attention, part).original_component, name)
                target.copy_(groups[:, rows].reshape(target.shape))


def check_finite(module: nn.Module, source: str) -> None:
    """Raise a `ValueError` that names the first parameter holding NaN or infinity."""
    for name, parameter in module.named_parameters():
        # A finite sum proves all entries finite, at a fraction of the cost; one that overflows proves nothing.
        if not bool(torch.isfinite(parameter.sum())) and not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{source}: weight {name.replace('_original_component.', '')} holds NaN or infinity")


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"no language model folder at {folder}")
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    content = read_json(config)
    if not isinstance(content, dict):
        raise ValueError(f"{config} is no model configuration: expected a JSON object, got a {type(content).__name__}")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds no .safetensors weights (pickled weights are not loaded)")


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the loader's progress bars: library code never prints."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
