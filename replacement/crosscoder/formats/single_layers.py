"""Transcoders published one file per layer, in whichever of the field's three spellings of their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.formats.tensor_files import TensorFile
from replacement.crosscoder.mapped_file import MappedFile


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One transcoder: `a = f(x W_enc^T + b_enc)`, `y = a W_dec + b_dec (+ x W_skip^T)`."""

    encoder_FD: Float[Tensor, "F D"]
    decoder_FD: Float[Tensor, "F D"]
    encoder_bias_F: Float[Tensor, " F"]
    decoder_bias_D: Float[Tensor, " D"]
    threshold_F: Float[Tensor, " F"] | None = None
    skip_DD: Float[Tensor, "D D"] | None = None
    mapped: MappedFile | None = None
    """The file that these are views of."""

    @classmethod
    def of(cls, crosscoder: Crosscoder, group: int) -> LayerWeights:
        """One group of a crosscoder that reads and writes one site."""
        (read,), (write,) = crosscoder.wiring.reads[group], crosscoder.wiring.writes[group]
        return cls(
            encoder_FD=crosscoder.encoder(group, read),
            decoder_FD=crosscoder.decoder(group, write),
            encoder_bias_F=crosscoder.b_enc[group],
            decoder_bias_D=crosscoder.decoder_bias(write),
            threshold_F=None
            if crosscoder.threshold is None
            else crosscoder.threshold[group].expand(crosscoder.n_features),
            skip_DD=crosscoder.skip_matrix(group, read, write) if crosscoder.skip else None,
        )


def read_layer(path: Path) -> LayerWeights:
    """Open one layer's file.

    | spelling | encoder | decoder | threshold | skip |
    |---|---|---|---|---|
    | circuit-tracer | `W_enc [F, D]` | `W_dec [F, D]` | `activation_function.threshold` | `W_skip`, `x @ W_skip.T` |

    Raises:
        ValueError: names the file and what is missing, misshapen or not known.
    """
    file = TensorFile(path)
    encoder_FD = file.take("W_enc", None, None)
    n_features, width = encoder_FD.shape
    weights = LayerWeights(
        encoder_FD=encoder_FD,
        decoder_FD=file.take("W_dec", n_features, width),
        encoder_bias_F=file.take("b_enc", n_features),
        decoder_bias_D=file.take("b_dec", width),
        threshold_F=file.take_if_there("activation_function.threshold", n_features),
        skip_DD=file.take_if_there("W_skip", width, width),
        mapped=file.mapped,
    )
    file.finish()
    return weights


def joined(layers: Sequence[LayerWeights], paths: Sequence[Path]) -> dict[str, Any]:
    """What `Published` needs of transcoders of one size: `n_features`, `tensors`, `sources`, `files` and `skip`.

    Raises:
        ValueError: layers of different sizes, or thresholds or skip connections in some layers only.
    """
    first = layers[0]
    for name in ("threshold_F", "skip_DD"):
        there = [getattr(layer, name) is not None for layer in layers]
        if any(there) and not all(there):
            kind, lacking = name.rpartition("_")[0], paths[there.index(False)]
            raise ValueError(f"{lacking} has no {kind}, other layers have one: expected it in every layer or in none")
    tensors: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for group, (layer, path) in enumerate(zip(layers, paths, strict=True)):
        if layer.encoder_FD.shape != first.encoder_FD.shape:
            given, expected = list(layer.encoder_FD.shape), list(first.encoder_FD.shape)
            raise ValueError(f"{path} has an encoder of {given}, {paths[0].name} one of {expected}: expected one size")
        taken = {
            f"W_enc.{group}": layer.encoder_FD,
            f"b_enc.{group}": layer.encoder_bias_F,
            f"W_dec.{group}": layer.decoder_FD[:, None],
            f"b_dec.{group}": layer.decoder_bias_D,
        }
        if layer.skip_DD is not None:
            taken[f"W_skip.{group}"] = layer.skip_DD
        tensors |= taken
        sources |= dict.fromkeys(taken, str(path))
    if first.threshold_F is not None:
        tensors["threshold"] = torch.stack([layer.threshold_F for layer in layers if layer.threshold_F is not None])
    return {
        "n_features": len(first.encoder_FD),
        "tensors": tensors,
        "sources": sources,
        "files": [layer.mapped for layer in layers if layer.mapped is not None],
        "skip": first.skip_DD is not None,
    }
