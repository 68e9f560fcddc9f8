// Shows the jobs, and asks for them again every two seconds. Everybody who may create pods chooses names, so they are
// only ever set as text.
"use strict";

const PERIOD = 2000;
const TIMEOUT = 9000;
const DEBOUNCE = 200;
const LIMIT = 100;

const byId = (id) => document.getElementById(id);
const body = document.querySelector("#jobs tbody");
const rows = new Map();
const count = new Intl.NumberFormat("en");

// The tokens of the pages up to this one; the first page has none.
let tokens = [""];
let next = null;
let tag = null;
let timer = null;
let request = null;
let isPaused = false;
let updatedAt = null;

function element(name, className, parent) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (parent) parent.append(made);
  return made;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function setAttribute(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

function percent(share) {
  return `${Math.round(share * 1000) / 10}%`;
}

function executors(number) {
  return `${count.format(number)} ${number === 1 ? "executor" : "executors"}`;
}

// One line of text for each, in this cell.
function setLines(cell, lines) {
  while (cell.childElementCount > lines.length) cell.lastElementChild.remove();
  lines.forEach(([text, className], at) => {
    const line = cell.children[at] ?? element("span", "", cell);
    setText(line, text);
    const wanted = `line ${className}`.trim();
    if (line.className !== wanted) line.className = wanted;
  });
}

function makeRow() {
  const row = element("tr");
  row.setAttribute("role", "row");
  const cell = (name, label) => {
    const made = element(name, "", row);
    made.setAttribute("role", name === "th" ? "rowheader" : "cell");
    if (name === "th") made.scope = "row";
    if (label) made.dataset.label = label;
    return made;
  };
  const job = cell("th");
  const distance = cell("td", "Distance");
  const bars = cell("td", "Executors");
  bars.className = "executors";
  const wanted = cell("td", "Wanted");
  const risk = cell("td", "Risk");
  const spot = cell("td", "Spot");
  const bar = element("div", "bar", bars);
  bar.setAttribute("role", "img");
  const parts = element("div", "parts", bar);
  const part = Object.fromEntries(
    ["spot", "on-demand", "pending", "unknown"].map((name) => [name, element("span", name, parts)]));
  const mark = element("span", "mark", bar);
  const numbers = element("span", "line soft", bars);
  return { row, job, distance, bar, part, mark, numbers, wanted, risk, spot };
}

// Where the wanted share of spot ends in the bar, from 0 to 1; null if the job is opted out or has no executor.
function wantedPosition(job, all) {
  if (job.wantedRatio === null || all === 0) return null;
  return (Math.max(all - job.onDemandBase, 0) * job.wantedRatio) / all;
}

function wantedText(job) {
  if (job.wantedRatio === null) return "opted out";
  const base = job.onDemandBase > 0 ? ` beyond ${count.format(job.onDemandBase)} on-demand` : "";
  return `${percent(job.wantedRatio)} spot${base}`;
}

const SOURCES = {
  driver: "stated by the driver",
  previous: "the driver's previous value",
  ledger: "from the ledger",
  default: "the default",
};

// With the date if it is not today.
function timeText(time) {
  if (time === null) return "an unknown time";
  const at = new Date(time);
  const isToday = at.toDateString() === new Date().toDateString();
  return isToday ? at.toLocaleTimeString() : at.toLocaleString();
}

function spotLines(job) {
  const state = job.spotState;
  const lines = [];
  if (state.state === "closed") {
    lines.push([`closed since ${timeText(state.since)}`, "bad"], [`next try at ${timeText(state.retryAt)}`, "soft"]);
  } else if (state.state === "probing") {
    lines.push([`probing; closed since ${timeText(state.since)}`, "bad"], [`by ${state.executor}`, "soft"]);
  } else {
    lines.push(["open", ""]);
  }
  for (const invalid of job.invalidAnnotations) lines.push([`${invalid.annotation}: ${invalid.problem}`, "bad soft"]);
  return lines;
}

function updateRow(shown, job) {
  setLines(shown.job, [
    [job.jobId, ""],
    [job.namespace, "soft"],
    ...(job.driver === null ? [] : [[job.driver, "soft"]]),
  ]);
  const sign = job.distance > 0 ? "+" : job.distance < 0 ? "−" : "";
  const where = job.distance === 0 ? "" : job.distance > 0 ? "too many on spot" : "too few on spot";
  setLines(shown.distance, [
    [`${sign}${count.format(Math.abs(job.distance))}`, job.distance === 0 ? "number" : "number bad"],
    ...(where ? [[where, "soft"]] : []),
  ]);
  const numbers = { spot: job.spot, "on-demand": job.onDemand, pending: job.pending, unknown: job.unknown };
  const all = job.spot + job.onDemand + job.pending + job.unknown;
  const texts = [];
  for (const [name, number] of Object.entries(numbers)) {
    shown.part[name].style.width = all === 0 ? "0" : `${(100 * number) / all}%`;
    if (number > 0 || name === "spot" || name === "on-demand") texts.push(`${count.format(number)} ${name}`);
  }
  const position = wantedPosition(job, all);
  shown.mark.hidden = position === null;
  if (position !== null) shown.mark.style.left = `${100 * position}%`;
  setText(shown.numbers, texts.join(", "));
  setAttribute(shown.bar, "aria-label", `${texts.join(", ")}; wanted: ${wantedText(job)}`);
  setLines(shown.wanted, [
    [wantedText(job), ""],
    ...(job.wantedRatio === null ? [] : [[SOURCES[job.source] ?? job.source, "soft"]]),
  ]);
  const node = job.largestNode;
  const pool = job.largestPool;
  setLines(shown.risk, [
    [percent(job.risk), "number"],
    ...(node === null ? [] : [[`${executors(node.executors)} on ${node.name}`, "soft"]]),
    ...(pool === null ? [] : [[`${executors(pool.executors)} in ${pool.instanceType}, ${pool.zone}`, "soft"]]),
  ]);
  setLines(shown.spot, spotLines(job));
}

function show(page) {
  const listed = new Set();
  let at = body.firstElementChild;
  for (const job of page.jobs) {
    const key = JSON.stringify([job.namespace, job.jobId, job.driver]);
    listed.add(key);
    let shown = rows.get(key);
    if (shown === undefined) {
      shown = makeRow();
      rows.set(key, shown);
    }
    updateRow(shown, job);
    if (shown.row === at) at = at.nextElementSibling;
    else body.insertBefore(shown.row, at);
  }
  for (const [key, shown] of rows) {
    if (listed.has(key)) continue;
    shown.row.remove();
    rows.delete(key);
  }
  for (const node of document.querySelectorAll("[data-total]")) {
    setText(node, count.format(page.totals[node.dataset.total]));
  }
  next = page.continue;
  const first = (tokens.length - 1) * LIMIT;
  const total = page.totals.jobs;
  const range = page.jobs.length === 0 ? "" : `${count.format(first + 1)} to ${count.format(first + page.jobs.length)} of ${count.format(total)}`;
  setText(byId("range"), range);
  byId("empty").hidden = page.jobs.length > 0;
  byId("next").disabled = next === null;
  byId("previous").disabled = tokens.length === 1;
}

// Screen readers read each change of the status, so the time of each update is a title alone.
function showStatus(text, isBad) {
  const status = byId("status");
  setText(status, text);
  status.classList.toggle("bad", isBad);
  status.title = updatedAt === null ? "" : `Last update: ${updatedAt.toLocaleTimeString()}`;
}

function failed(text) {
  const since = updatedAt === null ? "" : ` What is shown is of ${updatedAt.toLocaleTimeString()}.`;
  showStatus(`${text}${since}`, true);
}

function schedule(after) {
  clearTimeout(timer);
  timer = isPaused || document.hidden ? null : setTimeout(poll, after);
}

async function poll() {
  clearTimeout(timer);
  request?.abort();
  const own = new AbortController();
  request = own;
  const parameters = new URLSearchParams({ limit: LIMIT, sort: byId("sort").value });
  const filter = byId("filter").value.trim();
  const token = tokens[tokens.length - 1];
  if (filter) parameters.set("filter", filter);
  if (token) parameters.set("continue", token);
  const deadline = setTimeout(() => own.abort(), TIMEOUT);
  try {
    const answer = await fetch(`jobs?${parameters}`, {
      signal: own.signal,
      cache: "no-store",
      headers: tag === null ? {} : { "If-None-Match": tag },
    });
    if (answer.status === 200) {
      const page = await answer.json();
      if (request !== own) return;
      tag = answer.headers.get("ETag");
      // The jobs of the last page may have ended.
      if (page.jobs.length === 0 && tokens.length > 1) return restart();
      show(page);
    } else if (answer.status !== 304) {
      const refusal = await answer.json().catch(() => ({}));
      if (request !== own) return;
      return failed(refusal.error ?? `The reconciler answers ${answer.status}.`);
    }
    if (request !== own) return;
    updatedAt = new Date();
    showStatus(isPaused ? "Paused" : "Live", false);
  } catch (error) {
    if (request === own) failed("The reconciler does not answer; trying again.");
  } finally {
    clearTimeout(deadline);
    if (request === own) schedule(PERIOD);
  }
}

// Asks for another page at once.
function turn() {
  tag = null;
  return poll();
}

function restart() {
  tokens = [""];
  return turn();
}

let debounce = null;
byId("filter").addEventListener("input", () => {
  clearTimeout(debounce);
  debounce = setTimeout(restart, DEBOUNCE);
});
byId("sort").addEventListener("change", restart);
byId("next").addEventListener("click", async () => {
  if (next === null) return;
  tokens.push(next);
  await turn();
  byId("jobs").focus();
});
byId("previous").addEventListener("click", async () => {
  if (tokens.length > 1) tokens.pop();
  await turn();
  byId("jobs").focus();
});
byId("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  byId("pause").setAttribute("aria-pressed", String(isPaused));
  if (isPaused) {
    clearTimeout(timer);
    showStatus("Paused", false);
  } else {
    poll();
  }
});
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : isPaused || poll()));
poll();
