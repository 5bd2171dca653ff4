/** The graph: two canvases (the graph, and above it what hovering adds), moved and zoomed by pointer, wheel and keys. */

const LIVE_DRAW = 14; // milliseconds that a redraw may take to be done in every frame of a gesture
const REACH = 14; // pixels around the pointer in which a node is hit

function createGraphPane(element, data, store, services) {
  const canvas = element.appendChild(make("canvas"));
  const overlay = element.appendChild(make("canvas", {
    tabIndex: 0, role: "application", "aria-label": "Graph. Arrow keys walk the nodes, Enter selects, question mark shows all keys.",
  }));
  const tip = element.appendChild(make("div", {className: "tip", hidden: true}));
  let scene, visible, layout, findNode;
  let frame = {}; // of the pane: outer size, size of the plot, and where the layout is in it
  let drawn = null; // the frame that the canvas shows
  let [needsLayout, needsScene, needsDraw, lastDraw, settle] = [true, true, true, 0, 0];

  function request({layout: again = false, scene: sceneToo = false, draw = true} = {}) {
    needsLayout ||= again;
    needsScene ||= again || sceneToo;
    needsDraw ||= draw;
    if (!request.pending) request.pending = requestAnimationFrame(render);
  }

  function render() {
    request.pending = 0;
    const size = {outerWidth: element.clientWidth, outerHeight: element.clientHeight};
    if (!size.outerWidth || !size.outerHeight) return;
    if (needsLayout) makeLayout(size);
    if (needsScene) {
      scene = createScene(data, store.state, visible, layout, services.palette());
      tools.show(scene);
    }
    if (needsDraw || needsScene) draw();
    else if (drawn !== frame) moveDrawing();
    drawOverlay();
    [needsLayout, needsScene, needsDraw] = [false, false, false];
  }

  function makeLayout({outerWidth, outerHeight}) {
    const isNew = outerWidth !== frame.outerWidth || outerHeight !== frame.outerHeight || !layout;
    visible = shownNodes(data, store.state);
    const titles = titleWidths(data);
    let axes = {left: 60, bottom: 26};
    const room = () => ({width: outerWidth - axes.left, height: outerHeight - axes.bottom});
    for (let turn = 0; turn < 2; turn++) { // turned texts of tokens take room from the graph
      layout = layoutGraph(data, visible.shown, room(), titles);
      axes = axesOf(titles, layout, zoomToFit(room()));
    }
    findNode = createNodeGrid(layout);
    frame = {...frame, outerWidth, outerHeight, ...room(), axes};
    if (isNew || frame.isFit) fit();
  }

  function zoomToFit({width, height}) {
    return Math.min(1, width / layout.width, height / layout.height);
  }

  function fit() {
    const zoom = zoomToFit(frame);
    const left = (frame.width - layout.width * zoom) / 2;
    frame = {...frame, zoom, left, top: (frame.height - layout.height * zoom) / 2, isFit: true};
  }

  function resizeCanvas(target) {
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(frame.outerWidth * ratio), Math.round(frame.outerHeight * ratio)];
    if (target.width !== width || target.height !== height) [target.width, target.height] = [width, height];
    const context = target.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.globalAlpha = 1;
    context.clearRect(0, 0, frame.outerWidth, frame.outerHeight);
    return context;
  }

  function draw() {
    const began = performance.now();
    const context = resizeCanvas(canvas);
    context.translate(frame.axes.left, 0);
    drawScene(createCanvasPen(context), scene, frame);
    canvas.style.transform = "";
    drawn = frame;
    lastDraw = performance.now() - began;
  }

  /** While a gesture goes on, a drawing that takes long is moved as it is, and drawn anew when the gesture rests. */
  function moveDrawing() {
    if (lastDraw < LIVE_DRAW) return draw();
    const scale = frame.zoom / drawn.zoom;
    const [x, y] = [frame.axes.left + frame.left - (frame.axes.left + drawn.left) * scale, frame.top - drawn.top * scale];
    canvas.style.transform = `translate(${x}px, ${y}px) scale(${scale})`;
    clearTimeout(settle);
    settle = setTimeout(() => request(), 120);
  }

  function drawOverlay() {
    const context = resizeCanvas(overlay);
    const pen = createCanvasPen(context);
    const {hovered} = store.state;
    if (hovered !== null && visible.shown[hovered]) {
      context.save();
      context.translate(frame.axes.left, 0);
      const links = linkShares(data, store.state, hovered);
      if (hovered !== store.state.selected) drawLinks(pen, scene, frame, links);
      for (const node of links.shares.keys()) if (visible.shown[node]) drawNode(pen, scene, frame, node, {links});
      drawNode(pen, scene, frame, hovered, {links, isRinged: true});
      context.restore();
    }
    drawAxes(pen, {...scene, state: store.state}, frame);
    showTip(hovered);
  }

  function showTip(node) {
    tip.hidden = node === null || !visible.shown[node];
    if (tip.hidden) return;
    tip.textContent = describeNode(data, store.state, node);
    const [x, y] = screenOf(node);
    tip.style.left = `${clamp(x + 14, 4, Math.max(4, frame.outerWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${y > frame.outerHeight / 2 ? y - tip.offsetHeight - 14 : y + 16}px`;
  }

  function screenOf(node) {
    const [x, y] = pointOf({layout}, frame, node);
    return [frame.axes.left + x, y];
  }

  function nodeAt(event) {
    const [x, y] = plotPoint(event);
    if (!layout || x < 0 || y > frame.height) return null;
    return findNode((x - frame.left) / frame.zoom, (y - frame.top) / frame.zoom, REACH / frame.zoom);
  }

  function plotPoint(event) {
    return [event.offsetX - frame.axes.left, event.offsetY];
  }

  /** Zooms about a point of the plot, by default its middle. */
  function zoomBy(factor, x = frame.width / 2, y = frame.height / 2) {
    const zoom = clamp(frame.zoom * factor, 0.05, 40);
    const scale = zoom / frame.zoom;
    frame = {...frame, zoom, left: x - (x - frame.left) * scale, top: y - (y - frame.top) * scale, isFit: false};
    request({draw: false});
  }

  function panBy(x, y) {
    frame = {...frame, left: frame.left + x, top: frame.top + y, isFit: false};
    request({draw: false});
  }

  /** Moves a node into sight. */
  function reveal(node) {
    if (!visible?.shown[node]) return;
    const [x, y] = screenOf(node);
    const inside = x > frame.axes.left && x < frame.outerWidth && y > 0 && y < frame.height;
    if (!inside) panBy(frame.axes.left + frame.width / 2 - x, frame.height / 2 - y);
  }

  const refit = () => { fit(); request(); };
  const graph = {
    element: overlay,
    fit: refit,
    zoomBy,
    panBy,
    reveal,
    screenOf,
    redraw: () => request({layout: true}),
    /** For pictures and tests: what is drawn, and where. */
    view: () => ({scene, frame, layout, visible}),
  };
  listenToPointer(overlay, store, {nodeAt, panBy, refit, zoomAt: (factor, event) => zoomBy(factor, ...plotPoint(event))});
  const tools = createGraphTools(element, data, store, graph);
  new ResizeObserver(() => request({layout: true})).observe(element);
  store.subscribe(["hovered"], () => request({draw: false}));
  store.subscribe(["labels", "query"], () => request({scene: true}));
  store.subscribe(["theme", "direction", "topLinks"], () => request({scene: true}));
  store.subscribe(["selected", "pinned", "path", "minInfluence"], ({selected}) => {
    const {shown} = shownNodes(data, store.state); // the layout changes only where other nodes are shown
    request({layout: !visible || shown.some((isShown, node) => isShown !== visible.shown[node]), scene: true});
    if (selected !== null) reveal(selected);
  });
  request({layout: true});
  return graph;
}

