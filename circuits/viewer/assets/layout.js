/** Places of nodes: x = position in the prompt, y = layer. Units are screen pixels at zoom 1. */

const SLOT = {width: 30, height: 34}; // least room of a node
const ROOMY = {width: 96, height: 60}; // more than this is not needed, however large the pane is
const EMPTY = {width: 16, height: 18}; // columns that hold a token alone, and rows that hold nothing
const MARGIN = 14;
const OUTPUT = 2; // slots of an output, whose text is always wanted

/** The row of a node, upwards: positions -1, tokens 0, then attention and MLP of each layer in turn, logits on top. */
function rowOf(data, node) {
  const {kind, layer, part} = data.nodes;
  if (kind[node] === KIND.logit) return 2 * data.nLayers + 1;
  if (layer[node] < 0) return kind[node] === KIND.position ? -1 : 0;
  return 2 * layer[node] + (part[node] === 1 ? 1 : 2);
}

/**
 * Places the shown nodes in a pane. A column is as wide as its fullest cell needs, and its token where all tokens have room; how
 * many lines a cell may have is chosen so that everything is as large as possible in the pane's proportions.
 * @param titles width of each token's text
 * @returns `{x, y, width, height, columns, rows}`: Float32Arrays by node (NaN where not shown), and the bands of the axes
 */
function layoutGraph(data, shown, {width, height}, titles) {
  const cells = cellsOf(data, shown);
  const rows = rowsOf(data, cells);
  const crowd = new Array(data.tokens.length).fill(0);
  for (const {row, position, nodes} of cells.values()) {
    if (row > 0) crowd[position] = Math.max(crowd[position], Math.ceil(nodes.length * (row > 2 * data.nLayers ? OUTPUT : 1)));
  }
  const room = {width: Math.max(width - 2 * MARGIN, 1), height: Math.max(height - 2 * MARGIN, 1)};
  const least = sum(titles) <= 0.8 * room.width ? titles : titles.map(() => EMPTY.width);
  let best = null;
  for (let lines = 1; lines <= Math.max(1, ...crowd); lines = Math.ceil(lines * 1.2)) {
    const plan = planWith(lines, cells, rows, crowd, least);
    const scale = Math.min(room.width / plan.width, room.height / plan.height);
    if (!best || scale > best.scale) best = {...plan, scale};
  }
  const zoom = Math.min(1, best.scale); // what is left in one direction is shared out
  const stretch = {
    x: clamp(room.width / zoom / best.width, 1, ROOMY.width / SLOT.width / zoom),
    y: clamp(room.height / zoom / best.height, 1, ROOMY.height / SLOT.height / zoom),
  };
  return place(data, cells, rows, best, stretch);
}

/** The shown nodes by row and position: features by influence, then the error. */
function cellsOf(data, shown) {
  const cells = new Map();
  const {kind, influence, position} = data.nodes;
  for (let node = 0; node < data.nodes.count; node++) {
    if (!shown[node]) continue;
    const row = rowOf(data, node);
    const key = row * data.tokens.length + position[node];
    if (!cells.has(key)) cells.set(key, {row, position: position[node], nodes: []});
    cells.get(key).nodes.push(node);
  }
  const late = (node) => Number(kind[node] === KIND.error);
  for (const {nodes} of cells.values()) nodes.sort((a, b) => late(a) - late(b) || influence[b] - influence[a] || a - b);
  return cells;
}

/** The rows from top to bottom. Rows of attention and of learned positions exist where the graph has such nodes. */
function rowsOf(data, cells) {
  const top = 2 * data.nLayers + 1;
  const withAttention = data.nodes.part.includes(1);
  const used = new Set([...cells.values()].map((cell) => cell.row));
  const named = {[-1]: "position", 0: "token", [top]: "output"};
  const rows = [];
  for (let row = top; row >= -1; row--) {
    if (row < 0 && !data.nodes.kind.includes(KIND.position)) continue;
    if (row % 2 === 1 && row < top && !withAttention) continue;
    const layer = (row - 1) >> 1;
    const title = named[row] ?? (row % 2 ? `attention ${layer}` : `layer ${layer}`);
    rows.push({row, title, used: used.has(row)});
  }
  return rows;
}

function planWith(lines, cells, rows, crowd, least) {
  const perLine = crowd.map((count) => Math.max(1, Math.ceil(count / lines)));
  const linesOf = new Map();
  for (const {row, position, nodes} of cells.values()) {
    linesOf.set(row, Math.max(linesOf.get(row) ?? 1, Math.ceil(nodes.length / perLine[position])));
  }
  const widths = crowd.map((count, position) => (count ? Math.max(perLine[position] * SLOT.width, least[position]) : least[position]));
  const heights = rows.map(({row, used}) => (used ? (linesOf.get(row) ?? 1) * SLOT.height : EMPTY.height));
  return {perLine, widths, heights, width: sum(widths), height: sum(heights)};
}

function place(data, cells, rows, plan, stretch) {
  const bands = (sizes, factor) => {
    let end = MARGIN;
    return sizes.map((size) => ({start: end, size: size * factor, end: (end += size * factor)}));
  };
  const columns = bands(plan.widths, stretch.x);
  const bandOf = bands(plan.heights, stretch.y).map((band, number) => ({...band, ...rows[number]}));
  const byRow = new Map(bandOf.map((band) => [band.row, band]));
  const x = new Float32Array(data.nodes.count).fill(NaN);
  const y = x.slice();
  for (const {row, position, nodes} of cells.values()) {
    const [column, band, perLine] = [columns[position], byRow.get(row), plan.perLine[position]];
    const lines = Math.ceil(nodes.length / perLine);
    const step = band.size / lines;
    nodes.forEach((node, number) => {
      const line = Math.floor(number / perLine);
      const inLine = Math.min(perLine, nodes.length - line * perLine);
      x[node] = column.start + (column.size * ((number % perLine) + 0.5)) / inLine;
      y[node] = band.start + step * (line + 0.5);
    });
  }
  return {x, y, columns, rows: bandOf, width: columns.at(-1).end + MARGIN, height: bandOf.at(-1).end + MARGIN};
}

/** Finds the node nearest to a point, by a grid of square cells. */
function createNodeGrid({x, y}) {
  const size = 48;
  const cells = new Map();
  const keyOf = (column, row) => column * 65536 + row;
  for (let node = 0; node < x.length; node++) {
    if (Number.isNaN(x[node])) continue;
    const key = keyOf(Math.floor(x[node] / size), Math.floor(y[node] / size));
    if (cells.has(key)) cells.get(key).push(node);
    else cells.set(key, [node]);
  }
  /** The nearest node within `reach`, or null. */
  return (px, py, reach) => {
    let [best, nearest] = [null, reach * reach];
    for (let column = Math.floor((px - reach) / size); column <= Math.floor((px + reach) / size); column++) {
      for (let row = Math.floor((py - reach) / size); row <= Math.floor((py + reach) / size); row++) {
        for (const node of cells.get(keyOf(column, row)) ?? []) {
          const distance = (x[node] - px) ** 2 + (y[node] - py) ** 2;
          if (distance < nearest) [best, nearest] = [node, distance];
        }
      }
    }
    return best;
  };
}

function clamp(value, least, most) {
  return Math.min(Math.max(value, least), most);
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}
