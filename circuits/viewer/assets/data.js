/** The graph as typed arrays. Node and edge numbers are the rows of Python's tables, from 0. */

const KIND = {token: 0, position: 1, error: 2, feature: 3, logit: 4};
const TYPES = {
  u1: Uint8Array, i1: Int8Array, u2: Uint16Array, i2: Int16Array, i4: Int32Array, f4: Float32Array, f8: Float64Array,
};

/** A column of the payload, `[type, base64]`, as a typed array (little-endian, as all machines that browsers run on). */
function decodeColumn([type, text]) {
  const characters = atob(text);
  const bytes = new Uint8Array(characters.length);
  for (let at = 0; at < bytes.length; at++) bytes[at] = characters.charCodeAt(at);
  return new TYPES[type](bytes.buffer);
}

/** Decodes the columns among the fields of an object, and keeps the others. */
function decodeColumns(fields) {
  const isColumn = (value) => Array.isArray(value) && value.length === 2 && value[0] in TYPES;
  return Object.fromEntries(
    Object.entries(fields).map(([name, value]) => [name, isColumn(value) ? decodeColumn(value) : value]),
  );
}

/**
 * The payload of the page as `data`; see README.md for its fields.
 * Beside the payload's own: `edges.target`, `edges.share` (signed share of the target's input), `edges.influence`,
 * `edges.columnStart` and `edges.order` (edges by source), `edges.byInfluence` (the strongest first), `numberOf` (node by id),
 * `headsOf(edge)`.
 */
function decodeGraph(payload) {
  const nodes = {...decodeColumns(payload.nodes), id: payload.nodes.id, name: payload.nodes.name, label: payload.nodes.label};
  const edges = decodeColumns(payload.edges);
  const heads = payload.heads && decodeColumns(payload.heads);
  completeEdges(nodes, edges);
  nodes.label = labelsOf(nodes, payload.features);
  const numberOf = new Map(nodes.id.map((id, node) => [id, node]));
  return {...payload, nodes, edges, heads, numberOf, features: payload.features ?? {}, headsOf: (edge) => headsOf(heads, edge)};
}

/** A feature without a label in the graph has that of the feature index, unless it is unclear. */
function labelsOf({label}, features) {
  if (!features?.record) return label;
  const record = decodeColumn(features.record);
  return label.map((text, node) => {
    const best = text || record[node] < 0 ? null : features.records[record[node]].labels?.[0];
    return best && best.text !== "unclear" ? best.text.replace(/[\u202a-\u202e\u2066-\u2069]/g, "") : text; // nothing that turns text
  });
}

/** Adds what follows from rows, sources and weights. An edge's influence is the mass that crosses it, (I[t] + p[t]) M[t, s]. */
function completeEdges(nodes, edges) {
  const count = edges.source.length;
  Object.assign(edges, {
    count,
    target: new Int32Array(count),
    share: new Float32Array(count),
    influence: new Float64Array(count),
    columnStart: new Int32Array(nodes.count + 1),
    order: new Int32Array(count),
  });
  for (let target = 0; target < nodes.count; target++) {
    const [start, stop] = [edges.rowStart[target], edges.rowStart[target + 1]];
    let magnitude = 0;
    for (let edge = start; edge < stop; edge++) magnitude += Math.abs(edges.weight[edge]);
    const inflow = Math.max(nodes.inflow[target], magnitude); // as in Python: no row sums to more than 1
    const mass = nodes.influence[target] + nodes.outputWeight[target];
    for (let edge = start; edge < stop; edge++) {
      edges.target[edge] = target;
      edges.share[edge] = inflow > 0 ? edges.weight[edge] / inflow : 0;
      edges.influence[edge] = inflow > 0 ? (mass * Math.abs(edges.weight[edge])) / inflow : 0;
      edges.columnStart[edges.source[edge] + 1]++;
    }
  }
  for (let node = 0; node < nodes.count; node++) edges.columnStart[node + 1] += edges.columnStart[node];
  const place = edges.columnStart.slice();
  for (let edge = 0; edge < count; edge++) edges.order[place[edges.source[edge]]++] = edge;
  edges.byInfluence = Int32Array.from({length: count}, (_, edge) => edge).sort((a, b) => edges.influence[b] - edges.influence[a]);
}

/** What carries an edge: `{direct, rest, heads: [[layer, head, weight], ...]}`, the strongest head first; null if not known. */
function headsOf(heads, edge) {
  if (!heads) return null;
  const part = (value) => (value * heads.scale[edge]) / 32767;
  const listed = [];
  for (let at = heads.rowStart[edge]; at < heads.rowStart[edge + 1]; at++) {
    listed.push([heads.layer[at], heads.head[at], part(heads.weight[at])]);
  }
  return {direct: part(heads.direct[edge]), rest: part(heads.rest[edge]), heads: listed};
}

/** The numbers of the edges into a node, the largest weights first. */
function edgesInto(data, node) {
  const {rowStart} = data.edges;
  return bySize(data, Array.from({length: rowStart[node + 1] - rowStart[node]}, (_, at) => rowStart[node] + at));
}

/** The numbers of the edges out of a node, those with the largest shares of their targets' input first. */
function edgesOutOf(data, node) {
  const {columnStart, order} = data.edges;
  return bySize(data, Array.from(order.subarray(columnStart[node], columnStart[node + 1])));
}

function bySize(data, edges) {
  return edges.sort((a, b) => Math.abs(data.edges.share[b]) - Math.abs(data.edges.share[a]));
}

/** What people read on a node: their own text for it, its label, or its name. */
function labelOf(data, state, node) {
  return state.labels.get(node) ?? (data.nodes.label[node] || data.nodes.name[node]);
}

/**
 * Which nodes the graph pane shows. Tokens, logits, pinned nodes, the selected one and those of a path stay whatever their
 * influence is.
 * @returns `{shown: Uint8Array, hidden, share}`: how many are hidden, and their part of the influence of all nodes
 */
function shownNodes(data, state) {
  const {kind, influence, count} = data.nodes;
  const stays = new Set([...state.pinned, state.selected, ...shownPath(data, state).nodes]);
  const shown = new Uint8Array(count);
  let [hidden, hiddenInfluence, total] = [0, 0, 0];
  for (let node = 0; node < count; node++) {
    const always = kind[node] === KIND.token || kind[node] === KIND.logit || stays.has(node);
    shown[node] = always || influence[node] >= state.minInfluence ? 1 : 0;
    total += influence[node];
    if (!shown[node]) [hidden, hiddenInfluence] = [hidden + 1, hiddenInfluence + influence[node]];
  }
  return {shown, hidden, share: total > 0 ? hiddenInfluence / total : 0};
}

/** The strongest edges of a node that the state asks for: `{inputs, outputs}`, at most `topLinks` of each. */
function topLinks(data, state, node) {
  return {
    inputs: state.direction === "outputs" ? [] : edgesInto(data, node).slice(0, state.topLinks),
    outputs: state.direction === "inputs" ? [] : edgesOutOf(data, node).slice(0, state.topLinks),
  };
}
