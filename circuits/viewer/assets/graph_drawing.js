/** Draws the graph with a pen: bands, edges, nodes, labels, axes. Used for the pane and for exported pictures alike. */

const MOST_EDGES = 2000; // drawn beside those of the selected node, the most influential ones
const LABEL = {size: 11, line: 13, width: 116, narrow: 84, most: 200}; // pixels, and how many
const LEAST = {unnamed: 0.01, leader: 0.02}; // influence of a node whose number is shown for want of a label, and of one with a leader
const AXIS = {size: 12, longest: 110};

/** What is drawn of the graph in a state: `edges` from weak to strong, how many are `leftOut`, `links` of the selected node. */
function createScene(data, state, visible, layout, palette) {
  const edges = [];
  let between = 0;
  for (const edge of data.edges.byInfluence) {
    if (!visible.shown[data.edges.source[edge]] || !visible.shown[data.edges.target[edge]]) continue;
    if (++between <= MOST_EDGES) edges.push(edge);
  }
  let largest = 0;
  for (let node = 0; node < data.nodes.count; node++) {
    if (data.nodes.kind[node] === KIND.feature) largest = Math.max(largest, data.nodes.influence[node]);
  }
  const links = state.selected === null ? null : linkShares(data, state, state.selected);
  const path = shownPath(data, state);
  const marked = new Set([...path.nodes, ...searchNodes(data, state).filter(({field}) => field !== "token").map(({node}) => node)]);
  edges.reverse();
  return {data, state, visible, layout, palette, edges, links, path, marked, leftOut: between - edges.length, largest: largest || 1};
}

/** The links of a node: their edges, and the signed share by which each other end is coloured. */
function linkShares(data, state, node) {
  const {inputs, outputs} = topLinks(data, state, node);
  const shares = new Map();
  for (const edge of inputs) shares.set(data.edges.source[edge], data.edges.share[edge]);
  for (const edge of outputs) shares.set(data.edges.target[edge], data.edges.share[edge]);
  return {node, edges: [...inputs, ...outputs], shares};
}

/** Radius on the screen; the area above the least one grows with influence, of an output with its weight. */
function radiusOf({data, largest}, node, zoom) {
  const {influence, outputWeight} = data.nodes;
  const share = Math.min(1, influence[node] / largest + outputWeight[node]);
  return (4 + 8 * Math.sqrt(share)) * (zoom < 1 ? Math.max(zoom, 0.3) : Math.min(Math.sqrt(zoom), 1.8));
}

/** Where a node is in the plot. */
function pointOf({layout: {x, y}}, {left, top, zoom}, node) {
  return [left + x[node] * zoom, top + y[node] * zoom];
}

/** `frame` is `{width, height, zoom, left, top}`: a point of the layout is at `left + x zoom`, `top + y zoom`. */
function drawScene(pen, scene, frame) {
  drawBands(pen, scene, frame);
  drawEdges(pen, scene, frame);
  for (const edge of scene.path.edges) {
    drawEdge(pen, scene, frame, edge, {width: 9, alpha: 0.4, stroke: scene.palette.accent});
    drawEdge(pen, scene, frame, edge, {width: 3, alpha: 1});
  }
  const nodes = nodesInFrame(scene, frame);
  for (const node of nodes) drawNode(pen, scene, frame, node);
  drawLabels(pen, scene, frame, nodes);
}

function drawBands(pen, {layout, palette}, frame) {
  layout.rows.forEach(({start, size}, number) => {
    if (number % 2) pen.box(0, frame.top + start * frame.zoom, frame.width, size * frame.zoom, {fill: palette.band});
  });
  for (const {start, size} of layout.columns.slice(1)) {
    if (size * frame.zoom < 12) continue; // lines this close would be a grey area
    const x = frame.left + start * frame.zoom;
    pen.curve([x, 0, x, 0, x, frame.height, x, frame.height], {stroke: palette.line, width: 0.5});
  }
}

