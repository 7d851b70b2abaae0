// The page operators look at: asks the API every few seconds and shows what it says. It changes nothing
// but who is signed in at it.
// Whatever the server says becomes text or an attribute of a known name, never markup.

const EVERY_MS = 5000;
const PATIENCE_MS = 15000;
const MOST_ROWS = 300;
const KEY = "relfleet.token";
const LISTS = {
  rollouts: "/api/v1/rollouts?limit=20",
  cohorts: "/api/v1/cohorts",
  agents: "/api/v1/agents",
  audit: "/api/v1/audit?limit=30",
};

const TONES = {
  ok: "good", healthy: "good", completed: "good", passed: "good",
  failed: "bad", halted: "bad", aborted: "bad", rolled_back: "bad",
  silent: "warn", held: "warn", pending: "warn", paused: "warn", rolling_back: "warn",
  running: "busy", open: "busy", soaking: "busy", scheduled: "busy",
  downloading: "busy", staged: "busy", trial: "busy", offered: "busy",
};
const URGENCY = ["pending", "failed", "silent", "late", "held", "ok", "gone", "retired"];
const WORKING = ["offered", "downloading", "staged", "trial"];
const FAILED = ["failed", "rolled_back", "silent"];

const page = { open: false, lists: null, agent: null, rollout: null, now: Date.now(), timer: 0, turn: 0 };
const at = (id) => document.getElementById(id);

// --- small things ------------------------------------------------------------------------------------

const words = (text) => String(text ?? "").replaceAll("_", " ");
const sum = (counters, names) => names.reduce((total, name) => total + (counters[name] || 0), 0);
const tokenNow = () => sessionStorage.getItem(KEY);

function ago(iso) {
  const seconds = Math.max(0, Math.round((page.now - Date.parse(iso)) / 1000));
  if (seconds < 60) return `${seconds} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86400)} d ago`;
}

function clockTime(iso) {
  const time = new Date(iso);
  const today = time.toDateString() === new Date(page.now).toDateString();
  return today ? time.toLocaleTimeString() : time.toLocaleString();
}

// Text that stays the same is not touched, or a screen reader would say it again.
function setText(id, text) {
  if (at(id).textContent !== text) at(id).textContent = text;
}

function tally(items, nameOf) {
  const counts = new Map();
  for (const item of items) counts.set(nameOf(item), (counts.get(nameOf(item)) || 0) + 1);
  return counts;
}

// --- nodes -------------------------------------------------------------------------------------------

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.flat().filter((child) => child !== null && child !== ""));
  return node;
}

const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const state = (name, ...more) => make("span", { class: `state ${TONES[name] || ""}` }, words(name), ...more);
const since = (iso) => make("time", { datetime: iso, title: new Date(iso).toLocaleString() }, ago(iso));
const cell = (content, kind = "") => make("td", { class: kind }, content);
const soft = (text) => (text ? make("span", { class: "soft" }, text) : null);
const heading = (...content) => make("th", { scope: "row" }, ...content);

// Makes `old` equal to `fresh` in place, so that focus, selection and scrolling survive a refresh.
function mend(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  if (old.nodeName !== fresh.nodeName || old.nodeType !== Node.ELEMENT_NODE) {
    old.replaceWith(fresh);
    return;
  }
  for (const name of old.getAttributeNames()) if (!fresh.hasAttribute(name)) old.removeAttribute(name);
  for (const name of fresh.getAttributeNames()) old.setAttribute(name, fresh.getAttribute(name));
  mendChildren(old, [...fresh.childNodes]);
}

function mendChildren(parent, fresh) {
  const old = [...parent.childNodes];
  for (const extra of old.slice(fresh.length)) extra.remove();
  fresh.forEach((child, place) => (place < old.length ? mend(old[place], child) : parent.append(child)));
}

function showRows(id, rows, otherwise) {
  const columns = at(id).parentNode.querySelectorAll("thead th").length;
  const empty = make("tr", {}, make("td", { colspan: columns, class: "empty" }, otherwise));
  mendChildren(at(id), rows.length ? rows : [empty]);
}

// --- the fleet in one line ---------------------------------------------------------------------------

const chip = (filter, ...content) =>
  make("li", {}, make("button", { type: "button", "data-filter": filter }, ...content));

