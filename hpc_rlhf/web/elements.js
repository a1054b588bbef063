// Elements of the page. Text only ever becomes text nodes.

const byId = (id) => document.getElementById(id);

// An element with properties and children; `aria-…` and `data-…` are attributes.
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

function button(label, onclick, properties = {}, picture = null) {
  return element("button", { type: "button", onclick, ...properties }, picture && icon(picture), label);
}

function announce(text) {
  byId("announcer").textContent = text;
}

function showProblem(text) {
  byId("problem").textContent = text;
}
