/** What stands around the drawing of the graph: its buttons, how many edges are drawn, the legend, a list for screen readers. */

const MOST_LISTED = 300; // nodes in the list for screen readers, the most influential ones

function createGraphTools(body, data, store, graph) {
  const status = make("span", {id: "edges-drawn", className: "soft"});
  const pin = tool("pin", "Pin", "Pin or unpin the selected node (P, or Ctrl-click on a node)", () => togglePin(store, store.state.selected));
  toolsOf(body).append(
    createLegend(data),
    status,
    pin,
    tool("zoom-out", "−", "Zoom out (-)", () => graph.zoomBy(0.8)),
    tool("fit", "Fit", "Fit the graph into its pane (F)", graph.fit),
    tool("zoom-in", "+", "Zoom in (+)", () => graph.zoomBy(1.25)),
  );
  const list = graph.element.appendChild(make("ul", {"aria-label": "The most influential nodes of the graph"})); // inside a canvas: not seen
  const showPin = ({selected, pinned}) => {
    pin.disabled = selected === null;
    pin.textContent = selected !== null && pinned.has(selected) ? "Unpin" : "Pin";
  };
  store.subscribe(["selected", "pinned"], showPin);
  showPin(store.state);
  let listed = null;
  return {
    /** Tells what a scene shows. */
    show({edges, leftOut, visible, state}) {
      const total = countOf(edges.length + leftOut, "edge");
      status.textContent = leftOut ? `${edges.length.toLocaleString("en")} strongest of ${total}` : total;
      status.title = leftOut ? `${countOf(leftOut, "edge")} between shown nodes, those with the least influence, are not drawn` : "All edges between shown nodes are drawn";
      if (listed !== visible) list.replaceChildren(...listItems(data, state, visible));
      listed = visible;
    },
  };
}

function listItems(data, state, visible) {
  const nodes = [...visible.shown.keys()].filter((node) => visible.shown[node]);
  nodes.sort((a, b) => data.nodes.influence[b] - data.nodes.influence[a]);
  return nodes.slice(0, MOST_LISTED).map((node) => make("li", {textContent: describeNode(data, state, node)}));
}

/** The shapes of the kinds that the graph has, and what colours mean. */
function createLegend(data) {
  const {kind, part} = data.nodes;
  const kinds = [
    ["circle", "feature", "feature", kind.includes(KIND.feature)],
    ["triangle", "feature", "attention", kind.some((value, node) => value === KIND.feature && part[node] === 1)],
    ["square", "token", "token", true],
    ["square", "logit", "output", kind.includes(KIND.logit)],
    ["diamond", "error", "error", kind.includes(KIND.error)],
  ];
  const entries = kinds.filter(([, , , exists]) => exists).map(([shape, colour, name]) => make("span", {}, legendShape(shape, colour), name));
  const scale = make("span", {className: "scale", title: "Signed share of the target's input: what an edge adds to its target, divided by the sum of all that flows in"},
    "−100 %", make("span", {className: "gradient"}), "+100 % of the input");
  if (data.metadata.inclusion) entries.push(make("span", {className: "inclusion"}, "the paler, the fewer pruning thresholds keep it"));
  return make("div", {id: "graph-legend"}, ...entries, scale);
}

function legendShape(shape, colour) {
  const picture = makeSvg("svg", {width: 12, height: 12, viewBox: "0 0 12 12", "aria-hidden": "true"});
  picture.append(makeSvg("path", {d: pathOfShape(shape, 6, shape === "triangle" ? 6.5 : 6, shape === "square" ? 4.3 : 5), fill: `var(--${colour})`, stroke: "var(--outline)"}));
  return picture;
}
