"use strict";
// Draws curves in the colours of the theme, as wide as their boxes, and switches the theme. On paper they are light.
const curves = (() => {
  const root = document.documentElement;
  const HEIGHT = 190;
  const DASHES = [[], [6, 4], [2, 3]];
  const COLOURS = ["--first", "--second", "--third", "--fourth", "--fifth", "--sixth", "--seventh", "--eighth"];
  const STEPS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9].flatMap((power) => [1, 2, 5].map((digit) => digit * 10 ** power));
  const drawn = new Map(); // the plot and the chart of each box
  const THEMES = ["system", "light", "dark"];
  let theme = 0;

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
  // Numbers on an axis have the digits by which neighbours differ.
  const onAxis = (plot, splits, axis, space, step) => {
    const digits = Math.min(12, Math.max(0, Math.ceil(1 - Math.log10(step))));
    const most = Math.max(...splits.map(Math.abs));
    const label = (value) => (most < 1e-3 || most >= 1e6 ? short(value) : value.toLocaleString("en", { maximumFractionDigits: digits }));
    return splits.map((value) => (value === null ? "" : label(value)));
  };

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
    const values = Object.values(chart.lines).flat().filter((value) => value > 0);
    const log = chart.log && Math.max(...values) > 10 * Math.min(...values);
    const lines = names.map((label, at) => {
      const place = chart.places?.[label] ?? at;
      const stroke = colour(COLOURS[place % COLOURS.length]);
      const value = (plot, number) => short(number);
      if (chart.dots.includes(label)) return { label, stroke, value, paths: () => null, points: { show: true, size: 8, fill: stroke } };
      const points = { show: chart.steps.length < (chart.overlay ? 10 : 2), size: 5 };
      return { label, stroke, value, width: 1.5, dash: DASHES[(chart.overlay ? Math.floor(place / COLOURS.length) : at) % DASHES.length], spanGaps: true, points };
    });
    return {
      width,
      height: HEIGHT,
      scales: { x: { time: false }, y: log ? { distr: 3 } : { range } },
      axes: [{ ...axis, size: 28, incrs: STEPS }, { ...axis, size: 58, grid: { ...axis.grid, ...(log && { filter: powers }) } }],
      series: [{ label: "step", value: (plot, number) => short(number) }, ...lines],
      cursor: { points: { size: 7 } },
      hooks: { setCursor: [(plot) => plot.cursor.idx ?? showLatest(plot)] },
      legend: { markers: { dash: (plot, at) => (chart.dots.includes(names[at - 1]) ? "dotted" : at > (chart.overlay ? COLOURS.length : 1) ? "dashed" : "solid") } },
      padding: [8, 24, 0, 0],
    };
  }

  const data = (chart) => [chart.steps, ...Object.values(chart.lines)];
  // The latest value of each curve, until the pointer is over others.
  const showLatest = (plot) => plot.setLegend({ idxs: plot.data.map((values) => values.findLastIndex((value) => value !== null)) });

  function draw(box, chart) {
    drawn.get(box)?.plot.destroy();
    const plot = new uPlot(options(chart, box.clientWidth, getComputedStyle(root)), data(chart), box);
    drawn.set(box, { plot, chart });
    showLatest(plot);
    width.observe(box);
  }

  // Draws new data of a chart. What the user hid stays hidden, and what the user zoomed into stays in sight.
  function update(box, chart) {
    const before = drawn.get(box);
    const key = ({ title, log, places, dots, lines }) => JSON.stringify([title, log, places, dots, Object.keys(lines)]);
    if (!before || key(before.chart) !== key(chart)) return draw(box, chart);
    if (JSON.stringify(before.chart) === JSON.stringify(chart)) return;
    const { min, max } = before.plot.scales.x;
    const zoomed = min > before.chart.steps[0] || max < before.chart.steps.at(-1);
    before.chart = chart;
    before.plot.setData(data(chart), !zoomed);
    if (zoomed) before.plot.redraw();
    showLatest(before.plot);
  }

  function forget(box) {
    width.unobserve(box);
    drawn.get(box)?.plot.destroy();
    drawn.delete(box);
  }

  const width = new ResizeObserver((changed) => {
    for (const { target } of changed) {
      const { plot } = drawn.get(target);
      if (plot.width !== target.clientWidth) plot.setSize({ width: target.clientWidth, height: HEIGHT });
    }
  });
  const redraw = () => drawn.forEach(({ chart }, box) => draw(box, chart));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  const print = (printing) => {
    root.dataset.theme = printing ? "light" : THEMES[theme];
    redraw();
  };
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));

  const button = document.getElementById("theme");
  button.hidden = false;
  button.addEventListener("click", () => {
    theme = (theme + 1) % THEMES.length;
    root.dataset.theme = THEMES[theme];
    button.textContent = `Theme: ${THEMES[theme]}`;
    redraw();
  });
  return { COLOURS, draw, drawn, forget, update };
})();
