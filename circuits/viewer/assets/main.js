/** Starts the page: state from the address, panes, and what keeps both in step. */

const PANES = {
  graph: ["Graph", createGraphPane],
  links: ["Connections", createLinksPane],
  subgraph: ["Subgraph", createSubgraphPane],
  detail: ["Detail", createDetailPane],
};

function start() {
  const data = decodeGraph(JSON.parse(document.getElementById("graph").textContent));
  document.title = `Circuit: ${data.prompt}`;
  const store = createStore(data);
  const services = createServices(data, store);
  readAddress(store, services);
  applyTheme(store);
  store.subscribe(["theme"], () => applyTheme(store)); // before the panes', which read the colours
  const panes = {};
  for (const [name, [title, create]] of Object.entries(PANES)) {
    panes[name] = create(framePane(name, title, store), data, store, services);
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    applyTheme(store);
    for (const pane of Object.values(panes)) pane.redraw?.();
  });
  services.graph = panes.graph;
  services.panes = panes;
  createControls(document.getElementById("controls"), data, store, services);
  services.searchBox = createSearch(document.getElementById("search"), data, store, services);
  services.keys = createKeyboard(data, store, services);
  services.helpBox = createHelp(data, store, services);
  createSplitters(document.getElementById("panes"), store);
  store.subscribe(Object.keys(store.initial).filter((key) => key !== "hovered"), () => writeAddress(store, services));
  window.crosstrace = {data, store, panes, services};
}

/** What panes may ask of the page. */
function createServices(data, store) {
  const message = document.getElementById("message");
  let timer = 0;
  const services = {
    palette: readPalette,
    /** Shows a message for some seconds; an empty one takes away the last. */
    say(text) {
      if (text) message.textContent = text;
      message.classList.toggle("shown", text !== "");
      clearTimeout(timer);
      timer = setTimeout(() => message.classList.remove("shown"), 6000);
    },
    /** Tells screen readers alone. */
    announce(text) {
      if (!message.classList.contains("shown")) message.textContent = text;
    },
    download(name, blob) {
      const link = make("a", {href: URL.createObjectURL(blob), download: name});
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    },
    saveState: () => services.download("circuit-state.json", new Blob([JSON.stringify(store.toJSON(), null, 1)], {type: "application/json"})),
    loadState: () => chooseFile(".json", (text) => takeOn(store, services, () => JSON.parse(text))),
    picture: (format) => exportPicture(format, data, store, services),
    toggleTheme: () => store.update({theme: isDark(store) ? "light" : "dark"}),
    toggleFull: (name = document.activeElement?.closest(".pane")?.dataset.pane ?? "graph") =>
      store.update({panes: {...store.state.panes, full: store.state.panes.full ? null : name}}),
    search: () => services.searchBox?.focus(),
    help: () => services.helpBox?.toggle(),
    /** Closes what lies above the page; false where nothing does. */
    closeTop() {
      if (services.helpBox?.close()) return true;
      if (store.state.panes.full) services.toggleFull();
      else return false;
      return true;
    },
  };
  return services;
}

/** Title bar and body of a pane; `services.toolsOf(body)` is where a pane puts buttons. Returns the body. */
function framePane(name, title, store) {
  const pane = document.getElementById(`${name}-pane`);
  pane.dataset.pane = name;
  const full = button("⤢", "Let this pane fill the window, or not (M)", () =>
    store.update({panes: {...store.state.panes, full: store.state.panes.full === name ? null : name}}));
  const body = make("div", {className: "body"});
  pane.append(make("header", {}, make("h2", {textContent: title}), make("div", {className: "tools"}), full), body);
  return body;
}

/** The place for buttons in the title bar of the pane with this body. */
function toolsOf(body) {
  return body.previousElementSibling.querySelector(".tools");
}

function createSplitters(main, store) {
  const kinds = {column: ["x", "vertical"], left: ["y", "horizontal"], right: ["y", "horizontal"]};
  for (const [key, [axis, orientation]] of Object.entries(kinds)) {
    const splitter = main.appendChild(make("div", {
      className: `splitter ${key}`, tabIndex: 0, role: "separator", "aria-orientation": orientation, "aria-label": `Resize panes (${key})`,
    }));
    const move = (share) => store.update({panes: {...store.state.panes, [key]: clamp(share, 0.1, 0.9)}});
    splitter.addEventListener("pointerdown", (event) => splitter.setPointerCapture(event.pointerId));
    splitter.addEventListener("pointermove", (event) => {
      if (!splitter.hasPointerCapture(event.pointerId)) return;
      const box = main.getBoundingClientRect();
      move(axis === "x" ? (event.clientX - box.left) / box.width : (event.clientY - box.top) / box.height);
    });
    splitter.addEventListener("keydown", (event) => {
      const by = {ArrowLeft: -0.02, ArrowUp: -0.02, ArrowRight: 0.02, ArrowDown: 0.02}[event.key];
      if (!by) return;
      event.stopPropagation();
      event.preventDefault();
      move(store.state.panes[key] + by);
    });
  }
  const apply = ({panes}) => {
    for (const key of Object.keys(kinds)) main.style.setProperty(`--${key}`, String(panes[key]));
    main.classList.toggle("full", panes.full !== null);
    for (const pane of main.querySelectorAll(".pane")) pane.classList.toggle("filling", pane.dataset.pane === panes.full);
  };
  store.subscribe(["panes"], apply);
  apply(store.state);
}

/** `auto` is what the system prefers. */
function isDark({state: {theme}}) {
  return theme === "dark" || (theme === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
}

function applyTheme(store) {
  document.documentElement.dataset.theme = isDark(store) ? "dark" : "light";
}

function readAddress(store, services) {
  if (location.hash.length > 1) takeOn(store, services, () => ({version: STATE_VERSION, ...decodeHash(location.hash)}), {undo: false});
}

/** Takes on a saved state, and says what could not be. */
function takeOn(store, services, read, options = {}) {
  try {
    const missing = store.load(read(), options);
    if (missing) services.say(`${missing} nodes of the saved state are not in this graph`);
  } catch (error) {
    services.say(`The saved state cannot be read: ${error.message}`);
  }
}

function writeAddress(store, services) {
  clearTimeout(writeAddress.timer);
  writeAddress.timer = setTimeout(() => {
    const {hash, leftOut} = encodeHash(store);
    if (leftOut.length && !writeAddress.said) {
      services.say(`The address has no room for ${leftOut.join(" and ")}: use Save to keep them`);
      writeAddress.said = true;
    }
    try {
      history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
    } catch { /* pages inside a sandbox have no address of their own */ }
  }, 250);
}

function chooseFile(accept, read) {
  const input = make("input", {type: "file", accept});
  input.addEventListener("change", async () => { if (input.files.length) read(await input.files[0].text()); });
  input.click();
}

start();