function showSummary(agents, more) {
  const count = (number) => make("b", {}, number.toLocaleString());
  const states = tally(agents, (agent) => agent.state);
  const versions = [...tally(agents, (agent) => agent.version)].sort((one, two) => two[1] - one[1]);
  mendChildren(at("summary"), [
    chip("", count(agents.length), more ? "+ agents" : agents.length === 1 ? " agent" : " agents"),
    ...URGENCY.filter((name) => states.has(name)).map((name) =>
      chip(`state:${name}`, state(name, " ", count(states.get(name))))),
    make("li", { class: "gap" }),
    ...versions.slice(0, 8).map(([version, number]) =>
      chip(`version:${version}`, version || "nothing yet", " × ", count(number))),
  ]);
}

// --- rollouts ----------------------------------------------------------------------------------------

function goalOf(stage, members) {
  if (stage.count !== null) return Math.min(stage.count, members);
  return Math.min(members, Math.max(1, Math.ceil((stage.share_bp * members) / 10000)));
}

function stageState(rollout, place) {
  if (place < rollout.stage) return "passed";
  return place === rollout.stage ? rollout.stage_state : "pending";
}

// The outcomes stand in line, healthy ones first; each stage shows its own part of that line.
function outcomes(counters) {
  const parts = [["good", ["healthy"]], ["bad", FAILED], ["busy", WORKING]];
  let end = 0;
  return parts.map(([tone, names]) => ({ tone, start: end, end: (end += sum(counters, names)) }));
}

function bar(line, from, to) {
  const within = (place) => Math.min(Math.max(place, from), to);
  const share = (number) => `${(100 * number) / Math.max(1, to - from)}%`;
  const rects = line.map(({ tone, start, end }) => {
    const [left, right] = [within(start), within(end)];
    const box = { x: share(left - from), width: share(right - left), height: "100%" };
    return right > left ? draw("rect", { class: `fill-${tone}`, ...box }) : null;
  });
  return draw("svg", { "aria-hidden": "true" }, rects);
}

// A stage that has passed is full: agents that came to the cohort later, or stood aside, leave no gap in it.
function stageBar(rollout, place) {
  const goals = rollout.stages.map((stage) => goalOf(stage, rollout.members));
  const line = outcomes(rollout.counters);
  const from = place ? goals[place - 1] : 0;
  if (stageState(rollout, place) !== "passed") return bar(line, from, goals[place]);
  const to = Math.min(goals[place], line.at(-1).end);
  return to > from ? bar(line, from, to) : bar([{ tone: "good", start: 0, end: 1 }], 0, 1);
}

function stageItem(rollout, place) {
  const stage = rollout.stages[place];
  const agents = stage.count === 1 ? "1 agent" : `${stage.count} agents`;
  const label = stage.count === null ? `${stage.share_bp / 100}%` : agents;
  return make("li", { class: place === rollout.stage ? "current" : "" },
    stageBar(rollout, place), label, make("span", { class: "word" }, ` ${stageState(rollout, place)}`));
}

function counterItems(rollout) {
  const { counters, members } = rollout;
  const always = [["healthy", counters.healthy], ["failed", counters.failed], ["rolled_back", counters.rolled_back]];
  const others = [["silent", counters.silent], ["skipped", counters.skipped]].filter(([, number]) => number);
  const working = sum(counters, WORKING);
  return [
    ...always.concat(others).map(([name, number]) =>
      make("li", { class: number ? `state ${TONES[name] || ""}` : "soft" }, `${number} ${words(name)}`)),
    working ? make("li", { class: "state busy" }, `${working} on the way`) : null,
    make("li", { class: "soft" }, `${members} in the cohort`),
  ].filter(Boolean);
}

function rolloutItem(rollout) {
  const why = [rollout.reason, rollout.detail].filter(Boolean).join(": ");
  const halted = rollout.stage_state === "halted" && rollout.state === "paused";
  const stages = rollout.stages.map((_, place) => stageItem(rollout, place));
  const opens = { type: "button", class: "link", "aria-haspopup": "dialog" };
  return make("li", {},
    make("div", { class: "head" },
      make("b", {}, make("button", { ...opens, "data-rollout": rollout.id }, rollout.name)),
      make("span", {}, `${rollout.base ?? "nothing"} → `, make("b", {}, rollout.version)),
      soft(`${rollout.product}/${rollout.cohort}`),
      make("span", { class: `state ${halted ? "bad" : TONES[rollout.state] || ""}` },
        words(rollout.state), why ? ` (${why})` : ""),
      make("span", { class: "soft" }, since(rollout.created_at), ` by ${rollout.created_by}`)),
    make("ol", { class: "stages", "aria-label": "Stages" }, stages),
    make("ul", { class: "counters" }, counterItems(rollout)));
}

