// The page as a whole: connecting, sending, settings.

const EXAMPLES = ["What colour is snow?", "Explain photosynthesis to a child.", "Write a haiku about the sea."];
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
let server = null; // its settings

async function connect() {
  takeToken();
  if (!sessionStorage.getItem("token")) return showLogin("");
  try {
    server = await (await ask("page/settings")).json();
  } catch (error) {
    return showLogin(error.status === 401 ? "The server does not accept this token." : error.message);
  }
  showWorkspace(true);
  restore();
  if (!server.models.includes(settings.model)) {
    Object.assign(settings, { model: server.models.at(-1), max_tokens: server.max_tokens[server.models.at(-1)] });
  }
  const isServed = (turn) => turn.role === "user" || turn.replies.every((reply) => server.models.includes(reply.model));
  for (const name of Object.keys(conversations)) {
    if (!conversations[name].every(isServed)) conversations[name] = [];
  }
  showSettings();
  setMode(server.compared.length ? mode : "chat");
  byId("message").focus();
}

function showLogin(problem) {
  stop();
  sessionStorage.removeItem("token");
  showWorkspace(false);
  byId("login-problem").textContent = problem;
  byId("token").focus();
}

function showWorkspace(connected) {
  byId("login").hidden = connected;
  for (const id of ["workspace", "new", "toggle-settings"]) byId(id).hidden = !connected;
  if (!connected) byId("modes").hidden = true;
}

function setMode(chosen) {
  mode = chosen;
  document.body.dataset.mode = mode;
  byId("modes").hidden = !server.compared.length;
  for (const each of byId("modes").children) each.setAttribute("aria-pressed", each.dataset.mode === mode);
  byId("model").textContent = mode === "compare" ? "" : settings.model;
  document.title = `${mode === "compare" ? "Compare" : settings.model} · hpc-rlhf`;
  const twice = server.models.length < 2;
  byId("welcome-title").textContent = mode !== "compare" ? `Chat with ${settings.model}`
    : twice ? "Which response is better?" : "Which model is better?";
  byId("welcome-text").textContent = mode === "compare"
    ? twice ? `${settings.model} answers your message twice. Choose the better response.`
      : "Two models answer your message side by side, in random order. Choose the better response, and see which is which."
    : server.stores_votes ? "Rate responses to help the next round of training." : "This server stores no votes.";
  byId("model-field").hidden = server.models.length < 2 || mode === "compare";
  showProblem("");
  renderAll();
  save();
}

function showSettings() {
  byId("model-choice").replaceChildren(...server.models.map((name) => element("option", { value: name }, name)));
  byId("model-choice").value = settings.model;
  byId("user-field").hidden = !server.records_user;
  for (const name of ["system", "user", ...NUMBERS]) byId(name).value = settings[name] ?? "";
}

function readSettings(event) {
  const { id, value } = event.target;
  if (!event.target.checkValidity()) return; // the field shows it; the last valid number counts
  if (id === "model-choice") {
    settings.model = value;
    setMode(mode);
  } else settings[id] = !NUMBERS.includes(id) ? value : value === "" ? null : Number(value);
  save();
}

async function send(text) {
  if (lastTurn()?.role === "assistant" && isPair(lastTurn()) && !lastTurn().ballot) {
    return showProblem("Choose the better response first, or regenerate.");
  }
  turns().push({ role: "user", text });
  byId("message").value = "";
  await answer();
}

async function regenerate(turn) {
  turns().splice(turns().indexOf(turn), 1);
  byId("message").focus();
  await answer();
}

async function resend(turn, text) {
  turns().splice(turns().indexOf(turn), Infinity, { role: "user", text });
  byId("message").focus();
  await answer();
}

async function answer() {
  const turn = newTurn();
  const where = mode;
  turns().push(turn);
  showProblem("");
  const drawing = draw(turn, (reply, piece) => {
    const below = isAtBottom();
    shown.get(turn)?.texts.get(reply)?.appendData(piece);
    if (below) scrollDown();
  });
  showSending();
  announce("The model is answering.");
  renderAll();
  save();
  scrollDown();
  await drawing;
  showSending();
  const below = isAtBottom();
  if (mode === where) renderAll();
  if (below) scrollDown();
  announce(turn.replies.map((reply, place) => `${isPair(turn) ? `Response ${"AB"[place]}: ` : ""}${reply.text} ${reply.note}`).join(" "));
  save();
}

function showSending() {
  byId("send").textContent = running ? "Stop" : "Send";
}

function stop() {
  running?.abort();
}

function isAtBottom() {
  const { scrollHeight, scrollTop, clientHeight } = byId("scroller");
  return scrollHeight - scrollTop - clientHeight < 80;
}

function scrollDown() {
  byId("scroller").scrollTop = byId("scroller").scrollHeight;
}

function showTheme() {
  const theme = sessionStorage.getItem("theme");
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  byId("theme").lastElementChild.textContent = `Theme: ${theme ?? "system"}`;
}

function nextTheme() {
  const next = { light: "dark", dark: "" }[sessionStorage.getItem("theme") ?? ""] ?? "light";
  if (next) sessionStorage.setItem("theme", next);
  else sessionStorage.removeItem("theme");
  showTheme();
}

function toggleSettings() {
  const opens = byId("settings").hidden;
  byId("settings").hidden = !opens;
  byId("toggle-settings").setAttribute("aria-expanded", opens);
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return stop();
  if (byId("message").value.trim()) send(byId("message").value.trim());
});
byId("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) byId("composer").requestSubmit();
});
byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", byId("token").value.trim());
  byId("token").value = "";
  connect();
});
byId("new").addEventListener("click", () => {
  stop();
  conversations[mode] = [];
  setMode(mode);
  byId("message").focus();
});
for (const each of byId("modes").children) {
  each.addEventListener("click", () => {
    stop();
    setMode(each.dataset.mode);
  });
}
byId("settings").addEventListener("change", readSettings);
byId("toggle-settings").addEventListener("click", toggleSettings);
byId("theme").addEventListener("click", nextTheme);
byId("examples").append(...EXAMPLES.map((text) => button(text, () => send(text), { className: "plain-button" })));
addEventListener("keydown", (event) => event.key === "Escape" && stop());
addEventListener("hashchange", connect);
addEventListener("pagehide", () => server && save());
showTheme();
connect();
