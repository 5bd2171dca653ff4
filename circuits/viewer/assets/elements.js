/** Making elements. Texts enter the page through `textContent` and `append` alone, which take them as text. */

/** An element with properties, attributes, `dataset` and `style` from `fields`. */
function make(tag, fields = {}, ...children) {
  return fill(document.createElement(tag), fields, children);
}

/** The same of SVG, whose fields are all attributes. */
function makeSvg(tag, fields = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(fields)) if (value !== null) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function fill(element, fields, children) {
  for (const [name, value] of Object.entries(fields)) {
    if (name === "dataset" || name === "style") Object.assign(element[name], value);
    else if (name in element) element[name] = value;
    else if (value !== null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Text of the graph or of people, kept apart from the writing direction of what stands around it. */
function named(text, className = "") {
  return make("bdi", {textContent: text, className, title: text});
}

/** A button of a pane; tests and keys find it by `data-action`. */
function tool(action, text, title, run) {
  const result = button(text, title, run);
  result.dataset.action = action;
  return result;
}

/**
 * Makes the elements of a list that match a selector one stop of the Tab key: arrow keys, Home and End move the focus among them.
 * Call the result when the list is filled.
 */
function walkWithArrows(list, selector) {
  const itemsOf = () => [...list.querySelectorAll(selector)];
  const enter = (entry, items = itemsOf()) => items.forEach((item) => { item.tabIndex = item === entry ? 0 : -1; });
  list.addEventListener("focusin", ({target}) => { if (target.matches(selector)) enter(target); });
  list.addEventListener("keydown", (event) => {
    const items = itemsOf();
    const at = items.indexOf(document.activeElement);
    const to = {ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: items.length - 1}[event.key];
    if (at < 0 || to === undefined || event.altKey || event.ctrlKey) return;
    event.preventDefault();
    event.stopPropagation();
    items[clamp(to, 0, items.length - 1)].focus();
  });
  return () => enter(itemsOf()[0]);
}

/** A number with three significant digits, with a sign if asked for. */
function formatNumber(value, {sign = false} = {}) {
  const size = Math.abs(value);
  const digits = size >= 1e5 || (size > 0 && size < 1e-3) ? size.toExponential(2) : String(Number(size.toPrecision(3)));
  return (value < 0 ? "−" : sign ? "+" : "") + digits;
}

const wholeNumbers = new Intl.NumberFormat("en");

/** `1 node`, `2,000 nodes`. */
function countOf(count, noun) {
  return `${wholeNumbers.format(count)} ${noun}${count === 1 ? "" : "s"}`;
}

/** Where a node is, in words: `1/345 at Dallas`. */
function placeOf(data, node) {
  const {kind, name, position, layer, part} = data.nodes;
  const what = {
    [KIND.feature]: name[node],
    [KIND.error]: `${part[node] === 1 ? "attention " : ""}error of layer ${layer[node]}`,
    [KIND.token]: `token ${position[node]}`,
    [KIND.position]: `learned position ${position[node]}`,
    [KIND.logit]: "output",
  }[kind[node]];
  const isInput = kind[node] === KIND.token || kind[node] === KIND.position;
  return isInput ? what : `${what.split("@")[0]} at ${data.tokens[position[node]]} (${position[node]})`;
}
