/**
 * The state of the page. Panes read `store.state` and subscribe to keys of it; only `update` changes it.
 * Values are never changed in place: a changed set or map is a new one.
 */

const STATE_VERSION = 1;
const UNDOABLE = ["pinned", "groups", "labels", "places", "path", "direction", "topLinks", "minInfluence"];
const DIRECTIONS = ["both", "inputs", "outputs"];
const MERGED = ["minInfluence", "topLinks", "places"]; // a slider or a box that is moved on and on is one step of undo
const MERGE_WITHIN = 600; // milliseconds between such changes
const LONGEST_HASH = 4000;
const FIRST_LEFT_OUT = ["places", "labels", "groups", "pinned"]; // of a hash that would be too long

/** @param saved what `toJSON` gave, or nothing */
function createStore(data, saved = {}) {
  const initial = {
    selected: null,
    hovered: null,
    ...groupsOfGraph(data),
    direction: "both",
    topLinks: 15,
    minInfluence: defaultMinInfluence(data),
    query: "",
    path: null,
    labels: new Map(),
    places: new Map(), // of boxes of the subgraph that were moved: `[x, y]` by node id or `group:ID`
    theme: "auto",
    panes: {column: 0.64, left: 0.66, right: 0.5, full: null},
  };
  let state = {...initial};
  const listeners = new Set();
  const steps = {undo: [], redo: []};
  const walk = {nodes: [], at: -1};
  let lastChange = {keys: "", time: 0};

  function update(changes, {undo = Object.keys(changes).some((key) => UNDOABLE.includes(key))} = {}) {
    const unknown = Object.keys(changes).find((key) => !(key in initial));
    if (unknown) throw new Error(`store.update: expected one of ${Object.keys(initial)}, got ${unknown}`);
    const keys = Object.keys(changes).filter((key) => changes[key] !== state[key]);
    if (!keys.length) return;
    const [name, now] = [keys.join(), Date.now()];
    if (undo && !(MERGED.includes(name) && name === lastChange.keys && now - lastChange.time < MERGE_WITHIN)) {
      steps.undo.push(pick(state, UNDOABLE));
      steps.redo.length = 0;
    }
    if (undo) lastChange = {keys: name, time: now};
    if (keys.includes("selected") && changes.selected !== null && changes.selected !== walk.nodes[walk.at]) {
      walk.nodes.splice(++walk.at, Infinity, changes.selected);
    }
    set(changes);
  }

  function set(changes) {
    const before = state;
    state = {...state, ...changes};
    const changed = Object.keys(changes).filter((key) => before[key] !== state[key]);
    for (const {keys, listener} of [...listeners]) {
      if (changed.some((key) => keys.includes(key))) listener(state, changed);
    }
  }

  function step(from, to) {
    if (!steps[from].length) return false;
    steps[to].push(pick(state, UNDOABLE));
    lastChange = {keys: "", time: 0};
    set(steps[from].pop());
    return true;
  }

  function move(by) {
    const at = walk.at + by;
    if (at < 0 || at >= walk.nodes.length) return false;
    walk.at = at;
    set({selected: walk.nodes[at]});
    return true;
  }

  function toJSON(state) {
    const id = (node) => data.nodes.id[node];
    return {
      version: STATE_VERSION,
      prompt: data.prompt,
      ...pick(state, ["direction", "topLinks", "minInfluence", "query", "theme", "panes"]),
      selected: state.selected === null ? null : id(state.selected),
      pinned: [...state.pinned].map(id),
      groups: state.groups.map((group) => ({...group, members: group.members.map(id)})),
      labels: Object.fromEntries([...state.labels].map(([node, text]) => [id(node), text])),
      places: Object.fromEntries(state.places),
      path: state.path && state.path.map(id),
    };
  }

  /** Takes on a saved state. Returns how many of its nodes the graph does not have; throws an Error for another form. */
  function load(json, {undo = true} = {}) {
    const {changes, missing} = parseState(data, initial, json);
    update(changes, {undo});
    if (!undo) steps.undo.length = steps.redo.length = 0; // a step back would drop what was loaded
    return missing;
  }

  const store = {
    get state() { return state; },
    initial,
    usual: toJSON(initial),
    update,
    /** Calls `listener(state, changedKeys)` after changes of any of `keys`; returns a function that ends this. */
    subscribe(keys, listener) {
      const entry = {keys, listener};
      listeners.add(entry);
      return () => listeners.delete(entry);
    },
    undo: () => step("undo", "redo"),
    redo: () => step("redo", "undo"),
    back: () => move(-1),
    forward: () => move(1),
    can: () => ({
      undo: steps.undo.length > 0, redo: steps.redo.length > 0, back: walk.at > 0, forward: walk.at < walk.nodes.length - 1,
    }),
    toJSON: () => toJSON(state),
    load,
  };
  load({version: STATE_VERSION, ...saved}, {undo: false});
  return store;
}

/**
 * The groups that the page begins with: those of several features or outputs that the graph carries. The features of its most influential
 * groups, single ones too, are pinned, so that the subgraph shows the graph among them.
 */