function showRollouts(rollouts) {
  const none = make("li", { class: "soft" }, "No rollout yet: release rollout start VERSION --cohort NAME");
  mendChildren(at("rollouts"), rollouts.length ? rollouts.map(rolloutItem) : [none]);
}

// --- cohorts and audit -------------------------------------------------------------------------------

function cohortVersion(cohort) {
  const { base, progress = 0, release } = cohort.directive ?? {};
  const settled = progress === 10000 ? release : base;
  if (progress > 0 && progress < 10000) return `${base ?? "nothing"} → ${release} at ${progress / 100}%`;
  return settled ?? cohort.base ?? "–";
}

function cohortMarks(cohort) {
  const mode = cohort.directive?.mode ?? "enabled";
  const until = cohort.frozen_until ? ` until ${new Date(cohort.frozen_until).toLocaleString()}` : "";
  const why = (act) => (act?.reason ? `: ${act.reason}` : "");
  const marks = [
    cohort.pin ? `pinned to ${cohort.pin}${why(cohort.pinned)}` : "",
    cohort.frozen ? `frozen${until}${why(cohort.freeze)}` : "",
    cohort.frozen || mode === "enabled" ? "" : mode,
  ];
  return marks.filter(Boolean).map((mark) => make("span", { class: "state warn mark" }, mark));
}

function cohortRow(cohort) {
  return make("tr", {},
    heading(cohort.name, soft(` ${cohort.product}`)),
    cell(cohort.match || "every agent", cohort.match ? "any minor mono" : "minor soft"),
    make("td", {}, cohortVersion(cohort), cohortMarks(cohort)),
    cell(cohort.agents.toLocaleString(), "number"),
    cell(`${cohort.directive_revision}`, "number minor"));
}

function detailText(detail) {
  const said = Object.entries(detail).filter(([, value]) => value !== "" && value !== null);
  const text = (value) => (typeof value === "object" ? JSON.stringify(value) : value);
  return said.map(([name, value]) => `${name} ${text(value)}`).join(" · ");
}

function auditRow(entry) {
  return make("tr", {},
    make("td", { class: "seen" }, since(entry.at)), cell(entry.actor), cell(entry.action),
    cell(entry.subject, "any"), cell(detailText(entry.detail), "any minor soft"));
}

// --- agents ------------------------------------------------------------------------------------------

function marksOf(agent) {
  const labels = Object.entries({ ...agent.labels, ...agent.operator_labels });
  return [
    `state:${agent.state}`, `version:${agent.version}`, `cohort:${agent.cohort ?? ""}`, `phase:${agent.phase}`,
    agent.id, agent.platform, agent.reason, agent.detail, ...labels.map(([name, value]) => `${name}=${value}`),
  ].map((mark) => mark.toLowerCase());
}

// A word with a colon is one whole mark, as the buttons of the summary write it; any other is a part of one.
function isWanted(agent, wanted) {
  const marks = marksOf(agent);
  return wanted.every((word) => marks.some((mark) => (word.includes(":") ? mark === word : mark.includes(word))));
}

function byUrgency(one, two) {
  const [first, second] = [one, two].map((agent) => URGENCY.indexOf(agent.state));
  return first - second || one.id.localeCompare(two.id, undefined, { numeric: true });
}

function agentRow(agent) {
  const name = { type: "button", class: "link", "data-agent": agent.id, "aria-haspopup": "dialog" };
  const phase = agent.phase === "idle" ? "" : ` ${words(agent.phase)}`;
  return make("tr", {},
    heading(make("button", name, agent.id)),
    make("td", {}, state(agent.state), soft(phase)),
    cell(agent.version || "–", "any"), cell(agent.cohort ?? "–", "any minor"),
    make("td", { class: "seen" }, since(agent.seen_at)),
    make("td", { class: "any minor" }, words(agent.reason), soft(agent.detail && ` ${agent.detail}`)));
}

