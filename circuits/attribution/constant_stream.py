"""The residual stream of a prompt whose embeddings, features and errors are all zero: what biases alone make of it.

The frozen model is affine, so the constant part of a target is its inner product with this stream. T tokens, L layers,
D d_model.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attribution.sources import Sources
from replacement import LocalReplacement, Site
from replacement.splicing.skip import read_depth


def constant_stream(local: LocalReplacement, sources: Sources) -> Float[Tensor, "P T D"]:
    """The stream at every depth, P = 2 L + 1."""
    frozen, shape = local.frozen, local.shape
    x_TD = torch.zeros_like(frozen.token_embedding_TD)
    stream = x_TD.new_zeros(2 * shape.n_layers + 1, *x_TD.shape)
    for layer, attention in enumerate(frozen.attentions):
        stream[2 * layer] = x_TD
        x_TD = x_TD + (attention.apply(x_TD) if sources.attention is None else sources.attention.bias_LD[layer])
        stream[2 * layer + 1] = x_TD
        x_TD = x_TD + sources.mlp.bias_LD[layer]
        if local.crosscoder.skip:
            x_TD = x_TD + _skip_constant(local, Site(layer, "mlp_out"), stream)
    stream[-1] = x_TD
    return stream


def _skip_constant(local: LocalReplacement, write: Site, stream: Tensor) -> Tensor:
    """What the skip matrices write to one site when they read the constant stream, filled up to the sites read."""
    crosscoder = local.crosscoder
    total_TD = torch.zeros_like(local.mlp.errors_LTD[0])
    for group in crosscoder.wiring.writers(write):
        for read in crosscoder.wiring.reads[group]:
            x_TD = stream[read_depth(read, local.shape)]
            x_TD = local.frozen.norms_mlp[read.layer].apply(x_TD) if read.kind == "mlp_in" else x_TD
            total_TD += x_TD @ crosscoder.skip_matrix(group, read, write).T
    return total_TD
