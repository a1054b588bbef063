// Votes: thumbs for a response, or a choice between two.

const CHOICES = { left: "A is better", right: "B is better", tie: "Tie", both_bad: "Both are bad" };

const isComplete = (turn) => turn.replies.every((reply) => reply.state === "done");

// A pair's vote decides how the conversation went on, so it stays once it did.
const isSettled = (turn) => isPair(turn) && turn !== lastTurn();

async function vote(turn, choice, comment = null) {
  const before = turn.ballot;
  const ballot = { id: before?.id ?? randomId(), vote: choice, comment: comment ?? before?.comment ?? "" };
  Object.assign(turn, { ballot, voteNote: "Saving …", voteFailed: false, asksComment: comment === null });
  renderVote(turn);
  try {
    if (server.stores_votes) await ask("v1/feedback", body(turn));
    turn.voteNote = server.stores_votes ? "Saved. Thank you." : "Not saved: this server stores no votes.";
  } catch (error) {
    Object.assign(turn, { ballot: before, asksComment: before !== null, voteNote: `Not saved: ${error.message}`, voteFailed: true });
    if (error.status === 401) showLogin("The server no longer accepts this token.");
  }
  save();
  renderVote(turn);
}

// crypto.randomUUID exists only on encrypted connections and this machine.
function randomId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function body(turn) {
  return {
    ...turn.ballot,
    kind: isPair(turn) ? "pair" : "thumbs",
    models: turn.replies.map((reply) => reply.model),
    sampling: turn.sampling,
    messages: messagesBefore(turn),
    responses: turn.replies.map((reply) => reply.text),
    user: (server.records_user && settings.user) || null,
  };
}

// What is below the replies of a turn.
function voteControls(turn) {
  const parts = [element("div", { className: "actions" }, ...voteButtons(turn))];
  if (turn.asksComment && server.stores_votes && !isSettled(turn)) parts.push(commentForm(turn));
  else if (turn.ballot?.comment) parts.push(element("p", { className: "note" }, `Your comment: ${turn.ballot.comment}`));
  const className = turn.voteFailed ? "note problem" : "note";
  parts.push(element("p", { className, role: "status" }, turn.voteNote ?? ""));
  return parts;
}

function voteButtons(turn) {
  const made = [];
  const choice = (value, label, properties, picture) =>
    button(label, () => vote(turn, value), {
      disabled: isSettled(turn), "aria-pressed": turn.ballot?.vote === value, "data-vote": value, ...properties,
    }, picture);
  if (isComplete(turn) && isPair(turn)) {
    made.push(element("span", { className: "question" }, "Which response is better?"));
    made.push(...Object.entries(CHOICES).map(([value, label]) => choice(value, label, { className: "plain-button" })));
  } else if (isComplete(turn) && server.stores_votes) {
    made.push(choice("up", "", { className: "tool", "aria-label": "Good response", title: "Good response" }, "up"));
    made.push(choice("down", "", { className: "tool", "aria-label": "Bad response", title: "Bad response" }, "down"));
  }
  if (turn === lastTurn() && !running && !(isPair(turn) && turn.ballot)) {
    made.push(button("Regenerate", () => regenerate(turn), { className: "tool" }, "again"));
  }
  return made;
}

function commentForm(turn) {
  const id = `comment-${turn.ballot.id}`;
  const text = element("input", { id, value: turn.ballot.comment, maxLength: 4000, autocomplete: "off" });
  const onsubmit = (event) => {
    event.preventDefault();
    vote(turn, turn.ballot.vote, text.value.trim());
  };
  return element("form", { className: "comment", onsubmit },
    element("div", { className: "field" }, element("label", { htmlFor: id }, "Comment (optional)"), text),
    element("button", { type: "submit", className: "plain-button" }, "Save comment"));
}
