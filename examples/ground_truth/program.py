"""Programs: circuits written down gate by gate, and what is true of them on a prompt.

A program names variables, which become orthogonal directions of the residual stream, and says what every part of a
transformer does with them: tokens and positions embed variables, a head moves variables from the position it attends to, a
neuron is `ReLU(sum of weighted variables + bias)` and writes variables, and a token's logit is a sum of weighted variables.

`run` computes a prompt in plain Python, without any weights: beside the value of each variable at each position it keeps who
wrote how much of it. The entries of a neuron's inputs are then the true edges, with their weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from circuits import NodeKind

Sources = dict["Node", float]
"""How much of a value each node wrote."""
Stream = list[defaultdict[str, Sources]]
"""Per position: the writers of every variable."""


class Node(NamedTuple):
    """A node of the true circuit, named as rows of a `circuits.NodeTable` are."""

    kind: NodeKind
    layer: int
    position: int
    index: int


@dataclass(frozen=True, slots=True)
class Neuron:
    """`ReLU(sum of reads + bias)`, written to variables."""

    reads: Mapping[str, float]
    """Weight of every variable it reads."""
    bias: float
    writes: Mapping[str, float]
    """What a unit of its activation adds to every variable it writes."""
    gate: str = ""
    """The variable of the true computation that it is part of; several neurons may compute one variable."""


@dataclass(frozen=True, slots=True)
class Head:
    """An attention head that looks at one position."""

    scores: Mapping[tuple[str, str], float]
    """Score of a position: sum over (variable at the query, variable at the key) of weight x both values. The largest one
    must win by far, so that the softmax is one-hot."""
    moves: Mapping[str, str]
    """Variable read at the key -> variable written at the query."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Heads, then neurons that see what the heads wrote."""

    heads: Sequence[Head] = ()
    neurons: Sequence[Neuron] = ()


@dataclass(frozen=True, slots=True)
class Program:
    """A circuit, gate by gate."""

    variables: tuple[str, ...]
    tokens: tuple[Mapping[str, float], ...]
    """Variables each token of the vocabulary embeds."""
    positions: tuple[Mapping[str, float], ...]
    """The same for positions; their number is the context length."""
    layers: tuple[Layer, ...]
    outputs: Mapping[int, Mapping[str, float]]
    """Token -> weights of the variables its logit reads; all other logits are 0."""


@dataclass(slots=True)
class Run:
    """What is true on one prompt."""

    values: list[dict[str, float]]
    """Variables behind the last layer, per position."""
    activations: dict[Node, float] = field(default_factory=dict)
    """Every active neuron."""
    edges: dict[tuple[Node, Node], float] = field(default_factory=dict)
    """Effect of each (source, target) pair that has one; targets are active neurons and logits."""
    attended: dict[tuple[int, int, int], int] = field(default_factory=dict)
    """(layer, head, query) -> position it attends to."""


def run(program: Program, tokens: Sequence[int], targets: Sequence[tuple[int, int]] = ()) -> Run:
    """Compute a prompt.

    Args:
        targets: logit differences (token, other token) at the last position, which become target nodes; in the order given.
    """
    stream: Stream = []
    for place, token in enumerate(tokens):
        here: defaultdict[str, Sources] = defaultdict(dict)
        _write(here, program.tokens[token], Node(NodeKind.TOKEN, -1, place, token))
        _write(here, program.positions[place], Node(NodeKind.POSITION, -1, place, -1))
        stream.append(here)
    found = Run(values=[])
    for number, layer in enumerate(program.layers):
        _attend(stream, layer.heads, number, found)
        for place, here in enumerate(stream):
            _fire(here, layer.neurons, number, place, found)
    found.values = [{name: sum(sources.values()) for name, sources in here.items()} for here in stream]
    for plus, minus in targets:
        weights = defaultdict(float, program.outputs.get(plus, {}))
        for name, weight in program.outputs.get(minus, {}).items():
            weights[name] -= weight
        # A table names differences at one position -1, -2, ... in the order they were asked for.
        node = Node(NodeKind.LOGIT, len(program.layers), len(tokens) - 1, -1 - targets.index((plus, minus)))
        _join(_read(stream[-1], weights), node, found)
    return found


def _write(here: defaultdict[str, Sources], writes: Mapping[str, float], node: Node, times: float = 1.0) -> None:
    for name, weight in writes.items():
        here[name][node] = here[name].get(node, 0.0) + weight * times


def _read(here: Mapping[str, Sources], reads: Mapping[str, float]) -> Sources:
    read: Sources = defaultdict(float)
    for name, weight in reads.items():
        for node, amount in here[name].items() if name in here else ():
            read[node] += weight * amount
    return read


def _join(read: Sources, target: Node, found: Run) -> None:
    found.edges |= {(source, target): effect for source, effect in read.items() if effect}


def _attend(stream: Stream, heads: Sequence[Head], layer: int, found: Run) -> None:
    values = [{name: sum(sources.values()) for name, sources in here.items()} for here in stream]
    moved: list[tuple[int, str, Sources]] = []
    for number, head in enumerate(heads):
        for query in range(len(stream)):
            scores = [
                sum(w * values[query].get(q, 0.0) * values[key].get(k, 0.0) for (q, k), w in head.scores.items())
                for key in range(query + 1)
            ]
            key = max(range(query + 1), key=scores.__getitem__)
            found.attended[layer, number, query] = key
            moved += [(query, target, dict(stream[key].get(source, {}))) for source, target in head.moves.items()]
    for query, target, sources in moved:
        for node, amount in sources.items():
            _write(stream[query], {target: amount}, node)


def _fire(here: defaultdict[str, Sources], neurons: Sequence[Neuron], layer: int, place: int, found: Run) -> None:
    fired = []
    for index, neuron in enumerate(neurons):
        read = _read(here, neuron.reads)
        activation = sum(read.values()) + neuron.bias
        if activation > 0:
            node = Node(NodeKind.FEATURE, layer, place, index)
            found.activations[node] = activation
            _join(read, node, found)
            fired.append((neuron, node, activation))
    for neuron, node, activation in fired:  # neurons of one layer do not see each other
        _write(here, neuron.writes, node, activation)
