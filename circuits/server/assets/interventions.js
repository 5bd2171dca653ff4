/** Features of the graph changed in the model: a panel that lists the changes, and the likeliest tokens before and after. */
import {api, cancelButton, finished, isActive, jobText, make} from "./jobs.js";

const WAYS = {ablate: ["Ablate", "scale", 0], scale: ["Scale by", "scale", 2], set: ["Set to", "activation", 0], add: ["Add", "add", 1]};
const FEATURE = 3; // NodeKind.FEATURE
const LEAST_NAMED = 5; // tokens that are named however small their probability is
const FELT = 0.001; // smaller changes of a probability are not coloured

/** A share in percent, with two digits where it is small. */
function percent(share) {
  const value = 100 * share;
  return `${value >= 1 ? value.toFixed(1) : value >= 0.01 ? Number(value.toPrecision(2)) : "<0.01"} %`;
}

export function createInterventions(bar, facts, {data, store}) {
  const changes = new Map(); // node -> {way, value, everywhere}
  const list = make("ul", {className: "changes"});
  const outcome = make("div", {className: "outcome", role: "status"});
  const add = make("button", {type: "button", onclick: () => addNodes(chosen())});
  const run = make("button", {type: "button", className: "main", textContent: "Run", onclick: () => start().catch(fail)});
  const panel = make("section", {id: "interventions", hidden: true, ariaLabel: "Interventions"},
    make("header", {}, make("h2", {textContent: "Change features"}), make("button", {type: "button", textContent: "✕", ariaLabel: "Close", onclick: toggle})),
    make("p", {className: "quiet", textContent: "Runs the model on this prompt with features changed; errors are kept, later features follow."}),
    list, make("div", {className: "actions"}, add, run), outcome);
  const open = make("button", {type: "button", textContent: "Change features…", ariaExpanded: "false", onclick: toggle});
  bar.append(open);
  document.body.append(panel);
  panel.addEventListener("keydown", (event) => {
    if (event.key === "Escape") toggle();
    event.stopPropagation(); // keys of the page are not meant here
  });

  function toggle() {
    panel.hidden = !panel.hidden;
    open.ariaExpanded = String(!panel.hidden);
    if (panel.hidden) return open.focus();
    if (!changes.size) addNodes(chosen());
    (list.querySelector("select") ?? add).focus();
  }

  /** Features that the reader has chosen: the selected one, or else the pinned ones; those that are not listed yet. */
  function chosen() {
    const {selected, pinned} = store.state;
    const features = (selected === null ? [...pinned] : [selected]).filter((node) => data.nodes.kind[node] === FEATURE);
    return features.filter((node) => !changes.has(node));
  }

  function addNodes(nodes) {
    for (const node of nodes) changes.set(node, {way: "ablate", value: 0, everywhere: false});
    draw();
  }

  const nameOf = (node) => store.state.labels.get(node) || data.nodes.label[node] || data.nodes.name[node];

  function refreshAdd() {
    const nodes = chosen();
    const what = nodes.length === 1 ? nameOf(nodes[0]) : `${nodes.length} pinned features`;
    add.textContent = nodes.length ? `Add ${what}` : "Select a feature to add it";
    add.disabled = !nodes.length;
    run.disabled = !changes.size;
  }

  function draw() {
    list.replaceChildren(...[...changes].map(([node, change]) => item(node, change)));
    refreshAdd();
  }

  function item(node, change) {
    const name = make("bdi", {textContent: nameOf(node), title: data.nodes.name[node]});
    const way = make("select", {ariaLabel: `What to do with ${nameOf(node)}`, onchange: () => {
      const usual = way.value === "set" ? data.nodes.activation[node] : WAYS[way.value][2];
      Object.assign(change, {way: way.value, value: Number(usual.toPrecision(3))});
      draw();
      list.querySelectorAll("select")[[...changes.keys()].indexOf(node)].focus();
    }}, ...Object.entries(WAYS).map(([key, [title]]) => make("option", {value: key, textContent: title, selected: key === change.way})));
    const value = make("input", {type: "number", step: "any", value: change.value, hidden: change.way === "ablate", ariaLabel: "Value", onchange: () => {
      if (Number.isFinite(value.valueAsNumber)) change.value = value.valueAsNumber;
      value.value = change.value;
    }});
    const everywhere = make("input", {type: "checkbox", checked: change.everywhere, onchange: () => { change.everywhere = everywhere.checked; }});
    const remove = make("button", {type: "button", textContent: "✕", ariaLabel: `Remove ${nameOf(node)}`, onclick: () => {
      changes.delete(node);
      draw();
      add.focus();
    }});
    return make("li", {}, name, way, value, make("label", {title: "At all positions, not only its own"}, everywhere, " everywhere"), remove);
  }

  async function start() {
    const json = {changes: [...changes].map(([node, {way, value, everywhere}]) =>
      ({node: data.nodes.id[node], [WAYS[way][1]]: way === "ablate" ? 0 : value, everywhere}))};
    if (run.ariaBusy === "true") return;
    run.ariaBusy = "true"; // a disabled button would lose the focus
    try {
      const {job} = await api(`graphs/${encodeURIComponent(facts.name)}/interventions`, {json});
      const last = await finished(job, (now) => {
        const text = make("span", {className: now.state === "failed" ? "error" : "quiet", textContent: jobText(now)});
        outcome.replaceChildren(...(isActive(now) ? [text, cancelButton(now)] : [text]));
      });
      if (last.state === "done") showResult(last.result);
    } finally {
      run.ariaBusy = "false";
    }
  }

  function fail(error) {
    outcome.replaceChildren(make("span", {className: "error", textContent: error.message}));
  }

  function showResult({position, tokens}) {
    const bar = (share) => {
      const filled = make("span", {className: "filled"});
      filled.style.width = `${100 * share}%`;
      return make("td", {className: "number"}, make("span", {className: "share"}, filled), make("span", {className: "percent", textContent: percent(share)}));
    };
    const head = ["Next token", "before", "after"].map((title, place) => make("th", {scope: "col", className: place ? "number" : "", textContent: title}));
    const named = tokens.filter(({before, after}, place) => place < LEAST_NAMED || Math.max(before, after) >= 1e-4);
    const rows = named.map(({token, before, after}) => {
      const changed = Math.abs(after - before) < FELT ? "" : after < before ? "lower" : "raise";
      return make("tr", {className: changed}, make("td", {}, make("bdi", {textContent: token})), bar(before), bar(after));
    });
    const caption = make("caption", {}, "Likeliest tokens after ", make("bdi", {textContent: data.tokens[position]}), ` (${position})`);
    outcome.replaceChildren(make("table", {}, caption, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)));
  }

  store.subscribe(["selected", "pinned", "labels"], () => { if (!panel.hidden) draw(); });
  draw();
}
