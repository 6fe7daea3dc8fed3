"use strict";
// The number beside a chart's title follows the pointer, and returns to the last value when it leaves.
for (const chart of document.querySelectorAll(".chart")) {
  const points = JSON.parse(chart.dataset.points), unit = chart.dataset.unit;
  const cursor = chart.querySelector(".cursor"), output = chart.parentElement.querySelector("output");
  const show = (event) => {
    const box = chart.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * chart.viewBox.baseVal.width;
    const [px, py, step, value] = points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
    cursor.setAttribute("visibility", "visible");
    cursor.firstChild.setAttribute("x1", px);
    cursor.firstChild.setAttribute("x2", px);
    cursor.lastChild.setAttribute("cx", px);
    cursor.lastChild.setAttribute("cy", py);
    output.textContent = `${value}${unit ? "\u00a0" + unit : ""} at step ${step}`;
  };
  const hide = () => {
    cursor.setAttribute("visibility", "hidden");
    output.textContent = output.dataset.last;
  };
  chart.addEventListener("pointermove", show);
  chart.addEventListener("pointerdown", show);
  chart.addEventListener("pointerleave", hide);
}

// Any picture opens large; arrow keys go through all of them, Escape closes (the dialog's own habit).
const dialog = document.querySelector("dialog"), pictures = [...document.querySelectorAll(".enlarge")];
let shown = 0;
const enlarge = (index) => {
  shown = (index + pictures.length) % pictures.length;
  const source = pictures[shown].querySelector("img"), target = dialog.querySelector("img");
  target.src = source.src;
  target.alt = source.alt;
  target.className = source.className;
  dialog.querySelector("p").textContent = pictures[shown].dataset.caption;
  if (dialog.open) return;
  dialog.showModal();
  dialog.querySelector("[type=submit]").focus(); // not by autofocus, which also acts when the page loads
};
pictures.forEach((button, index) => button.addEventListener("click", () => enlarge(index)));
dialog.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") enlarge(shown - 1);
  if (event.key === "ArrowRight") enlarge(shown + 1);
});
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
  if (event.target.value) enlarge(shown + Number(event.target.value));
});
dialog.addEventListener("close", () => pictures[shown].focus());
