// The details of the chosen runs. HTML comes from the server, which escapes text, and the page runs no script in it.

function showDetails(details) {
  showCurves(details.charts);
  showTimes(details.times);
  showHtml("evaluation", details.evaluation);
  showHtml("responses", details.responses);
  const sections = [...document.querySelectorAll("#curves > section, #time, #evaluation, #responses")].filter((each) => !each.hidden);
  byId("chosen").querySelector("nav").replaceChildren(...sections.map((section) => {
    const title = section.querySelector("h2");
    return element("a", { href: `#${section.id}`, onclick: (event) => jump(event, section, title) }, title.textContent);
  }));
}

// The address keeps the chosen runs; its # is for the token.
function jump(event, section, title) {
  event.preventDefault();
  section.scrollIntoView();
  title.focus({ preventScroll: true });
}

function showHtml(id, html) {
  const section = byId(id);
  const place = section.querySelector(":scope > div");
  if (place.html !== html) {
    const open = [...place.querySelectorAll("details")].map((each) => each.open);
    place.innerHTML = place.html = html;
    [...place.querySelectorAll("details")].forEach((each, at) => (each.open = open[at] ?? each.open));
  }
  section.hidden = !html;
}

function showTimes(times) {
  const place = byId("time").querySelector(":scope > div");
  byId("time").hidden = !times.some(({ html }) => html);
  const known = new Map([...place.children].map((each) => [each.dataset.id, each]));
  const blocks = times.map(({ id, label, words, html }) => {
    const block = known.get(id) ?? element("div", { "data-id": id });
    if (block.html === html && block.words === words) return block;
    if (block.contains(document.activeElement)) return block; // it is being read
    const open = block.querySelector("details")?.open ?? times.length === 1;
    const timeline = element("details", { open });
    timeline.innerHTML = html;
    timeline.prepend(element("summary", {}, `Timeline of ${label}`));
    const title = element("h3", { className: "of-run" }, swatch(id), element("bdi", {}, label));
    block.replaceChildren(title, element("p", {}, `${words}.`), html ? timeline : "");
    return Object.assign(block, { html, words });
  });
  for (const [at, block] of blocks.entries()) if (place.children[at] !== block) place.insertBefore(block, place.children[at] ?? null);
  while (place.children.length > blocks.length) place.lastChild.remove();
  for (const block of blocks) block.querySelector(".swatch").replaceWith(swatch(block.dataset.id));
}

function showCurves(charts) {
  const place = byId("curves");
  const sections = Object.entries(charts).map(([stage, plots]) => {
    const id = `curves-${stage}`;
    const section = byId(id) ?? element("section", { id, "aria-labelledby": `${id}-title` },
      element("h2", { id: `${id}-title`, tabIndex: -1 }, `${stage} curves`), element("div", { className: "charts" }));
    showCharts(section.querySelector(".charts"), plots);
    return section;
  });
  const same = sections.length === place.children.length && sections.every((section, at) => section === place.children[at]);
  if (!same) place.replaceChildren(...sections);
  for (const [at, [, plots]] of Object.entries(charts).entries()) drawCharts(sections[at].querySelector(".charts"), plots);
}

function showCharts(grid, plots) {
  const titles = [...grid.children].map((figure) => figure.dataset.title);
  if (titles.join("\n") === plots.map(({ title }) => title).join("\n")) return;
  for (const box of grid.querySelectorAll(".plot")) curves.forget(box);
  grid.replaceChildren(...plots.map(({ title, unit }) => element("figure", { "data-title": title },
    element("figcaption", {}, `${title} `, element("span", { className: "faint" }, `(${unit})`)),
    element("div", { className: "plot", role: "img" }))));
}

function drawCharts(grid, plots) {
  for (const [at, box] of [...grid.querySelectorAll(".plot")].entries()) {
    box.setAttribute("aria-label", `${plots[at].title}, ${plots[at].unit}: ${plots[at].description}`);
    curves.update(box, plots[at]);
  }
}
