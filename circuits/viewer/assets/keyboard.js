/** Keys. `KEYS` is also what the help shows: `[keys, what they do, action]`; an action that returns false leaves the key alone. */

function createKeyboard(data, store, services) {
  const {graph} = services;
  const act = (action) => () => void action();
  const keys = [
    [["ArrowLeft"], "walk to the node at the left", () => walk(-1, 0)],
    [["ArrowRight"], "walk to the node at the right", () => walk(1, 0)],
    [["ArrowUp"], "walk to the node above", () => walk(0, -1)],
    [["ArrowDown"], "walk to the node below", () => walk(0, 1)],
    [["Enter"], "select the node under the cursor", () => select(store)],
    [["p"], "pin or unpin the node", () => withNode(store, (node) => togglePin(store, node))],
    [["w"], "begin a path at the selected node, or end it there", act(() => markPathEnd(data, store, services))],
    [["e"], "edit the label of the selected node", act(() => services.panes.detail.edit())],
    [["g"], "group the chosen boxes of the subgraph", act(() => services.panes.subgraph.group())],
    [["Escape"], "clear the selection, or close what is open", () => clear(store, services)],
    [["/"], "search labels and tokens", act(services.search)],
    [["u", "Ctrl+z"], "undo", act(store.undo)],
    [["U", "Ctrl+Z", "Ctrl+y"], "redo", act(store.redo)],
    [["Alt+ArrowLeft", "["], "back to the node before", act(store.back)],
    [["Alt+ArrowRight", "]"], "forward", act(store.forward)],
    [["i"], "show inputs, outputs or both", act(() => store.update({direction: next(DIRECTIONS, store.state.direction)}))],
    [["+", "="], "zoom in", act(() => graph.zoomBy(1.25))],
    [["-"], "zoom out", act(() => graph.zoomBy(0.8))],
    [["f", "0"], "fit the graph into its pane", act(graph.fit)],
    [["m"], "let the pane fill the window, or not", act(services.toggleFull)],
    [["t"], "light or dark", act(services.toggleTheme)],
    [["?"], "this help", act(services.help)],
  ];
  const walk = (right, down) => {
    const from = store.state.hovered ?? store.state.selected;
    const node = from === null ? strongestOutput(data) : neighbour(graph.view().layout, from, right, down);
    if (node === null) return;
    store.update({hovered: node});
    graph.reveal(node);
    services.announce(describeNode(data, store.state, node));
  };
  const byName = new Map(keys.flatMap(([names, , action]) => names.map((name) => [name, action])));
  document.addEventListener("keydown", (event) => {
    const isTyping = event.target.closest?.("input:not([type=range]), textarea, select, [contenteditable=true]");
    if (isTyping && event.key !== "Escape") return;
    const insideControl = event.target.closest?.("button, a, input, summary, [role=option], [role=menuitem]");
    if (insideControl && /^(Enter| |Arrow.*)$/.test(event.key) && !event.altKey) return;
    const action = byName.get(keyName(event));
    if (action && action() !== false) event.preventDefault();
  });
  return keys;
}

function keyName(event) {
  const modifier = event.ctrlKey || event.metaKey ? "Ctrl+" : event.altKey ? "Alt+" : "";
  return modifier + event.key;
}

function withNode(store, action) {
  const node = store.state.hovered ?? store.state.selected;
  if (node === null) return false;
  action(node);
  return true;
}

function select(store) {
  return withNode(store, (node) => store.update({selected: node}));
}

function clear(store, services) {
  if (services.closeTop()) return;
  store.update({selected: null, hovered: null, path: null, query: ""});
}

function next(values, value) {
  return values[(values.indexOf(value) + 1) % values.length];
}

function strongestOutput({nodes: {outputWeight}}) {
  return outputWeight.indexOf(outputWeight.reduce((most, weight) => Math.max(most, weight)));
}

/**
 * The nearest shown node in a direction: of those that are more ahead than aside if there are any, so that no node is passed by
 * for one behind it.
 */
function neighbour({x, y}, node, right, down) {
  let [best, least] = [null, Infinity];
  for (let other = 0; other < x.length; other++) {
    if (other === node || Number.isNaN(x[other])) continue;
    const [dx, dy] = [x[other] - x[node], y[other] - y[node]];
    const [ahead, aside] = right ? [dx * right, Math.abs(dy)] : [dy * down, Math.abs(dx)];
    const cost = aside <= ahead ? ahead + aside / 2 : 1e6 + ahead + 2.5 * aside;
    if (ahead <= 1 || cost >= least) continue;
    [best, least] = [other, cost];
  }
  return best;
}
