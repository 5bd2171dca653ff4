"""Trials: what is done to a group of a graph in the model, what the graph predicts of it, and what it is compared with.

| trial     | of features                                                | of tokens                                  |
|-----------|------------------------------------------------------------|--------------------------------------------|
| `ablated` | all members at activation 0                                | each replaced by a random token            |
| `set`     | members at the activations that they have in another prompt | replaced by the other prompt's tokens      |
|           | at the aligned positions, and the counterpart switched on  |                                            |

The counterpart of a group in another prompt: the features of that prompt's circuit which are not active in this prompt, each
counted to the group whose most influential member is of the same part and layer, at the aligned position.

Controls of a change of features: as many features drawn at random, each of the same layer at the same position as the feature
it stands for and not active there, changed in the same direction until its writes change by the same norm. So a control is as
large a change of the same streams, in directions that the graph does not speak of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from circuits.attribution.trace import trace
from circuits.explain.claims import readings
from circuits.graph.alignment import aligned_positions
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.conventions import EXACT
from circuits.graph.groups import Grouping
from circuits.graph.influence import node_influence
from circuits.graph.nodes import NodeKind, NodeTable
from circuits.validation.effects import Edit, Effects
from circuits.validation.final_norm import with_final_norm
from circuits.validation.prediction import predicted_changes
from replacement import Intervention, ReplacementModel
from replacement.language_model.prompts import Prompt
from replacement.splicing.clean_run import CleanRun
from replacement.splicing.feature_changes import activations_at
from replacement.splicing.intervention import PARTS

CANDIDATES = 16
"""Features drawn for one of a control: the first that writes anything is taken."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to change a group, in several variants whose effects are summed up by their median."""

    name: str
    """`ablated` or `set`."""
    edits: list[Edit]
    """The variants: random tokens, or other prompts; a single one for features ablated."""
    changes: list[dict[int, float]]
    """Of every variant: node -> relative change of what it writes, which is what the graph predicts from."""
    controls: list[Edit] = field(default_factory=list)
    """Of features: controls of the variants in turn, so that the k-th is of variant `k % len(edits)`."""


def circuit_of(graph: CircuitGraph) -> CircuitGraph:
    """The graph pruned as `circuits trace` prunes it, unless it is pruned already."""
    if "pruning" in graph.metadata:
        return graph
    return graph.prune(most_nodes=EXACT.circuit_nodes, most_edges=EXACT.circuit_edges)


class OtherPrompt:
    """Another prompt, aligned with a graph's: what its features are at the graph's positions, and its circuit."""

    def __init__(self, model: ReplacementModel, prompt: Prompt, graph: CircuitGraph) -> None:
        """Trace the prompt.

        Raises:
            ValueError: a prompt that the model cannot read, that is the graph's own, or that cannot be aligned with it.
        """
        lm, tokens = model.language_model, graph.metadata["token_ids"]
        self.tokens = [int(token) for token in lm.tokens(prompt)]
        self.text = prompt if isinstance(prompt, str) else "".join(lm.prompt_strings(self.tokens))
        if self.tokens == tokens:
            raise ValueError(f"against: expected another prompt than the graph's, given {self.text!r:.80}")
        try:
            self.position_of = aligned_positions(tokens, self.tokens)
        except ValueError as error:
            raise ValueError(f"against {self.text!r:.80}: {error}") from error
        self.run = CleanRun(lm, model.crosscoders, torch.tensor([self.tokens], device=lm.device))
        self.circuit = circuit_of(trace(model, self.tokens))