function drawEdges(pen, scene, frame) {
  const {data, edges, links, marked} = scene;
  const strongest = edges.length ? data.edges.influence[edges.at(-1)] || 1 : 1;
  const dim = links || marked.size ? 0.22 : 1;
  const faintest = clamp(40 / edges.length, 0.04, 0.22); // few weak edges are seen, many would be a fog
  for (const edge of edges) {
    const strength = Math.sqrt(data.edges.influence[edge] / strongest);
    drawEdge(pen, scene, frame, edge, {width: 0.5 + 3 * strength, alpha: (faintest + (0.8 - faintest) * strength) * dim});
  }
  if (links) drawLinks(pen, scene, frame, links);
}

/** The edges of one node, drawn by the size of their shares. */
function drawLinks(pen, scene, frame, links) {
  const {data, visible} = scene;
  for (const edge of [...links.edges].reverse()) {
    if (!visible.shown[data.edges.source[edge]] || !visible.shown[data.edges.target[edge]]) continue;
    const size = Math.sqrt(Math.abs(data.edges.share[edge]));
    drawEdge(pen, scene, frame, edge, {width: 0.9 + 4.5 * size, alpha: 0.35 + 0.6 * Math.min(1, size * 1.5)});
  }
}

function drawEdge(pen, scene, frame, edge, style) {
  const {data, palette} = scene;
  const [x1, y1] = pointOf(scene, frame, data.edges.source[edge]);
  const [x2, y2] = pointOf(scene, frame, data.edges.target[edge]);
  if (Math.max(x1, x2) < 0 || Math.min(x1, x2) > frame.width || Math.max(y1, y2) < 0 || Math.min(y1, y2) > frame.height) return;
  pen.curve(curvePoints(x1, y1, x2, y2), {stroke: data.edges.weight[edge] < 0 ? palette.lower : palette.raise, ...style});
}

function drawNode(pen, scene, frame, node, {isRinged = false, links = scene.links} = {}) {
  const {data, state, palette, marked} = scene;
  const {kind, expanded} = data.nodes;
  const [[x, y], radius, shape] = [pointOf(scene, frame, node), radiusOf(scene, node, frame.zoom), shapeOf(data, node)];
  const usual = {[KIND.error]: palette.error, [KIND.feature]: palette.feature, [KIND.logit]: palette.logit}[kind[node]] ?? palette.token;
  const [share, isPinned] = [links?.shares.get(node), state.pinned.has(node)];
  const isMarked = isRinged || links?.node === node;
  if (marked.has(node)) pen.shape("circle", x, y, radius + 6.5, {stroke: palette.accent, width: 2.2});
  if (isPinned) pen.shape(shape, x, y, radius + 3.5, {stroke: palette.ink, width: 1.4});
  pen.shape(shape, x, y, radius, {
    fill: share === undefined ? usual : shareColour(palette, share),
    stroke: isMarked ? palette.accent : isPinned ? palette.ink : palette.outline,
    width: isMarked ? 2.5 : 1,
    dashed: kind[node] >= KIND.feature && !expanded[node],
    alpha: opacityOf(data, node) * (links && share === undefined && !isMarked && !isPinned && !marked.has(node) ? 0.5 : 1),
  });
}

/** The inclusion frequency of a node over pruning thresholds, null where the graph does not say it or the node is never dropped. */
function inclusionOf({metadata: {inclusion}, nodes: {id, kind, outputWeight}}, node) {
  if (!inclusion || kind[node] === KIND.token || kind[node] === KIND.logit || outputWeight[node] > 0) return null;
  return inclusion.frequency[id[node]] ?? 0;
}

function opacityOf(data, node) {
  return 0.2 + 0.8 * (inclusionOf(data, node) ?? 1);
}

function nodesInFrame({data, layout: {x, y}}, {left, top, zoom, width, height}) {
  const result = [];
  for (let node = 0; node < data.nodes.count; node++) {
    const [px, py] = [left + x[node] * zoom, top + y[node] * zoom];
    if (px > -20 && px < width + 20 && py > -20 && py < height + 20) result.push(node); // false for NaN: not shown
  }
  return result;
}

