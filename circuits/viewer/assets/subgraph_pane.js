/** The pane of the subgraph: choose, drag, group and name boxes; scores of what is pinned. */

function createSubgraphPane(element, data, store, services) {
  const layers = ["links", "numbers", "boxes"].map((name) => makeSvg("g", {class: name}));
  const boxes = layers[2];
  const scene = makeSvg("g", {}, ...layers);
  const marquee = makeSvg("rect", {class: "marquee", visibility: "hidden"});
  const svg = makeSvg("svg", {id: "subgraph", role: "group", "aria-label": "Subgraph. Arrow keys walk the boxes, Space chooses several, G groups them, Shift and arrows move them."}, scene, marquee);
  const hint = make("div", {id: "subgraph-hint", className: "hint"});
  const status = make("footer", {id: "subgraph-status"});
  element.append(svg, hint, status);
  const pane = {chosen: new Set(), open: new Set(), focus: null, moving: null, zoom: 1, left: 0, top: 0, isFit: true, width: 0, height: 0};
  const whole = scoresOf(data);
  let subgraph = {boxes: [], links: [], leftOut: {}};
  let view = {subgraph};
  let places = {x: [], y: []};
  const tools = createSubgraphTools(data, store, services, pane, {draw, boxesOfChoice, rename, fit: () => { pane.isFit = true; draw(); }});
  toolsOf(element).append(...tools.buttons);
  hint.append("Pin nodes to build a subgraph: Ctrl-click, or P. ", tool("pin-top", "Pin the 12 most influential features", "A first subgraph", () =>
    store.update({pinned: new Set([...store.state.pinned, ...topFeatures(data, 12)])})));

  /** Reads the state anew: boxes, links and automatic places. */
  function renew() {
    subgraph = subgraphOf(data, store.state);
    for (const box of subgraph.boxes) {
      box.isOpen = box.group !== null && pane.open.has(box.key);
      box.width = boxWidth(boxName(data, store.state, box), boxPlace(data, box), box.isOpen);
    }
    const keys = new Set(subgraph.boxes.map(({key}) => key));
    pane.chosen = new Set([...pane.chosen].filter((key) => keys.has(key)));
    if (!keys.has(pane.focus)) pane.focus = null;
    if (subgraph.boxes.length) places = layoutSubgraph(subgraph, pane.width - 24, pane.height - 24);
    showLeftOut(status, subgraph);
    draw();
  }

  /** The box under the pointer or the cursor, here or in another pane; -1 for none. */
  function focusOf() {
    return subgraph.boxes.findIndex(({key, nodes}) => key === pane.focus || (pane.focus === null && nodes.includes(store.state.hovered)));
  }

  function at(number) {
    const {key} = subgraph.boxes[number];
    const [x, y] = store.state.places.get(key) ?? [places.x[number], places.y[number]];
    const moved = pane.moving?.keys.has(key) ? pane.moving : {x: 0, y: 0};
    return {x: x + moved.x, y: y + moved.y};
  }

  function draw() {
    const isEmpty = !subgraph.boxes.length;
    hint.hidden = !isEmpty;
    svg.style.visibility = isEmpty ? "hidden" : "";
    tools.refresh();
    const hadFocus = svg.contains(document.activeElement);
    view = {data, state: store.state, palette: services.palette(), subgraph, at, chosen: pane.chosen};
    drawSubgraph(layers, view);
    drawFocus();
    if (pane.isFit && !pane.moving) fit();
    scene.setAttribute("transform", `translate(${pane.left} ${pane.top}) scale(${pane.zoom})`);
    const entry = boxes.querySelector(`[data-key="${CSS.escape(pane.last ?? "")}"]`) ?? boxes.firstElementChild;
    entry?.setAttribute("tabindex", 0);
    if (hadFocus) entry?.focus({preventScroll: true});
  }

  /** Changes what the box under the pointer changes, without drawing anew. */
  function drawFocus() {
    pane.drawnFocus = focusOf();
    focusLinks(layers, view, pane.drawnFocus);
  }

  function fit() {
    if (!subgraph.boxes.length) return;
    const [xs, ys] = [[], []];
    subgraph.boxes.forEach((box, number) => {
      const [{x, y}, height] = [at(number), boxHeight(box) / 2 + 4];
      xs.push(x - box.width / 2 - 4, x + box.width / 2 + 4);
      ys.push(y - height, y + height);
    });
    const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    pane.zoom = clamp(Math.min((pane.width - 12) / (right - left), (pane.height - 12) / (bottom - top)), 0.15, 1.15);
    pane.left = pane.width / 2 - ((left + right) / 2) * pane.zoom;
    pane.top = pane.height / 2 - ((top + bottom) / 2) * pane.zoom;
  }

  function boxesOfChoice() {
    return subgraph.boxes.filter(({key}) => pane.chosen.has(key));
  }

  /** A field above a box for its new name: of the group, or the label of the node. */
  function rename(key) {
    const number = subgraph.boxes.findIndex((box) => box.key === key);
    if (number < 0) return;
    const [box, {x, y}] = [subgraph.boxes[number], at(number)];
    const field = make("input", {id: "rename-field", value: boxName(data, store.state, box), maxLength: 500, dir: "auto", "aria-label": "New name"});
    Object.assign(field.style, {left: `${pane.left + (x - box.width / 2) * pane.zoom}px`, top: `${pane.top + y * pane.zoom - boxHeight(box) * pane.zoom / 2}px`});
    let isOpen = true;
    const stop = (text) => {
      if (!isOpen) return; // removing the field takes its focus, which would end it again
      isOpen = false;
      field.remove();
      if (text !== null && !box.group) setLabel(data, store, box.nodes[0], text);
      else if (text?.trim()) store.update({groups: store.state.groups.map((group) => (group.id === box.group.id ? {...group, name: text.trim()} : group))});
      focusBox(key);
    };
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.stopPropagation();
      stop(event.key === "Enter" ? field.value : null);
    });
    field.addEventListener("blur", () => stop(field.value));
    element.append(field);
    field.select();
  }

  function focusBox(key) {
    pane.last = key;
    const box = boxes.querySelector(`[data-key="${CSS.escape(key)}"]`);
    for (const other of boxes.children) other.setAttribute("tabindex", other === box ? 0 : -1);
    box?.focus({preventScroll: true});
  }

  listenToSubgraph(svg, {store, pane, tools, draw, at, focusBox, marquee, drawFocus, boxes: () => subgraph.boxes});
  new ResizeObserver(([{contentRect}]) => {
    Object.assign(pane, {width: contentRect.width, height: contentRect.height});
    renew();
  }).observe(svg);
  store.subscribe(["pinned", "groups", "labels"], renew);
  store.subscribe(["theme", "selected", "places"], draw);
  store.subscribe(["hovered"], () => { if (focusOf() !== pane.drawnFocus) drawFocus(); });
  store.subscribe(["pinned"], () => showScores(status, data, store, whole));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  showScores(status, data, store, whole);
  renew();
  return {element, group: tools.group, view: () => ({subgraph, at, svg, scene}), redraw: renew};
}

