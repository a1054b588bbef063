"use strict";
// Draws the charts of a page that come near first, so that a long report opens at once; the others when there is time.
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const boxes = [...document.querySelectorAll(".plot")];
  const draw = (box) => curves.draw(box, charts[boxes.indexOf(box)]);
  const missing = () => boxes.filter((box) => !curves.drawn.has(box));
  const near = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      draw(target);
    }
  }, { rootMargin: "600px" });
  const idle = self.requestIdleCallback ?? ((work) => setTimeout(work, 50));
  const drawMissing = () => {
    const [box] = missing();
    if (!box) return;
    draw(box);
    idle(drawMissing);
  };
  addEventListener("load", () => idle(drawMissing));
  addEventListener("beforeprint", () => missing().forEach(draw));
  boxes.forEach((box) => near.observe(box));
})();
