"""The native layout: a folder with `config.json` (what the crosscoder is) and `crosscoder.safetensors` (its tensors).

A checkpoint appears whole or not at all (`files.atomic_folder`). Both files carry a digest, so that a changed byte in either is
found on loading; names, shapes and values are checked besides, and every failure is one ValueError that names the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replacement.crosscoder.activation_kinds import activation_from_dict
from replacement.crosscoder.checks import finite_values
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.formats.published import Layout, Published
from replacement.crosscoder.formats.tensor_files import mentions
from replacement.crosscoder.formats.writing import write_json
from replacement.crosscoder.mapped_file import map_tensors, write_tensors
from replacement.crosscoder.query_keys import QueryKeys
from replacement.crosscoder.wiring import Wiring
from replacement.files import read_json, sha256_of

NAME = "crosstrace"
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
OF_ADAPTERS = ("base_name", "base_fingerprint")
"""Entries that only adapters have."""


RULE = "as its wiring says: h = x W_enc^T + b_enc, a = f(h), y = a W_dec + b_dec (+ x W_skip^T); b_dec is added once per site"


def detect(folder: Path) -> bool:
    """Whether a folder says that it is one, or holds the tensors of one."""
    return (folder / TENSOR_FILE).is_file() or mentions(folder / CONFIG_FILE, '"format"')


def read(folder: Path) -> Published:
    """Read a checkpoint folder; `checkpoint.load` says what can be wrong with it."""
    config, path = read_config(folder), folder / TENSOR_FILE
    try:
        wiring, activation = Wiring.from_dict(config["wiring"]), activation_from_dict(config["activation"])
        query_keys = QueryKeys.from_dict(config["query_keys"]) if "query_keys" in config else None
    except ValueError as error:
        raise _not_described(folder, error) from None
    tensors, mapped = map_tensors(path)
    published = Published(
        layout=NAME,
        path=path,
        rule=RULE,
        wiring=wiring,
        activation=activation,
        query_keys=query_keys,
        tensors=tensors,
        files=[mapped],
        fingerprint=config.get("fingerprint", ""),
        whole_fingerprint=True,
        facts={"stored as": config["dtype"], "training": config["training"] or "not recorded"},
        verify=lambda: _verify(path, config),
        **{name: config[name] for name in ENTRIES if name not in ("wiring", "activation", "dtype", "training")},
        **{name: config[name] for name in OF_ADAPTERS if name in config},
    )
    try:
        published.described()
    except ValueError as error:
        raise _not_described(folder, error) from None
    return published


def write(
    crosscoder: Crosscoder, folder: Path, dtype: torch.dtype, *, training: Mapping[str, Any] | None = None
) -> None:
    """Write both files; see `checkpoint.save`."""
    config = {
        "format": FORMAT,
        "version": VERSION,
        "model_name": crosscoder.model_name,
        "model_fingerprint": crosscoder.model_fingerprint,
        **{name: value for name in OF_ADAPTERS if (value := getattr(crosscoder, name))},
        **crosscoder.settings(),
        "fingerprint": crosscoder.fingerprint,
        "dtype": str(dtype).removeprefix("torch."),
        "training": dict(training or {}),
    }
    config = json.loads(json.dumps(config))  # as it will be read: JSON has no tuples, and only texts as keys

    def values(name: str, make: Callable[[], Tensor]) -> Tensor:
        tensor = make().to("cpu", dtype)
        finite_values(f"the tensor {name}", tensor)
        return tensor

    tensors = [(name, shape, partial(values, name, make)) for name, shape, make in crosscoder.whole_tensors()]
    write_tensors(folder / TENSOR_FILE, tensors, dtype)
    config["tensors_sha256"] = sha256_of(folder / TENSOR_FILE)
    config["config_sha256"] = config_digest(config)
    write_json(folder / CONFIG_FILE, config)


def _not_described(folder: Path, error: ValueError) -> ValueError:
    return ValueError(f"{folder / CONFIG_FILE} does not describe a crosscoder: {error}")


def _verify(path: Path, config: Mapping[str, Any]) -> None:
    if config["version"] > 1 and sha256_of(path) != config["tensors_sha256"]:
        raise ValueError(f"{path} is damaged: its digest is not the one recorded in {CONFIG_FILE}")


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
    config = read_format(path)
    version = config.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(f"{path} has format version {version!r:.50}; this library reads versions up to {VERSION}")
    missing = [entry for entry in (*ENTRIES, *(DIGESTS if version > 1 else ())) if entry not in config]
    if missing:
        raise ValueError(f"{path} lacks the entry {missing[0]!r}")
    if version > 1 and config_digest(config) != config["config_sha256"]:
        raise ValueError(f"{path} is damaged or was edited: its entries do not have the digest recorded in it")
    return config


def read_format(path: Path) -> dict[str, Any]:
    """The entries of a configuration, of this format and any version."""
    config = read_json(path)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        given = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path} is no crosscoder checkpoint: expected format {FORMAT!r}, got {given!r:.50}")
    return config


def config_digest(config: Mapping[str, Any]) -> str:
    """Digest of a configuration's entries, that of the digest itself left out."""
    entries = {name: value for name, value in config.items() if name != "config_sha256"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


LAYOUTS = (
    Layout(
        name=NAME,
        description="our own: config.json and crosscoder.safetensors",
        detect=detect,
        read=read,
        write=write,
        holds_lorsa=True,
    ),
)
