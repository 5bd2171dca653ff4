"""Checkpoints: crosscoders are saved in the native layout, and loaded from that or any published one (`formats`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from replacement.crosscoder.checks import float_dtype
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.formats import native
from replacement.crosscoder.formats.layouts import open_published
from replacement.crosscoder.sites import HasShape, ModelShape
from replacement.files import atomic_folder


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
    if (target / native.CONFIG_FILE).is_file():
        native.read_format(target / native.CONFIG_FILE)
    with atomic_folder(target, replaces=(native.CONFIG_FILE, native.TENSOR_FILE)) as scratch:
        native.write(crosscoder, scratch, dtype, training=training)


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    lazy: bool | None = None,
) -> Crosscoder:
    """Read a crosscoder of any known layout, in evaluation mode.

    Args:
        folder: where it is, on this machine; `replacement.load` also takes `hf:` references.
        dtype: what the crosscoder computes in.
        device: where it is put.
        lazy: leave encoders and decoders in the file, as a map of it in memory: opening takes no time, encoders are read a
            group at a time and decoder vectors one by one, and the system forgets what it needs no more. Names, shapes and
            the digest of the configuration are checked then, the digest of the weights is not (loading with `lazy=False`
            checks it). By default where the weights would take more than half of the memory that is free.

    Raises:
        ValueError: an unsuitable dtype or device; or names the file and says what is wrong: missing, of no known layout, a
            newer version, other content than was saved, missing, unexpected or misshapen tensors, values that are no
            floats, NaN, infinite or above 1e18.
    """
    float_dtype("the dtype of a crosscoder", dtype)
    return open_published(Path(folder)).load(dtype=dtype, device=device, lazy=lazy)


def check_fits(crosscoder: Crosscoder, model: ModelShape | HasShape) -> None:
    """Check that a crosscoder belongs to a model.

    Args:
        model: a language model, whose sizes and weights are compared (its name only where a fingerprint is missing, because
            folders get renamed), or a `ModelShape`, for the sizes alone. For an adapter, one with its base model.

    Raises:
        ValueError: another width, depth, model or base model, with both values; or an adapter and no base model.
    """
    crosscoder.wiring.check_fits(model)
    _check_owner("model", crosscoder.model_name, crosscoder.model_fingerprint, model)
    if not crosscoder.wiring.writes_differences or isinstance(model, ModelShape):
        return
    if (base := getattr(model, "base", None)) is None:
        of = f" {crosscoder.base_name!r}" if crosscoder.base_name else ""
        raise ValueError(
            f"this adapter adds to the MLPs of the base model{of}: give the base model too, base=... or --base"
        )
    _check_owner("base model", crosscoder.base_name, crosscoder.base_fingerprint, base)


def _check_owner(what: str, recorded_name: str, recorded: str, model: ModelShape | HasShape) -> None:
    """Check that a crosscoder was made for a language model, by its fingerprint or else by its name."""
    name, fingerprint = getattr(model, "name", ""), getattr(model, "fingerprint", "")
    if recorded and fingerprint:
        if not model.has_fingerprint(recorded):  # type: ignore[union-attr] # which knows digests of earlier versions
            raise ValueError(
                f"this crosscoder was trained on another {what}: on {recorded_name!r} with weights {recorded}, "
                f"the {what} is {name!r} with weights {fingerprint}"
            )
    elif recorded_name and name and last_name(recorded_name) != last_name(name):
        raise ValueError(
            f"this crosscoder was trained on {recorded_name!r}, the {what} is {name!r}; if that is the same model in "
            "another folder, `replacement convert CROSSCODER FOLDER --model MODEL` writes a crosscoder that says so"
        )


def last_name(model_name: str) -> str:
    """Name of a model without its organisation: hub names and the folders they are copied to end in the same."""
    return model_name.rstrip("/").rpartition("/")[2].lower()
