/** What is known of the selected node: label, activation, examples and tokens of a feature; what the graph says of the others. */

function createDetailPane(element, data, store, services) {
  const body = element.appendChild(make("div", {id: "detail"}));
  let editing = false;

  const edit = () => {
    if (store.state.selected === null) return false;
    editing = true;
    draw();
    return true;
  };
  const stop = (text) => {
    if (!editing) return;
    editing = false;
    if (text !== null) setLabel(data, store, store.state.selected, text);
    draw();
    body.querySelector("[data-action=edit-label]")?.focus();
  };

  function draw() {
    const {selected} = store.state;
    body.replaceChildren();
    if (selected === null) return body.append(...overviewOf(data));
    body.append(titleRow(data, store, services, selected, editing ? stop : null, edit));
    const describe = {[KIND.feature]: describeFeature, [KIND.logit]: describeOutput, [KIND.error]: describeError}[data.nodes.kind[selected]];
    body.append(...(describe ?? describeInput)(data, selected, store));
    const field = body.querySelector("#label-field");
    if (field) field.select();
  }

  store.subscribe(["selected"], () => {
    editing = false;
    draw();
    element.scrollTop = 0;
  });
  store.subscribe(["labels", "pinned", "path"], () => editing || draw());
  draw();
  return {element, edit};
}

/** Gives a node a label of the reader's; without text, or with that of the graph, it has the graph's again. */
function setLabel(data, store, node, text) {
  const labels = new Map(store.state.labels);
  const plain = text.trim();
  if (plain && plain !== labelOf(data, {labels: new Map()}, node)) labels.set(node, plain);
  else if (!labels.delete(node)) return;
  store.update({labels});
}

function titleRow(data, store, services, node, stop, edit) {
  const label = labelOf(data, store.state, node);
  const isPinned = store.state.pinned.has(node);
  let title;
  if (stop) {
    title = make("input", {id: "label-field", value: label, "aria-label": "Label of this node", maxLength: 500, dir: "auto"});
    title.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === "Escape") {
        event.stopPropagation();
        event.preventDefault(); // else the button that gets the focus is pressed as well
        stop(event.key === "Enter" ? title.value : null);
      }
    });
    title.addEventListener("blur", () => stop(title.value));
  } else title = named(label, "label");
  const actions = group("actions", [
    tool("edit-label", "Edit label", "Change the label of this node (E); empty restores the graph's", edit),
    tool("pin", isPinned ? "Unpin" : "Pin", "Pin to the subgraph, or unpin (P)", () => togglePin(store, node)),
    tool("path", isPathOpen(store, node) ? "Path to here" : "Path from here", "Strongest path between two nodes (W on both ends)", () => markPathEnd(data, store, services)),
  ]);
  actions.children[1].setAttribute("aria-pressed", isPinned);
  return make("header", {className: "title"}, make("h3", {}, title), make("p", {className: "soft"}, named(`${data.nodes.kind[node] === KIND.feature ? "feature " : ""}${placeOf(data, node)}`)), actions);
}

/** Rows of facts: `[name, text or element]`; those without a value are left out. */
function factsList(facts) {
  const rows = facts.filter(([, value]) => value !== null && value !== "");
  return make("dl", {className: "facts"}, ...rows.flatMap(([name, value]) => [make("dt", {textContent: name}), make("dd", {}, value)]));
}

function heading(text, note = "") {
  return make("h4", {}, text, note ? make("span", {className: "soft", textContent: ` ${note}`}) : "");
}

// Features ---------------------------------------------------------------------------------------------------------------

