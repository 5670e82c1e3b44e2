"use strict";
// The words of a mark appear beside it: for a pointer, and for the keyboard, where arrows move among the marks.
const tip = document.body.appendChild(document.createElement("div"));
tip.id = "tip";
tip.hidden = true;
tip.setAttribute("aria-live", "polite");
let chosen = null;

function show(mark) {
  if (chosen) chosen.classList.remove("on");
  chosen = mark;
  tip.hidden = !mark;
  if (!mark) return;
  mark.classList.add("on");
  tip.textContent = mark.getAttribute("aria-label");
  const box = mark.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(4, box.left + box.width / 2 - own.width / 2), innerWidth - own.width - 4);
  const above = box.top - own.height - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
}

document.addEventListener("pointerover", (event) => show(event.target.closest("[data-mark]")));
document.addEventListener("scroll", () => show(null), { passive: true });
for (const svg of document.querySelectorAll("svg[tabindex]")) {
  const marks = [...svg.querySelectorAll("[data-mark]")];
  svg.addEventListener("blur", () => show(null));
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") show(null);
    if (!step || !marks.length) return;
    event.preventDefault();
    const at = marks.indexOf(chosen);
    show(marks[at < 0 ? 0 : (at + step + marks.length) % marks.length]);
  });
}

// A select shows the figures of one token count. Without this script all of them are shown.
for (const select of document.querySelectorAll("select[data-for]")) {
  const figures = [...document.querySelectorAll(`[data-group="${select.dataset.for}"]`)];
  const choose = () => figures.forEach((figure) => (figure.hidden = figure.dataset.tokens !== select.value));
  select.addEventListener("change", choose);
  select.parentElement.hidden = false;
  choose();
}
