/** The pinned subgraph as boxes, which stand for nodes or groups of nodes, with the edges between boxes added up. */

const MOST_UNPINNED = 12; // tokens and outputs that are drawn without being pinned
const MOST_PINNED = 300; // nodes that are drawn, the most influential ones; scores are of all
const DRAWN = {share: 0.95, most: 120}; // links are drawn, the most influential first, until they hold this share of all links' influence

/**
 * The boxes and links of a state. Beside what is pinned there are boxes of the tokens and outputs that a drawn link joins to it.
 *
 * A link from box S to box T stands for the edges A[t, s] of its members, s in S and t in T:
 *   weight = sum of A[t, s];  share = weight / sum of the inflows of T's members;  influence = sum of the mass that crosses them.
 * Weight and share are signed; between two nodes they are those of the edge. Edges inside a box are in no link.
 *
 * @returns `{boxes, links, leftOut: {tokens, pinned, links, share}}`; boxes are `{key, nodes, group, row, position, isOutput}`, links
 *   `{from, to, weight, share, influence, count}` with numbers of boxes, from weak to strong
 */
function subgraphOf(data, state) {
  const pinned = mostInfluential(data, [...state.pinned]).slice(0, MOST_PINNED);
  const {shown, tokens} = nodesOfSubgraph(data, new Set(pinned));
  const all = boxesOf(data, state.groups, shown);
  const boxOf = new Int32Array(data.nodes.count).fill(-1);
  all.forEach(({nodes}, number) => nodes.forEach((node) => { boxOf[node] = number; }));
  const links = linksOf(data, all, boxOf).sort((a, b) => b.influence - a.influence);
  const total = sum(links.map(({influence}) => influence)) || 1;
  let [drawn, left] = [0, total];
  while (drawn < Math.min(links.length, DRAWN.most) && left > (1 - DRAWN.share) * total) left -= links[drawn++].influence;
  const linked = new Set(links.slice(0, drawn).flatMap(({from, to}) => [from, to]));
  const kept = all.filter(({nodes, group}, number) => group || linked.has(number) || state.pinned.has(nodes[0]));
  const place = new Map(kept.map((box, number) => [all.indexOf(box), number]));
  return {
    boxes: kept,
    links: links.slice(0, drawn).map((link) => ({...link, from: place.get(link.from), to: place.get(link.to)})).reverse(),
    leftOut: {tokens: tokens + all.length - kept.length, pinned: state.pinned.size - pinned.length, links: links.length - drawn, share: Math.max(0, left) / total},
  };
}

/** The pinned nodes, and the tokens and outputs with the most influential edges to them; `tokens` counts those left out. */
function nodesOfSubgraph(data, pinned) {
  const {rowStart, source, influence, columnStart, order, target} = data.edges;
  const joined = new Map();
  const join = (node, edge) => {
    if (!pinned.has(node) && alwaysPinned(data, node)) joined.set(node, (joined.get(node) ?? 0) + influence[edge]);
  };
  for (const node of pinned) {
    for (let edge = rowStart[node]; edge < rowStart[node + 1]; edge++) join(source[edge], edge);
    for (let at = columnStart[node]; at < columnStart[node + 1]; at++) join(target[order[at]], order[at]);
  }
  const strongest = [...joined.keys()].sort((a, b) => joined.get(b) - joined.get(a));
  return {shown: new Set([...pinned, ...strongest.slice(0, MOST_UNPINNED)]), tokens: Math.max(0, strongest.length - MOST_UNPINNED)};
}

function boxesOf(data, groups, shown) {
  const left = new Set(shown);
  const boxes = [];
  const add = (key, nodes, group) => {
    const rows = nodes.map((node) => rowOf(data, node));
    const mean = sum(rows) / rows.length;
    const row = rows.reduce((best, other) => (Math.abs(other - mean) < Math.abs(best - mean) ? other : best));
    const isOutput = nodes.some((node) => data.nodes.kind[node] === KIND.logit);
    boxes.push({key, nodes, group, row, isOutput, position: sum(nodes.map((node) => data.nodes.position[node])) / nodes.length});
  };
  for (const group of groups) {
    const members = group.members.filter((node) => left.delete(node));
    if (members.length) add(`group:${group.id}`, members, group);
  }
  for (const node of left) add(data.nodes.id[node], [node], null);
  return boxes;
}

function linksOf(data, boxes, boxOf) {
  const {rowStart, source, weight, influence} = data.edges;
  const links = [];
  boxes.forEach(({nodes}, to) => {
    const into = new Map();
    let inflow = 0;
    for (const node of nodes) {
      let magnitude = 0;
      for (let edge = rowStart[node]; edge < rowStart[node + 1]; edge++) {
        magnitude += Math.abs(weight[edge]);
        const from = boxOf[source[edge]];
        if (from < 0 || from === to) continue;
        if (!into.has(from)) into.set(from, {from, to, weight: 0, share: 0, influence: 0, count: 0});
        const link = into.get(from);
        link.weight += weight[edge];
        link.influence += influence[edge];
        link.count++;
      }
      inflow += Math.max(data.nodes.inflow[node], magnitude);
    }
    for (const link of into.values()) links.push({...link, share: inflow > 0 ? link.weight / inflow : 0});
  });
  return links;
}

/** Makes one group of boxes; groups among them are merged. Returns the new group. */
function groupBoxes(store, boxes) {
  const merged = boxes.filter(({group}) => group).map(({group}) => group);
  const members = boxes.flatMap(({nodes}) => nodes);
  const number = 1 + Math.max(0, ...store.state.groups.map(({name}) => Number(/^Group (\d+)$/.exec(name)?.[1] ?? 0)));
  const id = Math.random().toString(36).slice(2, 10); // other readers make groups of the same graph: ids must differ
  const group = {id, name: merged.length === 1 ? merged[0].name : `Group ${number}`, members};
  const others = store.state.groups.filter((other) => !merged.includes(other));
  const pinned = new Set([...store.state.pinned, ...members]);
  const left = others.map((other) => ({...other, members: other.members.filter((node) => !members.includes(node))}));
  store.update({groups: [...left.filter((other) => other.members.length), group], pinned});
  return group;
}

/** Dissolves groups; their members stay pinned. */
function ungroup(store, groups) {
  store.update({groups: store.state.groups.filter((group) => !groups.includes(group))});
}

/** Takes the nodes of boxes out of the subgraph, and out of their groups. */
function unpinBoxes(store, boxes) {
  const nodes = new Set(boxes.flatMap((box) => box.nodes));
  const groups = store.state.groups.map((group) => ({...group, members: group.members.filter((node) => !nodes.has(node))}));
  store.update({pinned: new Set([...store.state.pinned].filter((node) => !nodes.has(node))), groups: groups.filter(({members}) => members.length)});
}

/** The most influential features of the graph. */
function topFeatures(data, count) {
  return mostInfluential(data, [...data.nodes.kind.keys()].filter((node) => data.nodes.kind[node] === KIND.feature)).slice(0, count);
}

function mostInfluential(data, nodes) {
  return nodes.sort((a, b) => data.nodes.influence[b] - data.nodes.influence[a]);
}