/** The buttons of the pane, which act on the chosen boxes. */
function createSubgraphTools(data, store, services, pane, {draw, boxesOfChoice, rename, fit}) {
  const choose = (keys) => {
    pane.chosen = new Set(keys);
    draw();
  };
  const groupChosen = () => {
    const chosen = boxesOfChoice();
    if (chosen.length < 2) return services.say("Choose several boxes first: Shift-click them, draw a frame around them, or press Space on them");
    rename(`group:${groupBoxes(store, chosen).id}`); // it is not chosen: boxes chosen next would be grouped with it
  };
  const groupsOf = () => boxesOfChoice().filter(({group}) => group);
  const actions = {
    group: groupChosen,
    ungroup: () => ungroup(store, groupsOf().map(({group}) => group)),
    rename: () => boxesOfChoice().length === 1 && rename([...pane.chosen][0]),
    open: () => {
      for (const {key} of groupsOf()) if (!pane.open.delete(key)) pane.open.add(key);
      store.update({groups: [...store.state.groups]}, {undo: false});
    },
    unpin: () => unpinBoxes(store, boxesOfChoice()),
    tidy: () => store.update({places: new Map()}),
  };
  const buttons = [
    tool("group", "Group", "Make the chosen boxes one group (G)", actions.group),
    tool("ungroup", "Ungroup", "Dissolve the chosen groups (Shift+G)", actions.ungroup),
    tool("rename", "Rename", "Rename the chosen box (F2)", actions.rename),
    tool("open", "Members", "Show or hide the members of the chosen groups (Enter)", actions.open),
    tool("unpin", "Unpin", "Take the chosen boxes out of the subgraph (Delete)", actions.unpin),
    tool("tidy", "Tidy", "Place all boxes anew", actions.tidy),
    tool("fit-subgraph", "Fit", "Show everything", fit),
    tool("subgraph-svg", "SVG", "Save the subgraph as a picture (SVG)", () => exportSubgraph("svg", data, store, services)),
    tool("subgraph-png", "PNG", "Save the subgraph as a picture (PNG)", () => exportSubgraph("png", data, store, services)),
  ];
  const refresh = () => {
    const [chosen, groups] = [boxesOfChoice(), groupsOf()];
    const can = {group: chosen.length > 1, ungroup: groups.length, rename: chosen.length === 1, open: groups.length, unpin: chosen.length, tidy: store.state.places.size};
    for (const item of buttons) item.disabled = item.dataset.action in can && !can[item.dataset.action];
  };
  return {...actions, fit, buttons, choose, refresh};
}

/** The scores of what is pinned, beside those of the whole graph. */
function showScores(status, data, store, whole) {
  const entry = (id, title, {replacement, completeness, nodes, edges}) => make("span", {
    id, title: `Replacement: share of the output that is traced back to inputs. Completeness: share of the nodes' input, weighted by influence, that is no error. What is not in the part counts as error. ${countOf(nodes, "node")}, ${countOf(edges, "edge")}.`,
    dataset: {replacement, completeness},
  }, `${title} `, make("b", {textContent: replacement.toFixed(3)}), " replacement, ", make("b", {textContent: completeness.toFixed(3)}), " completeness");
  const left = status.querySelector(".left-out") ?? make("span", {className: "left-out"});
  status.replaceChildren(
    entry("scores-pinned", `${store.state.pinned.size.toLocaleString("en")} pinned + all tokens and outputs:`, scoresOf(data, pinnedNodes(data, store.state.pinned))),
    entry("scores-graph", "whole graph:", whole), left);
}

/** What of the subgraph is not drawn. */
function showLeftOut(status, {leftOut: {tokens, pinned, links, share}}) {
  const parts = [];
  if (links) parts.push(`${countOf(links, "weaker link")} not drawn (${formatShare(share)} of all links)`);
  if (tokens) parts.push(`${countOf(tokens, "token")} not drawn`);
  if (pinned) parts.push(`${countOf(pinned, "pinned node")} not drawn`);
  status.querySelector(".left-out").textContent = parts.join(", ");
}
