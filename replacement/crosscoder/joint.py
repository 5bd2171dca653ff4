"""A joint crosscoder taken apart, into that of the MLPs and that of attention, and put together from both."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from replacement.crosscoder.activation import Activation
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.families import JOINT
from replacement.crosscoder.sites import Site
from replacement.crosscoder.topk import k_of
from replacement.crosscoder.wiring import Wiring


def split(crosscoder: Crosscoder) -> list[Crosscoder]:
    """The crosscoders of the MLPs and of attention that make up a joint one; the crosscoder itself if it is of another family.

    Both are views: they take no memory, follow later changes of the weights in place, and have the fingerprints that they
    would have if they were loaded from checkpoints of their own.

    Raises:
        ValueError: features that are chosen over both parts together, or groups of the MLPs behind those of attention.
    """
    wiring = crosscoder.wiring
    if wiring.name != JOINT:
        return [crosscoder]
    if crosscoder.activation.chooses_over_groups:
        name = crosscoder.activation.name
        raise ValueError(
            f"this joint crosscoder chooses features of MLPs and attention together ({name}): it has no parts"
        )
    writes_mlps = [all(site.kind == "mlp_out" for site in sites) for sites in wiring.writes]
    n_mlps = sum(writes_mlps)
    if not all(writes_mlps[:n_mlps]) or n_mlps in (0, wiring.n_groups):
        raise ValueError("a joint crosscoder needs groups that write MLP outputs, and behind them those of attention")
    return [
        _part(crosscoder, "strictly_causal", range(n_mlps)),
        _part(crosscoder, "attention", range(n_mlps, wiring.n_groups)),
    ]


@torch.no_grad()
def join(mlps: Crosscoder, attention: Crosscoder) -> Crosscoder:
    """The joint crosscoder that a cross-layer transcoder and an attention crosscoder make up, as a copy; `split` undoes it.

    Raises:
        ValueError: another family, or parts that differ in features per group, activation function or other settings.
    """
    parts = (mlps, attention)
    names = [part.wiring.name for part in parts]
    if names != ["strictly_causal", "attention"]:
        raise ValueError(f"expected a strictly_causal and an attention crosscoder to join, got {' and '.join(names)}")
    differing = [name for name, value in _shared(mlps).items() if _shared(attention)[name] != value]
    if differing:
        given = " and ".join(str(_shared(part)[differing[0]]) for part in parts)
        raise ValueError(f"crosscoders that are joined must have the same {differing[0]}, got {given}")
    first, second = mlps.wiring, attention.wiring
    wiring = Wiring(JOINT, first.reads + second.reads, first.writes + second.writes, {**first.widths, **second.widths})
    activation = mlps.activation
    if hasattr(activation, "k"):
        k = tuple(k_of(part.activation.k, group) for part in parts for group in range(part.n_groups))  # type: ignore[attr-defined]
        activation = replace(activation, k=k)  # type: ignore[call-arg]
    joint = Crosscoder._without_memory(mlps, wiring=wiring, activation=activation).to_empty(device=mlps.device)
    for part, view in zip(parts, split(joint), strict=True):
        values = part.state_dict()
        for name, tensor in view.state_dict().items():
            tensor.copy_(values[name])
    return joint.eval()


def _shared(crosscoder: Crosscoder) -> dict[str, object]:
    """Settings that parts have in common."""
    names = ("n_features", "tied", "skip", "dtype", "undecomposed_positions", "model_fingerprint")
    activation = {name: value for name, value in crosscoder.activation.to_dict().items() if name != "k"}
    return {**{name: getattr(crosscoder, name) for name in names}, "activation": activation}


def _part(crosscoder: Crosscoder, name: str, groups: range) -> Crosscoder:
    """The crosscoder of groups that follow one another, as views."""
    whole, chosen = crosscoder.wiring, slice(groups.start, groups.stop)
    reads, writes = whole.reads[chosen], whole.writes[chosen]
    sites = {site for side in (*reads, *writes) for site in side}
    widths = {kind: width for kind, width in whole.widths.items() if kind in {site.kind for site in sites}}
    activation = _of_groups(crosscoder.activation, chosen)
    made = Crosscoder._without_memory(crosscoder, wiring=Wiring(name, reads, writes, widths), activation=activation)
    made.load_state_dict(_tensors(crosscoder, groups, sites), assign=True)
    if (in_file := crosscoder.in_file) is not None:
        decoders = {(g - groups.start, place): w_FD for (g, place), w_FD in in_file.decoders.items() if g in groups}
        made.in_file = replace(in_file, decoders=decoders)
    trains = any(parameter.requires_grad for parameter in crosscoder.parameters())
    return made.train(crosscoder.training).requires_grad_(trains)


def _of_groups(activation: Activation, groups: slice) -> Activation:
    k = getattr(activation, "k", None)
    return replace(activation, k=k[groups]) if isinstance(k, tuple) else activation  # type: ignore[call-arg]


def _tensors(crosscoder: Crosscoder, groups: range, sites: set[Site]) -> dict[str, Tensor]:
    """The tensors of some groups, by the names that they have in a crosscoder of these groups alone."""
    wiring = crosscoder.wiring
    group_of = {  # what each tensor of a list belongs to: a group or a written site
        "W_enc": [group for group, reads in enumerate(wiring.reads) for _ in reads],
        "b_enc": range(wiring.n_groups),
        "W_dec": wiring.write_sites if crosscoder.tied else [group for group, _ in wiring.write_blocks],
        "b_dec": wiring.write_sites,
        "W_skip": [
            group
            for group, (reads, writes) in enumerate(zip(wiring.reads, wiring.writes, strict=True))
            for _ in range(len(reads) * len(writes))
        ],
    }
    chosen, counts = {}, dict.fromkeys(group_of, 0)
    for name, value in crosscoder.state_dict().items():
        kind, _, number = name.partition(".")
        if kind not in group_of:
            chosen[name] = value[groups.start : groups.stop]
            continue
        if group_of[kind][int(number)] in groups or group_of[kind][int(number)] in sites:
            chosen[f"{kind}.{counts[kind]}"] = value
            counts[kind] += 1
    return chosen
