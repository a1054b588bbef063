// What this tab knows: its settings and a conversation for each mode, kept over reloads.
//
// A turn is the user's ({role: "user", text}) or the models' ({role: "assistant", replies, system, sampling, ballot}),
// with one reply ({model, text, state, note}) or two to compare. A ballot is {id, vote, comment}.

const settings = { system: "", temperature: 1, top_p: 1, max_tokens: 256, seed: null, user: "", model: null };
const conversations = { chat: [], compare: [] };
let mode = "chat";
let running = null; // the AbortController of the response that is drawn

const turns = () => conversations[mode];
const lastTurn = () => turns().at(-1);
const isPair = (turn) => turn.replies?.length === 2;

function save() {
  try {
    sessionStorage.setItem("state", JSON.stringify({ settings, conversations, mode }));
  } catch {
    showProblem("The browser has no room to keep this conversation over a reload. Start a new chat.");
  }
}

function restore() {
  const saved = JSON.parse(sessionStorage.getItem("state") ?? "null");
  if (!saved) return;
  Object.assign(settings, saved.settings);
  Object.assign(conversations, saved.conversations);
  mode = saved.mode;
  for (const reply of Object.values(conversations).flat().flatMap((turn) => turn.replies ?? [])) {
    if (reply.state === "running") Object.assign(reply, { state: "stopped", note: "Stopped by a reload." });
  }
}

// The reply that a conversation goes on with; null if both were bad.
function preferred(turn) {
  if (!isPair(turn)) return turn.replies[0];
  return { left: turn.replies[0], right: turn.replies[1], tie: turn.replies[0] }[turn.ballot?.vote] ?? null;
}

// The messages before a turn, as the models get them.
function messagesBefore(turn) {
  const messages = turn.system ? [{ role: "system", content: turn.system }] : [];
  for (const each of turns().slice(0, turns().indexOf(turn))) {
    if (each.role === "user") messages.push({ role: "user", content: each.text });
    else if (preferred(each)?.text) messages.push({ role: "assistant", content: preferred(each).text });
    else messages.pop(); // a question without a good answer
  }
  return messages;
}

function newTurn() {
  const { system, temperature, top_p, max_tokens } = settings;
  const seed = settings.seed ?? crypto.getRandomValues(new Uint32Array(1))[0];
  let models = [settings.model];
  if (mode === "compare") {
    models = crypto.getRandomValues(new Uint8Array(1))[0] % 2 ? [...server.compared].reverse() : [...server.compared];
  }
  const replies = models.map((model) => ({ model, text: "", state: "running", note: "" }));
  return { role: "assistant", replies, system, sampling: { temperature, top_p, max_tokens, seed }, ballot: null };
}

// Draw the replies of a turn. `arrived` is called with each reply and the piece that came.
async function draw(turn, arrived) {
  const controller = new AbortController();
  const { signal } = controller;
  running = controller;
  const messages = messagesBefore(turn);
  await Promise.all(turn.replies.map(async (reply, side) => {
    try {
      // With the same seed, one model would give the same response twice.
      const seed = turn.replies[0].model === reply.model ? (turn.sampling.seed + side) % 2 ** 32 : turn.sampling.seed;
      const pieces = completion({ model: reply.model, messages, ...turn.sampling, seed }, signal);
      let next;
      while (!(next = await pieces.next()).done) {
        reply.text += next.value;
        arrived(reply, next.value);
      }
      Object.assign(reply, { state: "done", note: next.value === "length" ? "Cut off at max tokens." : "" });
      if (!reply.text) reply.note = "The model gave an empty response.";
    } catch (error) {
      if (signal.aborted) Object.assign(reply, { state: "stopped", note: "Stopped." });
      else Object.assign(reply, { state: "failed", note: error.message });
      if (error.status === 401) showLogin("The server no longer accepts this token.");
    }
  }));
  if (running === controller) running = null;
}