function showAgents(agents, more) {
  const wanted = at("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = agents.filter((agent) => isWanted(agent, wanted)).sort(byUrgency);
  const first = more ? `; only the first ${agents.length.toLocaleString()} are looked at` : "";
  const some = found.length > MOST_ROWS ? `${MOST_ROWS} of ` : "";
  setText("shown", `${some}${found.length.toLocaleString()} shown${first}`);
  const none = agents.length ? "No agent fits the filter." : "No agent has enrolled yet.";
  showRows("agents", found.slice(0, MOST_ROWS).map(agentRow), none);
}

function linkItem(link) {
  const then = link.then ? make("span", { class: "then" }, "→ ", make("code", {}, link.then)) : null;
  const [tone, word] = link.ok ? ["good", "ok"] : ["bad", "no"];
  return make("li", {}, make("span", { class: `state ${tone}` }, word), ` ${link.text}`, then);
}

function eventRow(event) {
  const why = [words(event.reason), event.detail].filter(Boolean).join(": ");
  return make("tr", {},
    make("td", { class: "seen" }, make("time", { datetime: event.at }, clockTime(event.at))),
    cell(event.version, "any"), make("td", {}, state(event.state), soft(why && ` ${why}`)));
}

function factRow([name, fact]) {
  return make("tr", {}, heading(name), cell(`${fact.value}`, "any"), cell(fact.origin, "soft"));
}

async function showAgent(id) {
  const name = encodeURIComponent(id);
  const [agent, why] = await Promise.all([ask(`/api/v1/agents/${name}`), ask(`/api/v1/agents/${name}/why`)]);
  if (page.agent !== id) return;
  setText("agent-title", id);
  setText("agent-summary", why.summary);
  mendChildren(at("agent-why"), why.chain.map(linkItem));
  showRows("agent-facts", Object.entries(agent.facts).map(factRow), "Nothing is known of it.");
  showRows("agent-events", agent.events.map(eventRow), "It has reported no step yet.");
  if (!at("agent").open) at("agent").showModal();
}

function momentRow(event) {
  const why = [words(event.reason), event.detail].filter(Boolean).join(": ");
  return make("tr", {},
    make("td", { class: "seen" }, make("time", { datetime: event.at }, clockTime(event.at))),
    cell(`${event.stage + 1}`, "number"), make("td", {}, words(event.event), soft(why && ` ${why}`)),
    cell(event.actor || "server"));
}

async function showRollout(id) {
  const path = `/api/v1/rollouts/${id}`;
  const [rollout, why] = await Promise.all([ask(path), ask(`/api/v1/rollouts/${id}/why`)]);
  if (page.rollout !== id) return;
  setText("rollout-title", rollout.name);
  setText("rollout-summary", why.summary);
  mendChildren(at("rollout-why"), why.chain.map(linkItem));
  setText("rollout-next", why.next ? `Next: ${why.next.text}.` : "");
  showRows("rollout-events", rollout.events.map(momentRow), "Nothing has happened yet.");
  if (!at("rollout").open) at("rollout").showModal();
}

// --- asking ------------------------------------------------------------------------------------------

class Unanswered extends Error {
  constructor(text, status = 0, retryAfter = 0, reason = "") {
    super(text);
    Object.assign(this, { status, reason, retryMs: 1000 * (Number(retryAfter) || 0) });
  }
}

async function refusal(answer) {
  const problem = await answer.json().catch(() => ({}));
  const text = [problem.title, problem.detail].filter(Boolean).join(": ") || `the server answered ${answer.status}`;
  return new Unanswered(text, answer.status, answer.headers.get("Retry-After"), problem.reason);
}

// Who signed in with the provider has no token: the browser sends a cookie by itself, which no script can read.
async function ask(path) {
  const headers = tokenNow() ? { Authorization: `Bearer ${tokenNow()}` } : {};
  const away = () => { throw new Unanswered("the server does not answer; what is shown may be old"); };
  const signal = AbortSignal.timeout(PATIENCE_MS);
  const answer = await fetch(path, { headers, signal, cache: "no-store" }).catch(away);
  page.now = Date.parse(answer.headers.get("Date")) || Date.now();
  if (!answer.ok) throw await refusal(answer);
  return answer.json().catch(away);
}

function say(text, tone) {
  at("status").className = tone;
  setText("status", text);
}

function show() {
  const { rollouts, cohorts, agents, audit } = page.lists;
  showSummary(agents.items, agents.next);
  showRollouts(rollouts.items);
  showRows("cohorts", cohorts.items.map(cohortRow), "No cohort yet: release cohort create NAME");
  showAgents(agents.items, agents.next);
  showRows("audit", audit.items.map(auditRow), "Nothing has been done yet.");
  at("fleet").hidden = false;
}

async function askAll() {
  const names = Object.keys(LISTS);
  const answers = await Promise.all(names.map((name) => ask(LISTS[name])));
  return Object.fromEntries(names.map((name, place) => [name, answers[place]]));
}

// One turn at a time: what an earlier one still learns after a sign-in or sign-out is dropped.
async function refresh() {
  clearTimeout(page.timer);
  if (!page.open || document.hidden) return;
  const turn = ++page.turn;
  let pause = EVERY_MS;
  try {
    const lists = await askAll();
    if (turn !== page.turn) return;
    page.lists = lists;
    show();
    if (page.agent) await showAgent(page.agent);
    if (page.rollout) await showRollout(page.rollout);
    say("Live", "good");
  } catch (error) {
    if (turn !== page.turn) return;
    pause = Math.max(pause, error.retryMs || 0);
    explain(error);
  }
  if (turn === page.turn) page.timer = setTimeout(refresh, pause);
}

function explain(error) {
  if (error.status === 401) return signOut(`Signed out: ${error.message}`);
  if (error instanceof Unanswered) return say(`Trying again: ${error.message}`, "bad");
  console.error(error);
  return say("This page made a mistake; the browser's console says which", "bad");
}

// --- signing in and out ------------------------------------------------------------------------------

// The token comes behind the # of the address, which is never sent, and does not stay there.
function takeToken() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!token) return false;
  history.replaceState(null, "", location.pathname + location.search);
  sessionStorage.setItem(KEY, token);
  return true;
}

