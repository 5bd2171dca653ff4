"""Short digests that tell whether two crosscoders (or language models) compute the same function."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

SCHEME = "2:"
"""Prefix of `fingerprint`: another way to compute it must begin with another."""
SAMPLED = "sample:"
"""Prefix of `sampled_fingerprint`."""
_SAMPLED_ROWS, _SAMPLED_COLUMNS = 16, 256
_CHUNK = 1 << 22
_LEGACY_SAMPLES = 4096


def fingerprint(tensors: Iterable[tuple[str, Tensor]], settings: str = "") -> str:
    """SHA-256 of settings and of every value of every tensor, rounded to bfloat16.

    Rounding makes the digest equal for weights loaded as bfloat16, float32 or float64 (float16 rounds differently); a change
    too small for bfloat16 goes unnoticed. Every value counts, since any sample would miss the change of a single one: this
    takes 1.5 s for 10^9 values on one CPU core, less than reading them from disk.

    Args:
        tensors: names and values, in an order that is always the same.
        settings: what else decides the function.
    """
    digest = hashlib.sha256(settings.encode())
    for name, tensor in tensors:
        digest.update(f"{name}{list(tensor.shape)}".encode())
        for chunk in tensor.detach().reshape(-1).split(_CHUNK):
            digest.update(chunk.to(torch.bfloat16).view(torch.int16).cpu().numpy())
    return SCHEME + digest.hexdigest()[:16]


def sampled_fingerprint(tensors: Iterable[tuple[str, Tensor]], settings: str) -> str:
    """Digest of settings, names, shapes and a few rows of every tensor, for published files too large to be read for it.

    A change of single values goes unnoticed; another training, layer or model does not.
    """
    digest = hashlib.sha256(settings.encode())
    for name, tensor in sorted(tensors):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        rows = tensor.detach()[:: max(1, len(tensor) // _SAMPLED_ROWS)][:_SAMPLED_ROWS]
        sample = rows.reshape(len(rows), -1)[:, :_SAMPLED_COLUMNS]
        digest.update(sample.to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy().tobytes())
    return SAMPLED + digest.hexdigest()[:16]


def legacy_fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of a sample of every parameter, sorted by name, which earlier versions wrote into graphs and checkpoints."""
    digest = hashlib.sha256()
    for _, parameter in sorted(parameters):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // _LEGACY_SAMPLES)]
        digest.update(sample.to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
