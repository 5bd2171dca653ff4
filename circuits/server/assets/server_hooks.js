/** What the server adds to the viewer's page: the way back, saving of labels and supernodes, and interventions. */
import {createInterventions} from "./interventions.js";
import {api, make} from "./jobs.js";

const SAVE_AFTER = 500; // milliseconds without a change before changes are saved
const facts = JSON.parse(document.querySelector('meta[name="crosstrace-server"]').content);
const statePath = `graphs/${encodeURIComponent(facts.name)}/state`;
const {data, store, services} = window.crosstrace;

function createBar() {
  const number = (value) => value.toLocaleString("en");
  const page = `/graph/${encodeURIComponent(facts.name)}`;
  const [[nodes, edges], [allNodes, allEdges]] = [facts.shown, facts.of];
  const isAll = nodes === allNodes && edges === allEdges;
  const said = isAll ? "the full graph" : `${number(nodes)} of ${number(allNodes)} nodes, ${number(edges)} of ${number(allEdges)} edges`;
  const other = facts.isFull
    ? make("a", {href: page, textContent: "circuit only"})
    : isAll ? null : make("a", {href: `${page}?full`, textContent: "full graph"});
  const bounded = facts.isFull && !isAll ? "too large for a page, the most influential part: " : "";
  const status = make("output", {className: "saved"});
  const bar = make("div", {className: "group server"},
    make("a", {href: "/", textContent: "All graphs"}), make("span", {textContent: bounded + said}), other, status);
  document.getElementById("controls").prepend(bar);
  return {bar, status};
}

// Saving ----------------------------------------------------------------------------------------------------------------

let known = {labels: {}, groups: [], pinned: [], places: {}}; // what the server has
const isShown = (id) => data.numberOf.has(id);
const without = (ids) => ids.filter((id) => !isShown(id));
const byId = (groups) => new Map(groups.map((group) => [group.id, group]));
const same = (first, second) => JSON.stringify(first) === JSON.stringify(second);

/** What differs from what the server has, as it wants it; nodes that this page does not show keep what is saved for them. */
function changes() {
  const {version, prompt, labels, groups, pinned, places} = store.toJSON();
  const removed = Object.keys(known.labels).filter((id) => isShown(id) && !(id in labels));
  const changed = Object.entries(labels).filter(([id, text]) => known.labels[id] !== text);
  const [before, now] = [byId(known.groups), byId(groups)];
  const whole = groups.map((group) => ({...group, members: [...group.members, ...without(before.get(group.id)?.members ?? [])]}));
  const gone = known.groups.filter((group) => group.members.some(isShown) && !now.has(group.id));
  const pins = [...pinned, ...without(known.pinned)];
  const result = {};
  if (changed.length + removed.length) result.labels = Object.fromEntries([...changed, ...removed.map((id) => [id, null])]);
  const sent = [...whole.filter((group) => !same(group, before.get(group.id))), ...gone.map((group) => ({...group, members: []}))];
  if (sent.length) result.groups = sent.map(({id, name, members}) => ({id, name, members}));
  if (!same([...pins].sort(), [...known.pinned].sort())) result.pinned = pins;
  if (!same(Object.entries(places).sort(), Object.entries(known.places).sort())) result.places = places;
  return Object.keys(result).length ? {version, prompt, ...result} : null;
}

/** Takes on what is saved; labels and supernodes that only this page has stay. */
function takeOn(saved) {
  const {version, labels, groups, pinned, places} = store.toJSON();
  known = saved;
  store.load({
    version,
    labels: {...labels, ...saved.labels},
    groups: [...new Map([...byId(groups), ...byId(saved.groups)]).values()],
    pinned: [...new Set([...pinned, ...saved.pinned])],
    places: {...places, ...saved.places},
  }, {undo: false});
}

let timer = 0;
let underWay = Promise.resolve();

function saveSoon() {
  clearTimeout(timer);
  timer = setTimeout(() => { underWay = underWay.then(save); }, SAVE_AFTER);
}

async function save() {
  const json = changes();
  if (!json) return;
  say("saving…");
  try {
    known = await api(statePath, {json});
    say("saved");
  } catch (error) {
    say(`not saved: ${error.message}`, true);
  }
}

/** What other pages saved in the meantime is taken on when the reader comes back to this one. */
async function pull() {
  if (!changes()) takeOn(await api(statePath));
}

const {bar, status} = createBar();

function say(text, isError = false) {
  status.textContent = text;
  status.classList.toggle("error", isError);
}

async function start() {
  if (facts.model) createInterventions(bar, facts, window.crosstrace);
  takeOn(await api(statePath));
  store.subscribe(["labels", "groups", "pinned", "places"], saveSoon);
  saveSoon(); // labels that came with the address
  addEventListener("focus", () => pull().catch((error) => say(error.message, true)));
  addEventListener("pagehide", () => {
    const json = changes();
    const body = JSON.stringify(json);
    if (json) fetch(`/api/${statePath}`, {method: "POST", headers: {"Content-Type": "application/json"}, body, keepalive: true});
  });
}

start().catch((error) => services.say(`Labels that are saved cannot be read: ${error.message}`));
