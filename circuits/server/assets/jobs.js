/** Requests to the server, and the jobs of its model, on every page. */

const POLL = 400; // milliseconds between looks at jobs that are under way

/** Asks the server; `json` or `body` makes it a change. Throws an Error with the server's message. */
export async function api(path, {json, body} = {}) {
  const options = {};
  if (json !== undefined || body !== undefined) {
    options.method = "POST";
    options.headers = {"Content-Type": body === undefined ? "application/json" : "application/octet-stream"};
    options.body = body ?? JSON.stringify(json);
  }
  let response;
  try {
    response = await fetch(`/api/${path}`, options);
  } catch {
    throw new Error("the server does not answer: is `circuits serve` still running?");
  }
  const answer = await response.json().catch(() => ({error: `the server answered ${response.status}`}));
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

/** An element with properties and children; texts become text. */
export function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Looks at a job until it is finished and gives its facts; `tell` gets them after every look. */
export async function finished(id, tell) {
  for (;;) {
    const {jobs} = await api("jobs");
    const job = jobs.find((known) => known.id === id);
    if (!job) throw new Error("the server knows nothing of this job any more");
    tell(job);
    if (!isActive(job)) return job;
    await new Promise((resolve) => setTimeout(resolve, POLL));
  }
}

export const isActive = (job) => job.state === "waiting" || job.state === "running";

/** What a job does, in words. */
export function jobText(job) {
  if (job.state === "waiting") return job.place ? `waiting, ${job.place} before it` : "waiting";
  return {running: job.progress, done: "done", failed: job.error, cancelled: "cancelled"}[job.state];
}

/** A button that cancels a job. */
export function cancelButton(job) {
  return make("button", {
    type: "button",
    textContent: "Cancel",
    ariaLabel: `Cancel: ${job.title}`,
    onclick: (event) => {
      event.target.disabled = true;
      api(`jobs/${job.id}/cancel`, {json: {}}).catch(() => {});
    },
  });
}
