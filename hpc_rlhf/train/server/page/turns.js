// The conversation as elements.

const shown = new Map(); // of turns, to {item, texts, votes}

function renderAll() {
  shown.clear();
  byId("turns").replaceChildren(...turns().map(render));
  byId("welcome").hidden = turns().length > 0;
  byId("turns").hidden = !turns().length;
}

function render(turn) {
  return turn.role === "user" ? ownItem(turn) : modelItem(turn);
}

function rerender(turn) {
  const { item } = shown.get(turn);
  item.replaceWith(render(turn));
}

function ownItem(turn) {
  const label = { className: "tool", "aria-label": "Edit your message", title: "Edit", disabled: running !== null };
  const item = element("li", { className: "own" },
    element("h2", { className: "unseen" }, "You"),
    element("p", { className: "text" }, turn.text),
    button("", () => editTurn(turn), label, "edit"));
  shown.set(turn, { item });
  return item;
}

function editTurn(turn) {
  const id = "edited";
  const text = element("textarea", { id, value: turn.text, rows: 3 });
  const onsubmit = (event) => {
    event.preventDefault();
    if (text.value.trim()) resend(turn, text.value.trim());
  };
  const cancel = () => {
    rerender(turn);
    byId("message").focus();
  };
  const form = element("form", { onsubmit },
    element("label", { htmlFor: id, className: "unseen" }, "Edit your message"), text,
    element("div", { className: "actions end" },
      button("Cancel", cancel, { className: "plain-button" }),
      element("button", { type: "submit", className: "main-button" }, "Send again")));
  shown.get(turn).item.replaceChildren(form);
  text.focus();
}

function modelItem(turn) {
  const names = isPair(turn) ? ["Response A", "Response B"] : turn.replies.map((reply) => reply.model);
  const replies = turn.replies.map((reply, place) => replyElement(turn, reply, names[place]));
  const votes = element("div", { className: "votes" });
  const item = element("li", { className: isPair(turn) ? "pair" : "single" },
    element("div", { className: "replies" }, ...replies.map((reply) => reply.whole)), votes);
  shown.set(turn, { item, votes, texts: new Map(turn.replies.map((reply, place) => [reply, replies[place].text])) });
  if (turn.replies.every((reply) => reply.state !== "running")) fillVotes(turn);
  return item;
}

function replyElement(turn, reply, name) {
  const text = document.createTextNode(reply.text);
  const revealed = isPair(turn) && turn.ballot;
  const best = revealed && preferred(turn) === reply && turn.ballot.vote !== "tie";
  const whole = element("article", { className: `reply${best ? " preferred" : ""}`, "aria-busy": reply.state === "running" },
    element("h2", { className: "who" }, revealed ? `${name}: ${reply.model}${best ? ", preferred" : ""}` : name),
    element("p", { className: "text" }, text),
    reply.note ? element("p", { className: reply.state === "failed" ? "note problem" : "note" }, reply.note) : null);
  return { whole, text };
}

function fillVotes(turn) {
  shown.get(turn).votes.replaceChildren(...voteControls(turn));
}

// After a vote: a pair shows its models. If the focus was here, it goes to the choice.
function renderVote(turn) {
  if (!shown.has(turn)) return; // another mode or chat is shown
  const hadFocus = shown.get(turn).item.contains(document.activeElement);
  if (isPair(turn)) rerender(turn);
  else fillVotes(turn);
  if (hadFocus) shown.get(turn).votes.querySelector('[aria-pressed="true"]')?.focus();
}
