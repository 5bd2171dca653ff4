/** Draws the graph with a pen: bands, edges, nodes, labels, axes. Used for the pane and for exported pictures alike. */

const MOST_EDGES = 3000; // drawn beside those of the selected node, the most influential ones
const LABEL = {size: 11, width: 118, most: 160};
const AXIS = {left: 66, size: 12};

/** What is drawn of the graph in a state: `edges` from weak to strong, `leftOut` of the edges between shown nodes, `links`. */
function createScene(data, state, visible, layout, palette) {
  const {source, target, influence, count} = data.edges;
  const between = [];
  for (let edge = 0; edge < count; edge++) if (visible.shown[source[edge]] && visible.shown[target[edge]]) between.push(edge);
  between.sort((a, b) => influence[a] - influence[b]);
  const edges = between.slice(-MOST_EDGES);
  let largest = 0;
  for (let node = 0; node < data.nodes.count; node++) {
    if (data.nodes.kind[node] === KIND.feature) largest = Math.max(largest, data.nodes.influence[node]);
  }
  const links = state.selected === null ? null : linkShares(data, state, state.selected);
  const marked = new Set([...shownPath(data, state).nodes, ...searchNodes(data, state).filter(({field}) => field !== "token").map(({node}) => node)]);
  return {data, state, visible, layout, palette, edges, links, marked, leftOut: between.length - edges.length, largest: largest || 1};
}

/** The links of a node: their edges, and the signed share by which each other end is coloured. */
function linkShares(data, state, node) {
  const {inputs, outputs} = topLinks(data, state, node);
  const shares = new Map();
  for (const edge of inputs) shares.set(data.edges.source[edge], data.edges.share[edge]);
  for (const edge of outputs) shares.set(data.edges.target[edge], data.edges.share[edge]);
  return {node, edges: [...inputs, ...outputs], shares};
}

/** Radius on the screen: the area above the least one grows with influence. */
function radiusOf(scene, node, zoom) {
  const {influence, kind} = scene.data.nodes;
  const share = Math.min(1, influence[node] / scene.largest);
  const radius = kind[node] === KIND.logit || kind[node] === KIND.token ? 8 : 4 + 8 * Math.sqrt(share);
  return radius * (zoom < 1 ? Math.max(zoom, 0.3) : Math.min(Math.sqrt(zoom), 1.8));
}

/** `frame` is `{width, height, bottom, zoom, left, top}`: a point of the layout is at `left + x zoom`, `top + y zoom`. */
function drawScene(pen, scene, frame) {
  drawBands(pen, scene, frame);
  drawEdges(pen, scene, frame);
  for (const edge of shownPath(scene.data, scene.state).edges) {
    drawEdge(pen, scene, frame, edge, {width: 9, alpha: 0.4, stroke: scene.palette.accent});
    drawEdge(pen, scene, frame, edge, {width: 3, alpha: 1});
  }
  drawNodes(pen, scene, frame);
  drawLabels(pen, scene, frame);
}

function drawBands(pen, {layout, palette}, frame) {
  layout.rows.forEach(({start, size}, number) => {
    if (number % 2) pen.box(0, frame.top + start * frame.zoom, frame.width, size * frame.zoom, {fill: palette.band});
  });
  for (const {start} of layout.columns.slice(1)) {
    const x = frame.left + start * frame.zoom;
    pen.curve([x, 0, x, 0, x, frame.height, x, frame.height], {stroke: palette.line, width: 0.5});
  }
}

