/** Inputs and outputs of the selected node, strongest first, and the path that is shown. A click on a row walks the graph. */

const FIRST_ROWS = 25; // of each sign; more on demand
const MORE_ROWS = 200;
const NAMED_HEADS = {most: 3, least: 0.1}; // as Python's EdgeHeads.text

function createLinksPane(element, data, store, services) {
  const path = element.appendChild(make("div", {id: "path"}));
  const head = element.appendChild(make("div", {id: "links-head"}));
  const lists = element.appendChild(make("div", {id: "links"}));
  const back = tool("back", "←", "Back to the node before (Alt+Left)", store.back);
  const forward = tool("forward", "→", "Forward (Alt+Right)", store.forward);
  toolsOf(element).append(back, forward);

  function draw() {
    const {selected, direction} = store.state;
    const before = document.activeElement?.closest?.("#links") && document.activeElement.dataset.side;
    [back.disabled, forward.disabled] = [!store.can().back, !store.can().forward];
    head.replaceChildren();
    lists.replaceChildren();
    if (selected === null) {
      head.append(make("p", {className: "hint", textContent: "Select a node to see what flows into it and out of it."}));
      lists.append(strongestList(data, store));
      return;
    }
    head.append(headOf(data, store, selected));
    if (direction !== "outputs") lists.append(inputList(data, store, selected));
    if (direction !== "inputs") lists.append(outputList(data, store, selected));
    const pairs = direction === "outputs" ? null : pairsOf(data, store, selected);
    if (pairs) lists.append(pairs);
    if (before) lists.querySelector(`button.link[data-side=${before}]`)?.focus(); // the walk goes on with the keyboard
    element.scrollTop = 0;
  }

  const drawPath = () => path.replaceChildren(...pathBanner(data, store));
  store.subscribe(["selected", "direction", "labels"], draw);
  store.subscribe(["path", "labels"], drawPath);
  store.subscribe(["hovered"], ({hovered}) => markHovered(element, hovered));
  draw();
  drawPath();
  return {element};
}

function headOf(data, store, node) {
  const name = make("strong", {}, named(labelOf(data, store.state, node)));
  return make("p", {}, name, " ", make("span", {className: "soft"}, named(placeOf(data, node))));
}

function markHovered(element, hovered) {
  for (const row of element.querySelectorAll("[data-node]")) row.classList.toggle("hovered", row.dataset.node === String(hovered));
}

/** Where to begin while nothing is selected: the features that carry most of the output. */
function strongestList(data, store) {
  const {influence, activation} = data.nodes;
  const features = topFeatures(data, data.nodes.count);
  const section = make("section", {className: "links", "aria-label": "Most influential features"}, make("h3", {textContent: `Most influential features (${wholeNumbers.format(features.length)})`}));
  const walk = walkWithArrows(section, "button.link");
  const rowOf = (node) => make("div", {className: "row"}, nodeRow(data, store, node, {}, {
    className: "bar", filled: influence[node] / (influence[features[0]] || 1), numbers: [formatShare(influence[node]), activation[node] ? `activation ${formatNumber(activation[node])}` : ""],
  }));
  section.append(cutList(features, rowOf, (left) => `${left.length.toLocaleString("en")} more`));
  walk();
  return section;
}

/** What flows into a node: the edges, what is not in this graph, and the bias; together they are the node's value. */
function inputList(data, store, node) {
  const {kind, expanded, inflow, value, bias} = data.nodes;
  const edges = edgesInto(data, node);
  const isInput = kind[node] !== KIND.feature && kind[node] !== KIND.logit;
  const section = listOf(data, store, "inputs", edges);
  if (isInput) return section.note("Nothing flows into this node: it is an input of the graph.");
  if (!expanded[node]) return section.note("Its inputs were not computed: the trace did not expand it. It counts as unexplained.");
  const total = sum(edges.map((edge) => data.edges.weight[edge]));
  const held = sum(edges.map((edge) => Math.abs(data.edges.weight[edge])));
  const removed = inflow[node] > 0 ? Math.max(0, 1 - held / inflow[node]) : 0;
  section.note(partsOf(data, edges));
  if (removed > 5e-5) section.note(`Not in this graph: ${formatShare(removed)} of its input (removed edges).`);
  const rest = value[node] - total - bias[node];
  const others = removed > 5e-5 ? ` ${formatNumber(rest, {sign: true})} removed` : "";
  return section.note(`${formatNumber(value[node])} = ${formatNumber(total)} from here${others} ${formatNumber(bias[node], {sign: true})} bias`);
}

