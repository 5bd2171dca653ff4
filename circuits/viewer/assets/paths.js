/** The strongest path between two nodes, by the method of circuits/graph/paths.py: the largest product of the edges' shares. */

/**
 * The strongest path from one node to another, or the other way round where only that exists; null where neither does.
 * @returns `{nodes, edges, product, share, allPaths}`: its nodes and edges from the source on; the product of the shares M of its
 *   edges; `share` = (I + p) of its end times the product, the part of the output's influence that runs along exactly this path
 *   and on from its end; `allPaths`, the sum of the products of all paths between the two
 */
function strongestPath(data, from, to) {
  return from === to ? null : pathUp(data, from, to) ?? pathUp(data, to, from);
}

function pathUp(data, from, to) {
  const {rowStart, source, share, target} = data.edges;
  const {count, influence, outputWeight} = data.nodes;
  const best = new Float64Array(count).fill(-Infinity); // logarithms, whose sums do not underflow
  const next = new Int32Array(count).fill(-1); // the edge by which the best path goes on
  const all = new Float64Array(count);
  best[to] = 0;
  all[to] = 1;
  for (const node of backwardOrder(data)) {
    if (node === from) break;
    if (best[node] === -Infinity) continue;
    for (let edge = rowStart[node]; edge < rowStart[node + 1]; edge++) {
      const size = Math.abs(share[edge]);
      all[source[edge]] += all[node] * size;
      const through = best[node] + Math.log(size);
      if (through > best[source[edge]]) [best[source[edge]], next[source[edge]]] = [through, edge];
    }
  }
  if (best[from] === -Infinity) return null;
  const [nodes, edges] = [[from], []];
  while (nodes.at(-1) !== to) {
    edges.push(next[nodes.at(-1)]);
    nodes.push(target[edges.at(-1)]);
  }
  const product = Math.exp(best[from]);
  return {nodes, edges, product, share: (influence[to] + outputWeight[to]) * product, allPaths: all[from]};
}

const shownPaths = new WeakMap();

/** The path that the state asks for; without nodes and edges between them where there is none. */
function shownPath(data, {path}) {
  if (path === null) return {nodes: [], edges: []};
  if (!shownPaths.has(path)) shownPaths.set(path, strongestPath(data, ...path) ?? {nodes: [...new Set(path)], edges: []});
  return shownPaths.get(path);
}

/** Whether a path waits for its other end, and this node could be it. */
function isPathOpen({state: {path}}, node) {
  return path !== null && path[0] === path[1] && path[0] !== node;
}

/** Makes the selected node the beginning of a path, or its end where one waits for it. */
function markPathEnd(data, store, services) {
  const {selected, path} = store.state;
  if (selected === null) return services.say("Select a node first: a path begins or ends there");
  const isEnd = isPathOpen(store, selected);
  store.update({path: [isEnd ? path[0] : selected, selected]});
  services.say(isEnd ? "" : "Select the other end of the path, and press W again");
}
