"""Native checkpoints: a folder with `config.json` (what the crosscoder is) and `crosscoder.safetensors` (its tensors).

Saving writes a temporary folder next to the target and renames it, so a reader never meets half a checkpoint. Loading
checks names, shapes and values, and every failure is one ValueError that names the file.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from replacement.crosscoder.activation import activation_from_dict
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import ModelShape
from replacement.crosscoder.wiring import HasShape, Wiring

FORMAT = "crosstrace crosscoder"
VERSION = 1
CONFIG_FILE = "config.json"
TENSOR_FILE = "crosscoder.safetensors"
ENTRIES = (
    "model_name",
    "model_fingerprint",
    "wiring",
    "n_features",
    "activation",
    "tied",
    "skip",
    "undecomposed_positions",
    "dtype",
    "training",
)


def save(
    crosscoder: Crosscoder,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder atomically.

    Args:
        folder: the target; created, or replaced if it is empty or holds a checkpoint.
        dtype: dtype of the stored weights; `torch.bfloat16` halves the size.
        training: anything worth recording about the training run (JSON values).

    Raises:
        ValueError: the folder holds something else, or the crosscoder holds NaN or infinite values.
        TypeError: `training` holds values JSON cannot express.
    """
    target = Path(folder)
    _check_replaceable(target)
    crosscoder.check_finite()
    config = json.dumps(_config(crosscoder, dtype, dict(training or {})), indent=1)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        tensors = {name: value.to("cpu", dtype).contiguous() for name, value in crosscoder.state_dict().items()}
        save_file(tensors, scratch / TENSOR_FILE)
        (scratch / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
        scratch.chmod(0o755)  # mkdtemp makes private folders, safetensors private files
        (scratch / TENSOR_FILE).chmod(0o644)
        _swap(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load(folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Crosscoder:
    """Read a checkpoint folder into a crosscoder in evaluation mode.

    Raises:
        ValueError: names the file and says what is wrong: missing, not JSON, another format, a newer version, a damaged
            tensor file, missing, unexpected or misshapen tensors, or NaN and infinite values.
    """
    path = Path(folder) / TENSOR_FILE
    crosscoder = _from_config(read_config(folder), Path(folder) / CONFIG_FILE, dtype)
    tensors = _read_tensors(path, device)
    expected = crosscoder.state_dict()
    for problem, names in (("lacks", expected.keys() - tensors.keys()), ("has", tensors.keys() - expected.keys())):
        if names:
            verb = "the tensor" if problem == "lacks" else "an unexpected tensor"
            raise ValueError(f"{path} {problem} {verb} {min(names)}, which does not agree with {CONFIG_FILE}")
    for name, value in tensors.items():
        if value.shape != expected[name].shape:
            shapes = f"expected {list(expected[name].shape)}, got {list(value.shape)}"
            raise ValueError(f"{path}: the tensor {name} has the wrong shape: {shapes}")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{path}: the tensor {name} holds NaN or infinite values")
    crosscoder.to(device)
    crosscoder.load_state_dict(tensors)
    return crosscoder.eval()


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read and check `config.json` of a checkpoint folder, without the weights.

    Raises:
        ValueError: the folder or file is missing, not JSON, of another format, or of a newer version.
    """
    path = Path(folder) / CONFIG_FILE
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder: expected a crosscoder checkpoint")
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {folder} is not a crosscoder checkpoint")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        given = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path} is no crosscoder checkpoint: expected format {FORMAT!r}, got {given!r}")
    if not isinstance(config.get("version"), int) or config["version"] > VERSION:
        raise ValueError(
            f"{path} has format version {config.get('version')!r}; this library reads versions up to {VERSION}"
        )
    missing = [entry for entry in ENTRIES if entry not in config]
    if missing:
        raise ValueError(f"{path} lacks the entry {missing[0]!r}")
    return config


def check_fits(crosscoder: Crosscoder, model: ModelShape | HasShape) -> None:
    """Check that a crosscoder belongs to a model.

    Args:
        model: a language model, whose sizes and weights are compared (its name only where a fingerprint is missing, because
            folders get renamed), or a `ModelShape`, for the sizes alone.

    Raises:
        ValueError: another width, depth or model, with both values.
    """
    crosscoder.wiring.check_fits(model)
    # Earlier versions recorded another digest of the same weights.
    known = [digest for kind in ("fingerprint", "legacy_fingerprint") if (digest := getattr(model, kind, ""))]
    name, recorded = getattr(model, "name", ""), crosscoder.model_fingerprint
    if recorded and known:
        if recorded not in known:
            raise ValueError(
                f"this crosscoder was trained on another model: on {crosscoder.model_name!r} with weights {recorded}, "
                f"the model is {name!r} with weights {known[0]}"
            )
    elif crosscoder.model_name and name and crosscoder.model_name != name:
        raise ValueError(f"this crosscoder was trained on {crosscoder.model_name!r}, the model is {name!r}")


def _config(crosscoder: Crosscoder, dtype: torch.dtype, training: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "model_name": crosscoder.model_name,
        "model_fingerprint": crosscoder.model_fingerprint,
        **crosscoder.settings(),
        "dtype": str(dtype).removeprefix("torch."),
        "training": training,
    }


def _from_config(config: Mapping[str, Any], path: Path, dtype: torch.dtype) -> Crosscoder:
    try:
        return Crosscoder(
            Wiring.from_dict(config["wiring"]),
            n_features=config["n_features"],
            activation=activation_from_dict(config["activation"]),
            tied=config["tied"],
            skip=config["skip"],
            dtype=dtype,
            model_name=config["model_name"],
            model_fingerprint=config["model_fingerprint"],
            undecomposed_positions=config["undecomposed_positions"],
            seed=0,
        )
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{path} does not describe a crosscoder: {error}") from None


def _read_tensors(path: Path, device: torch.device | str) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from None


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file: expected a folder to save the crosscoder in")
    if any(target.iterdir()):
        foreign = sorted({entry.name for entry in target.iterdir()} - {CONFIG_FILE, TENSOR_FILE})
        if foreign:
            raise ValueError(f"{target} holds {foreign[0]!r}, which is no part of a checkpoint; choose another folder")
        read_config(target)


def _swap(scratch: Path, target: Path) -> None:
    """Put the new folder in the target's place; a filled folder cannot be renamed over, so the old one steps aside."""
    if not target.exists() or not any(target.iterdir()):
        os.replace(scratch, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    os.replace(target, old)
    try:
        os.replace(scratch, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old)
