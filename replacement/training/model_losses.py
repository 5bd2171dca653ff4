"""Losses that run the language model: the derivatives of its MLPs, and its output with the crosscoder spliced in.

A crosscoder that gives the right outputs may give them for the wrong reasons: features that memorise inputs reconstruct as
well as features that compute. Circuits are derivatives, so `JacobianMatching` compares the derivatives.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.crosscoder.sites import Site
from replacement.crosscoder.sparse import with_encoder_gradient
from replacement.crosscoder.topk import BatchTopK
from replacement.splicing.splice import Splice
from replacement.training.losses import Loss, StepState
from replacement.validation.metrics import kl_divergence

OriginalMap = Callable[[Tensor], Tensor]
"""Rows `[B, D]` at a read site to rows `[B, D]` at a written site, in the model's own scale; each row on its own."""


@dataclass(frozen=True)
class JacobianMatching(Loss):
    """`sum over pairs of mean_b ||J_f v - J_cc v||^2 / mean_b ||J_f v||^2`, one random unit vector v per row.

    The mean over v of `||(J_f - J_cc) v||^2` is the squared Frobenius norm over D, so each pair's term estimates which
    fraction of the original's Jacobian is missed. J_f is that of the original map, by forward-mode differentiation; J_cc is
    that of the crosscoder with its active features fixed, its skip connection included.

    A pair is a (read, written) site of one group with a known original map: `mlp_out` of a layer from `mlp_in`,
    `mlp_normalized` or the stream in front of its norm, or any pair given.
    """

    name: ClassVar[str] = "jacobian"

    maps: Mapping[tuple[Site, Site], OriginalMap] | None = field(default=None, compare=False, repr=False)
    """Original maps by (read, written) site, in place of the language model's; not part of a configuration file."""

    def __call__(self, state: StepState) -> Float[Tensor, ""]:
        """`coefficient *` the sum over pairs.

        Raises:
            ValueError: the crosscoder has no pair of sites with a known map, or the step no language model to take it from.
        """
        pairs = {pair: self._map_of(state, *pair) for pair in _pairs(state, self.maps)}
        if not pairs:
            raise ValueError(
                f"the loss {self.name} needs a crosscoder that reads the input of an MLP and writes its output, "
                f"not one that reads {state.crosscoder.wiring.read_sites[0]}; or give maps"
            )
        vectors: dict[int, Tensor] = {}
        terms = []
        for (read, write), original in pairs.items():
            x_BD = state.inputs[read].detach()
            v_BD = vectors.setdefault(x_BD.shape[1], directions(state, x_BD.shape[1]))
            scale_in, scale_out = state.scales.get(read, 1.0), state.scales.get(write, 1.0)
            target_BD = _product(original, x_BD / scale_in, v_BD) * (scale_out / scale_in)
            total = state.parallel.sum_over_data(target_BD.square().sum())
            error = (target_BD - _crosscoder_product(state, read, write, v_BD)).square().sum()
            terms.append(error / total.clamp(min=torch.finfo(total.dtype).tiny))
        return self.coefficient * torch.stack(terms).sum()

    def _map_of(self, state: StepState, read: Site, write: Site) -> OriginalMap:
        if self.maps is not None:
            return self.maps[read, write]
        lm = state.language_model
        if lm is None:
            raise ValueError(f"the loss {self.name} needs the language model in every step, or maps")
        original = lm.parts.mlp_map(write.layer, read.kind)
        return lambda x_BD: original(x_BD.to(lm.device, lm.dtype)).to(x_BD)


def directions(state: StepState, width: int) -> Float[Tensor, "B D"]:
    """A random unit vector for each row of this process: a function of (seed, step, row of the whole batch) alone."""
    device = state.crosscoder.device
    generator = torch.Generator(device).manual_seed(state.seed * 1_000_003 + state.step)
    # Drawn for the whole batch in one go: kernels fill a tensor in an order that depends on its size.
    shape = (state.n_rows, width)
    v_ND = torch.randn(shape, generator=generator, device=device, dtype=state.crosscoder.dtype)
    v_BD = v_ND[state.rows_before :][: len(next(iter(state.inputs.values())))]
    return torch.nn.functional.normalize(v_BD, dim=1)


