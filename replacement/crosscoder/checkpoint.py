"""Native checkpoints: a folder with `config.json` (what the crosscoder is) and `crosscoder.safetensors` (its tensors).

A checkpoint appears whole or not at all (`files.atomic_folder`). Both files carry a digest, so that a changed byte in either is
found on loading; names, shapes and values are checked besides, and every failure is one ValueError that names the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from replacement.crosscoder.activation import activation_from_dict
from replacement.crosscoder.checks import finite_values, float_dtype
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.mapped_file import map_tensors
from replacement.crosscoder.sites import ModelShape
from replacement.crosscoder.weights import MATRICES
from replacement.crosscoder.wiring import HasShape, Wiring
from replacement.files import atomic_folder, read_json, sha256_of
from replacement.memory import available_memory, size_text

FORMAT = "crosstrace crosscoder"
VERSION = 2
"""2 added `tensors_sha256` and `config_sha256`; checkpoints of version 1 are read without digests."""
CONFIG_FILE = "config.json"
TENSOR_FILE = "crosscoder.safetensors"
DIGESTS = ("tensors_sha256", "config_sha256")
"""Digests of the tensor file, and of the entries of the configuration apart from this one."""
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
        ValueError: the folder holds something else or cannot be written, an unsuitable dtype, or weights that hold NaN,
            infinity or magnitudes above 1e18 in that dtype.
        TypeError: `training` holds values JSON cannot express.
    """
    target = Path(folder)
    float_dtype("the dtype of a checkpoint", dtype)
    if training is not None and not isinstance(training, Mapping):
        raise ValueError(f"training must be a mapping of JSON values, got {training!r:.50}")
    if (target / CONFIG_FILE).is_file():
        _read_checked(target / CONFIG_FILE)
    tensors = {name: value.to("cpu", dtype).contiguous() for name, value in crosscoder.state_dict().items()}
    for name, value in tensors.items():
        finite_values(f"the tensor {name}", value)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "model_name": crosscoder.model_name,
        "model_fingerprint": crosscoder.model_fingerprint,
        **crosscoder.settings(),
        "fingerprint": crosscoder.fingerprint,
        "dtype": str(dtype).removeprefix("torch."),
        "training": dict(training or {}),
    }
    config = json.loads(json.dumps(config))  # as it will be read: JSON has no tuples, and only texts as keys
    with atomic_folder(target, replaces=(CONFIG_FILE, TENSOR_FILE)) as scratch:
        save_file(tensors, scratch / TENSOR_FILE)
        config["tensors_sha256"] = sha256_of(scratch / TENSOR_FILE)
        config["config_sha256"] = config_digest(config)
        (scratch / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    lazy: bool | None = None,
) -> Crosscoder:
    """Read a checkpoint folder into a crosscoder in evaluation mode.

    Args:
        dtype: what the crosscoder computes in.
        device: where it is put.
        lazy: leave encoders and decoders in the file, as a map of it in memory: opening takes no time, encoders are read a
            group at a time and decoder vectors one by one, and the system forgets what it needs no more. Names, shapes and
            the digest of the configuration are checked then, the digest of the weights is not (loading with `lazy=False`
            checks it). By default where the weights would take more than half of the memory that is free.

    Raises:
        ValueError: an unsuitable dtype or device; or names the file and says what is wrong: missing, not JSON, another format,
            a newer version, other content than was saved, missing, unexpected or misshapen tensors, values that are no
            floats, NaN, infinite or above 1e18.
    """
    float_dtype("the dtype of a crosscoder", dtype)
    config, path = read_config(folder), Path(folder) / TENSOR_FILE
    crosscoder = _described(config, Path(folder) / CONFIG_FILE, dtype)
    expected = crosscoder.state_dict()
    lazy = _is_lazy(path, expected, dtype, device, lazy)
    tensors, mapped = map_tensors(path)
    for problem, names in (("lacks", expected.keys() - tensors.keys()), ("has", tensors.keys() - expected.keys())):
        if names:
            verb = "the tensor" if problem == "lacks" else "an unexpected tensor"
            raise ValueError(f"{path} {problem} {verb} {min(names)}, which does not agree with {CONFIG_FILE}")
    for name, value in tensors.items():
        if value.shape != expected[name].shape:
            shapes = f"expected {list(expected[name].shape)}, got {list(value.shape)}"
            raise ValueError(f"{path}: the tensor {name} has the wrong shape: {shapes}")
        float_dtype(f"{path}: the dtype of the tensor {name}", value.dtype)
        if lazy and name.startswith(MATRICES):
            continue
        tensors[name] = value.to(dtype, copy=True)  # into aligned memory: sums are then the same as before saving
        finite_values(f"{path}: the tensor {name}", tensors[name])
        mapped.release()
    if not lazy and config["version"] > 1 and sha256_of(path) != config["tensors_sha256"]:
        raise ValueError(f"{path} is damaged: its digest is not the one recorded in {CONFIG_FILE}")
    crosscoder.load_state_dict(tensors, assign=True)
    if lazy:
        crosscoder.in_file = mapped
        if "fingerprint" in config:
            crosscoder.fingerprint = config["fingerprint"]
        return crosscoder.eval().requires_grad_(False)
    try:
        return crosscoder.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot load a crosscoder to the device {str(device)!r:.50}: {error}") from error