function describeFeature(data, node, store) {
  const {activation, expanded, influence} = data.nodes;
  const evidence = evidenceOf(data, node);
  const indexed = evidence?.isIndexed ? evidence : null;
  const parts = [...labelNotes(data, store, node, evidence)];
  const everyNth = indexed && indexed.density > 0 ? ` (1 in ${Math.round(1 / indexed.density).toLocaleString("en")})` : "";
  const rank = indexed?.histogram.length && activation[node] > 0 ? `, above ${formatShare(quantileOf(indexed, activation[node]))} of its firings` : "";
  parts.push(factsList([
    ["activation here", activation[node] ? `${formatNumber(activation[node])}${rank}` : null],
    ["largest known", indexed ? formatNumber(indexed.max_activation) : null],
    ["fires on", indexed ? `${formatShare(indexed.density)} of tokens${everyNth}` : null],
    ["influence", `${formatShare(influence[node])} of the output`],
    keptAt(data, node),
    ["inputs", expanded[node] ? null : "not computed: its part counts as unexplained"],
  ]));
  if (!indexed) {
    const note = data.features.notes?.[data.nodes.part[node] === 1 ? "attention" : "mlp"] ?? `The page holds evidence of the ${data.features.kept?.[0]} most influential of ${data.features.kept?.[1]} features; this is not one of them.`;
    return [...parts, make("p", {className: "hint", textContent: note})];
  }
  const [strongest, others] = exampleLists(indexed);
  parts.push(...strongest, ...tokenLists(indexed)); // what a feature is shows first in what it fires on
  if (indexed.histogram.length) parts.push(heading("Activations"), histogramOf(indexed, activation[node]));
  return [...parts, ...others];
}

/** Where the label is from and how well it detects the feature; an index that found none says so. */
function labelNotes(data, store, node, evidence) {
  const notes = [];
  const graphLabel = labelOf(data, {labels: new Map()}, node);
  if (store.state.labels.has(node)) notes.push(["Your label. The graph says ", named(graphLabel), "."]);
  const facts = evidence?.named;
  if (facts?.source === "hint") notes.push(["The label is a guess from weights: tokens that it reads → tokens that it promotes."]);
  if (facts?.text) notes.push([named(facts.text)]);
  const [best, ...others] = evidence?.labels ?? [];
  if (best?.text === "unclear") {
    notes.push(["The index finds its label ", make("strong", {textContent: "unclear"}), ": the best claim, ", named(best.claim ?? "none"), ", has ", scoreInWords(best), "."]);
  } else if (best && best.text === graphLabel) notes.push([`Label ${sourceInWords(best.source)}, ${scoreInWords(best)}.`]);
  else if (best) notes.push(["Index: ", named(best.text), " — ", sourceInWords(best.source), ", ", scoreInWords(best), "."]);
  else if (facts?.f1 !== undefined) notes.push([sourceInWords(facts.source), ", ", scoreInWords(facts), "."]);
  for (const other of others) notes.push(["Also: ", named(other.text === "unclear" ? other.claim : other.text), " — ", sourceInWords(other.source), ", ", scoreInWords(other), "."]);
  return notes.map((note) => make("p", {className: "note"}, ...note));
}

function sourceInWords(source) {
  return {rule: "found by rule", person: "by a person", "language model": "by a language model"}[source] ?? source;
}

function scoreInWords({f1, precision, recall}) {
  if (f1 === undefined) return "not scored";
  return `F1 ${f1.toFixed(2)}` + (precision === undefined ? "" : ` (precision ${precision.toFixed(2)}, recall ${recall.toFixed(2)})`);
}

/** How often the feature fires with which activation, and where this one lies. Heights grow with the logarithm of the count. */
function histogramOf(evidence, here) {
  const {histogram, bin_width: width} = evidence;
  const [height, bar, range] = [46, 10, histogram.length * width];
  const most = Math.log1p(Math.max(...histogram));
  const bars = histogram.map((count, bin) => {
    const size = count ? Math.max(2, (height * Math.log1p(count)) / most) : 0;
    const title = `${countOf(count, "token")} from ${formatNumber(bin * width)} to ${formatNumber((bin + 1) * width)}`;
    return makeSvg("rect", {x: bin * bar + 0.5, y: height - size, width: bar - 1, height: size}, makeSvg("title", {}, title));
  });
  const x = clamp(here / range, 0, 1) * histogram.length * bar;
  const marks = here > 0 ? [makeSvg("line", {class: "here", x1: x, x2: x, y1: -5, y2: height}), makeSvg("path", {class: "here", d: `M${x - 4} -9h8l-4 6z`})] : [];
  const words = `${countOf(sum(histogram), "firing")}${here > 0 ? `; here ${formatNumber(here)}, above ${formatShare(quantileOf(evidence, here))} of them` : ""}`;
  const picture = makeSvg("svg", {class: "histogram", viewBox: `0 -10 ${histogram.length * bar} ${height + 11}`, preserveAspectRatio: "none", role: "img", "aria-label": `Histogram of activations: ${words}`}, ...bars, ...marks);
  const axis = make("div", {className: "axis soft"}, make("span", {textContent: "0"}), make("span", {textContent: `${words} (log heights)`}), make("span", {textContent: formatNumber(range)}));
  return make("figure", {}, picture, axis);
}

