/** Places of the subgraph's boxes: one row for each layer in use, inside a row near what a box is linked to. */

const BOX = {least: 62, widest: 220, height: 32, member: 15, most: 12};
const GAP = {x: 12, y: [22, 96], line: 8};

/** As wide as its texts need; an open group is as wide as can be. */
function boxWidth(name, place, isOpen) {
  return isOpen ? BOX.widest : clamp(Math.max(textWidth(name, 11.5, true), textWidth(place, 9.5)) + 30, BOX.least, BOX.widest);
}

/** Height of a box; an open group lists its members. */
function boxHeight({nodes, isOpen}) {
  if (!isOpen) return BOX.height;
  return BOX.height + BOX.member * (Math.min(nodes.length, BOX.most) + (nodes.length > BOX.most ? 1 : 0)) + 4;
}

/** Places boxes so that they are large in a pane: a drawing that is scaled down to the pane's height has room for wider rows. */
function layoutSubgraph(subgraph, width, height) {
  let best = null;
  for (const scale of [1, 0.85, 0.7, 0.55, 0.4]) {
    const layout = placeBoxes(subgraph, width / scale, height / scale);
    const zoom = Math.min(1, width / layout.width, height / layout.height);
    if (!best || zoom > best.zoom * 1.05) best = {...layout, zoom};
    if (best.zoom > 0.9) break;
  }
  return best;
}

/**
 * `{x, y, width, height}`: the middles of boxes in a room of a width and a height.
 *
 * Each row settles in turn at the mean of what its boxes are linked to, weighted by influence, without overlaps and with the least
 * squared distance to those means. Boxes of tokens keep the order of the prompt. Rows with more boxes than fit are staggered.
 */
function placeBoxes({boxes, links}, width, height) {
  const rows = rowsOfBoxes(boxes, links, width);
  const x = new Float64Array(boxes.length);
  const positions = boxes.map(({position}) => position);
  const [first, last] = [Math.min(...positions), Math.max(...positions)];
  for (const {members, lines} of rows) {
    settle(boxes, lines, new Map(members.map((box) => [box, ((positions[box] - first) / (last - first || 1)) * width])), x, width);
  }
  for (let round = 0; round < 12; round++) {
    const order = round % 2 ? rows : [...rows].reverse();
    for (const {members, lines, isInput} of order) {
      settle(boxes, lines, new Map(members.map((box) => [box, meanOfNeighbours(box, links, x)])), x, width, isInput ? positions : null);
    }
  }
  const y = new Float64Array(boxes.length);
  const total = sum(rows.map(({size}) => size));
  const gap = clamp((height - total - 12) / Math.max(1, rows.length - 1), ...GAP.y);
  let top = 0;
  for (const row of rows) {
    for (const [number, line] of row.lines.entries()) {
      const offset = sum(row.lines.slice(0, number).map(({size}) => size + GAP.line));
      for (const box of line.members) y[box] = top + offset + line.size / 2;
    }
    top += row.size + gap;
  }
  const edge = (side) => boxes.map((box, number) => x[number] + (side * box.width) / 2);
  return {x, y, width: Math.max(...edge(1)) - Math.min(...edge(-1)), height: top - gap};
}

/**
 * Rows from top to bottom, each with its lines: more than one where its boxes do not fit side by side. Layers share a row where no link
 * joins them, so that a circuit of many layers stays readable; inputs and outputs have rows of their own.
 */
function rowsOfBoxes(boxes, links, width) {
  const isEnd = (row) => row === 0 || boxes.some((box) => box.row === row && box.isOutput);
  const rows = [];
  for (const row of [...new Set(boxes.map((box) => box.row))].sort((a, b) => a - b)) {
    const members = [...boxes.keys()].filter((box) => boxes[box].row === row);
    const last = rows.at(-1);
    const both = new Set([...members, ...(last?.members ?? [])]);
    const fits = sum([...both].map((box) => boxes[box].width + GAP.x)) <= width + GAP.x;
    const isLinked = links.some(({from, to}) => both.has(from) && both.has(to));
    if (last && fits && !isLinked && !last.isEnd && !isEnd(row)) last.members.push(...members);
    else rows.push({members, isInput: row === 0, isEnd: isEnd(row)});
  }
  return rows.reverse().map(({members, isInput}) => {
    members.sort((a, b) => boxes[a].position - boxes[b].position);
    const count = Math.max(1, Math.ceil(sum(members.map((box) => boxes[box].width + GAP.x)) / (width + GAP.x)));
    const lines = Array.from({length: count}, (_, line) => {
      const inLine = members.filter((_, place) => place % count === line);
      return {members: inLine, size: Math.max(...inLine.map((box) => boxHeight(boxes[box])))};
    });
    return {members, lines, isInput, size: sum(lines.map(({size}) => size)) + GAP.line * (count - 1)};
  });
}

function meanOfNeighbours(box, links, x) {
  let [total, weight] = [1e-9 * x[box], 1e-9];
  for (const {from, to, influence} of links) {
    if (from !== box && to !== box) continue;
    total += influence * x[from === box ? to : from];
    weight += influence;
  }
  return total / weight;
}

/** Puts each line of a row as near as possible to the places that its boxes want, in the order of these or of `keys`. */
function settle(boxes, lines, wish, x, width, keys = null) {
  for (const {members} of lines) {
    const order = [...members].sort((a, b) => (keys?.[a] ?? wish.get(a)) - (keys?.[b] ?? wish.get(b)) || a - b);
    const widths = order.map((box) => boxes[box].width);
    spread(order.map((box) => wish.get(box)), widths, width).forEach((place, at) => { x[order[at]] = place; });
  }
}

/**
 * Middles of boxes side by side, between 0 and `width` if they fit, with the least squared distance to `wanted`: boxes that would
 * overlap are pooled, and a pool lies at the mean of what its boxes want.
 */
function spread(wanted, widths, width) {
  let end = 0;
  const offsets = widths.map((size) => { // middles of boxes that stand close together
    const middle = end + size / 2;
    end += size + GAP.x;
    return middle;
  });
  const pools = [];
  wanted.forEach((place, at) => {
    let pool = {mean: place - offsets[at], count: 1};
    while (pools.length && pools.at(-1).mean > pool.mean) {
      const {mean, count} = pools.pop();
      pool = {mean: (mean * count + pool.mean * pool.count) / (count + pool.count), count: count + pool.count};
    }
    pools.push(pool);
  });
  const shifts = pools.flatMap(({mean, count}) => Array(count).fill(mean));
  return shifts.map((shift, at) => clamp(shift, 0, Math.max(0, width - (end - GAP.x))) + offsets[at]);
}
