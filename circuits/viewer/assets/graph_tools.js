/** What stands around the drawing of the graph: its buttons, how many edges are drawn, the legend, a list for screen readers. */

const MOST_LISTED = 300; // nodes in the list for screen readers, the most influential ones

function createGraphTools(body, data, store, graph) {
  const status = document.createElement("span");
  status.className = "status";
  status.id = "edges-drawn";
  const pin = button("Pin", "Pin or unpin the selected node (P, or Ctrl-click on a node)", () => {
    if (store.state.selected !== null) togglePin(store, store.state.selected);
  });
  pin.dataset.action = "pin";
  toolsOf(body).append(
    status,
    pin,
    button("−", "Zoom out (-)", () => graph.zoomBy(0.8)),
    button("Fit", "Fit the graph into its pane (F)", graph.fit),
    button("+", "Zoom in (+)", () => graph.zoomBy(1.25)),
  );
  const list = graph.element.appendChild(document.createElement("ul")); // inside the canvas: for screen readers alone
  list.setAttribute("aria-label", "The most influential nodes of the graph");
  const showPin = ({selected, pinned}) => {
    pin.disabled = selected === null;
    pin.textContent = selected !== null && pinned.has(selected) ? "Unpin" : "Pin";
  };
  store.subscribe(["selected", "pinned"], showPin);
  showPin(store.state);
  let listed = null;
  return {
    /** Tells what a scene shows. */
    show(scene) {
      const total = scene.edges.length + scene.leftOut;
      status.textContent = scene.leftOut
        ? `the ${scene.edges.length.toLocaleString("en")} most influential of ${total.toLocaleString("en")} edges`
        : `${total.toLocaleString("en")} edges`;
      if (listed !== scene.visible) list.replaceChildren(...listItems(data, scene));
      listed = scene.visible;
    },
  };
}

function listItems(data, {visible, state}) {
  const nodes = [...visible.shown.keys()].filter((node) => visible.shown[node]);
  nodes.sort((a, b) => data.nodes.influence[b] - data.nodes.influence[a]);
  return nodes.slice(0, MOST_LISTED).map((node) => {
    const item = document.createElement("li");
    item.textContent = describeNode(data, state, node);
    return item;
  });
}

/** Shapes of kinds, and what colours mean. */
function createLegend() {
  const legend = document.createElement("div");
  legend.className = "legend";
  const kinds = [["circle", "feature", "feature"], ["square", "token", "token"], ["square", "logit", "output"], ["diamond", "error", "error"]];
  if (legend.ownerDocument.getElementById("graph-pane").dataset.attention) kinds.splice(1, 0, ["triangle", "feature", "attention"]);
  return legend;
}
