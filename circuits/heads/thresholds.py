"""Thresholds: with a prompt's other features held fixed, every activation function is `f(h) = h 1[h > theta]`.

ReLU         0
JumpReLU     the feature's own threshold
BatchTopK    the recorded threshold, at least 0
TopK         the largest pre-activation of the group at that position that was not selected, at least 0
"""

from __future__ import annotations

import torch

from replacement import BatchTopK, Decomposition, JumpReLU, LocalReplacement, ReLU, TopK


@torch.no_grad()
def feature_threshold(local: LocalReplacement, part: Decomposition, number: int) -> float:
    """The threshold of one active feature, in units of its pre-activation.

    Args:
        part: whose feature it is, one of `local.decompositions`.
        number: number into `part.features`.

    Raises:
        ValueError: an activation function of another kind, or a threshold below 0.
    """
    crosscoder, features = part.crosscoder, part.features
    group, row, index = (int(column[number]) for column in (features.group, features.row, features.index))
    activation = crosscoder.activation
    if isinstance(activation, ReLU):
        return 0.0
    if isinstance(activation, JumpReLU | BatchTopK):
        assert crosscoder.threshold is not None
        theta = float(crosscoder.threshold[group].expand(crosscoder.n_features)[index])
        if theta < 0 and isinstance(activation, JumpReLU):
            layer = crosscoder.wiring.group_layer(group)
            raise ValueError(f"feature {layer}/{index} has the threshold {theta:g}: expected 0 or more")
        return max(theta, 0.0)
    if isinstance(activation, TopK):
        inputs = {site: local.frozen.activations[site][row : row + 1] for site in crosscoder.wiring.reads[group]}
        pre_F = crosscoder.pre_activations(inputs, group)[0]
        own = features.of(group)
        pre_F[own.index[own.row == row]] = -torch.inf
        return max(float(pre_F.max()), 0.0)
    raise ValueError(f"features of {type(activation).__name__} have no threshold that is known here")