@torch.no_grad()
def _product(function: OriginalMap, x_BD: Tensor, v_BD: Tensor) -> Tensor:
    """`J_f(x) v`, row by row."""
    with warnings.catch_warnings():
        # PyTorch builds its rules of forward differentiation on first use, with parts it calls deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        product_BD: Tensor = torch.func.jvp(function, (x_BD,), (v_BD,))[1]
    return product_BD


def _pairs(state: StepState, maps: Mapping[tuple[Site, Site], OriginalMap] | None) -> list[tuple[Site, Site]]:
    """(read, written) sites of some group whose original map is known, each once."""
    wiring, lm = state.crosscoder.wiring, state.language_model
    stream = "resid_pre" if lm is not None and lm.shape.parallel else "resid_mid"

    def known(read: Site, write: Site) -> bool:
        if maps is not None:
            return (read, write) in maps
        same = read.layer == write.layer and read.model == write.model == 0
        return same and write.kind == "mlp_out" and read.kind in ("mlp_in", "mlp_normalized", stream)

    found = (
        (read, write)
        for reads, writes in zip(wiring.reads, wiring.writes, strict=True)
        for read in reads
        for write in writes
        if known(read, write)
    )
    return list(dict.fromkeys(found))


def _crosscoder_product(state: StepState, read: Site, write: Site, v_BD: Tensor) -> Tensor:
    """`J_cc v` from one read to one written site, `[B, D]`: through the active features, and the skip matrix."""
    crosscoder, wiring = state.crosscoder, state.crosscoder.wiring
    groups = [g for g in range(wiring.n_groups) if read in wiring.reads[g] and write in wiring.writes[g]]
    parts = [_slopes(state, group, read, v_BD) for group in groups]
    product_BD = crosscoder.decode_contribution(Features.concatenate(parts), groups=groups, sites=[write])[write]
    for group in groups if crosscoder.skip else ():
        product_BD = product_BD + v_BD @ crosscoder.skip_matrix(group, read, write).T
    return product_BD


def _slopes(state: StepState, group: int, read: Site, v_BD: Tensor) -> Features:
    """The active features of one group with `W_enc v` in place of their activations, differentiable in the encoder."""
    part = state.features.of(group)
    part = part.select(part.activation.detach() > 0)  # JumpReLU training lists features of value 0 too
    weight_FD = state.crosscoder.encoder(group, read)
    with torch.no_grad():
        slope_S = (v_BD @ weight_FD.T)[part.row, part.index]
    return part.replace_activations(with_encoder_gradient(slope_S, v_BD, weight_FD, None, part.row, part.index))


@dataclass(frozen=True)
class OutputKL(Loss):
    """`mean_k KL(p_k || q_k)` from the original next-token distribution to that of the spliced model, in nats.

    Every written site is replaced and the crosscoder reads its own stream, so the gradient reaches each group through all
    that follows it in the model ("end-to-end" training: Braun et al. 2024, "Identifying Functionally Important Features").
    Costs two forward passes of the language model and one backward pass.
    """

    name: ClassVar[str] = "output_kl"
    needs_rows: ClassVar[bool] = True

    def __call__(self, state: StepState) -> Float[Tensor, ""]:
        """`coefficient *` the mean over kept tokens.

        Raises:
            ValueError: the step has no language model or tokens, or the crosscoder cannot be spliced into one model.
        """
        lm, tokens_RT, keep_RT = state.language_model, state.tokens_RT, state.keep_RT
        if lm is None or tokens_RT is None or keep_RT is None:
            raise ValueError(f"the loss {self.name} needs the language model and whole rows of tokens in every step")
        with running_threshold_kept(state.crosscoder):
            splice = Splice(lm, state.crosscoder, tokens_RT, scales=state.scales, keep_BT=keep_RT)
            spliced_KV = splice.run()[keep_RT]
        with torch.no_grad():
            original_KV = lm(tokens_RT)[keep_RT]
        return self.coefficient * kl_divergence(original_KV, spliced_KV, dtype=spliced_KV.dtype).sum() / state.n_rows


@contextmanager
def running_threshold_kept(crosscoder: Crosscoder) -> Iterator[None]:
    """Leave the running threshold of BatchTopK alone: the step itself measures it, once."""
    threshold = crosscoder.threshold if isinstance(crosscoder.activation, BatchTopK) else None
    before = None if threshold is None else threshold.detach().clone()
    yield
    if threshold is not None and before is not None:
        threshold.copy_(before)