/** Labels of the most important nodes, each where it covers neither a node nor another label; left out where there is no room. */
function drawLabels(pen, scene, frame, nodes) {
  const {data, state, palette, links, marked} = scene;
  const {kind, influence} = data.nodes;
  const taken = createRoom();
  for (const node of nodes) {
    const [[x, y], radius] = [pointOf(scene, frame, node), radiusOf(scene, node, frame.zoom)];
    taken.add([x - radius, y - radius, x + radius, y + radius]);
  }
  const rank = (node) => {
    if (node === state.selected) return 4;
    if (kind[node] === KIND.logit) return 3;
    return links?.shares.has(node) || state.pinned.has(node) || marked.has(node) ? 2 : 1;
  };
  const isQuiet = (node) => (links || marked.size) && rank(node) === 1;
  const isTold = (node) => data.nodes.label[node] || state.labels.has(node) || rank(node) > 1 || influence[node] >= LEAST.unnamed;
  const ranked = nodes.filter((node) => kind[node] >= KIND.feature && isTold(node)).map((node) => [rank(node), influence[node], node]);
  ranked.sort((a, b) => b[0] - a[0] || b[1] - a[1]);
  for (const [, , node] of ranked.slice(0, LABEL.most)) {
    const label = placeLabel(scene, frame, node, taken, rank(node) > 1 || influence[node] >= LEAST.leader);
    if (!label) continue;
    const style = {colour: isQuiet(node) ? palette.soft : palette.ink, size: LABEL.size, align: label.align, halo: palette.background, bold: label.bold};
    if (label.leader) for (const [from, to] of label.leader) pen.curve([...from, ...from, ...to, ...to], {stroke: palette.soft, width: 0.8, alpha: 0.7});
    label.lines.forEach((line, number) => pen.text(line, label.x, label.y + number * LABEL.line, style));
  }
}

/**
 * The first free spot around a node, of two lines, then of one: centred above or below it, or beside it. An important node may also
 * have its label off centre, with a leader that tells whose it is.
 */
function placeLabel(scene, frame, node, taken, mayLead) {
  const {data, state} = scene;
  const [x, y] = pointOf(scene, frame, node);
  const r = radiusOf(scene, node, frame.zoom) + (state.pinned.has(node) ? 8 : 5);
  const isLogit = data.nodes.kind[node] === KIND.logit;
  const bold = isLogit || node === state.selected;
  const text = labelOf(data, state, node);
  const [chance, short] = [data.nodes.probability[node], fitText(text, LABEL.width, LABEL.size, bold)];
  const forms = [wrapText(text, LABEL.width, LABEL.size, bold), wrapText(text, LABEL.narrow, LABEL.size, bold), [short]];
  if (chance > 0) forms.splice(0, 3, [short, formatShare(chance)], [`${isolate(short)} ${formatShare(chance)}`]);
  for (const lines of forms) {
    const [width, height] = [Math.max(...lines.map((line) => textWidth(line, LABEL.size, bold))), lines.length * LABEL.line];
    const [below, above, radius] = [y + r, y - r - height, r - 5];
    const spots = [
      [x, below, "center"], [x, above, "center"], [x + r, y - height / 2, "left"], [x - r, y - height / 2, "right"],
      ...(mayLead ? [below, above] : []).flatMap((top) => [[x, top, "left", top], [x, top, "right", top]]),
    ];
    if (isLogit) spots.push(spots.shift()); // below are its edges
    for (const [px, top, align, side] of spots) {
      const left = align === "left" ? px : align === "right" ? px - width : px - width / 2;
      const area = [left - 5, top, left + width + 5, top + height];
      if (area[0] < 0 || area[2] > frame.width || area[1] < 0 || area[3] > frame.height) continue;
      if (!taken.add(area, {onlyIfFree: true})) continue;
      const [rim, line] = side === below ? [y + radius, top - 1] : [y - radius, top + height + 1];
      const leader = side === undefined ? null : [[[x, rim], [x, line]], [[x, line], [align === "left" ? x + width : x - width, line]]];
      return {lines, x: px, y: top + LABEL.line / 2, align, bold, leader};
    }
  }
  return null;
}