function outputList(data, store, node) {
  const edges = edgesOutOf(data, node);
  const section = listOf(data, store, "outputs", edges);
  if (!edges.length) return section.note(data.nodes.outputWeight[node] > 0 ? "It is a target of the graph." : "Nothing in this graph reads it.");
  return section.note("Shares are of the input of the node at the other end.");
}

/** `features 70 %, tokens 20 %, errors 10 %` of the input that these edges hold. */
function partsOf(data, edges) {
  const parts = new Map();
  for (const edge of edges) {
    const kind = Object.keys(KIND)[data.nodes.kind[data.edges.source[edge]]];
    parts.set(kind, (parts.get(kind) ?? 0) + Math.abs(data.edges.share[edge]));
  }
  const largest = [...parts].sort((a, b) => b[1] - a[1]);
  return largest.map(([kind, share]) => `${kind}s ${formatShare(share)}`).join(", ") || "No edge flows in.";
}

/** A list of edges: those that raise first, then those that lower, each with what is not shown. */
function listOf(data, store, side, edges) {
  const other = side === "inputs" ? data.edges.source : data.edges.target;
  const largest = edges.length ? Math.abs(data.edges.share[edges[0]]) || 1 : 1;
  const title = `${side === "inputs" ? "Inputs" : "Outputs"} (${edges.length.toLocaleString("en")})`;
  const section = make("section", {className: "links", "aria-label": title}, make("h3", {textContent: title}));
  const walk = walkWithArrows(section, "button.link");
  const notes = section.appendChild(make("div", {className: "notes"}));
  for (const [sign, word] of [[1, "raising"], [-1, "lowering"]]) {
    const signed = edges.filter((edge) => Math.sign(data.edges.weight[edge]) === sign);
    if (!signed.length) continue;
    const share = side === "inputs" ? `, ${formatShare(sign * sum(signed.map((edge) => Math.abs(data.edges.share[edge]))))}` : "";
    section.append(make("h4", {textContent: `${sign > 0 ? "+" : "−"} ${word}: ${signed.length.toLocaleString("en")}${share}`}));
    section.append(cutList(signed, (edge) => linkRow(data, store, side, edge, other[edge], largest), (left) => leftOutOf(data, left)));
  }
  walk();
  section.note = (text) => {
    notes.append(make("p", {textContent: text}));
    return section;
  };
  return section;
}

/** The first rows of a list, and a button for more that says what is left out. */
function cutList(items, rowOf, describe) {
  const list = make("div", {className: "rows"});
  let shown = 0;
  const more = tool("more", "", "Show more rows", () => grow(MORE_ROWS));
  more.classList.add("more");
  function grow(count) {
    more.remove();
    for (const item of items.slice(shown, shown + count)) list.append(rowOf(item));
    const focus = shown && list.children[shown]?.querySelector("button");
    shown = Math.min(items.length, shown + count);
    more.textContent = `${describe(items.slice(shown))}: show ${Math.min(MORE_ROWS, items.length - shown)} more`;
    if (shown < items.length) list.append(more);
    if (focus) focus.focus();
  }
  grow(FIRST_ROWS);
  return list;
}

function leftOutOf(data, edges) {
  const weight = sum(edges.map((edge) => data.edges.weight[edge]));
  return `${edges.length.toLocaleString("en")} more, ${formatNumber(weight, {sign: true})} in all`;
}

function linkRow(data, store, side, edge, node, largest) {
  const [share, weight] = [data.edges.share[edge], data.edges.weight[edge]];
  const row = nodeRow(data, store, node, {
    dataset: {side, edge},
    title: `${labelOf(data, store.state, node)}\n${placeOf(data, node)}\nweight ${formatNumber(weight, {sign: true})}, ${formatShare(share)} of the target's input, carries ${formatShare(data.edges.influence[edge])} of the output`,
  }, {className: `bar ${weight < 0 ? "lower" : "raise"}`, filled: Math.abs(share) / largest, numbers: [signedShare(share), formatNumber(weight, {sign: true})]});
  const heads = headsRow(data.headsOf(edge));
  row.addEventListener("keydown", (event) => {
    if (!heads || event.altKey || !["ArrowRight", "ArrowLeft"].includes(event.key)) return;
    heads.open = event.key === "ArrowRight";
    event.stopPropagation();
  });
  return make("div", {className: "row"}, row, heads);
}

/** A node in a list: its label and its place, a bar between them, and a number at the end of each line. */
function nodeRow(data, store, node, fields, {className, filled, numbers}) {
  const row = nodeButton(data, store, node, {className: "link", tabIndex: -1, ...fields});
  const line = (name, text, number) => make("span", {className: name}, text, make("span", {className: "number", textContent: number}));
  row.append(
    line("line", named(labelOf(data, store.state, node), "label"), numbers[0]),
    make("span", {className: "track"}, make("span", {className, style: {width: `${100 * filled}%`}})),
    line("line soft", named(placeOf(data, node), "place"), numbers[1]),
  );
  return row;
}