function drawEdges(pen, scene, frame) {
  const {data, edges, links} = scene;
  const strongest = edges.length ? data.edges.influence[edges.at(-1)] || 1 : 1;
  for (const edge of edges) {
    const strength = Math.sqrt(data.edges.influence[edge] / strongest);
    drawEdge(pen, scene, frame, edge, {width: 0.5 + 2.8 * strength, alpha: (0.06 + 0.7 * strength) * (links ? 0.25 : 1)});
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

function drawEdge(pen, {data, layout: {x, y}, palette}, {left, top, zoom, width, height}, edge, style) {
  const [source, target] = [data.edges.source[edge], data.edges.target[edge]];
  const [x1, y1, x2, y2] = [left + x[source] * zoom, top + y[source] * zoom, left + x[target] * zoom, top + y[target] * zoom];
  if (Math.max(x1, x2) < 0 || Math.min(x1, x2) > width || Math.max(y1, y2) < 0 || Math.min(y1, y2) > height) return;
  pen.curve(curvePoints(x1, y1, x2, y2), {stroke: data.edges.weight[edge] < 0 ? palette.lower : palette.raise, ...style});
}

function drawNodes(pen, scene, frame) {
  for (const node of nodesInFrame(scene, frame)) drawNode(pen, scene, frame, node);
}

function drawNode(pen, scene, frame, node, {ring = null, links = scene.links} = {}) {
  const {data, state, layout, palette} = scene;
  const {kind, expanded} = data.nodes;
  const [x, y, radius] = [frame.left + layout.x[node] * frame.zoom, frame.top + layout.y[node] * frame.zoom, radiusOf(scene, node, frame.zoom)];
  const usual = {[KIND.error]: palette.error, [KIND.feature]: palette.neutral, [KIND.logit]: palette.logit}[kind[node]] ?? palette.token;
  const [share, isFocus] = [links?.shares.get(node), links?.node === node];
  const outline = ring ?? (isFocus ? palette.accent : state.pinned.has(node) ? palette.ink : palette.outline);
  const shape = shapeOf(data, node);
  if (scene.marked.has(node)) pen.shape("circle", x, y, radius + 6.5, {stroke: palette.accent, width: 2.2});
  if (state.pinned.has(node)) pen.shape(shape, x, y, radius + 3, {stroke: palette.ink, width: 1.2});
  pen.shape(shape, x, y, radius, {
    fill: share === undefined ? usual : shareColour(palette, share),
    stroke: outline,
    width: ring || isFocus ? 2.5 : 1,
    dashed: kind[node] >= KIND.feature && !expanded[node],
    alpha: links && share === undefined && !isFocus && !state.pinned.has(node) && kind[node] !== KIND.logit ? 0.45 : 1,
  });
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
function drawLabels(pen, scene, frame) {
  const {data, state, layout, palette, links} = scene;
  const inFrame = nodesInFrame(scene, frame);
  const taken = createRoom();
  for (const node of inFrame) {
    const [x, y, r] = [frame.left + layout.x[node] * frame.zoom, frame.top + layout.y[node] * frame.zoom, radiusOf(scene, node, frame.zoom)];
    taken.add([x - r, y - r, x + r, y + r]);
  }
  const rank = (node) => {
    if (node === state.selected) return 4;
    if (data.nodes.kind[node] === KIND.logit) return 3;
    if (links?.shares.has(node)) return 2;
    return state.pinned.has(node) ? 2 : data.nodes.influence[node];
  };
  const wanted = inFrame.filter((node) => [KIND.feature, KIND.logit].includes(data.nodes.kind[node]));
  wanted.sort((a, b) => rank(b) - rank(a) || data.nodes.influence[b] - data.nodes.influence[a]);
  let drawn = 0;
  for (const node of wanted) {
    if (drawn >= LABEL.most) break;
    const label = placeLabel(scene, frame, node, taken);
    if (!label) continue;
    pen.text(label.text, label.x, label.y, {colour: palette.ink, size: LABEL.size, align: label.align, halo: palette.background, bold: label.bold});
    drawn++;
  }
}

function placeLabel(scene, frame, node, taken) {
  const {data, state, layout} = scene;
  const [x, y, r] = [frame.left + layout.x[node] * frame.zoom, frame.top + layout.y[node] * frame.zoom, radiusOf(scene, node, frame.zoom) + 2];
  const probability = data.nodes.probability[node];
  const bold = data.nodes.kind[node] === KIND.logit || node === state.selected;
  const whole = labelOf(data, state, node) + (probability > 0 ? ` ${formatShare(probability)}` : "");
  const text = fitText(whole, LABEL.width, LABEL.size, bold);
  const [width, half] = [textWidth(text, LABEL.size, bold), LABEL.size / 2 + 1];
  const spots = [
    [x, y + r + 5 + half, "center"], [x, y - r - 5 - half, "center"], [x + r + 5, y, "left"], [x - r - 5, y, "right"],
  ];
  for (const [px, py, align] of spots) {
    const left = align === "left" ? px : align === "right" ? px - width : px - width / 2;
    const area = [left, py - half, left + width, py + half];
    if (area[0] < 0 || area[2] > frame.width || area[1] < 0 || area[3] > frame.height) continue;
    if (taken.add(area, {onlyIfFree: true})) return {text, x: px, y: py, align, bold};
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
      for (const key of places) cells.has(key) ? cells.get(key).push(area) : cells.set(key, [area]);
      return true;
    },
  };
}

/** The titles of rows at the left and of columns below; they stay in sight when the graph is moved. */
function drawAxes(pen, {data, layout, palette, state}, frame) {
  const {axes} = frame;
  pen.box(0, 0, AXIS.left, frame.outerHeight, {fill: palette.background});
  pen.box(0, frame.outerHeight - axes.bottom, frame.outerWidth, axes.bottom, {fill: palette.background});
  const floor = frame.outerHeight - axes.bottom;
  let lastY = Infinity;
  for (const {start, size, title, used} of [...layout.rows].reverse()) {
    const y = frame.top + (start + size / 2) * frame.zoom;
    if (y < 6 || y > floor - 6 || lastY - y < 12) continue;
    pen.text(title, AXIS.left - 8, y, {colour: used ? palette.ink : palette.soft, size: AXIS.size - 1, align: "right"});
    lastY = y;
  }
  const focus = [state.selected, state.hovered].filter((node) => node !== null).map((node) => data.nodes.position[node]);
  let lastX = -Infinity;
  layout.columns.forEach(({start, size}, position) => {
    const x = AXIS.left + frame.left + (start + size / 2) * frame.zoom;
    const room = axes.angle ? AXIS.size + 2 : 0;
    if (x < AXIS.left || x > frame.outerWidth || x - lastX < room) return;
    const style = {colour: palette.ink, size: AXIS.size, bold: focus.includes(position)};
    const text = fitText(data.tokens[position], axes.angle ? 110 : size * frame.zoom - 4, AXIS.size, style.bold);
    if (axes.angle) pen.text(text, x + 4, floor + 8, {...style, align: "right", angle: axes.angle});
    else pen.text(text, x, floor + 12, {...style, align: "center"});
    lastX = x;
  });
}

/** How token labels stand below the columns at zoom 1: level where they fit, else turned. */
function axesOf(data, layout, zoom) {
  const widths = data.tokens.map((token) => Math.min(textWidth(token, AXIS.size, true), 110));
  const fit = widths.every((width, position) => width <= layout.columns[position].size * zoom - 4);
  return fit ? {angle: 0, bottom: 26} : {angle: -Math.PI / 4, bottom: 22 + Math.max(...widths) * Math.SQRT1_2};
}

/** `12.3 %`, with three significant digits at most. */
function formatShare(share) {
  const percent = 100 * Math.abs(share);
  const digits = percent >= 10 ? 0 : percent >= 1 ? 1 : percent >= 0.1 ? 2 : percent > 0 ? 3 : 0;
  return `${share < 0 ? "−" : ""}${percent.toFixed(digits)} %`;
}
