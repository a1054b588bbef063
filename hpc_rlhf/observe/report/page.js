"use strict";
// Draws the curves in the colours of the theme, as wide as the page, and switches the theme.
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const boxes = [...document.querySelectorAll(".plot")];
  const root = document.documentElement;
  const HEIGHT = 190;
  const DASHES = [[], [6, 4], [2, 3]];
  const drawn = new Map();

  const short = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-4 || size >= 1e6)) return value.toExponential(2).replace(/\.?0+e/, "e");
    return value.toLocaleString("en", { maximumSignificantDigits: 4 });
  };
  // A curve that is zero everywhere still needs an axis.
  const range = (plot, least, most) =>
    least === 0 && most === 0 ? [0, 1] : uPlot.rangeNum(least ?? 0, most ?? 1, 0.1, true);
  const powers = (plot, splits) => splits.map((value) => (Math.abs(Math.log10(value) % 1) < 1e-6 ? value : null));
  const onAxis = (plot, splits) => splits.map((value) => (value === null ? "" : short(value)));

  function options(chart, width, css) {
    const colour = (name) => css.getPropertyValue(name).trim();
    const axis = {
      stroke: colour("--faint"),
      font: "11px system-ui, sans-serif",
      grid: { stroke: colour("--rule"), width: 1 },
      ticks: { show: false },
      values: onAxis,
    };
    const names = Object.keys(chart.lines);
    const lines = names.map((label, at) => {
      const stroke = colour(["--first", "--second", "--third"][at]);
      const value = (plot, number) => short(number);
      if (chart.dots.includes(label)) return { label, stroke, value, paths: () => null, points: { show: true, size: 8, fill: stroke } };
      const points = { show: chart.steps.length < 2 };
      return { label, stroke, value, width: 1.5, dash: DASHES[at], spanGaps: true, points };
    });
    return {
      width,
      height: HEIGHT,
      scales: { x: { time: false }, y: chart.log ? { distr: 3 } : { range } },
      axes: [{ ...axis, size: 28 }, { ...axis, size: 58, grid: { ...axis.grid, ...(chart.log && { filter: powers }) } }],
      series: [{ label: "step", value: (plot, number) => short(number) }, ...lines],
      cursor: { points: { size: 7 } },
      hooks: { setCursor: [(plot) => plot.cursor.idx ?? plot.setLegend({ idx: chart.steps.length - 1 })] },
      legend: { markers: { dash: (plot, at) => (chart.dots.includes(names[at - 1]) ? "dotted" : at > 1 ? "dashed" : "solid") } },
      padding: [8, 24, 0, 0],
    };
  }

  function draw(box) {
    const chart = charts[boxes.indexOf(box)];
    const data = [chart.steps, ...Object.values(chart.lines)];
    drawn.get(box)?.destroy();
    const plot = new uPlot(options(chart, box.clientWidth, getComputedStyle(root)), data, box);
    drawn.set(box, plot);
    plot.setLegend({ idx: chart.steps.length - 1 }); // the latest values, until the pointer is over others
  }

  // Charts are drawn when they come near, so that a long report opens at once.
  const near = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      draw(target);
    }
  }, { rootMargin: "600px" });
  const width = new ResizeObserver((changed) => {
    for (const { target } of changed) {
      const plot = drawn.get(target);
      if (plot && plot.width !== target.clientWidth) plot.setSize({ width: target.clientWidth, height: HEIGHT });
    }
  });
  for (const box of boxes) {
    near.observe(box);
    width.observe(box);
  }
  const redraw = () => [...drawn.keys()].forEach(draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => boxes.filter((box) => !drawn.has(box)).forEach(draw));

  const button = document.getElementById("theme");
  const THEMES = ["system", "light", "dark"];
  let theme = 0;
  button.hidden = false;
  button.addEventListener("click", () => {
    theme = (theme + 1) % THEMES.length;
    root.dataset.theme = THEMES[theme];
    button.textContent = `Theme: ${THEMES[theme]}`;
    redraw();
  });
})();