def _is_lazy(
    path: Path, expected: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str, lazy: bool | None
) -> bool:
    """Whether to leave the weights in their file; see `load`."""
    size = sum(value.numel() for value in expected.values()) * dtype.itemsize
    available, on_cpu = available_memory(), torch.device(device).type == "cpu"
    if lazy and not on_cpu:
        raise ValueError(f"cannot leave the weights of {path} in their file on the device {device}: only on cpu")
    if lazy is None:
        return on_cpu and available is not None and size > available / 2
    if not lazy and on_cpu and available is not None and size > available:
        raise ValueError(
            f"{path}: the weights take {size_text(size)} in {str(dtype).removeprefix('torch.')}, and {size_text(available)} "
            "of memory are free: load them with lazy=True, which leaves them in the file"
        )
    return lazy


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read and check `config.json` of a checkpoint folder, without the weights.

    Raises:
        ValueError: the folder or file is missing, not JSON, of another format, of a newer version, or changed since saving.
    """
    path = Path(folder) / CONFIG_FILE
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder: expected a crosscoder checkpoint")
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {folder} is not a crosscoder checkpoint")
    config = _read_checked(path)
    version = config.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(f"{path} has format version {version!r:.50}; this library reads versions up to {VERSION}")
    missing = [entry for entry in (*ENTRIES, *(DIGESTS if version > 1 else ())) if entry not in config]
    if missing:
        raise ValueError(f"{path} lacks the entry {missing[0]!r}")
    if version > 1 and config_digest(config) != config["config_sha256"]:
        raise ValueError(f"{path} is damaged or was edited: its entries do not have the digest recorded in it")
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
    name, recorded = getattr(model, "name", ""), crosscoder.model_fingerprint
    fingerprint = getattr(model, "fingerprint", "")
    if recorded and fingerprint:
        if not model.has_fingerprint(recorded):  # type: ignore[union-attr] # which knows digests of earlier versions
            raise ValueError(
                f"this crosscoder was trained on another model: on {crosscoder.model_name!r} with weights {recorded}, "
                f"the model is {name!r} with weights {fingerprint}"
            )
    elif crosscoder.model_name and name and crosscoder.model_name != name:
        raise ValueError(f"this crosscoder was trained on {crosscoder.model_name!r}, the model is {name!r}")


def _described(config: Mapping[str, Any], path: Path, dtype: torch.dtype) -> Crosscoder:
    """The crosscoder that a configuration describes, without memory for its tensors."""
    try:
        with torch.device("meta"):
            return Crosscoder(
                Wiring.from_dict(config["wiring"]),
                activation=activation_from_dict(config["activation"]),
                dtype=dtype,
                **{
                    name: config[name]
                    for name in (*ENTRIES[:2], "n_features", "tied", "skip", "undecomposed_positions")
                },
            )
    except ValueError as error:
        raise ValueError(f"{path} does not describe a crosscoder: {error}") from None


def _read_checked(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        given = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path} is no crosscoder checkpoint: expected format {FORMAT!r}, got {given!r:.50}")
    return config


def config_digest(config: Mapping[str, Any]) -> str:
    """Digest of a configuration's entries, that of the digest itself left out."""
    entries = {name: value for name, value in config.items() if name != "config_sha256"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