function groupsOfGraph(data) {
  const most = 12;
  const influenceOf = ({members}) => sum(members.map((node) => data.nodes.influence[node]));
  const ofFeatures = data.groups.filter(({kind}) => kind === "features").sort((a, b) => influenceOf(b) - influenceOf(a));
  return {
    groups: data.groups.filter(({kind, members}) => members.length > 1 && kind !== "tokens" && kind !== "errors").map(({name, members}, number) => ({id: `graph-${number}`, name, members})),
    pinned: new Set(ofFeatures.slice(0, most).flatMap(({members}) => members)),
  };
}

/** At first the most influential nodes of a large graph are shown, and how many are hidden is said. */
function defaultMinInfluence(data) {
  const most = 250;
  const influences = data.nodes.influence.slice().sort().reverse();
  return influences.length <= most ? 0 : influences[most - 1];
}

/** The changes that a saved state asks for, checked; ids become node numbers. Keys that it lacks are left alone. */
function parseState(data, initial, json) {
  const expect = (fits, key, expected) => {
    if (!fits) throw new Error(`saved state: expected ${key} to be ${expected}`);
  };
  expect(json !== null && typeof json === "object" && json.version === STATE_VERSION, "version", String(STATE_VERSION));
  let missing = 0;
  const known = (ids) => {
    const found = ids.map((id) => data.numberOf.get(id)).filter((node) => node !== undefined);
    missing += ids.length - found.length;
    return found;
  };
  const texts = (value) => Array.isArray(value) && value.every((text) => typeof text === "string");
  const isNumber = (value) => typeof value === "number" && Number.isFinite(value) && value >= 0;
  const readers = {
    selected: [(value) => value === null || typeof value === "string", "an id", (id) => known(id === null ? [] : [id])[0] ?? null],
    pinned: [texts, "a list of ids", (ids) => new Set(known(ids))],
    groups: [
      (list) => Array.isArray(list) && list.every((group) => typeof group?.id === "string" && typeof group.name === "string" && texts(group.members)),
      "a list of groups with id, name and members",
      (list) => list.map(({id, name, members}) => ({id, name, members: known(members)})).filter((group) => group.members.length),
    ],
    labels: [
      (value) => value !== null && typeof value === "object" && texts(Object.values(value)),
      "an object of texts",
      (value) => new Map(Object.entries(value).flatMap(([id, text]) => known([id]).map((node) => [node, text]))),
    ],
    places: [
      (value) => value !== null && typeof value === "object" && Object.values(value).every((place) => Array.isArray(place) && place.length === 2 && place.every(Number.isFinite)),
      "an object of [x, y]",
      (value) => new Map(Object.entries(value)),
    ],
    path: [(value) => value === null || (texts(value) && value.length === 2), "two ids", (value) => {
      const ends = known(value ?? []);
      return ends.length === 2 ? ends : null;
    }],
    direction: [(value) => DIRECTIONS.includes(value), DIRECTIONS.join(", ")],
    topLinks: [(value) => Number.isInteger(value) && value >= 1, "a whole number of at least 1"],
    minInfluence: [isNumber, "a number of at least 0"],
    query: [(value) => typeof value === "string", "a text"],
    theme: [(value) => ["auto", "light", "dark"].includes(value), "auto, light or dark"],
    panes: [
      (value) => value !== null && typeof value === "object" && Object.keys(initial.panes).every((key) =>
        key === "full" ? value.full === null || typeof value.full === "string" : isNumber(value[key]) && value[key] <= 1),
      "an object with the shares column, left and right, and full",
    ],
  };
  const changes = {};
  for (const [key, [fits, expected, read = (value) => value]] of Object.entries(readers)) {
    if (!(key in json)) continue;
    expect(fits(json[key]), key, expected);
    changes[key] = read(json[key]);
  }
  return {changes, missing};
}

/** What differs from the initial state, as the part of an address after `#`; `leftOut` names what had no room. */
function encodeHash(store) {
  const {version, prompt, ...json} = store.toJSON();
  const different = Object.entries(json).filter(([key, value]) => JSON.stringify(value) !== JSON.stringify(store.usual[key]));
  const write = (entries) => new URLSearchParams(entries.map(([key, value]) => [key, JSON.stringify(value)])).toString();
  const leftOut = [];
  let entries = different;
  while (write(entries).length > LONGEST_HASH && leftOut.length < FIRST_LEFT_OUT.length) {
    leftOut.push(FIRST_LEFT_OUT[leftOut.length]);
    entries = different.filter(([key]) => !leftOut.includes(key));
  }
  return {hash: write(entries), leftOut: leftOut.filter((key) => different.some(([name]) => name === key))};
}

/** The saved state that an address holds; throws where it is not one. */
function decodeHash(hash) {
  const entries = [...new URLSearchParams(hash.replace(/^#/, ""))];
  return Object.fromEntries(entries.map(([key, value]) => [key, JSON.parse(value)]));
}

function pick(object, keys) {
  return Object.fromEntries(keys.map((key) => [key, object[key]]));
}
