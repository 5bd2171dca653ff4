/** The bar above the panes: what is shown and hidden, and the controls of the whole page. */

function createControls(element, data, store, services) {
  element.append(
    titleOf(data),
    make("div", {id: "search"}), // filled by search.js
    group("files", [
      button("SVG", "Save the graph as a picture (SVG)", () => services.picture("svg")),
      button("PNG", "Save the graph as a picture (PNG)", () => services.picture("png")),
      button("Save", "Save pins, groups, labels and view to a file", services.saveState),
      button("Load", "Load a saved state", services.loadState),
    ]),
    group("page", [
      button("◐", "Light or dark (T)", services.toggleTheme),
      button("?", "Help and keys (?)", services.help),
    ]),
    group("view", [
      group("history", [
        button("←", "Back to the node before (Alt+Left)", store.back, "back"),
        button("→", "Forward (Alt+Right)", store.forward, "forward"),
        button("↶", "Undo (U or Ctrl+Z)", store.undo, "undo"),
        button("↷", "Redo (Ctrl+Shift+Z)", store.redo, "redo"),
      ]),
      influenceControl(data, store),
      directionControl(store),
      topLinksControl(store),
    ]),
  );
  const buttons = [...element.querySelectorAll("[data-can]")];
  const refresh = () => buttons.forEach((item) => { item.disabled = !store.can()[item.dataset.can]; });
  store.subscribe([...UNDOABLE, "selected"], refresh);
  refresh();
}

/** A button; `can` names what `store.can()` says of it. */
function button(text, title, action, can = null) {
  const result = make("button", {type: "button", textContent: text, title, "aria-label": title, dataset: can ? {can} : {}});
  result.addEventListener("click", () => action());
  return result;
}

function group(name, children) {
  return make("div", {className: `group ${name}`}, ...children);
}

function titleOf(data) {
  const {label, name} = data.nodes;
  const answer = strongestOutput(data);
  const output = label[answer] || name[answer];
  return make("h1", {title: data.prompt},
    make("bdi", {className: "prompt", textContent: data.prompt}), make("span", {textContent: "→"}), make("bdi", {className: "answer", textContent: output}));
}

function labelled(text, control, title) {
  return make("label", {title}, text, " ", control);
}

function directionControl(store) {
  const names = {inputs: "Inputs", both: "Both", outputs: "Outputs"};
  const buttons = Object.entries(names).map(([direction, name]) => {
    const item = button(name, `Show ${direction} of the selected node`, () => store.update({direction}));
    item.dataset.direction = direction;
    return item;
  });
  const result = group("direction segments", buttons);
  result.setAttribute("role", "group");
  result.setAttribute("aria-label", "Links shown");
  const refresh = ({direction}) => buttons.forEach((item) => item.setAttribute("aria-pressed", item.dataset.direction === direction));
  store.subscribe(["direction"], refresh);
  refresh(store.state);
  return result;
}

function topLinksControl(store) {
  const input = make("input", {type: "number", min: 1, max: 999, value: store.state.topLinks, id: "top-links"});
  input.addEventListener("change", () => {
    const value = Number(input.value);
    if (Number.isInteger(value) && value >= 1) store.update({topLinks: value});
    input.value = store.state.topLinks;
  });
  store.subscribe(["topLinks"], ({topLinks}) => { input.value = topLinks; });
  return labelled("Top links", input, "Strongest links drawn of a node, in each direction");
}

/** The slider is logarithmic: a step is a factor. Beside it stand the number of hidden nodes and their influence. */
function influenceControl(data, store) {
  const steps = 200;
  const positive = data.nodes.influence.filter((value) => value > 0).sort();
  const [least, most] = [Math.max(positive[0] ?? 1e-6, 1e-8), Math.max(positive.at(-1) ?? 1, 1e-6)];
  const toValue = (step) => (step === 0 ? 0 : least * (most / least) ** (step / steps));
  const toStep = (value) => (value < least ? 0 : clamp(Math.round((steps * Math.log(value / least)) / Math.log(most / least)), 0, steps));
  const input = make("input", {type: "range", min: 0, max: steps, id: "min-influence"});
  const said = make("output", {id: "hidden"});
  const refresh = (state) => {
    input.value = toStep(state.minInfluence);
    input.setAttribute("aria-valuetext", `at least ${formatShare(state.minInfluence)}`);
    const {hidden, share} = shownNodes(data, state);
    const total = data.nodes.count.toLocaleString("en");
    said.textContent = hidden ? `${hidden.toLocaleString("en")} of ${total} nodes hidden: ${formatShare(share)} of influence` : `all ${total} nodes shown`;
    said.classList.toggle("hiding", hidden > 0);
  };
  input.addEventListener("input", () => store.update({minInfluence: toValue(Number(input.value))}));
  store.subscribe(["minInfluence", "pinned", "selected", "path"], refresh);
  refresh(store.state);
  return group("influence", [labelled("Least influence", input, "Hide nodes with less influence; tokens, outputs and pinned nodes stay"), said]);
}
