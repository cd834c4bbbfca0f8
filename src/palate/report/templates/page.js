"use strict";
// Enlarged pictures: the first picture of a pair, or of a row of before and after, lies under the one that was clicked;
// a slider moves the border.
// Left and right go to the next picture, up and down move the border, Escape closes.
const dialog = document.getElementById("zoom");
const frame = dialog.querySelector(".frame");
const [under, over] = frame.querySelectorAll("img");
const slider = dialog.querySelector("input");
const buttons = () => [...document.querySelectorAll("button.zoom")];
let current = null;

function show(button, picked) {
  current = button;
  const own = [...button.querySelectorAll("img")];
  const row = button.closest("[data-row]");
  const after = own.indexOf(picked) > 0 ? picked : own[own.length - 1];  // a card of several runs: the one clicked
  const before = own.length > 1 ? own[0] : row ? row.querySelector("img") : after;
  for (const [shown, source] of [[under, before], [over, after]]) {
    shown.src = source.src;
    shown.className = (shown === under ? "before" : "after") + (source.classList.contains("small") ? " small" : "");
  }
  under.alt = before.alt;
  over.alt = after.alt;
  slider.hidden = before === after;
  const first = own.length > 1 ? "the picture before" : row ? row.dataset.row : "";
  const caption = before === after ? after.alt : after.alt + " · slide: " + first;
  document.getElementById("zoom-caption").textContent = caption;
  const room = Math.min(innerWidth * 0.9 - 32, innerHeight - 210, 1024), natural = after.naturalWidth || 64;
  const times = after.classList.contains("small") ? Math.max(1, Math.floor(room / natural)) : room / natural;
  frame.style.width = Math.round(natural * times) + "px";
  move(0);
  if (!dialog.open) dialog.showModal();
}

function move(value) {
  slider.value = Math.max(0, Math.min(100, value));
  over.style.clipPath = "inset(0 0 0 " + slider.value + "%)";
}

function step(by) {
  const all = buttons();
  show(all[(all.indexOf(current) + by + all.length) % all.length]);
}

document.addEventListener("click", event => {
  const button = event.target.closest("button.zoom");
  if (button) show(button, event.target);
});
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("close", () => { if (current) current.focus(); });
slider.addEventListener("input", () => move(Number(slider.value)));
document.getElementById("zoom-close").addEventListener("click", () => dialog.close());
document.getElementById("zoom-previous").addEventListener("click", () => step(-1));
document.getElementById("zoom-next").addEventListener("click", () => step(1));
dialog.addEventListener("keydown", event => {
  const act = {
    ArrowLeft: () => step(-1), ArrowRight: () => step(1),
    ArrowUp: () => move(Number(slider.value) + 5), ArrowDown: () => move(Number(slider.value) - 5),
    Home: () => move(0), End: () => move(100),
  }[event.key];
  if (act && !event.altKey && !event.ctrlKey && !event.metaKey) { event.preventDefault(); act(); }
});

// Cards of an evaluation, sorted by one of their changes; what was not measured comes last.
const sort = document.getElementById("sort");
if (sort) {
  sort.closest(".sorter").hidden = false;
  const cards = document.getElementById("cards");
  sort.addEventListener("change", () => {
    const choice = Number(sort.value), falling = !sort.value.startsWith("-");
    const column = falling ? choice : -choice - 1;
    const value = card => {
      const number = Number(card.dataset.changes.split(" ")[column]);
      return Number.isNaN(number) ? -Infinity : falling ? number : -number;
    };
    const sorted = [...cards.children].map(card => [value(card), card]).sort((a, b) => b[0] - a[0]);
    cards.append(...sorted.map(item => item[1]));
  });
}
