"""Measured effects: features of a graph are scaled in the model, and everything the graph speaks of is looked at.

| patching      | what reacts to the change                                                            | predicted by   |
|---------------|--------------------------------------------------------------------------------------|----------------|
| `constrained` | nothing writes but the changed feature; attention moves what it wrote, norms rescale | direct effects |
| `propagated`  | every feature of the replacement model, errors kept; attention; norms                | total effects  |
| `original`    | behind the feature's layer the original model's own MLPs; up to it as `constrained`  | total effects  |
| `window`      | as `original`, but held from the feature's layer to two layers on                     | influence      |

Each with attention patterns frozen or live. B changes, T tokens, N nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.grounding import Grounding
from circuits.graph.nodes import NodeKind
from replacement import Features, Intervention, ReplacementModel
from replacement.splicing.interventions import difference
from replacement.splicing.patching import Conditions, Patched, Patcher, changes_of, copies_of

PATCHING = ("constrained", "propagated", "original")
"""How the real tests patch; `window` is for influence among features alone."""
WINDOW = 3
"""Layers that `window` holds: the feature's and the next two, as published (Ameisen et al. 2025)."""
OWN_MLPS = ("original", "window")
"""The original model's MLPs run wherever outputs are not held."""
ATTENTION = ("live", "frozen")
TOKENS_AT_ONCE = 4096
"""Tokens of all copies of a prompt that run together: bounds memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What B changes did, one row each."""

    change_BN: np.ndarray
    """float64[B, N], change of every node's activation (features) or logit; 0 at other nodes."""
    kl_B: np.ndarray
    """float64[B], KL of the output at the graph's target position, clean to changed, in nats; 0 without logit targets."""
    size_BL: np.ndarray
    """float64[B, L], norm of the change of all features of a layer, those outside the graph included."""


