"""Transcoders published one file per layer, in whichever of the field's three spellings of their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.formats.tensor_files import TensorFile
from replacement.crosscoder.mapped_file import MappedFile
from replacement.crosscoder.sites import Site
from replacement.crosscoder.wiring import Wiring

_ROWS_AT_ONCE = 4096


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


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """Names and orientation of the tensors in the files of one publisher."""

    encoder: str = "W_enc"
    decoder: str = "W_dec"
    threshold: str = "threshold"
    skip: str = "W_skip"
    encoder_is_DF: bool = True
    """Whether the encoder is `[D, F]`, applied as `x @ W`, instead of `[F, D]`."""
    skip_is_applied_as_is: bool = False
    """Whether the skip matrix is applied as `x @ W`, instead of `x @ W.T`."""
    threshold_after_relu: bool = True
    """Whether `max(h, 0)` comes first: a threshold below 0 then means 0."""


CIRCUIT_TRACER = Spelling(threshold="activation_function.threshold", encoder_is_DF=False, threshold_after_relu=False)
SAELENS = Spelling()
"""Gemma Scope's `.npz` files, too."""
GEMMA_SCOPE_2 = Spelling(encoder="w_enc", decoder="w_dec", skip="affine_skip_connection", skip_is_applied_as_is=True)


def read_layer(path: Path, *, threshold_after_relu: bool = False) -> LayerWeights:
    """Open one layer's file, whichever spelling it has.

    | spelling | encoder | decoder | threshold | skip |
    |---|---|---|---|---|
    | circuit-tracer | `W_enc [F, D]` | `W_dec [F, D]` | `activation_function.threshold` | `W_skip`, `x @ W_skip.T` |
    | Gemma Scope (`.npz`) | `W_enc [D, F]` | `W_dec [F, D]` | `threshold` | none |
    | Gemma Scope 2 | `w_enc [D, F]` | `w_dec [F, D]` | `threshold` | `affine_skip_connection`, `x @ W` |

    Args:
        threshold_after_relu: whether a threshold below 0 means 0, as in Gemma Scope's own code; circuit-tracer reads the same
            files without the ReLU.

    Raises:
        ValueError: names the file and what is missing, misshapen or not known.
    """
    file = TensorFile(path)
    spelling = GEMMA_SCOPE_2 if "w_enc" in file else SAELENS if "threshold" in file else CIRCUIT_TRACER
    factor_F = file.take_if_there("scaling_factor", None)  # of a finetuning
    if factor_F is not None and not bool((factor_F == 1).all()):
        raise ValueError(f"{path}: the tensor scaling_factor is not 1, which is not supported")
    weights = take_layer(file, replace(spelling, threshold_after_relu=threshold_after_relu))
    file.finish()
    return weights


def take_layer(file: TensorFile, spelling: Spelling) -> LayerWeights:
    """The tensors of one layer, of one spelling."""
    encoder_FD = file.take(spelling.encoder, None, None)
    encoder_FD = encoder_FD.T if spelling.encoder_is_DF else encoder_FD
    n_features, read_width = encoder_FD.shape
    decoder_FD = file.take(spelling.decoder, n_features, None)
    width = decoder_FD.shape[1]
    threshold_F = file.take_if_there(spelling.threshold, n_features)
    if threshold_F is not None and spelling.threshold_after_relu:
        threshold_F = threshold_F.clamp(min=0)
    if spelling.skip_is_applied_as_is:
        skip_DD = file.take_if_there(spelling.skip, read_width, width)
        skip_DD = None if skip_DD is None else skip_DD.T
    else:
        skip_DD = file.take_if_there(spelling.skip, width, read_width)
    return LayerWeights(
        encoder_FD=encoder_FD,
        decoder_FD=decoder_FD,
        encoder_bias_F=file.take("b_enc", n_features),
        decoder_bias_D=file.take("b_dec", width),
        threshold_F=threshold_F,
        skip_DD=skip_DD,
        mapped=file.mapped,
    )


def bias_for_shifted_input(
    encoder_FD: Float[Tensor, "F D"],
    bias_F: Float[Tensor, " F"],
    shift_D: Float[Tensor, " D"],
    mapped: MappedFile | None,
) -> Float[Tensor, " F"]:
    """`b_enc - W_enc b_dec` in float64: the encoder's bias where `b_dec` is subtracted from the input."""
    parts = []
    for rows_RD in encoder_FD.split(_ROWS_AT_ONCE):
        parts.append(rows_RD.double() @ shift_D.double())
        if mapped is not None:
            mapped.release()
    return bias_F.double() - torch.cat(parts)


def layer_wiring(reads: Sequence[Site], writes: Sequence[Site], layers: Sequence[LayerWeights]) -> Wiring:
    """The wiring of one group per layer, which reads one site and writes one.

    Named `autoencoder` where each writes what it reads, `per_layer` where layers 0, 1, 2 and so on are there, and
    `transcoder` for single layers.
    """
    whole = len(reads) > 1 and [site.layer for site in reads] == list(range(len(reads)))
    name = "autoencoder" if list(reads) == list(writes) else "per_layer" if whole else "transcoder"
    widths = {site.kind: layer.encoder_FD.shape[1] for site, layer in zip(reads, layers, strict=True)}
    widths |= {site.kind: layer.decoder_FD.shape[1] for site, layer in zip(writes, layers, strict=True)}
    return Wiring(name, tuple((site,) for site in reads), tuple((site,) for site in writes), widths)


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