function tokenLists(evidence) {
  const through = evidence.head ? `reads via L${evidence.head[0]}H${evidence.head[1]}` : "reads via a head";
  const lists = {promotes: evidence.promoted, suppresses: evidence.suppressed, reads: evidence.read, [through]: evidence.read_through_heads};
  const facts = Object.entries(lists).filter(([, tokens]) => tokens.length).map(([name, tokens]) => {
    const chips = tokens.map(([text, weight]) => make("span", {className: "chip", title: formatNumber(weight, {sign: true})},
      make("bdi", {textContent: visibleToken(text)}), make("small", {textContent: formatNumber(weight, {sign: true})})));
    return [name, make("span", {className: "chips"}, ...chips)];
  });
  return facts.length ? [heading("Tokens", "by its weights alone"), factsList(facts)] : [];
}

/** Spaces at the ends, line ends and tabs made visible; empty text as ∅. */
function visibleToken(text) {
  const marks = {"\n": "⏎", "\r": "␍", "\t": "⇥"};
  const shown = text.replace(/[\n\r\t]/g, (character) => marks[character]).replace(/\p{C}/gu, (character) => `<U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}>`);
  return shown.replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length)) || "∅";
}

/** The strongest examples, and those from the quantiles, each list with its heading. */
function exampleLists(evidence) {
  const {examples, n_examples: kept} = evidence;
  if (!examples.length) return [[make("p", {className: "hint", textContent: "The index has no examples of this feature."})], []];
  const spaced = examples.some(({tokens}) => tokens.some((token) => token.startsWith(" ")));
  const cut = examples.length < kept ? `${examples.length} of the index's ${kept}` : "";
  const legend = make("p", {className: "legend soft"}, "shade: quantile of activation ", ...[0.2, 0.5, 0.8, 1].map((quantile) => shaded(` ${formatShare(quantile)} `, quantile)), "; framed: the peak");
  const listOf = (title, note, isQuantile) => {
    const list = examples.filter(({quantile}) => (quantile !== null) === isQuantile);
    return list.length ? [heading(title, note), ...(isQuantile ? [] : [legend]), ...list.map((example) => exampleRow(evidence, example, spaced))] : [];
  };
  return [listOf("Strongest examples", cut, false), listOf("From the quantiles", "", true)];
}

function exampleRow(evidence, {tokens, activations, peak, quantile}, spaced) {
  const words = tokens.flatMap((token, place) => {
    const word = shaded(inText(token), activations[place] > 0 ? quantileOf(evidence, activations[place]) : 0);
    word.title = `${visibleToken(token)}: ${formatNumber(activations[place])}`;
    word.classList.toggle("peak", place === peak);
    return [spaced ? document.createElement("wbr") : " ", word];
  });
  const from = quantile === null ? "" : `above ${formatShare(quantile)}`;
  return make("div", {className: "example"}, make("span", {className: "number", textContent: formatNumber(activations[peak]), title: from}), make("bdi", {}, ...words), from ? make("small", {className: "soft", textContent: from}) : null);
}

/** A token inside a text: its spaces as small marks, which keep their width. */
function inText(token) {
  return visibleToken(token).replaceAll("␣", "·");
}

/** Text on a background that is stronger the higher the quantile; 0 has none. */
function shaded(text, quantile) {
  const word = make("span", {className: "token", textContent: text});
  if (quantile > 0) word.style.setProperty("--shade", `${Math.round(10 + 44 * quantile)}%`);
  return word;
}

