/** Search over labels, names, tokens and promoted tokens. What matches is also marked in the graph while there is a query. */

const MOST_RESULTS = 60;
const FIELDS = ["label", "name", "token", "promotes"];
const searched = new WeakMap();

/** The lower-case texts of every node by field; labels of the reader's are looked up at each search. */
function searchTexts(data) {
  if (!searched.has(data)) {
    const texts = Array.from({length: data.nodes.count}, (_, node) => ({
      name: data.nodes.name[node].toLowerCase(),
      token: data.tokens[data.nodes.position[node]].toLowerCase(),
      promotes: (evidenceOf(data, node)?.promoted ?? []).map(([text]) => text.trim().toLowerCase()),
    }));
    searched.set(data, texts);
  }
  return searched.get(data);
}

/**
 * The nodes that match the state's query: `{node, field, rank}`, the best first. All words of the query must be in one field, in any
 * case. Labels come first, then names, tokens at the node's position, and tokens that its feature promotes.
 */
function searchNodes(data, state) {
  const words = state.query.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  const found = [];
  const texts = searchTexts(data);
  const groupName = new Map(state.groups.flatMap(({name, members}) => members.map((node) => [node, name])));
  for (let node = 0; node < data.nodes.count; node++) {
    const label = `${labelOf(data, state, node)} ${groupName.get(node) ?? ""}`.toLowerCase();
    const matches = (text) => words.every((word) => text.includes(word));
    const place = [matches(label), matches(texts[node].name), matches(texts[node].token), texts[node].promotes.some(matches)].indexOf(true);
    if (place >= 0) found.push({node, field: FIELDS[place], rank: place - (place === 0 && label.trim() === words.join(" ") ? 1 : 0)});
  }
  return found.sort((a, b) => a.rank - b.rank || data.nodes.influence[b.node] - data.nodes.influence[a.node]);
}

function createSearch(element, data, store) {
  const input = make("input", {
    id: "search-field", type: "search", placeholder: "Search labels, tokens (/)", autocomplete: "off", role: "combobox", dir: "auto",
    "aria-label": "Search labels, tokens and promoted tokens", "aria-controls": "search-results", "aria-expanded": "false", "aria-autocomplete": "list",
  });
  const list = make("div", {id: "search-results", role: "listbox", "aria-label": "Search results", hidden: true});
  element.append(input, list);
  let [results, at, timer] = [[], -1, 0];

  function refresh() {
    const {query} = store.state;
    if (input.value !== query) input.value = query;
    results = searchNodes(data, store.state);
    list.replaceChildren(...results.slice(0, MOST_RESULTS).map((result, number) => resultRow(data, store, result, number, () => choose(number))));
    const left = results.length - MOST_RESULTS;
    const summary = !query.trim() ? "" : left > 0 ? `${left.toLocaleString("en")} more match` : results.length ? "" : "Nothing matches";
    if (summary) list.append(make("p", {className: "hint", textContent: summary}));
    move(-1);
  }

  function open(isOpen) {
    list.hidden = !isOpen || !store.state.query.trim();
    input.setAttribute("aria-expanded", String(!list.hidden));
    if (list.hidden && store.state.hovered !== null) store.update({hovered: null});
  }

  function move(to) {
    const rows = list.querySelectorAll("[role=option]");
    at = rows.length ? clamp(to, -1, rows.length - 1) : -1;
    rows.forEach((row, number) => row.setAttribute("aria-selected", String(number === at)));
    if (at < 0) return input.removeAttribute("aria-activedescendant");
    input.setAttribute("aria-activedescendant", rows[at].id);
    rows[at].scrollIntoView({block: "nearest"});
    store.update({hovered: results[at].node});
  }

  function choose(number) {
    if (!results[number]) return;
    store.update({selected: results[number].node});
    open(false);
    input.blur(); // the keys of the page act on the node that was found
  }

  function ask() {
    clearTimeout(timer);
    if (store.state.query !== input.value) store.update({query: input.value});
    open(true);
  }

  input.addEventListener("input", () => {
    clearTimeout(timer);
    if (data.nodes.count > 3000) timer = setTimeout(ask, 120);
    else ask();
  });
  input.addEventListener("focus", () => open(true));
  element.addEventListener("focusout", (event) => { if (!element.contains(event.relatedTarget)) open(false); });
  input.addEventListener("keydown", (event) => {
    const step = {ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10}[event.key];
    if (step || event.key === "Enter") ask(); // a key that comes before the answer to what was typed
    if (step) move(at + step);
    else if (event.key === "Enter") choose(Math.max(at, 0));
    else if (event.key === "Escape" && (input.value || !list.hidden)) { store.update({query: ""}); open(false); input.blur(); }
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  store.subscribe(["query", "labels", "groups"], refresh);
  refresh();
  return {focus: () => { input.focus(); input.select(); }, results: () => results};
}

function resultRow(data, store, {node, field}, number, choose) {
  const where = {label: "", name: "", token: "at the token", promotes: "promotes it"}[field];
  const row = make("div", {id: `result-${number}`, className: "result", role: "option", "aria-selected": "false", dataset: {node}},
    named(labelOf(data, store.state, node), "label"), make("span", {className: "soft"}, named(placeOf(data, node)), where ? ` · ${where}` : ""),
    make("span", {className: "number soft", textContent: formatShare(data.nodes.influence[node])}));
  row.addEventListener("pointerdown", (event) => event.preventDefault()); // the field keeps the focus
  row.addEventListener("click", choose);
  row.addEventListener("pointerenter", () => store.update({hovered: node}));
  return row;
}
