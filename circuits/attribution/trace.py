"""Trace the circuit of a prompt: the conductor that reads as the algorithm.

N nodes: tokens, learned positions, errors, features, logits, in the order of the node table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from circuits.attribution.columns import source_table
from circuits.attribution.estimate import Estimate, check_memory, estimate
from circuits.attribution.expansion import Attribution, Attributor, Progress
from circuits.attribution.labels import FeatureLabels, Indexes, most_influential, node_labels, open_indexes
from circuits.attribution.limits import LABELLED, MAX_NODES, memory_bytes
from circuits.attribution.metadata import trace_facts
from circuits.attribution.targets import (
    FeatureTarget,
    LogitTarget,
    Target,
    active_feature,
    as_target,
    check_model,
    output_weights,
    resolve_logit,
    top_logits,
)
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.conventions import EXACT, Conventions, named_conventions
from circuits.graph.edges import Edges
from circuits.graph.feature_labels import FEATURE_LABELS
from circuits.graph.nodes import NodeKind, NodeTable
from circuits.graph.pruning import check_threshold
from replacement import LocalReplacement, ReplacementModel
from replacement.language_model.prompts import Prompt
from replacement.number_checks import whole_number


def trace(
    model: ReplacementModel,
    prompt: Prompt,
    *,
    targets: Sequence[Target | str | int] | Target | str | int | None = None,
    coverage: float = 0.99,
    max_nodes: int | None = MAX_NODES,
    drop_below: float = 0.0,
    conventions: str = "exact",
    memory: str | int | None = None,
    index: Indexes = None,
    announce: Callable[[Estimate], None] | None = None,
    progress: Progress | None = None,
) -> CircuitGraph:
    """Attribute the model's output on a prompt to the features, errors and tokens that caused it.

    For every expanded node, exactly: `value = sum of incoming edges + bias`; the largest relative violation seen is the
    graph's `identity_error`. Relative to the value, or to 1 % of the summed magnitudes where the value is a smaller
    remainder of large terms.

    Args:
        model: language model with a strictly causal (or per-layer) crosscoder spliced in.
        prompt: text, or a list or 1-D tensor of token ids.
        targets: what to explain. By default the top logits at the last position (probability 0.95, at most 10); or
            tokens (text or id), `TokenTarget`, `DifferenceTarget`, `FeatureTarget`, or texts that `parse_target` reads.
        coverage: expand features until at most `1 - coverage` of the influence ends in unexpanded ones.
        max_nodes: most features expanded; None for no limit. Which limit ended the trace is `metadata["stopped_by"]`.
        drop_below: edges of at most this share of their target's inflow are left out, for long prompts; they count as lost, as
            after `CircuitGraph.drop_edges`.
        conventions: `exact`, or `circuit-tracer` for graphs that agree with that package's: the features and errors of position
            0, learned position embeddings and features that were not expanded have no nodes, and `CircuitGraph.prune` ranks
            tokens too (see `circuits.graph.conventions`). What these sources contribute to a node becomes part of its bias,
            after the sums were checked; `metadata["left_out_share"]` is the share of the output that reaches them. Pruned sets
            and `scores` follow the conventions.
        memory: most bytes that the process may hold, as a number or a text such as `4GB`; by default what it holds and what
            the machine, or its control group, has left.
        index: feature indexes of the model's crosscoders, whose labels are used; by default those found beside them, see
            `with_labels`.
        announce: called with the expected cost before the work starts.
        progress: called after each round with features expanded and the unexpanded share.

    A `KeyboardInterrupt` (Ctrl-C) after the first round ends the expansion and gives the graph of the rounds that are
    complete, a valid graph whose `metadata["stopped_by"]` is `interrupt`.

    Raises:
        ValueError: a prompt or target the model cannot read, numbers outside their range, or an expected cost above `memory`.

    >>> model = replacement.load("demo")                                        # doctest: +SKIP
    >>> graph = trace(model, "the capital of the state containing Dallas is")   # doctest: +SKIP
    >>> graph.prune().scores()                                                  # doctest: +SKIP
    """
    started = time.perf_counter()
    check_model(model)
    check_threshold("coverage", coverage)
    check_threshold("drop_below", drop_below)
    rules = named_conventions(conventions)
    if max_nodes is not None:
        whole_number("max_nodes", max_nodes, least=1)
    if memory is not None:
        memory = memory_bytes(memory)
    _check_layers(model)
    lm = model.language_model
    tokens_T = lm.tokens(prompt)
    with open_indexes(model, index) as indexes, torch.no_grad():
        local = model.localize(tokens_T)
        logits, roots = _resolve(targets, local, model)
        cost = estimate(local, n_logits=len(logits), max_nodes=max_nodes)
        check_memory(cost, memory, local.n_positions)
        if announce is not None:
            announce(cost)
        attributor = Attributor(local, logits, drop_below=drop_below)
        output = _shares_of_output(attributor, logits, roots)
        rows = attributor.expand(output, coverage=coverage, max_nodes=max_nodes, progress=progress)
        columns = _columns(local, logits)
        left_out = _left_out(columns, local, rows, rules) & (output == 0)
        left_out_share = rows.leave_out(left_out, output) if left_out.any() else 0.0
        labels = FeatureLabels(model, local, indexes)
        nodes, edges = _assemble(labels, logits, rows, output, columns)
    metadata = {
        "prompt": prompt if isinstance(prompt, str) else "".join(lm.prompt_strings(tokens_T.tolist())),
        **trace_facts(model, local, logits, roots, rows),
        "coverage": float(coverage),
        FEATURE_LABELS: labels.facts,
        **({"dropped_below": float(drop_below)} if drop_below else {}),
        **({} if rules == EXACT else {"conventions": rules.name, "left_out_share": left_out_share}),
        "seconds": time.perf_counter() - started,
    }
    return CircuitGraph(nodes, edges, metadata)


def _check_layers(model: ReplacementModel) -> None:
    layers = [model.crosscoder.wiring.group_layer(group) for group in range(model.crosscoder.n_groups)]
    if sorted(set(layers)) != layers:
        raise ValueError(f"cannot name features by layer: the crosscoder's groups belong to the layers {layers}")


def _shares_of_output(attributor: Attributor, logits: Sequence[LogitTarget], roots: Sequence[int]) -> np.ndarray:
    """Share of the output of every node: of logits by probability, of features that are targets in equal parts."""
    output = np.zeros(attributor.rows.n_nodes)
    output[attributor.rows.n_columns :] = output_weights(logits) if logits else []
    output[attributor.columns.features.start + np.array(roots, dtype=np.int64)] = 1 / max(1, len(roots))
    return output


def _resolve(
    targets: Sequence[Target | str | int] | Target | str | int | None,
    local: LocalReplacement,
    model: ReplacementModel,
) -> tuple[list[LogitTarget], list[int]]:
    """Logit targets, and the numbers of active features that are targets themselves."""
    if targets is None:
        named: Iterable[Target] = top_logits(local)
    else:
        # Bytes are a sequence of numbers, but no list of token ids.
        given: Sequence[Any] = (
            [targets] if isinstance(targets, str | bytes) or not isinstance(targets, Sequence) else targets
        )
        named = [as_target(target) for target in given]
    logits, roots = [], []
    for target in named:
        if isinstance(target, FeatureTarget):
            roots.append(active_feature(target, local))
        else:
            logits.append(resolve_logit(target, local, model.language_model))
    if bool(logits) == bool(roots):
        raise ValueError(
            "expected at least one target, all logits or all features, got " + ("both" if logits else "none")
        )
    if len({(logit.position, logit.token_id, logit.label) for logit in logits}) < len(logits) or len(set(roots)) < len(
        roots
    ):
        raise ValueError("the same target is named twice")
    return logits, roots


def _assemble(
    labels: FeatureLabels,
    logits: Sequence[LogitTarget],
    rows: Attribution,
    output: np.ndarray,
    columns: dict[str, np.ndarray],
) -> tuple[NodeTable, Edges]:
    """The node table and edges: every token, every target, and whatever else causes one of them."""
    blocks = [block for parts in rows.blocks.values() for block in parts]
    kept = rows.expanded | (output > 0) | np.isin(columns["kind"], (NodeKind.TOKEN, NodeKind.LOGIT))
    for block in blocks:
        kept[block.source] = True
    shown = (output > 0) | most_influential(rows.influence(output), columns["kind"] == NodeKind.FEATURE, LABELLED)
    rows.blocks.clear()  # `Edges.from_blocks` frees each block as it copies it
    edges = Edges.from_blocks(blocks, n_nodes=int(kept.sum()), number=np.cumsum(kept) - 1)
    label = node_labels(labels, logits, columns, kept, shown)
    table = {name: column[kept] for name, column in columns.items()}
    nodes = NodeTable.build(
        **table,
        label=label,
        output_weight=output[kept],
        expanded=rows.expanded[kept],
        value=rows.value[kept],
        bias=rows.bias[kept],
        inflow=rows.inflow[kept],
    )
    return nodes, edges


def _left_out(
    columns: dict[str, np.ndarray], local: LocalReplacement, rows: Attribution, rules: Conventions
) -> np.ndarray:
    """bool[N], the sources that have no node under the conventions."""
    kind, position = columns["kind"], columns["position"]
    first = max(1, *(part.crosscoder.undecomposed_positions for part in local.decompositions))
    left_out = np.zeros(len(kind), dtype=bool)
    if not rules.first_position:
        left_out |= np.isin(kind, (NodeKind.ERROR, NodeKind.FEATURE)) & (position < first)
    if not rules.learned_positions:
        left_out |= kind == NodeKind.POSITION
    if not rules.unexpanded:
        left_out |= (kind == NodeKind.FEATURE) & ~rows.expanded
    return left_out


def _columns(local: LocalReplacement, logits: Sequence[LogitTarget]) -> dict[str, np.ndarray]:
    """Kind, part, layer, position, index, activation and probability of all N nodes."""
    sources = source_table(local)
    n_columns = len(sources["kind"])
    of_logits = {
        "kind": np.full(len(logits), int(NodeKind.LOGIT)),
        "layer": np.full(len(logits), local.shape.n_layers),
        "position": np.array([logit.position for logit in logits], dtype=np.int64),
        "index": np.array([logit.token_id for logit in logits], dtype=np.int64),
    }
    columns = {
        name: np.concatenate([column, of_logits.get(name, np.zeros(len(logits), column.dtype))])
        for name, column in sources.items()
    }
    return columns | {"probability": np.array([0.0] * n_columns + [logit.probability for logit in logits])}