/** Areas `[left, top, right, bottom]` that are taken, in a grid. */
function createRoom() {
  const [size, cells] = [40, new Map()];
  const keys = ([left, top, right, bottom]) => {
    const result = [];
    for (let column = Math.floor(left / size); column <= Math.floor(right / size); column++) {
      for (let row = Math.floor(top / size); row <= Math.floor(bottom / size); row++) result.push(column * 65536 + row);
    }
    return result;
  };
  const overlap = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
  return {
    /** Takes an area; false, and nothing taken, where something of it is taken and `onlyIfFree`. */
    add(area, {onlyIfFree = false} = {}) {
      const places = keys(area);
      if (onlyIfFree && places.some((key) => cells.get(key)?.some((other) => overlap(area, other)))) return false;
      for (const key of places) {
        if (cells.has(key)) cells.get(key).push(area);
        else cells.set(key, [area]);
      }
      return true;
    },
  };
}

/** The titles of rows at the left and of columns below; they stay in sight when the graph is moved. */
function drawAxes(pen, {data, layout, palette, state}, frame) {
  const {axes, outerWidth, outerHeight} = frame;
  const floor = outerHeight - axes.bottom;
  pen.box(0, 0, axes.left, outerHeight, {fill: palette.background});
  pen.box(0, floor, outerWidth, axes.bottom, {fill: palette.background});
  let lastY = Infinity;
  for (const {start, size, title, used} of [...layout.rows].reverse()) {
    const y = frame.top + (start + size / 2) * frame.zoom;
    if (y < 6 || y > floor - 6 || lastY - y < 12) continue;
    pen.text(title, axes.left - 8, y, {colour: used ? palette.ink : palette.soft, size: AXIS.size - 1, align: "right"});
    lastY = y;
  }
  const marked = [state.selected, state.hovered].filter((node) => node !== null).map((node) => data.nodes.position[node]);
  let lastX = -Infinity;
  layout.columns.forEach(({start, size}, position) => {
    const x = axes.left + frame.left + (start + size / 2) * frame.zoom;
    if (x < axes.left || x > outerWidth || (axes.angle && x - lastX < AXIS.size + 2)) return;
    const style = {colour: palette.ink, size: AXIS.size, bold: marked.includes(position)};
    const text = fitText(data.tokens[position], axes.angle ? AXIS.longest : size * frame.zoom - 2, AXIS.size, style.bold);
    if (axes.angle) pen.text(text, x + 4, floor + 8, {...style, align: "right", angle: axes.angle});
    else pen.text(text, x, floor + 13, {...style, align: "center"});
    lastX = x;
  });
}

function titleWidths(data) {
  return data.tokens.map((token) => Math.min(textWidth(token, AXIS.size, true), AXIS.longest) + 10);
}

/** How token texts stand below the columns: level where they fit, else turned. */
function axesOf(titles, layout, zoom) {
  const left = 16 + Math.max(...layout.rows.map(({title}) => textWidth(title, AXIS.size - 1)));
  if (titles.every((width, position) => width - 4 <= layout.columns[position].size * zoom)) return {left, angle: 0, bottom: 26};
  return {left, angle: -Math.PI / 4, bottom: 18 + Math.max(...titles) * Math.SQRT1_2};
}

/** `12.3 %`, with three significant digits at most. */
function formatShare(share) {
  const percent = 100 * Math.abs(share);
  const digits = percent >= 10 ? 0 : percent >= 1 ? 1 : percent >= 0.1 ? 2 : percent > 0 ? 3 : 0;
  return `${share < 0 ? "−" : ""}${percent.toFixed(digits)} %`;
}
