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

// Saving: entries by kind and id ------------------------------------------------------------------------------------------

const KINDS = {
  labels: {read: ({labels}) => labels, write: (entries) => entries},
  groups: {
    read: ({groups}) => Object.fromEntries(groups.map(({id, name, members}) => [id, {id, name, members: [...members].sort()}])),
    write: Object.values,
  },
  pinned: {read: ({pinned}) => Object.fromEntries(pinned.map((id) => [id, true])), write: Object.keys},
  places: {read: ({places}) => places, write: (entries) => entries},
};
const eachKind = (make) => Object.fromEntries(Object.keys(KINDS).map((kind) => [kind, make(kind)]));
const entriesOf = (json) => eachKind((kind) => ({...KINDS[kind].read(json)}));
const isShown = (id) => data.numberOf.has(id);
let known = eachKind(() => ({})); // what the server has

/** This page's entries. What is saved for nodes that it does not show is left as it is. */
function ownEntries() {
  const own = entriesOf(store.toJSON());
  for (const kind of ["labels", "pinned", "places"]) {
    for (const [id, entry] of Object.entries(known[kind])) if (!isShown(id) && !(id in own[kind])) own[kind][id] = entry;
  }
  for (const group of Object.values(known.groups)) {
    const hidden = group.members.filter((id) => !isShown(id));
    if (hidden.length === group.members.length) own.groups[group.id] = group;
    else if (own.groups[group.id]) own.groups[group.id].members = [...own.groups[group.id].members, ...hidden].sort();
  }
  return own;
}

/** Ids of the entries of a kind that differ. */
function differing(before, now, kind) {
  const ids = new Set([...Object.keys(before[kind]), ...Object.keys(now[kind])]);
  return [...ids].filter((id) => JSON.stringify(before[kind][id]) !== JSON.stringify(now[kind][id]));
}

/** What the server is to merge into what it has; null for nothing. */
function changes(own) {
  const changed = eachKind((kind) => differing(known, own, kind));
  const sent = {
    labels: Object.fromEntries(changed.labels.map((id) => [id, own.labels[id] ?? null])),
    groups: changed.groups.map((id) => own.groups[id] ?? {...known.groups[id], members: []}),
    pinned: KINDS.pinned.write(own.pinned),
    places: own.places,
  };
  const kinds = Object.keys(KINDS).filter((kind) => changed[kind].length);
  const {version, prompt} = store.toJSON();
  return kinds.length ? {version, prompt, ...Object.fromEntries(kinds.map((kind) => [kind, sent[kind]]))} : null;
}

/** Takes on what the server has, but for what this page changed since `base`. */
function takeOn(saved, base = known) {
  const [theirs, own] = [entriesOf(saved), ownEntries()];
  const merged = eachKind((kind) => {
    const entries = {...theirs[kind]};
    for (const id of differing(base, own, kind)) {
      if (id in own[kind]) entries[id] = own[kind][id];
      else delete entries[id];
    }
    return entries;
  });
  known = theirs;
  if (!Object.keys(KINDS).some((kind) => differing(own, merged, kind).length)) return;
  const {version} = store.toJSON();
  store.load({version, ...eachKind((kind) => KINDS[kind].write(merged[kind]))}, {undo: false});
}

let timer = 0;
let underWay = Promise.resolve();

function saveSoon() {
  clearTimeout(timer);
  timer = setTimeout(() => { underWay = underWay.then(save); }, SAVE_AFTER);
}

async function save() {
  const own = ownEntries();
  const json = changes(own);
  if (!json) return;
  say("saving…");
  try {
    takeOn(await api(statePath, {json}), own);
    say("saved");
  } catch (error) {
    say(`not saved: ${error.message}`, true);
  }
}

const {bar, status} = createBar();

function say(text, isError = false) {
  status.textContent = text;
  status.classList.toggle("error", isError);
}

async function start() {
  if (facts.model) createInterventions(bar, facts, window.crosstrace);
  const [saved, own] = [await api(statePath), ownEntries()];
  const theirs = entriesOf(saved);
  // Of what the address brought, entries that are saved too may be old.
  takeOn(saved, eachKind((kind) => Object.fromEntries(Object.entries(own[kind]).filter(([id]) => id in theirs[kind]))));
  store.subscribe(Object.keys(KINDS), saveSoon);
  saveSoon();
  addEventListener("focus", async () => {
    try {
      takeOn(await api(statePath));
    } catch (error) {
      say(error.message, true);
    }
  });
  addEventListener("pagehide", () => {
    const body = JSON.stringify(changes(ownEntries()));
    const headers = {"Content-Type": "application/json"};
    if (body !== "null") fetch(`/api/${statePath}`, {method: "POST", headers, body, keepalive: true});
  });
}

start().catch((error) => services.say(`Labels that are saved cannot be read: ${error.message}`));