class Trials:
    """Makes the trials of the groups of one graph."""

    def __init__(self, effects: Effects, grouping: Grouping, *, controls: int, seed: int) -> None:
        """
        Args:
            effects: of the model and the graph.
            grouping: of that graph, or of a circuit pruned from it.
            controls: random groups for every group of features, and random tokens for every group of tokens.
            seed: of the random choices.
        """
        self.effects, self.grouping, self.n_controls, self.seed = effects, grouping, controls, seed
        self.model, self.nodes = effects.model, effects.nodes
        row_of = {name: row for row, name in enumerate(self.nodes.ids())}
        ids = grouping.graph.nodes.ids()
        self.groups = [
            replace(group, members=tuple(row_of[ids[node]] for node in group.members)) for group in grouping.groups
        ]
        """The groups, with rows of the whole graph as members."""
        self.reading_NG = readings(effects.grounding.graph, self.groups)
        self.owner = _owners(grouping)

    def ablated(self, number: int) -> Trial | None:
        """The group ablated; None where it cannot be."""
        rows = self._changeable(number)
        removed = dict.fromkeys(rows.tolist(), -1.0)
        if not len(rows):
            return None
        if self.groups[number].kind == "tokens":
            drawn = self._random_tokens(number, self.nodes.index[rows].tolist())
            places = self.nodes.position[rows].tolist()
            edits = [Edit(tokens=dict(zip(places, tokens, strict=True))) for tokens in drawn]
            return Trial("ablated", edits, [removed] * len(edits))
        edit = Edit(tuple(_intervention(*_key(self.nodes, row), activation=0.0) for row in rows.tolist()))
        return self._with_controls("ablated", number, [(edit, removed)])

    def set_to(self, number: int, others: Sequence[OtherPrompt]) -> Trial | None:
        """The group set to its values in those of the other prompts that have all of its positions; None without any."""
        rows = self._changeable(number)
        of_kind = self._other_tokens if self.groups[number].kind == "tokens" else self._other_activations
        aligned = [other for other in others if (other.position_of[self.nodes.position[rows]] >= 0).all()]
        variants = [of_kind(number, rows.tolist(), other) for other in aligned] if len(rows) else []
        return self._with_controls("set", number, variants) if variants else None

    def _with_controls(self, name: str, number: int, variants: list[tuple[Edit, dict[int, float]]]) -> Trial:
        edits, changes = [edit for edit, _ in variants], [change for _, change in variants]
        random = np.random.default_rng([self.seed, number])
        of_features = any(edit.interventions for edit in edits)
        turns = range(self.n_controls if of_features else 0)
        return Trial(name, edits, changes, [self._control(random, edits[turn % len(edits)]) for turn in turns])

    def predicted(self, trial: Trial, *, total: bool) -> np.ndarray:
        """float64[B, G], what the graph predicts that every variant changes of every group's reading.

        The final norm follows what changed features leave of the last stream. Of random tokens the graph knows nothing, and
        the norm is held.

        Args:
            total: through all paths; only through the edges out of the group otherwise.
        """
        grounding = self.effects.grounding
        change_BN = predicted_changes(grounding.graph, trial.changes, total=total, clipped=True)
        if not any(edit.tokens for edit in trial.edits):
            change_BN = with_final_norm(grounding, trial.changes, change_BN, total=total)
        return np.asarray(change_BN @ self.reading_NG)

    def measured(self, trial: Trial, patching: str) -> np.ndarray:
        """float64[B, G], what every variant, and after them every control, changes; `patching` as of `Effects.measure`."""
        run = self.effects.measure_edits([*trial.edits, *trial.controls], patching, "live")
        return np.asarray(run.change_BN @ self.reading_NG)

    def _changeable(self, number: int) -> np.ndarray:
        """Rows of the members of a group that can be changed: not errors, outputs, and learned positions."""
        rows = np.array(self.groups[number].members)
        return rows[self.nodes.mask(NodeKind.TOKEN, NodeKind.FEATURE)[rows]]

    def _other_tokens(self, number: int, rows: list[int], other: OtherPrompt) -> tuple[Edit, dict[int, float]]:
        place_of = {row: int(self.nodes.position[row]) for row in rows}
        token_of = {row: other.tokens[other.position_of[place]] for row, place in place_of.items()}
        moved = [row for row in rows if token_of[row] != self.nodes.index[row]]
        return Edit(tokens={place_of[row]: token_of[row] for row in moved}), dict.fromkeys(moved, -1.0)

    def _other_activations(self, number: int, rows: list[int], other: OtherPrompt) -> tuple[Edit, dict[int, float]]:
        members, changes = [], {}
        for row in rows:
            part, layer, index, position = _key(self.nodes, row)
            value = self._activation(other.run, part, layer, index, int(other.position_of[position]))
            members.append(_intervention(part, layer, index, position, activation=value))
            changes[row] = value / float(self.nodes.activation[row]) - 1
        return Edit((*members, *self._counterpart(number, other))), changes

    def _counterpart(self, number: int, other: OtherPrompt) -> list[Intervention]:
        nodes, found = other.circuit.nodes, []
        position_of = {int(place): position for position, place in enumerate(other.position_of)}
        for row in np.flatnonzero(nodes.mask(NodeKind.FEATURE)).tolist():
            part, layer, index, place = _key(nodes, row)
            here = (part, layer, index, position_of.get(place, -1))
            if self.owner.get((part, layer, here[3])) == number and not self._activation(self.effects.clean, *here):
                found.append(_intervention(*here, activation=float(nodes.activation[row])))
        return found

    def _control(self, random: np.random.Generator, edit: Edit) -> Edit:
        """An edit of random features instead; a feature for which none is left is left out."""
        interventions: dict[tuple[str, int, int, int], Intervention] = {}
        for changed in edit.interventions:
            part, layer, position = changed.part, changed.layer, changed.position
            assert position is not None
            assert changed.activation is not None
            moved = changed.activation - self._activation(self.effects.clean, part, layer, changed.index, position)
            moved *= self._norm(part, layer, changed.index)
            free = self._inactive(part, layer, position)
            for drawn in random.choice(free, size=min(CANDIDATES, len(free)), replace=False).tolist():
                key, norm = (part, layer, drawn, position), self._norm(part, layer, drawn)
                if norm > 0 and key not in interventions:
                    interventions[key] = _intervention(*key, add=moved / norm)
                    break
        return Edit(tuple(interventions.values()))

    def _inactive(self, part: str, layer: int, position: int) -> np.ndarray:
        """Indices of the features of a layer that are not active at a position of the prompt."""
        crosscoder = self.model.crosscoders[part]
        active = self.effects.clean.features[part].of(crosscoder.wiring.group_of(layer))
        here = active.index[active.row == position].cpu().numpy()
        return np.setdiff1d(np.arange(crosscoder.n_features), here)

    def _norm(self, part: str, layer: int, index: int) -> float:
        """Norm of all that a feature writes for each unit of activation."""
        crosscoder = self.model.crosscoders[part]
        group = crosscoder.wiring.group_of(layer)
        row = torch.tensor([index], device=crosscoder.device)
        writes = (crosscoder.decoder_vectors(group, row, site) for site in crosscoder.wiring.writes[group])
        return math.sqrt(sum(float(vector.double().square().sum()) for vector in writes))

    def _random_tokens(self, number: int, tokens: list[int]) -> list[list[int]]:
        """Tokens to stand in the place of some, for every variant: never the token itself, nor a special one."""
        lm, random = self.model.language_model, np.random.default_rng([self.seed, number])
        special = set(lm.tokenizer.all_special_ids) if lm.tokenizer is not None else set()
        known = np.array([token for token in range(lm.vocabulary_size) if token not in special])
        return [[int(random.choice(known[known != token])) for token in tokens] for _ in range(self.n_controls)]

    def _activation(self, run: CleanRun, part: str, layer: int, index: int, position: int) -> float:
        features = run.features[part].of(self.model.crosscoders[part].wiring.group_of(layer))
        row, column = features.row.new_tensor([position]), features.row.new_tensor([index])
        return float(activations_at(features, row, column))


def _key(nodes: NodeTable, row: int) -> tuple[str, int, int, int]:
    """Part, layer, index and position of a feature."""
    part = PARTS[int(nodes.part[row])]
    return part, int(nodes.layer[row]), int(nodes.index[row]), int(nodes.position[row])


def _intervention(part: str, layer: int, index: int, position: int, **way: float) -> Intervention:
    return Intervention(part=part, layer=layer, index=index, position=position, **way)


def _owners(grouping: Grouping) -> dict[tuple[str, int, int], int]:
    """The group of the most influential feature at every place: part, layer and position."""
    nodes, owner = grouping.graph.nodes, {}
    for row in np.argsort(node_influence(grouping.graph), kind="stable").tolist():
        if nodes.kind[row] == NodeKind.FEATURE:
            part, layer, _, position = _key(nodes, row)
            owner[part, layer, position] = int(grouping.group_of[row])
    return owner