function signOut(text) {
  sessionStorage.removeItem(KEY);
  clearTimeout(page.timer);
  Object.assign(page, { open: false, lists: null, agent: null, rollout: null, turn: page.turn + 1 });
  for (const id of ["agent", "rollout"]) at(id).close();
  for (const id of ["fleet", "who"]) at(id).hidden = true;
  for (const id of ["summary", "rollouts", "cohorts", "agents", "audit"]) at(id).replaceChildren();
  at("signin").hidden = false;
  at("token").focus();
  say(text, "");
  offerProvider();
}

async function offerProvider() {
  const { provider } = await ask("/api/v1/signin").catch(() => ({ provider: null }));
  at("provider").hidden = !provider;
  if (provider) setText("provider-name", new URL(provider).host);
}

function open() {
  page.open = true;
  at("who").hidden = false;
  refresh();
}

async function start() {
  const token = tokenNow();
  at("signin").hidden = true;
  say("Asking the server …", "");
  if (token) open();
  const person = await ask("/api/v1/whoami").catch((error) => error);
  if (token !== tokenNow()) return;
  const known = !(person instanceof Error);
  at("name").textContent = known ? `${person.name} (${person.role})` : "";
  if (token) return;
  if (known) open();
  else signOut(person.reason === "not-signed-in" ? "" : person.message);
}

async function leave() {
  if (tokenNow()) return signOut("Signed out.");
  const answer = await fetch("/signout", { method: "POST" }).catch(() => ({ ok: false, status: 0 }));
  if (answer.ok || answer.status === 401) signOut("Signed out.");
  else say("Still signed in: the server did not take the sign-out", "bad");
}

function signIn(event) {
  event.preventDefault();
  sessionStorage.setItem(KEY, at("token").value.trim());
  at("token").value = "";
  start();
}

function openAgent(event) {
  const button = event.target.closest("[data-agent]");
  if (!button) return;
  page.agent = button.dataset.agent;
  showAgent(page.agent).catch(explain);
}

function openRollout(event) {
  const button = event.target.closest("[data-rollout]");
  if (!button) return;
  page.rollout = button.dataset.rollout;
  showRollout(page.rollout).catch(explain);
}

function useFilter(event) {
  const button = event.target.closest("[data-filter]");
  if (!button) return;
  at("filter").value = button.dataset.filter ?? "";
  show();
}

at("signin").addEventListener("submit", signIn);
at("signout").addEventListener("click", leave);
at("agents").addEventListener("click", openAgent);
at("rollouts").addEventListener("click", openRollout);
at("summary").addEventListener("click", useFilter);
at("filter").addEventListener("input", () => page.lists && show());
at("close").addEventListener("click", () => at("agent").close());
at("agent").addEventListener("close", () => { page.agent = null; });
at("close-rollout").addEventListener("click", () => at("rollout").close());
at("rollout").addEventListener("close", () => { page.rollout = null; });
addEventListener("hashchange", () => takeToken() && start());
document.addEventListener("visibilitychange", refresh);
takeToken();
start();
