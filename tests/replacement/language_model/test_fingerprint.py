"""A fingerprint follows all that decides what a model computes, and nothing else."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformer_lens.model_bridge import TransformerBridge

import replacement
from replacement import LanguageModel

EVERYWHERE = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)


@EVERYWHERE
def test_it_does_not_depend_on_the_dtype(
    language_model: Any, model_folder: Callable[[str], Path], architecture: str
) -> None:
    print32 = language_model(architecture).fingerprint
    assert print32.startswith("2:")
    assert len(print32) == 18
    assert print32 == language_model(architecture, torch.float64).fingerprint
    if architecture != "native":
        stored = LanguageModel.from_pretrained(model_folder(architecture), dtype=torch.bfloat16)
        assert print32 == stored.fingerprint


def test_models_differ(language_model: Any) -> None:
    assert len({language_model(name).fingerprint for name in tiny.ARCHITECTURES}) == len(tiny.ARCHITECTURES)


def edited(folder: Path, target: Path, **entries: Any) -> LanguageModel:
    """The model of a folder with other entries in its configuration."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **entries}))
    return LanguageModel.from_pretrained(target)


@pytest.mark.parametrize(
    ("architecture", "entries"),
    [
        ("gpt2", {"activation_function": "relu"}),
        ("gpt2", {"layer_norm_epsilon": 1e-3}),
        ("gpt2", {"n_head": 8}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"rms_norm_eps": 1e-3}),
        ("llama", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
        ("gemma2", {"attn_logit_softcapping": 4.0}),
        ("gemma2", {"final_logit_softcapping": 4.0}),
        ("gemma2", {"query_pre_attn_scalar": 9}),
        ("gemma2", {"sliding_window": 3}),
        ("neox", {"use_parallel_residual": True, "hidden_act": "relu"}),
    ],
)
def test_settings_count(
    language_model: Any,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    architecture: str,
    entries: dict[str, Any],
) -> None:
    assert edited(model_folder(architecture), tmp_path / "m", **entries).fingerprint != (
        language_model(architecture).fingerprint
    )


def test_entries_without_effect_do_not_count(
    language_model: Any, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    entries = {"initializer_range": 0.5, "use_cache": False, "resid_pdrop": 0.3, "some_future_option": None}
    assert edited(model_folder("gpt2"), tmp_path / "renamed", **entries).fingerprint == (
        language_model("gpt2").fingerprint
    )


def change_weight(bridge: TransformerBridge) -> None:
    bridge.blocks[2].mlp.out.original_component.weight.view(-1)[777] += 1  # one value, which a sample would miss


def change_activation(bridge: TransformerBridge) -> None:
    bridge.blocks[1].mlp.original_component.act_fn = torch.nn.ReLU()


def change_epsilon(bridge: TransformerBridge) -> None:
    bridge.blocks[1].ln2.original_component.variance_epsilon = 0.1


def change_buffer(bridge: TransformerBridge) -> None:
    bridge.original_model.get_buffer("model.rotary_emb._original_component.inv_freq")[1] *= 2


def change_bias(bridge: TransformerBridge) -> None:
    bridge.b_U[3] += 1


def swap_layers(bridge: TransformerBridge) -> None:
    first, second = (bridge.blocks[layer].mlp.out.original_component.weight for layer in (0, 1))
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


@pytest.mark.parametrize(
    "change", [change_weight, change_activation, change_epsilon, change_buffer, change_bias, swap_layers]
)
def test_changes_of_the_loaded_model_count(model_folder: Callable[[str], Path], change: Any) -> None:
    lm = LanguageModel.from_pretrained(model_folder("llama"))
    with torch.no_grad():
        change(lm.parts.bridge)
    assert LanguageModel(lm.parts.bridge, name="changed").fingerprint != lm.fingerprint


def test_names_do_not_count(model_folder: Callable[[str], Path]) -> None:
    lm = LanguageModel.from_pretrained(model_folder("llama"))
    module = lm.parts.bridge.original_model.model
    renamed = copy.copy(module)
    renamed._modules = {f"other_{name}": child for name, child in module._modules.items()}
    lm.parts.bridge.original_model._modules["model"] = renamed
    from replacement.language_model.fingerprint import model_fingerprint

    assert model_fingerprint(lm.parts) == lm.fingerprint


def test_fingerprints_of_earlier_versions_are_known() -> None:
    model = replacement.load("demo")
    lm = model.language_model
    recorded = lm.legacy_fingerprint
    assert ":" not in recorded
    assert model.crosscoder.model_fingerprint == lm.fingerprint
    assert lm.has_fingerprint(recorded)
    assert lm.has_fingerprint(lm.fingerprint)
    assert not lm.has_fingerprint("2:" + recorded)
    assert not lm.has_fingerprint("")
