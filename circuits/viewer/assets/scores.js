/**
 * Replacement and completeness of the graph and of parts of it, the formulas of circuits/graph/scores.py: what was removed or
 * not expanded counts as error, so that the scores of a part are those of `graph.select(nodes, edges among them)` in Python.
 */

const orders = new WeakMap();

/** All nodes in backward order: a node comes after every node it feeds. */
function backwardOrder(data) {
  if (orders.has(data)) return orders.get(data);
  const {rowStart, columnStart, source} = data.edges;
  const order = new Int32Array(data.nodes.count);
  const waiting = order.map((_, node) => columnStart[node + 1] - columnStart[node]); // targets that have not come yet
  let [end, at] = [0, 0];
  waiting.forEach((count, node) => count || (order[end++] = node));
  for (; at < end; at++) {
    for (let edge = rowStart[order[at]]; edge < rowStart[order[at] + 1]; edge++) {
      if (--waiting[source[edge]] === 0) order[end++] = source[edge];
    }
  }
  if (end < data.nodes.count) throw new Error("expected a graph without cycles");
  orders.set(data, order);
  return order;
}

/** Whether a node is a part of every subgraph: tokens and logits are, and whatever else is a target. */
function alwaysPinned(data, node) {
  const {kind, outputWeight} = data.nodes;
  return kind[node] === KIND.token || kind[node] === KIND.logit || outputWeight[node] > 0;
}

/** The nodes of the pinned subgraph, as flags by node. */
function pinnedNodes(data, pinned) {
  return Uint8Array.from({length: data.nodes.count}, (_, node) => +(pinned.has(node) || alwaysPinned(data, node)));
}

/**
 * Scores of the nodes in `kept` (flags by node; all by default) and the edges among them.
 * @returns `{replacement, completeness, nodes, edges, mass}`: shares in 0..1 and counts; `mass` says where the output's mass ends,
 *   in `inputs`, `errors`, `unexpanded` features, or `lost` with what is not in the part; the four sum to 1
 */
function scoresOf(data, kept = null) {
  const {kind, expanded, inflow, outputWeight} = data.nodes;
  const {rowStart, source, weight} = data.edges;
  const through = Float64Array.from(outputWeight); // I + p, complete once all targets of a node have been visited
  const mass = {inputs: 0, errors: 0, unexpanded: 0, lost: 0};
  let [nodes, edges, total, explained] = [0, 0, 0, 0];
  for (const node of backwardOrder(data)) {
    if (kept && !kept[node]) continue;
    const [start, stop] = [rowStart[node], rowStart[node + 1]];
    let [magnitude, ofErrors, inside] = [0, 0, 0];
    for (let edge = start; edge < stop; edge++) {
      if (kept && !kept[source[edge]]) continue;
      const size = Math.abs(weight[edge]);
      magnitude += size;
      inside++;
      if (kind[source[edge]] === KIND.error) ofErrors += size;
    }
    const scale = invert(Math.max(inflow[node], magnitude)); // weights are rounded: no row sums to more than 1
    const mine = through[node];
    for (let edge = start; edge < stop; edge++) {
      if (!kept || kept[source[edge]]) through[source[edge]] += mine * scale * Math.abs(weight[edge]);
    }
    const lost = expanded[node] ? 1 - magnitude * scale : 0;
    const unexpanded = (kind[node] === KIND.feature || kind[node] === KIND.logit) && !expanded[node];
    if (kind[node] === KIND.token || kind[node] === KIND.position) mass.inputs += mine;
    if (kind[node] === KIND.error) mass.errors += mine;
    if (unexpanded) mass.unexpanded += mine;
    mass.lost += mine * lost;
    explained += mine * (unexpanded ? 0 : 1 - ofErrors * scale - lost);
    total += mine;
    edges += inside;
    nodes++;
  }
  return {
    replacement: mass.inputs / (mass.inputs + mass.errors + mass.unexpanded + mass.lost),
    completeness: (explained + mass.lost) / (total + mass.lost), // lost mass is one more error, which has no inputs itself
    nodes,
    edges,
    mass,
  };
}

/** `1 / value`, and 0 where that is not finite. */
function invert(value) {
  return Number.isFinite(1 / value) ? 1 / value : 0;
}
