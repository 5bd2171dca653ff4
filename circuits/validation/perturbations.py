"""Does the local replacement model react to a perturbation as the original model does?

After Ameisen et al. 2025, "Circuit Tracing", section "Evaluating Faithfulness of the Local Replacement Model". A vector is
added to the residual stream in front of an MLP, at one position, in two models:

- the local replacement model, which graphs describe: features react, errors stay, attention patterns and norm scales are
  frozen;
- the original model: its own MLPs, its norms live, its attention patterns `frozen` (as published) or `live`.

What changes in the streams behind the next layers is compared.

| kind       | what is added                                                                                              |
|------------|------------------------------------------------------------------------------------------------------------|
| `encoder`  | what a feature reads, as much of it as raises the feature's pre-activation by a tenth of its activation    |
| `random`   | a random vector of the same norm                                                                           |
| `upstream` | what is missing in front of the next layer's MLP when a feature is ablated                                 |

B perturbations. Points of the stream are numbered by depth, as in `replacement.splicing.skip`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.grounding import Grounding
from circuits.attribution.readers import stream_reads
from circuits.validation.agreement import cosine, mean_of_known
from circuits.validation.effects import PATTERNS, TOKENS_AT_ONCE
from replacement import ReplacementModel, Site
from replacement.language_model.language_model import Hook
from replacement.splicing.clean_run import WRITES, CleanRun, Conditions
from replacement.splicing.skip import read_depth

RISE = 0.1
"""By how much of its activation an `encoder` perturbation raises a feature."""


@dataclass(frozen=True, slots=True)
class Perturbation:
    """A vector added to the residual stream."""

    kind: str
    depth: int
    """Point of the stream."""
    position: int
    vector_D: Tensor


def compare_perturbations(
    model: ReplacementModel, grounding: Grounding, changed: np.ndarray, *, seed: int
) -> list[dict[str, Any]]:
    """How alike the streams of the local replacement model and of the original change.

    Args:
        changed: int[B], feature nodes of the graph; those of attention are left out.
        seed: of the random vectors.

    Returns:
        One row per kind, attention patterns of the original model, and distance in layers: mean over perturbations of the
        `cosine` between the two changes of the stream, `nmse` (`sum |local - original|^2 / sum |original|^2`), and
        `cosine_added`, the cosine after the perturbation itself, which both models pass on, is subtracted. Rows without
        perturbations are left out.
    """
    perturbations = _perturbations(model, grounding, changed, seed=seed)
    if not perturbations:
        return []
    local = _Streams(model, grounding, Conditions(patterns="frozen", norms="frozen"), local=True)
    rows = []
    for patterns in reversed(PATTERNS):  # as published first
        original = _Streams(model, grounding, Conditions(patterns=patterns, mlps="original"))
        for kind in dict.fromkeys(perturbation.kind for perturbation in perturbations):
            chosen = [perturbation for perturbation in perturbations if perturbation.kind == kind]
            rows += _rows(chosen, local.changes(chosen), original.changes(chosen), kind=kind, patterns=patterns)
    return rows


class _Streams:
    """The residual stream under perturbations, less the stream without them."""

    def __init__(
        self, model: ReplacementModel, grounding: Grounding, conditions: Conditions, *, local: bool = False
    ) -> None:
        """Run the prompt; in the local replacement model (`local`) outputs that no crosscoder writes are errors, and stay."""
        self.shape, tokens_T = model.language_model.shape, grounding.local.frozen.tokens_T
        self._original, self._conditions = CleanRun(model.language_model, model.crosscoders, tokens_T[None]), conditions
        self._unwritten = [
            site
            for part, crosscoder in (model.crosscoders if local else {}).items()
            for site in (Site(layer, WRITES[part]) for layer in range(self.shape.n_layers))
            if site not in crosscoder.wiring.as_outputs().write_sites
        ]
        self._n_tokens = len(tokens_T)
        self._clean = self._run([None])

    def changes(self, perturbations: Sequence[Perturbation]) -> list[dict[int, Tensor]]:
        """For each perturbation the change `[T, D]` of the stream at every depth behind it."""
        size = max(1, TOKENS_AT_ONCE // self._n_tokens)
        changes = []
        for begin in range(0, len(perturbations), size):
            batch = perturbations[begin : begin + size]
            streams = self._run(batch)
            for copy, perturbation in enumerate(batch):
                later = {depth: x_BTD for depth, x_BTD in streams.items() if depth > perturbation.depth}
                changes.append({depth: x_BTD[copy] - self._clean[depth][0] for depth, x_BTD in later.items()})
        return changes

    def _run(self, perturbations: Sequence[Perturbation | None]) -> dict[int, Tensor]:
        """Stream `[B, T, D]` at every depth, one copy of the prompt for each perturbation."""
        streams: dict[int, Tensor] = {}
        hooks = {self._site(depth): self._hook(depth, perturbations, streams) for depth in self._depths()}
        hooks |= {site: self._keep(site) for site in self._unwritten}
        self._original.run(self._conditions, n_copies=len(perturbations), hooks=hooks)
        return streams

    def _keep(self, site: Site) -> Hook:
        return lambda x_BTD: self._original.activations[site].to(x_BTD).expand_as(x_BTD)

    def _hook(self, depth: int, perturbations: Sequence[Perturbation | None], streams: dict[int, Tensor]) -> Hook:
        """Add the perturbations of one depth, and keep the stream there."""

        def hook(x_BTD: Tensor) -> Tensor:
            x_BTD = x_BTD.clone()
            for copy, perturbation in enumerate(perturbations):
                if perturbation is not None and perturbation.depth == depth:
                    x_BTD[copy, perturbation.position] += perturbation.vector_D
            streams[depth] = x_BTD
            return x_BTD

        return hook

    def _depths(self) -> list[int]:
        step = 2 if self.shape.parallel else 1  # a parallel layer has no point between attention and MLP
        return list(range(0, 2 * self.shape.n_layers + 1, step))

    def _site(self, depth: int) -> Site:
        layer, middle = divmod(depth, 2)
        if middle:
            return Site(layer, "resid_mid")
        return Site(layer - 1, "resid_post") if layer else Site(0, "resid_pre")  # the first name of a point


def _perturbations(
    model: ReplacementModel, grounding: Grounding, changed: np.ndarray, *, seed: int
) -> list[Perturbation]:
    local, nodes = grounding.local, grounding.graph.nodes
    (_, chosen_S), *_ = grounding.feature_numbers(changed[~nodes.of_attention[changed]])
    if not len(chosen_S):
        return []
    features, generator = local.features, torch.Generator().manual_seed(seed)
    place_N, targets, _ = stream_reads(local, local.mlp, chosen_S)
    perturbations = []
    for place, vector_D, depth in zip(place_N.tolist(), targets.vectors_ND, targets.depth_N.tolist(), strict=True):
        number = int(chosen_S[place])
        position, activation = int(features.row[number]), features.activation[number]
        raised_D = vector_D * (RISE * activation / (vector_D @ vector_D))
        random_D = torch.randn(len(vector_D), generator=generator).to(raised_D)
        perturbations.append(Perturbation("encoder", depth, position, raised_D))
        perturbations.append(Perturbation("random", depth, position, random_D * (raised_D.norm() / random_D.norm())))
    upstream = (_ablated(model, grounding, number) for number in chosen_S.tolist())
    return [*perturbations, *(perturbation for perturbation in upstream if perturbation is not None)]


def _ablated(model: ReplacementModel, grounding: Grounding, number: int) -> Perturbation | None:
    """What a feature wrote into the stream that the MLP of the next layer reads, taken away."""
    local, shape = grounding.local, model.language_model.shape
    features, crosscoder = local.features, local.crosscoder
    group = int(features.group[number])
    layer = crosscoder.wiring.group_layer(group) + 1
    sites = [site for site in crosscoder.wiring.writes[group] if site.layer < layer]
    if layer >= shape.n_layers or not sites:
        return None
    index = features.index[number : number + 1]
    written_D = torch.stack([crosscoder.decoder_vectors(group, index, site)[0] for site in sites]).sum(0)
    depth = read_depth(Site(layer, "mlp_in"), shape)
    return Perturbation("upstream", depth, int(features.row[number]), -features.activation[number] * written_D)


def _rows(
    perturbations: Sequence[Perturbation],
    local: Sequence[dict[int, Tensor]],
    original: Sequence[dict[int, Tensor]],
    *,
    kind: str,
    patterns: str,
) -> list[dict[str, Any]]:
    # By distance: cosine, cosine of what layers add, squared error and power of every perturbation.
    figures: dict[int, list[tuple[float, ...]]] = defaultdict(list)
    for perturbation, local_change, original_change in zip(perturbations, local, original, strict=True):
        last = max(original_change)
        for distance, depth in enumerate([*range(perturbation.depth + 2, last, 2), last], start=1):
            predicted, measured = _flat(local_change[depth]), _flat(original_change[depth])
            given_TD = torch.zeros_like(original_change[depth])
            given_TD[perturbation.position] = perturbation.vector_D
            given = _flat(given_TD)
            cosines = (cosine(predicted, measured), cosine(predicted - given, measured - given))
            figures[distance].append((*cosines, ((predicted - measured) ** 2).sum(), (measured**2).sum()))
    rows = []
    for distance, values in sorted(figures.items()):
        whole, added, error, power = np.array(values).T
        rows.append(
            {"kind": kind, "patterns": patterns, "distance": distance, "perturbations": len(values)}
            | {"cosine": mean_of_known(whole), "nmse": float(error.sum() / power.sum()) if power.any() else np.nan}
            | {"cosine_added": mean_of_known(added)}
        )
    return rows


def _flat(x_TD: Tensor) -> np.ndarray:
    return np.asarray(x_TD.double().flatten().cpu().numpy())