class Effects:
    """Changes of features of one graph."""

    def __init__(self, model: ReplacementModel, grounding: Grounding) -> None:
        self.model, self.grounding = model, grounding
        self.nodes = grounding.graph.nodes
        self.n_layers = model.language_model.shape.n_layers
        self.tokens_T = grounding.local.frozen.tokens_T
        self._patchers: dict[Conditions, Patcher] = {}

    def measure(
        self, changed: np.ndarray, scale: float, patching: str, attention: str, *, norms: str = "live"
    ) -> Measured:
        """Scale each of the changed features by itself.

        Args:
            changed: int[B], feature nodes.
            scale: multiple of the activation they are held at; 0 suppresses, 2 doubles them.
            patching: one of `PATCHING`, or `window`.
            attention: `live` or `frozen` patterns.
            norms: `live` or `frozen` scales.
        """
        found = Measured(
            np.zeros((len(changed), len(self.nodes))), np.zeros(len(changed)), np.zeros((len(changed), self.n_layers))
        )
        layers = self.nodes.layer[changed]
        for layer in np.unique(layers).tolist() if patching in OWN_MLPS else [None]:
            own = np.arange(len(changed)) if layer is None else np.flatnonzero(layers == layer)
            patcher = self.patcher(patching, attention, layer, norms=norms)
            for some, patched in self._passes(patcher, changed, own, scale):
                change_BN, size_BL = self._feature_changes(patcher, patched, len(some))
                logits_BTV = patched.logits_BTV
                found.kl_B[some] = self._logit_changes(patcher.original_logits_TV, logits_BTV, change_BN)
                change_BN[np.arange(len(some)), changed[some]] = (scale - 1) * self.nodes.activation[changed[some]]
                found.change_BN[some], found.size_BL[some] = change_BN, size_BL
        return found

    def patcher(self, patching: str, attention: str, layer: int | None = None, *, norms: str = "live") -> Patcher:
        """The prompt under the conditions of one row of the table; `original` and `window` depend on the feature's layer."""
        own, n = int(layer or 0), self.n_layers
        held = {
            "constrained": range(n),
            "propagated": None,
            "original": range(own + 1),
            "window": range(own, min(own + WINDOW, n)),
        }[patching]
        mlps = "original" if patching in OWN_MLPS else "replaced"
        conditions = Conditions(patterns=attention, norms=norms, mlps=mlps, constrained_layers=held)
        if conditions not in self._patchers:
            lm = self.model.language_model
            self._patchers[conditions] = Patcher(lm, self.model.crosscoders, self.tokens_T, conditions)
        return self._patchers[conditions]

    def self_check(self, changed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Direct edges, predicted and measured: with everything frozen, true by construction (float64[P] each).

        Every feature is suppressed by itself; what its targets' pre-activations lose is compared with the edges.
        """
        patcher = self.patcher("constrained", "frozen", norms="frozen")
        edges = self.grounding.graph.edges
        target_E, predicted, measured = edges.target, [], []
        for some, patched in self._passes(patcher, changed, np.arange(len(changed)), 0.0):
            for copy, node in enumerate(changed[some]):
                own = np.flatnonzero((edges.source == node) & self.nodes.mask(NodeKind.FEATURE)[target_E])
                predicted.append(-edges.weight[own].astype(np.float64))
                measured.append(self._pre_activation_changes(patcher, patched, copy, target_E[own]))
        return np.concatenate([np.zeros(0), *predicted]), np.concatenate([np.zeros(0), *measured])

    def _passes(
        self, patcher: Patcher, changed: np.ndarray, own: np.ndarray, scale: float
    ) -> Iterator[tuple[np.ndarray, Patched]]:
        size = max(1, TOKENS_AT_ONCE // len(self.tokens_T))
        for begin in range(0, len(own), size):
            some = own[begin : begin + size]
            copies = [self._intervention(int(node), scale) for node in changed[some]]
            by_part = {part: [[one] if one.part == part else [] for one in copies] for part in self.model.crosscoders}
            yield some, patcher.run(changes_of(by_part, patcher), n_copies=len(some))

    def _intervention(self, node: int, scale: float) -> Intervention:
        nodes, part = self.nodes, "attention" if self.nodes.of_attention[node] else "mlp"
        group = self._groups(part)[int(nodes.layer[node])]
        place = {"group": group, "position": int(nodes.position[node]), "index": int(nodes.index[node])}
        return Intervention(
            **place, scale=scale, part=part
        )  # nothing below it changes: its current activation is the clean one

    def _groups(self, part: str) -> dict[int, int]:
        """Group of each layer."""
        wiring = self.model.crosscoders[part].wiring
        return {wiring.group_layer(group): group for group in range(wiring.n_groups)}

    def _feature_changes(self, patcher: Patcher, patched: Patched, n_copies: int) -> tuple[np.ndarray, np.ndarray]:
        change_BN, power_BL = np.zeros((n_copies, len(self.nodes))), np.zeros((n_copies, self.n_layers))
        for part, features in patched.features.items():
            mine = self.nodes.mask(NodeKind.FEATURE) & (self.nodes.of_attention == (part == "attention"))
            for layer, group in self._groups(part).items():
                clean = copies_of(patcher.clean_features[part].of(group), n_copies)
                changes = difference(features.of(group), clean, group=group)
                own = np.flatnonzero(mine & (self.nodes.layer == layer))
                change_BN[:, own] = self._at(changes, own, n_copies)
                copy = (changes.row // len(self.tokens_T)).cpu().numpy()
                power_BL[:, layer] += np.bincount(
                    copy, weights=changes.activation.double().cpu().numpy() ** 2, minlength=n_copies
                )
        return change_BN, np.sqrt(power_BL)

    def _at(self, changes: Features, own: np.ndarray, n_copies: int) -> np.ndarray:
        """float64[B, own], entries of a sparse table at nodes of its group."""
        T, F = len(self.tokens_T), changes.n_features
        known = (changes.row * F + changes.index).cpu().numpy()
        rows = np.arange(n_copies)[:, None] * T + self.nodes.position[own]
        wanted = rows * F + self.nodes.index[own]
        if not len(known):
            return np.zeros(wanted.shape)
        place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return np.where(known[place] == wanted, changes.activation.double().cpu().numpy()[place], 0.0)

    def _logit_changes(self, clean_TV: Tensor, logits_BTV: Tensor, change_BN: np.ndarray) -> np.ndarray:
        """Fill in the logit nodes' changes; return the KL at the last target's position."""
        targets = self.grounding.logits
        if not targets:
            return np.zeros(len(change_BN))
        before = self.model.language_model.parts.before_soft_cap  # graphs explain logits in front of a soft-cap
        change_BTV = (before(logits_BTV) - before(clean_TV)).double()
        for node, target in zip(np.flatnonzero(self.nodes.mask(NodeKind.LOGIT)), targets, strict=True):
            at_BV = change_BTV[:, target.position]
            plus, minus = target.token_ids or (target.token_id, None)
            base_B = at_BV.mean(-1) if minus is None else at_BV[:, minus]
            change_BN[:, node] = (at_BV[:, plus] - base_B).cpu().numpy()
        position = targets[-1].position
        return kl(clean_TV[position], logits_BTV[:, position])

    def _pre_activation_changes(self, patcher: Patcher, patched: Patched, copy: int, targets: np.ndarray) -> np.ndarray:
        change, T = np.zeros(len(targets)), len(self.tokens_T)
        for part, crosscoder in self.model.crosscoders.items():
            for layer, group in self._groups(part).items():
                attention = part == "attention"
                own = np.flatnonzero(
                    (self.nodes.layer[targets] == layer) & (self.nodes.of_attention[targets] == attention)
                )
                index = torch.from_numpy(self.nodes.index[targets[own]]).to(crosscoder.device)
                row = torch.from_numpy(self.nodes.position[targets[own]].astype(np.int64)).to(crosscoder.device)
                for site in crosscoder.wiring.reads[group]:
                    moved_PD = patched.inputs[site][copy * T + row] - patcher.clean[site][row]
                    change[own] += (moved_PD * crosscoder.encoder(group, site)[index]).sum(-1).double().cpu().numpy()
        return change


def kl(clean_V: Tensor, logits_BV: Tensor) -> np.ndarray:
    """float64[B], KL divergence of each row's distribution from the clean one, in nats."""
    clean, other = clean_V.double().log_softmax(-1), logits_BV.double().log_softmax(-1)
    return np.asarray((clean.exp() * (clean - other)).sum(-1).clamp(min=0).cpu().numpy())


def sample_features(grounding: Grounding, n_features: int, *, seed: int) -> np.ndarray:
    """int[B], features drawn uniformly among the graph's, targets left out; all of them where there are fewer.

    Raises:
        ValueError: fewer than one feature asked for, or none in the graph.
    """
    if n_features < 1:
        raise ValueError(f"features: expected at least 1, given {n_features}")
    nodes = grounding.graph.nodes
    known: Sequence[int] = np.flatnonzero(nodes.mask(NodeKind.FEATURE) & ~nodes.is_target).tolist()
    if not known:
        raise ValueError("the graph has no features to change")
    chosen = np.random.default_rng(seed).permutation(known)[:n_features]
    return np.sort(chosen)
