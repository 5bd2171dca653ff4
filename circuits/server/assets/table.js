/** The table of graphs: search, sort, upload, and traces of prompts. */
import {api, cancelButton, finished, isActive, jobText, make} from "./jobs.js";

const REFRESH = 1500; // milliseconds between looks at graphs whose scores are not there yet
const count = new Intl.NumberFormat("en");
const percent = (value) => `${(100 * value).toFixed(1)} %`;
const COLUMNS = [
  {key: "prompt", title: "Prompt", text: true},
  {key: "answer", title: "Answer", text: true},
  {key: "probability", title: "Probability", show: percent},
  {key: "nodes", title: "Nodes", show: count.format},
  {key: "edges", title: "Edges", show: count.format},
  {key: "replacement", title: "Replacement", show: (value) => value.toFixed(2), hint: "Share of the output that is traced back to tokens"},
  {key: "completeness", title: "Completeness", show: (value) => value.toFixed(2), hint: "How much of what flows into the nodes is no error"},
  {key: "model", title: "Model", text: true},
  {key: "date", title: "Changed", show: dateText},
  {key: "labels", title: "Labels", show: (value) => (value ? count.format(value) : ""), hint: "Labels that were saved here"},
];
const [$, view] = [(selector) => document.querySelector(selector), {query: "", sort: "date", down: true}];
let graphs = [];
let uploadBytes = Infinity;

function dateText(seconds) {
  const date = new Date(1000 * seconds);
  const two = (number) => String(number).padStart(2, "0");
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} ${two(date.getHours())}:${two(date.getMinutes())}`;
}

async function refresh() {
  const answer = await api("graphs");
  ({graphs, upload_bytes: uploadBytes} = answer);
  $("#folder").textContent = answer.folder;
  $("#trace").hidden = answer.model === null;
  $("#model").textContent = answer.model === null ? "" : `in ${answer.model}`;
  draw();
  if (graphs.some((graph) => graph.pending)) setTimeout(() => refresh().catch(say), REFRESH);
}

const fold = (text) => text.normalize("NFKD").toLowerCase();

function shown() {
  const words = fold(view.query).split(/\s+/).filter(Boolean);
  const textOf = ({name, prompt, answer, model, error}) => fold([name, prompt, answer, model, error].filter(Boolean).join("\n"));
  const found = graphs.filter((graph) => words.every((word) => textOf(graph).includes(word)));
  const sign = view.down ? -1 : 1;
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
  return found.sort((first, second) => {
    const [a, b] = [first[view.sort] ?? null, second[view.sort] ?? null];
    if (a === null || b === null) return (a === null) - (b === null); // what is not known comes last, either way
    return sign * compare(a, b) || first.name.localeCompare(second.name);
  });
}

function draw() {
  const rows = shown();
  $("thead").replaceChildren(make("tr", {}, ...COLUMNS.map(head)));
  $("tbody").replaceChildren(...rows.map(row));
  const pending = graphs.filter((graph) => graph.pending).length;
  const found = rows.length === graphs.length ? `${count.format(graphs.length)} graphs` : `${count.format(rows.length)} of ${count.format(graphs.length)} graphs`;
  $("#count").textContent = pending ? `${found}, ${count.format(pending)} not scored yet` : found;
  if (!rows.length) $("tbody").append(make("tr", {}, make("td", {
    colSpan: COLUMNS.length, className: "quiet", textContent: graphs.length ? "No graph fits the search." : "No graphs in this folder yet.",
  })));
  history.replaceState(null, "", `#${new URLSearchParams(view)}`);
}

function head({key, title, text, hint = ""}) {
  const isSorted = view.sort === key;
  const button = make("button", {type: "button", textContent: title, title: hint, onclick: () => sortBy(key, !text)});
  const cell = make("th", {scope: "col", className: text ? "" : "number"}, button);
  if (isSorted) cell.ariaSort = view.down ? "descending" : "ascending";
  return cell;
}

function sortBy(key, startsDown) {
  Object.assign(view, {sort: key, down: view.sort === key ? !view.down : startsDown});
  draw();
  $(`thead th[aria-sort] button`).focus();
}

