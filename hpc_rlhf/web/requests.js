// Requests to the server. The token comes in the address after the #, and stays in this tab.

class ServerProblem extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function takeToken() {
  if (location.hash.length < 2) return;
  sessionStorage.setItem("token", decodeURIComponent(location.hash.slice(1)));
  history.replaceState(null, "", location.pathname);
}

async function ask(path, body, signal) {
  const headers = { Authorization: `Bearer ${sessionStorage.getItem("token")}` };
  if (body) headers["Content-Type"] = "application/json";
  const request = { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, request);
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerProblem(0, "The server cannot be reached.");
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  throw new ServerProblem(response.status, answer?.error?.message ?? `The server answered ${response.status}.`);
}
