// The page as a whole: connecting, and asking again while somebody looks.

const RUNS_EVERY = 5000;
const DETAILS_EVERY = 2; // refreshes of the list
const latest = {}; // the text of the latest answers
let refreshes = 0;
let timer = null;

async function changed(name, path) {
  const text = await (await ask(path)).text();
  if (latest[name] === path + text) return null;
  latest[name] = path + text;
  return JSON.parse(text);
}

function refreshLater() {
  clearTimeout(timer);
  timer = setTimeout(() => (document.hidden ? refreshLater : refresh)(), RUNS_EVERY);
}

async function refresh() {
  clearTimeout(timer);
  try {
    const answer = await changed("runs", "runs");
    if (answer) {
      most = answer.most;
      byId("folder").textContent = answer.folder;
      byId("version").textContent = answer.version;
      byId("left-out").hidden = !answer.left_out;
      byId("left-out").textContent = answer.left_out === 1
        ? "A folder that cannot be read, or whose plan is damaged, is left out."
        : `${answer.left_out} folders that cannot be read, or whose plans are damaged, are left out.`;
      showRuns(answer.runs);
    } else {
      showChosen();
    }
    showWorkspace(true);
    if (refreshes++ % DETAILS_EVERY === 0) await refreshDetails();
    showLive(true);
  } catch (error) {
    if (error.status === 401) return showLogin("The server does not accept this token.");
    showLive(false, error.message);
  }
  refreshLater();
}

async function refreshDetails() {
  if (!chosen.length) {
    delete latest.details;
    return showDetails({ charts: {}, times: [], evaluation: "", responses: "" });
  }
  const asked = chosenQuery();
  try {
    const details = await changed("details", `details?${asked}`);
    if (details && asked === chosenQuery()) showDetails(details);
  } catch (error) {
    showLive(false, error.message);
  }
}

function showLive(live, problem = "") {
  byId("live").hidden = false;
  byId("live").dataset.live = live;
  byId("live").replaceChildren(live ? "live" : "not connected", element("span", { className: "at" }, live ? ` ${new Date().toLocaleTimeString()}` : ""));
  showProblem(live ? "" : `${problem} The page shows what it knew last, and tries again.`);
}

function showLogin(problem) {
  sessionStorage.removeItem("token");
  showWorkspace(false);
  byId("live").hidden = true;
  byId("login-problem").textContent = problem;
  byId("token").focus();
}

function showWorkspace(connected) {
  byId("login").hidden = connected;
  byId("workspace").hidden = !connected;
}

byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", byId("token").value.trim());
  byId("token").value = "";
  refresh();
});
byId("filter").addEventListener("input", arrange);
byId("more").addEventListener("click", () => {
  showsAll = true;
  arrange();
});
document.addEventListener("visibilitychange", () => document.hidden || refresh());
chosen = new URLSearchParams(location.search).getAll("run");
takeToken();
if (sessionStorage.getItem("token")) refresh();
else showLogin("");