// Other nodes ------------------------------------------------------------------------------------------------------------

function describeOutput(data, node) {
  const {probability, outputWeight, value, position} = data.nodes;
  const likely = (data.metadata.top_tokens ?? []).filter(({probability: p}) => p > 0);
  const bars = likely.map(({token, probability: p}) => [token, make("span", {className: "chance"}, chanceBar(p), formatShare(p))]);
  return [
    factsList([
      ["probability", probability[node] > 0 ? formatShare(probability[node]) : null],
      ["share of the output", outputWeight[node] > 0 ? `${formatShare(outputWeight[node])}: the weight of this target in all influences` : null],
      ["logit", value[node] ? formatNumber(value[node]) : null],
      ["errors", `${formatShare(errorShare(data, node))} of its direct input`],
    ]),
    ...(bars.length ? [heading("The model's likely next tokens", `at ${data.tokens[position[node]]}`), factsList(bars)] : []),
  ];
}

function keptAt(data, node) {
  const inclusion = inclusionOf(data, node);
  return ["kept at", inclusion === null ? null : `${formatShare(inclusion)} of the pruning thresholds`];
}

function chanceBar(share) {
  return make("span", {className: "track"}, make("span", {className: "bar", style: {width: `${100 * share}%`}}));
}

function describeError(data, node) {
  const {influence, kind, layer} = data.nodes;
  const all = sum(Array.from(influence).filter((_, other) => kind[other] === KIND.error));
  return [
    make("p", {className: "note", textContent: `What the crosscoder does not reconstruct of the ${data.nodes.part[node] === 1 ? "attention" : "MLP"} output of layer ${layer[node]} here. What reaches the output through it is unexplained.`}),
    factsList([
      ["influence", `${formatShare(influence[node])} of the output`],
      keptAt(data, node),
      ["of all errors", all > 0 ? formatShare(influence[node] / all) : null],
    ]),
  ];
}

function describeInput(data, node) {
  const {kind, influence, outputWeight, index} = data.nodes;
  const direct = sum(edgesOutOf(data, node).map((edge) => outputWeight[data.edges.target[edge]] * Math.abs(data.edges.share[edge])));
  return [factsList([
    ["token id", kind[node] === KIND.token && index[node] >= 0 ? String(index[node]) : null],
    ["influence", `${formatShare(influence[node])} of the output, through all paths`],
    ["through no feature", influence[node] > 0 ? `${formatShare(direct)}: its edges into the output itself` : null],
  ])];
}

function errorShare(data, node) {
  return sum(edgesInto(data, node).map((edge) => (data.nodes.kind[data.edges.source[edge]] === KIND.error ? Math.abs(data.edges.share[edge]) : 0)));
}

/** What is shown while no node is selected: the graph itself. */
function overviewOf(data) {
  const {replacement, completeness, mass} = scoresOf(data);
  const {model, crosscoder, identity_error: identity, pruning, stopped_by: stopped} = data.metadata;
  return [
    make("h3", {}, named(data.prompt)),
    factsList([
      ["graph", `${countOf(data.nodes.count, "node")}, ${countOf(data.edges.count, "edge")}`],
      ["pruned", pruning ? `to ${formatShare(pruning.nodes)} of node and ${formatShare(pruning.edges)} of edge influence` : null],
      ["replacement score", `${formatShare(replacement)} of the output is traced back to inputs`],
      ["completeness", formatShare(completeness)],
      ["the rest ends in", `errors ${formatShare(mass.errors)}, features not expanded ${formatShare(mass.unexpanded)}, what was removed ${formatShare(mass.lost)}`],
      ["identity error", typeof identity === "number" ? identity.toExponential(1) : "not known"],
      ["trace stopped by", stopped ?? null],
      ["model", model ? named(model) : null],
      ["crosscoder", crosscoder ? named(crosscoder) : null],
    ]),
    make("p", {className: "hint", textContent: "Select a node in the graph to read about it."}),
  ];
}