function row(graph) {
  const link = make("a", {href: `/graph/${encodeURIComponent(graph.name)}`, dir: "auto", textContent: graph.prompt || graph.name});
  const name = make("div", {className: "name", textContent: graph.prompt ? graph.name : ""});
  if (graph.error) {
    const message = make("td", {colSpan: COLUMNS.length - 1, className: "error", textContent: graph.error});
    return make("tr", {}, make("td", {className: "prompt"}, make("span", {textContent: graph.name})), message);
  }
  const cells = COLUMNS.slice(1).map(({key, text, show = String}) => {
    const isKnown = (graph[key] ?? null) !== null;
    const unknown = graph.pending ? "…" : "–";
    const cell = make("td", {className: `${text ? "" : "number"} ${key}`, textContent: isKnown ? show(graph[key]) : unknown});
    if (!isKnown && graph.note) cell.title = graph.note;
    return cell;
  });
  if (graph.savedError) Object.assign(cells.at(-1), {textContent: "damaged", title: graph.savedError});
  return make("tr", {}, make("td", {className: "prompt"}, link, name), ...cells);
}

function say(error) {
  const text = error instanceof Error ? error.message : error;
  Object.assign($("#message"), {textContent: text, className: error instanceof Error ? "error" : ""});
}

// Jobs ------------------------------------------------------------------------------------------------------------------

const watched = new Map(); // id -> list item

async function watch(job) {
  const item = make("li");
  watched.set(job.id, item);
  $("#jobs").append(item);
  const last = await finished(job.id, (now) => {
    const isLink = now.state === "done" && now.result.graph;
    const title = isLink ? make("a", {href: `/graph/${encodeURIComponent(now.result.graph)}`, textContent: now.title}) : make("span", {textContent: now.title});
    const text = make("span", {className: now.state === "failed" ? "error" : "quiet", textContent: jobText(now)});
    const cancel = isActive(now) ? item.querySelector("button") ?? cancelButton(now) : null; // the focus stays where it is
    title.dir = "auto";
    item.className = now.state;
    for (const child of [...item.children]) if (child !== cancel) child.remove();
    item.prepend(title, text);
    if (cancel && !cancel.isConnected) item.append(cancel);
  });
  if (last.state === "done") await refresh();
}

async function watchOthers() {
  const {jobs} = await api("jobs");
  for (const job of jobs) if (isActive(job) && !watched.has(job.id)) watch(job).catch(say);
}

// What the reader does --------------------------------------------------------------------------------------------------

$("#trace").addEventListener("submit", async (event) => {
  event.preventDefault();
  const {prompt, target} = Object.fromEntries(new FormData(event.target));
  say("");
  try {
    const {job} = await api("traces", {json: {prompt, targets: target.trim() ? [target] : []}});
    await watch({id: job});
  } catch (error) {
    say(error);
  }
});

$("#trace textarea").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    $("#trace").requestSubmit();
  }
});

async function upload(files) {
  try {
    for (const file of files) {
      if (file.size > uploadBytes) throw new Error(`${file.name}: expected at most ${count.format(uploadBytes)} bytes`);
      say(`adding ${file.name}…`);
      await api(`upload?name=${encodeURIComponent(file.name)}`, {body: file});
      say(`added ${file.name}`);
    }
  } catch (error) {
    say(error);
  }
  await refresh();
}

$("#upload").addEventListener("change", async (event) => {
  await upload([...event.target.files]).catch(say);
  event.target.value = "";
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  upload([...event.dataTransfer.files]).catch(say);
});

$("#search").addEventListener("input", (event) => {
  view.query = event.target.value;
  draw();
});
document.addEventListener("keydown", (event) => {
  const isTyping = event.target.matches("input, textarea");
  if (event.key === "/" && !isTyping) {
    event.preventDefault();
    $("#search").focus();
  }
  if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
  if (!event.target.matches("#search, tbody a")) return;
  event.preventDefault();
  const places = [$("#search"), ...document.querySelectorAll("tbody a")];
  places[places.indexOf(event.target) + (event.key === "ArrowDown" ? 1 : -1)]?.focus();
});

const kept = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
if (COLUMNS.some(({key}) => key === kept.sort)) Object.assign(view, {sort: kept.sort, down: kept.down === "true"});
$("#search").value = view.query = kept.query ?? "";
refresh().then(watchOthers).catch(say);