function listenToPointer(overlay, store, {nodeAt, panBy, zoomAt, refit}) {
  let drag = null;
  overlay.addEventListener("pointerdown", (event) => {
    drag = {x: event.clientX, y: event.clientY, moved: false};
    overlay.setPointerCapture(event.pointerId);
  });
  overlay.addEventListener("pointermove", (event) => {
    if (!drag) {
      store.update({hovered: nodeAt(event)});
      return;
    }
    const [x, y] = [event.clientX - drag.x, event.clientY - drag.y];
    if (!drag.moved && Math.hypot(x, y) < 4) return;
    drag = {x: event.clientX, y: event.clientY, moved: true};
    panBy(x, y);
  });
  overlay.addEventListener("pointerup", (event) => {
    const wasDrag = drag?.moved;
    drag = null;
    if (wasDrag) return;
    const node = nodeAt(event);
    if (node !== null && (event.ctrlKey || event.metaKey)) togglePin(store, node);
    else if (node !== null) store.update({selected: node});
  });
  overlay.addEventListener("pointerleave", () => { if (!drag) store.update({hovered: null}); });
  overlay.addEventListener("dblclick", (event) => { if (nodeAt(event) === null) refit(); });
  overlay.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoomAt(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), event);
  }, {passive: false});
}

function togglePin(store, node) {
  const pinned = new Set(store.state.pinned);
  if (!pinned.delete(node)) pinned.add(node);
  store.update({pinned});
}

/** A node in words: label, name, place, influence. */
function describeNode(data, state, node) {
  const {kind, position, influence, activation, probability, name} = data.nodes;
  const word = Object.keys(KIND)[kind[node]];
  const facts = [`${word} ${kind[node] === KIND.feature ? name[node] : ""}`.trim(), `at ${data.tokens[position[node]]}`];
  if (kind[node] === KIND.feature && activation[node]) facts.push(`activation ${activation[node].toPrecision(3)}`);
  facts.push(kind[node] === KIND.logit ? `probability ${formatShare(probability[node])}` : `influence ${formatShare(influence[node])}`);
  return `${labelOf(data, state, node)}\n${facts.join(" · ")}`;
}
