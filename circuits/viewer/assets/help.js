/** The overlay that explains the page and lists its keys, and a hint at the first visit. */

const HINT_KEY = "crosstrace-hint-seen";
const EXPLAINED = [
  ["Graph", "Columns are tokens, rows are layers: the prompt below, outputs above. ● feature, ▲ attention feature, ■ token or output, ◆ error (what the crosscoder misses). Size grows with influence. A dashed outline: inputs were not computed."],
  ["Colours", "Blue raises, orange lowers. The selected node's links are coloured by their signed share of the target's input."],
  ["Influence", "The share of the output that reaches a node through all paths. Nothing disappears silently: what the slider hides is counted beside it."],
  ["Scores", "Replacement: the share of the output that is traced back to inputs. Completeness: the share of the nodes' inputs, weighted by influence, that is no error. Of a pinned subgraph everything else counts as error; tokens and outputs are always part of it."],
  ["Subgraph", "Pinned nodes as boxes. A link stands for all edges between two boxes: its share is the signed sum of their weights ÷ the inputs of the target's members."],
];

function createHelp(data, store, services) {
  const dialog = make("dialog", {id: "help", "aria-label": "Help"});
  const close = tool("close-help", "Close", "Close the help (Esc)", () => dialog.close());
  const keys = (services.keys ?? []).map(([names, text]) => make("div", {},
    make("dt", {}, ...names.slice(0, 2).map((name) => make("kbd", {textContent: keyInWords(name)}))), make("dd", {textContent: text})));
  dialog.append(
    make("header", {}, make("h2", {textContent: "How to read and use this page"}), close),
    make("dl", {className: "explained"}, ...EXPLAINED.flatMap(([name, text]) => [make("dt", {textContent: name}), make("dd", {textContent: text})])),
    make("h3", {textContent: "Keys"}), make("dl", {className: "keys"}, ...keys),
    make("p", {className: "soft", textContent: "With a box of the subgraph in focus: arrows walk, Space chooses, Shift and arrows move, Enter opens, F2 renames, Delete unpins, + and - zoom, F fits. In the lists of connections: up and down walk, Enter selects, right and left open and close the heads, Ctrl-click pins."}));
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  document.body.append(dialog);
  showHint();
  return {
    toggle: () => (dialog.open ? dialog.close() : dialog.showModal()),
    close: () => dialog.open && (dialog.close(), true),
  };
}

function keyInWords(name) {
  const arrows = {ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓", Escape: "Esc"};
  return name.split("+").map((part) => arrows[part] ?? (part.length === 1 && part !== part.toLowerCase() ? `Shift+${part}` : part)).join("+") || "+";
}

/** Once, until it is closed; where the browser keeps nothing, once for each page. */
function showHint() {
  const kept = (action) => {
    try { return action(localStorage); } catch { return null; } // a sandboxed page or a strict browser has no storage
  };
  if (kept((storage) => storage.getItem(HINT_KEY))) return;
  const hint = make("aside", {id: "first-hint", role: "note"}, "Click a node to see what flows through it, Ctrl-click to pin it below. Press ? for all keys.");
  const close = tool("close-hint", "Got it", "Do not show this again", () => {
    kept((storage) => storage.setItem(HINT_KEY, "1"));
    hint.remove();
  });
  hint.append(close);
  document.body.append(hint);
}
