// The list of runs. A row keeps its place while the page is open, so that nothing moves under the pointer.

const GROUPS = { running: "Running", waiting: "Waiting", stopped: "Stopped", done: "Done" };
const FIRST = 50; // rows that are shown at first
const shown = new Map(); // the run and the elements of each row, by id
let order = [];
let chosen = []; // ids, in the order in which they were chosen: the place of a run gives its colour
let most = 1;
let group = null;
let showsAll = false;

const chosenQuery = () => new URLSearchParams(chosen.map((id) => ["run", id])).toString();

function swatch(id) {
  const place = chosen.indexOf(id);
  const dot = element("span", { className: place < 0 ? "swatch" : "swatch drawn", "aria-hidden": "true" });
  if (place >= 0) dot.style.background = `var(${curves.COLOURS[place % curves.COLOURS.length]})`;
  return dot;
}

function ago(time) {
  if (time === null) return "–";
  const seconds = Date.now() / 1000 - time;
  for (const [unit, length, from] of [["d", 86400, 2], ["h", 3600, 1], ["min", 60, 1]]) {
    if (seconds >= length * from) return `${Math.floor(seconds / length)} ${unit} ago`;
  }
  return "just now";
}

function makeRow(run) {
  const cell = (tag, role, properties = {}) => element(tag, { role, ...properties });
  const box = element("input", { type: "checkbox", onchange: () => choose(run.id, box.checked) });
  const parts = {
    box,
    dot: swatch(run.id),
    name: element("bdi"),
    path: element("bdi", { className: "path" }),
    state: cell("td", "cell", { className: "wide-cell" }),
    bar: element("progress", { max: 1 }),
    steps: element("span", { className: "faint" }),
    left: cell("td", "cell", { "data-label": "left" }),
    ettr: cell("td", "cell", { "data-label": "ETTR" }),
    interruptions: cell("td", "cell", { className: "wide-cell" }),
    active: cell("td", "cell", { "data-label": "active" }),
  };
  const names = element("span", {}, parts.name, parts.path);
  const head = cell("th", "rowheader", { scope: "row" });
  head.append(element("label", {}, box, parts.dot, names));
  const progress = cell("td", "cell", { className: "wide-cell" });
  progress.append(parts.bar, parts.steps);
  const row = cell("tr", "row");
  row.append(head, parts.state, progress, parts.left, parts.ettr, parts.interruptions, parts.active);
  return { ...parts, row };
}

function fillRow(run, parts) {
  parts.row.dataset.group = run.group;
  parts.name.textContent = run.name;
  parts.path.textContent = run.place;
  parts.state.replaceChildren(
    element("span", { className: "state", "data-group": run.group }, run.state),
    run.stage ? ` ${run.stage}` : "",
    run.why ? element("span", { className: "why" }, run.why) : "",
  );
  parts.bar.value = run.progress;
  parts.bar.setAttribute("aria-label", `Progress of ${run.label}`);
  const steps = run.step === null ? "" : `, step ${run.step.toLocaleString("en")} of ${run.total_steps.toLocaleString("en")}`;
  parts.steps.textContent = `${run.done} of ${run.stages} stages${steps}`;
  parts.left.textContent = run.left;
  parts.ettr.textContent = run.ettr === null ? "" : run.ettr.toFixed(2);
  parts.interruptions.textContent = run.interruptions;
}

function showRuns(runs) {
  const before = new Map([...shown].map(([id, { run }]) => [id, run]));
  for (const run of runs) {
    const parts = shown.get(run.id)?.parts ?? makeRow(run);
    fillRow(run, parts);
    shown.set(run.id, { run, parts });
    const was = before.get(run.id);
    if (was && was.state !== run.state) announce(`${run.label} is ${run.state}`);
  }
  const ids = runs.map((run) => run.id);
  for (const id of before.keys()) if (!ids.includes(id)) shown.delete(id);
  const added = ids.filter((id) => !before.has(id));
  order = [...added, ...order.filter((id) => shown.has(id))];
  chosen = chosen.filter((id) => shown.has(id));
  if (!before.size && !chosen.length) chosen = ids.slice(0, 1);
  arrange();
}

// Puts the rows that the filters let through into the table.
function arrange() {
  const runs = order.map((id) => shown.get(id).run);
  const text = byId("filter").value.trim().toLowerCase();
  const passes = (run) => (!group || run.group === group) && `${run.name} ${run.place}`.toLowerCase().includes(text);
  const passing = runs.filter(passes);
  const listed = showsAll ? passing : passing.slice(0, FIRST);
  const rows = listed.map(({ id }) => shown.get(id).parts.row);
  const body = byId("runs").tBodies[0];
  if (rows.length !== body.rows.length || rows.some((row, at) => row !== body.rows[at])) body.replaceChildren(...rows);
  byId("runs").hidden = !rows.length;
  byId("none").hidden = rows.length > 0;
  byId("none").textContent = runs.length ? "No run matches." : "No runs yet. They appear here when they are submitted.";
  byId("more").hidden = listed.length === passing.length;
  byId("more").textContent = `Show all ${passing.length} runs`;
  showGroups(runs);
  showChosen();
}

function showGroups(runs) {
  const counts = Object.entries(GROUPS).map(([name, title]) => [name, title, runs.filter((run) => run.group === name).length]);
  const buttons = [[null, "All", runs.length], ...counts].map(([name, title, count]) =>
    [name, `${title} ${count}`, count]).filter(([name, , count]) => count || name === group || name === null);
  const made = byId("groups");
  if (made.children.length !== buttons.length || buttons.some(([name], at) => made.children[at].dataset.name !== `${name}`)) {
    made.replaceChildren(...buttons.map(([name]) => button("", () => {
      group = name;
      arrange();
    }, { "data-name": `${name}` })));
  }
  buttons.forEach(([name, title], at) => {
    made.children[at].textContent = title;
    made.children[at].setAttribute("aria-pressed", name === group);
  });
}

function choose(id, wanted) {
  chosen = wanted ? [...chosen, id] : chosen.filter((each) => each !== id);
  showChosen();
  refreshDetails();
}

// Marks the chosen runs in the list and above the details.
function showChosen() {
  for (const [id, { run, parts }] of shown) {
    const isChosen = chosen.includes(id);
    parts.box.checked = isChosen;
    parts.box.disabled = !isChosen && chosen.length >= most;
    const dot = swatch(id);
    parts.dot.replaceWith(dot);
    parts.dot = dot;
    parts.active.textContent = ago(run.updated);
  }
  byId("chosen").hidden = !chosen.length;
  byId("chosen-title").textContent = chosen.length === 1 ? "1 run chosen" : `${chosen.length} runs chosen`;
  const chips = chosen.map((id) => {
    const { label } = shown.get(id).run;
    const remove = element("button", { type: "button", onclick: () => choose(id, false), "aria-label": `Remove ${label}` });
    remove.append(swatch(id), element("bdi", {}, label), element("span", { "aria-hidden": "true" }, "×"));
    return element("li", { "data-id": id }, remove);
  });
  const list = byId("chips");
  const same = chips.length === list.children.length && chips.every((chip, at) => chip.dataset.id === list.children[at].dataset.id);
  if (!same) list.replaceChildren(...chips);
  history.replaceState(null, "", chosen.length ? `?${chosenQuery()}` : location.pathname);
}