/** A button that stands for a node: a click selects it, Ctrl-click pins it, hover and focus show it in all panes. */
function nodeButton(data, store, node, fields) {
  const row = make("button", {type: "button", ...fields, dataset: {...fields.dataset, node, id: data.nodes.id[node]}});
  row.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey) togglePin(store, node);
    else store.update({selected: node});
  });
  for (const [event, hovered] of [["pointerenter", node], ["focus", node], ["pointerleave", null], ["blur", null]]) {
    row.addEventListener(event, () => store.update({hovered}));
  }
  return row;
}

function signedShare(share) {
  return `${share < 0 ? "" : "+"}${formatShare(share)}`;
}

/** The heads that carry an edge, in words; all its parts on demand. */
function headsRow(heads) {
  if (!heads) return null;
  const parts = [
    ...heads.heads.map(([layer, head, weight]) => ({name: `L${layer}H${head}`, weight})),
    {name: "direct", weight: heads.direct},
    {name: "other heads", weight: heads.rest},
  ].filter(({weight}) => weight !== 0).sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
  const total = sum(parts.map(({weight}) => Math.abs(weight))) || 1;
  const inWords = parts.filter(({weight}) => Math.abs(weight) / total >= NAMED_HEADS.least).slice(0, NAMED_HEADS.most);
  const text = inWords.map(({name, weight}) => `${weight < 0 ? "−" : ""}${name} ${formatShare(Math.abs(weight) / total)}`).join(", ");
  const details = make("details", {className: "heads"}, make("summary", {textContent: text || "heads", tabIndex: -1}));
  details.addEventListener("toggle", () => {
    if (details.children.length > 1) return;
    const rows = parts.map(({name, weight}) => make("tr", {},
      make("td", {textContent: name}), make("td", {textContent: formatNumber(weight, {sign: true})}),
      make("td", {textContent: formatShare(Math.abs(weight) / total)})));
    details.append(make("table", {}, ...rows));
  });
  return details;
}

/** Pairs of a query node and a key node that an attention score of this node is made of, where the graph holds them. */
function pairsOf(data, store, node) {
  const result = data.metadata.qk_tracing_results?.[data.nodes.id[node]];
  if (!result) return null;
  const end = (id) => {
    const other = data.numberOf.get(id);
    if (other === undefined) return named(id === "constants" ? "constants" : `${id} (not in this graph)`, "soft");
    const link = nodeButton(data, store, other, {className: "inline"});
    link.append(named(labelOf(data, store.state, other)), " ", make("span", {className: "soft"}, named(placeOf(data, other))));
    return link;
  };
  const tableOf = (title, rows) => [
    make("h4", {textContent: title}),
    make("table", {className: "pairs"}, ...rows.map((row) => make("tr", {},
      ...row.slice(0, -1).map((id) => make("td", {}, end(id))), make("td", {className: "number", textContent: formatNumber(row.at(-1), {sign: true})})))),
  ];
  return make("section", {className: "qk links", "aria-label": "Attention score"}, make("h3", {textContent: "Attention score (QK)"}),
    ...tableOf("query × key pairs", result.pair_wise_contributors),
    ...tableOf("by query", result.top_q_marginal_contributors), ...tableOf("by key", result.top_k_marginal_contributors));
}

/** The path that is shown, in words, with what it carries. */
function pathBanner(data, store) {
  const {path, labels} = store.state;
  if (!path) return [];
  const close = tool("clear-path", "×", "Clear the path (Esc)", () => store.update({path: null}));
  const say = (...children) => [make("div", {className: "path", role: "status"}, close, ...children)];
  const label = (node) => labelOf(data, {labels}, node);
  if (path[0] === path[1]) return say("Path from ", named(label(path[0])), ": select the other end and press W.");
  const found = shownPath(data, {path});
  if (!found.edges.length) return say("No path joins ", named(label(path[0])), " and ", named(label(path[1])), ".");
  const steps = found.nodes.flatMap((node, at) => {
    const step = nodeButton(data, store, node, {className: "inline"});
    step.append(named(label(node)));
    return at ? [make("span", {className: "step soft", textContent: ` —${signedShare(data.edges.share[found.edges[at - 1]])}→ `}), step] : [step];
  });
  const ofAll = found.allPaths > 0 ? `, ${formatShare(found.product / found.allPaths)} of all paths between the two` : "";
  return say(make("strong", {textContent: `Strongest path: ${formatShare(found.share)} of the output's influence${ofAll}`}), make("div", {}, ...steps));
}
