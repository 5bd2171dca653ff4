"""Measured effects: features or tokens of a graph are changed in the model, and what the graph speaks of is measured.

| patching      | what reacts to the change                                                             | predicted by   |
|---------------|---------------------------------------------------------------------------------------|----------------|
| `constrained` | nothing but attention and norms: every output is clean plus what the feature writes   | direct effects |
| `propagated`  | every feature of the replacement model, errors kept; attention; norms                 | total effects  |
| `original`    | above the feature's layer the original model's MLPs; up to it as `constrained`        | total effects  |
| `window`      | as `original`, but held from the feature's layer to two layers on                     | influence      |

Each with attention patterns frozen or live. Where several features are changed together, their highest layer counts; tokens are
below all layers. B edits, one copy of the prompt each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.grounding import Grounding
from circuits.graph.nodes import NodeKind
from replacement import Features, Intervention, ReplacementModel
from replacement.splicing.clean_run import CleanRun, Conditions, SplicedRun
from replacement.splicing.feature_changes import activations_at, change_of, difference, repeat_prompt
from replacement.splicing.intervention import PARTS
from replacement.validation.metrics import kl_divergence

PATCHING = ("constrained", "propagated", "original")
"""How features are patched where predictions are tested; `window` is for influence among features alone."""
WINDOW = 3
"""Layers that `window` holds: the feature's and the next two, as published (Ameisen et al. 2025)."""
ORIGINAL_MLPS = ("original", "window")
"""Patching in which the original model's MLPs run wherever outputs are not held."""
PATTERNS = ("live", "frozen")
"""Attention patterns: computed again in every run, or held at those of the clean run."""
NORMS = ("live", "final", "frozen")
"""Scales of the stream's norms: computed again, that of the final norm held at its clean value, or all of them.

A graph's linear paths have all of them held. For logits the final norm matters most: ablating a feature changes the size of the
last stream, and with it every logit by one factor, which moves a large logit by more than most features write. Predictions for
`live` follow it (`circuits.validation.final_norm`)."""
TOKENS_AT_ONCE = 4096
"""Tokens of all copies of a prompt that run together: bounds memory."""


@dataclass(frozen=True, slots=True)
class Edit:
    """What is changed in one copy of the prompt, all of it together."""

    interventions: tuple[Intervention, ...] = ()
    tokens: Mapping[int, int] = field(default_factory=dict)
    """Position -> id of the token that stands there instead."""

    @property
    def layer(self) -> int:
        """Highest layer of a changed feature; -1 where only tokens are changed."""
        return max((intervention.layer for intervention in self.interventions), default=-1)


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What B edits did, one row each."""

    change_BN: np.ndarray
    """float64[B, N], change of every node's activation (features) or logit; 0 at other nodes."""
    kl_B: np.ndarray
    """float64[B], KL of the output at the graph's target position, clean to changed, in nats; 0 without logit targets."""
    size_BL: np.ndarray
    """float64[B, L], norm of the change of all features of a layer, those outside the graph included."""


class Effects:
    """Changes of features of one graph, all compared with one clean run of its prompt."""

    def __init__(self, model: ReplacementModel, grounding: Grounding) -> None:
        """Prepare the clean run.

        Raises:
            ValueError: features whose activations a graph does not explain: scaled and shifted ones.
        """
        if any(crosscoder.activation.affine for crosscoder in model.crosscoders.values()):
            raise ValueError(
                "cannot predict activations that are scaled and shifted at last: a graph explains what is in front of that"
            )
        self.model, self.grounding = model, grounding
        self.nodes = grounding.graph.nodes
        self.n_layers = model.language_model.shape.n_layers
        self.tokens_T = grounding.local.frozen.tokens_T
        self.clean = CleanRun(model.language_model, model.crosscoders, self.tokens_T[None])

    def measure(
        self, changed: np.ndarray, scale: float, patching: str, patterns: str, *, norms: str = "live"
    ) -> Measured:
        """Scale each of the changed features by itself.

        Args:
            changed: int[B], feature nodes.
            scale: multiple of the activation they are held at; 0 suppresses, 2 doubles them.
            patching: one of `PATCHING`, or `window`.
            patterns: attention patterns, one of `PATTERNS`.
            norms: scales of the stream's norms, one of `NORMS`.
        """
        return self.measure_edits(
            [self._scaled(node, scale) for node in changed.tolist()], patching, patterns, norms=norms
        )

    def measure_edits(self, edits: Sequence[Edit], patching: str, patterns: str, *, norms: str = "live") -> Measured:
        """Make each of the edits by itself; arguments as of `measure`."""
        B = len(edits)
        measured = Measured(np.zeros((B, len(self.nodes))), np.zeros(B), np.zeros((B, self.n_layers)))
        layers = np.array([edit.layer for edit in edits], dtype=np.int64)
        for layer in np.unique(layers).tolist() if patching in ORIGINAL_MLPS else [0]:
            rows_B = np.flatnonzero(layers == layer) if patching in ORIGINAL_MLPS else np.arange(B)
            conditions = self.conditions(patching, patterns, layer, norms=norms)
            for rows, run in self._passes(conditions, edits, rows_B):
                change_BN, measured.size_BL[rows] = self._feature_changes(run, len(rows))
                measured.kl_B[rows] = self._logit_changes(run.logits_BTV, change_BN)
                measured.change_BN[rows] = change_BN
        return measured

    def conditions(self, patching: str, patterns: str, layer: int = 0, *, norms: str = "live") -> Conditions:
        """One row of the module's table; `original` and `window` depend on the layer of the edit."""
        held = {
            "constrained": range(self.n_layers),
            "propagated": None,
            "original": range(layer + 1),
            "window": range(max(layer, 0), min(layer + WINDOW, self.n_layers)),
        }[patching]
        mlps = "original" if patching in ORIGINAL_MLPS else "replaced"
        return Conditions(patterns=patterns, norms=norms, mlps=mlps, constrained_layers=held)

    def self_check(self, changed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Direct edges, predicted and measured: with everything frozen, true by construction (float64[P] each).

        Every feature is suppressed by itself; what its targets' pre-activations lose is compared with the edges.
        """
        conditions = self.conditions("constrained", "frozen", norms="frozen")
        edges = self.grounding.graph.edges
        target_E, predicted, measured = edges.target, [], []
        edits = [self._scaled(node, 0.0) for node in changed.tolist()]
        for rows, run in self._passes(conditions, edits, np.arange(len(changed))):
            for copy, node in enumerate(changed[rows]):
                outgoing = np.flatnonzero((edges.source == node) & self.nodes.mask(NodeKind.FEATURE)[target_E])
                predicted.append(-edges.weight[outgoing].astype(np.float64))
                measured.append(self._pre_activation_changes(run, copy, target_E[outgoing]))
        return np.concatenate([np.zeros(0), *predicted]), np.concatenate([np.zeros(0), *measured])

    def _passes(
        self, conditions: Conditions, edits: Sequence[Edit], rows_B: np.ndarray
    ) -> Iterator[tuple[np.ndarray, SplicedRun]]:
        """Runs of some rows of `edits` at a time, one copy of the prompt for each."""
        T = len(self.tokens_T)
        size = max(1, TOKENS_AT_ONCE // T)
        for begin in range(0, len(rows_B), size):
            rows = rows_B[begin : begin + size]
            copies = [edits[row] for row in rows]
            # Multiples are of clean activations: features are scaled alone, and nothing below a feature reacts to it.
            changes = {
                part: change_of(
                    [[i for i in edit.interventions if i.part == part] for edit in copies], crosscoder, n_positions=T
                )
                for part, crosscoder in self.model.crosscoders.items()
            }
            tokens_BT = self.tokens_T.repeat(len(copies), 1)
            for copy, edit in enumerate(copies):
                for position, token in edit.tokens.items():
                    tokens_BT[copy, position] = token
            yield rows, self.clean.run(conditions, changes, n_copies=len(rows), tokens_BT=tokens_BT)

    def _scaled(self, node: int, scale: float) -> Edit:
        nodes = self.nodes
        layer, index, position = (int(column[node]) for column in (nodes.layer, nodes.index, nodes.position))
        part = PARTS[int(nodes.part[node])]
        return Edit((Intervention(layer=layer, index=index, position=position, scale=scale, part=part),))

    def _feature_changes(self, run: SplicedRun, n_copies: int) -> tuple[np.ndarray, np.ndarray]:
        T = len(self.tokens_T)
        change_BN, power_BL = np.zeros((n_copies, len(self.nodes))), np.zeros((n_copies, self.n_layers))
        for part, features in run.features.items():
            of_part = self.nodes.mask(NodeKind.FEATURE) & (self.nodes.part == PARTS.index(part))
            wiring = self.model.crosscoders[part].wiring
            for layer in wiring.layers:
                group = wiring.group_of(layer)
                clean = repeat_prompt(self.clean.features[part].of(group), n_copies)
                changes = difference(features.of(group), clean, group=group)
                nodes = np.flatnonzero(of_part & (self.nodes.layer == layer))
                change_BN[:, nodes] = self._at(changes, nodes, n_copies)
                copy = (changes.row // T).cpu().numpy()
                power_BL[:, layer] += np.bincount(
                    copy, weights=changes.activation.double().cpu().numpy() ** 2, minlength=n_copies
                )
        return change_BN, np.sqrt(power_BL)

    def _at(self, changes: Features, nodes: np.ndarray, n_copies: int) -> np.ndarray:
        """float64[B, len(nodes)], entries of a table of one group at nodes of that group."""
        rows_BN = np.arange(n_copies)[:, None] * len(self.tokens_T) + self.nodes.position[nodes]
        index_BN = np.broadcast_to(self.nodes.index[nodes], rows_BN.shape)
        row, index = (torch.tensor(column, device=changes.row.device) for column in (rows_BN, index_BN))
        return activations_at(changes, row, index).double().cpu().numpy()

    def _logit_changes(self, logits_BTV: Tensor, change_BN: np.ndarray) -> np.ndarray:
        """Fill in the logit nodes' changes; return the KL at the last target's position."""
        targets, clean_TV = self.grounding.logits, self.clean.logits[0]
        if not targets:
            return np.zeros(len(change_BN))
        before_cap = self.model.language_model.parts.before_soft_cap  # graphs explain logits in front of a soft-cap
        change_BTV = (before_cap(logits_BTV) - before_cap(clean_TV)).double()
        for node, target in zip(np.flatnonzero(self.nodes.mask(NodeKind.LOGIT)), targets, strict=True):
            change_BN[:, node] = target.read(change_BTV[:, target.position]).cpu().numpy()
        position = targets[-1].position
        return kl_divergence(clean_TV[position], logits_BTV[:, position]).cpu().numpy()

    def _pre_activation_changes(self, run: SplicedRun, copy: int, targets: np.ndarray) -> np.ndarray:
        """float64[targets], change of each target feature's pre-activation in one copy."""
        change, T = np.zeros(len(targets)), len(self.tokens_T)
        for part, local in zip(PARTS, self.grounding.local.decompositions, strict=False):
            crosscoder = self.model.crosscoders[part]
            for layer in crosscoder.wiring.layers:
                group = crosscoder.wiring.group_of(layer)
                is_here = (self.nodes.layer[targets] == layer) & (self.nodes.part[targets] == PARTS.index(part))
                chosen = np.flatnonzero(is_here)
                index = torch.from_numpy(self.nodes.index[targets[chosen]]).to(crosscoder.device)
                row = torch.from_numpy(self.nodes.position[targets[chosen]].astype(np.int64)).to(crosscoder.device)
                for site in crosscoder.wiring.reads[group]:
                    moved_TD = run.inputs[site][copy * T : (copy + 1) * T] - self.clean.activations[site]
                    moved_PD = local.rows_read(group, index, row, moved_TD)
                    read_P = (moved_PD * crosscoder.encoder(group, site)[index]).sum(-1)
                    change[chosen] += read_P.double().cpu().numpy()
        return change


def sample_features(grounding: Grounding, n_features: int, *, seed: int) -> np.ndarray:
    """int[B], features drawn uniformly among the graph's, targets left out; all of them where there are fewer.

    Raises:
        ValueError: fewer than one feature asked for, a negative seed, or no feature in the graph.
    """
    if n_features < 1:
        raise ValueError(f"features: expected at least 1, given {n_features}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, given {seed}")
    nodes = grounding.graph.nodes
    candidates = np.flatnonzero(nodes.mask(NodeKind.FEATURE) & ~nodes.is_target)
    if not len(candidates):
        raise ValueError("the graph has no features to change")
    return np.sort(np.random.default_rng(seed).permutation(candidates)[:n_features])
