// Palate Studio: keys, holding for "before", the lightbox, and live parts. State lives on the server.
"use strict";

const find = (selector, from = document) => from.querySelector(selector);
const all = (selector, from = document) => [...from.querySelectorAll(selector)];
const typing = (target) => target.closest("input:not([type=radio]):not([type=range]), textarea, select");
const arrowed = (target) => target.closest("input[type=radio], input[type=range]"); // arrow keys are its own

// ---- parts of a page change in place: what is focused, held or typed stays, and no picture flickers

const morph = (from, to) => {
  for (const { name } of [...from.attributes]) if (!to.hasAttribute(name) && name !== "open") from.removeAttribute(name);
  for (const { name, value } of to.attributes) if (from.getAttribute(name) !== value) from.setAttribute(name, value);
  if (from.matches("input[type=hidden]")) from.value = to.getAttribute("value") ?? "";
  if ("disabled" in from) from.disabled = to.hasAttribute("disabled");
  morphChildren(from, to);
};
const morphChildren = (from, to) => {
  const old = [...from.childNodes], now = [...to.childNodes];
  now.forEach((node, i) => {
    const there = old[i];
    if (!there) from.append(node);
    else if (there.nodeType !== node.nodeType || there.nodeName !== node.nodeName || there.id !== node.id) there.replaceWith(node);
    else if (node.nodeType === Node.ELEMENT_NODE) morph(there, node);
    else if (there.data !== node.data) there.data = node.data;
  });
  old.slice(now.length).forEach((node) => node.remove());
};
htmx.defineExtension("morph", {
  isInlineSwap: () => false,
  handleSwap: (style, target, fragment) => {
    if (style !== "morph") return false;
    morphChildren(target, fragment);
    return [...target.children];
  },
});

// ---- the pair: how long the person looked, and keys

let shownAt = performance.now();
document.addEventListener("htmx:afterSettle", (event) => {
  if (event.target.id === "pair" || event.target.id === "blind") shownAt = performance.now();
});
document.addEventListener("htmx:configRequest", (event) => {
  if ("ms" in event.detail.parameters) event.detail.parameters.ms = Math.round(performance.now() - shownAt);
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target) || find("dialog[open]")) return;
  if (event.key === "b" || event.key === "B") return hold(true);
  if (event.key.startsWith("Arrow") && arrowed(event.target)) return;
  const button = find(`[data-key="${CSS.escape(event.key)}"]`);
  if (!button || button.disabled || event.repeat) return;
  event.preventDefault();
  button.classList.add("pressed");
  button.click();
});

// ---- before and after

const hold = (on) => {
  document.body.classList.toggle("holding", on);
  const image = find("#lightbox-image");
  if (!find("#lightbox").open || current < 0) return;
  const { before, after, text } = tiles()[current].dataset;
  image.src = on ? before : after;
  find("#lightbox-text").textContent = on ? `${text} (${heldName()})` : text;
};
const heldName = () => tiles()[current]?.closest("[data-held]")?.dataset.held ?? "before";
const presses = (event) => [" ", "Enter"].includes(event.key) && event.target.closest("[data-hold]");
document.addEventListener("keydown", (event) => { if (presses(event)) { event.preventDefault(); hold(true); } });
document.addEventListener("keyup", (event) => { if (event.key === "b" || event.key === "B" || presses(event)) hold(false); });
document.addEventListener("pointerdown", (event) => { if (event.target.closest("[data-hold]")) hold(true); });
for (const kind of ["pointerup", "pointercancel", "blur"]) window.addEventListener(kind, () => hold(false));

// ---- lightbox

let current = -1;
const tiles = () => all("[data-lightbox]");
const enlarge = (index) => {
  const list = tiles();
  if (!list.length) return;
  current = (index + list.length) % list.length;
  const { after, text } = list[current].dataset;
  Object.assign(find("#lightbox-image"), { src: after, alt: text });
  find("#lightbox-text").textContent = text;
  find("#lightbox-held").textContent = heldName();
  if (!find("#lightbox").open) find("#lightbox").showModal();
};
document.addEventListener("click", (event) => {
  const tile = event.target.closest("[data-lightbox]");
  if (tile) enlarge(tiles().indexOf(tile));
  const turn = event.target.closest("[data-turn]");
  if (turn) enlarge(current + Number(turn.dataset.turn));
  if (event.target.closest("[data-dismiss]")) find("#notice").replaceChildren();
});
find("#lightbox").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step) { event.preventDefault(); enlarge(current + step); }
  if (event.key === "b" || event.key === "B") hold(true);
});

// ---- live parts: the run's folder has changed

const live = find("[data-live]");
if (live) {
  const { run, live: page } = live.dataset;
  let state = find("[data-testid=run-state]", live)?.dataset.state, waiting = null;
  const refresh = () => {
    waiting = null;
    htmx.ajax("GET", `/live?run=${encodeURIComponent(run)}&page=${page}`, { source: live, target: live, swap: "morph" });
  };
  const source = new EventSource(`/events?run=${encodeURIComponent(run)}`);
  source.addEventListener("change", () => { waiting ??= setTimeout(refresh, 150); });
  let left = false; // a page that is left closes its stream, which is no silence
  window.addEventListener("pagehide", () => { left = true; source.close(); });
  source.addEventListener("error", () => setTimeout(() => { if (!left && source.readyState !== EventSource.OPEN) saySilent(); }, 3000));
  source.addEventListener("open", () => find("#notice [data-silent]")?.remove());
  document.addEventListener("htmx:afterSwap", (event) => { // at once: later it would undo a click on a link
    const now = find("[data-testid=run-state]", live)?.dataset.state;
    if (event.target.id !== "live" || now === state) return;
    const over = ["running", "waiting"].includes(state) && !["running", "waiting"].includes(now);
    state = now;
    if (over) location.replace(`/${page}?run=${encodeURIComponent(run)}`); // the page around it has other buttons now
  });
}
for (const part of all("[data-refresh]")) {
  setInterval(() => {
    if (!document.hidden && !part.contains(document.activeElement)) htmx.trigger(part, "refresh");
  }, Number(part.dataset.refresh));
}

// ---- a studio that has ended, or is out of reach, answers nothing: that is said, and a key can be pressed again

const SILENT = "The studio does not answer. If it was stopped, start palate studio and open the link that it prints; "
  + "what was chosen before is kept.";
document.addEventListener("htmx:sendError", saySilent);
function saySilent() {
  if (find("#notice [data-silent]")) return; // what polls would say it again and again
  const said = document.createElement("p");
  said.className = "notice";
  said.dataset.silent = "";
  said.textContent = SILENT;
  find("#notice").replaceChildren(said);
}
document.addEventListener("htmx:afterRequest", (event) => {
  if (event.detail.successful) find("#notice [data-silent]")?.remove();
  else all(".pressed").forEach((button) => button.classList.remove("pressed"));
});

// ---- what was refused is no longer said once something was done

document.addEventListener("htmx:afterRequest", (event) => {
  if (event.detail.successful && event.detail.requestConfig.verb !== "get") find("#notice").replaceChildren();
});

// ---- words: the field is free for the next one at once; a refused word comes back into it

let sent = "";
document.addEventListener("htmx:configRequest", (event) => {
  if (event.detail.path !== "/steer/word") return;
  sent = event.detail.parameters.action ? "" : event.detail.parameters.word; // a word that stays is not written again
  if (!sent) return;
  find("#word").value = "";
});
document.addEventListener("htmx:afterSettle", (event) => {
  if (event.detail.requestConfig?.path !== "/steer/word") return;
  const field = find("#word");
  if (field && !field.value && find("[data-testid=refused]")) field.value = sent;
  field?.focus();
});

// ---- sliders

document.addEventListener("input", (event) => {
  const slider = event.target;
  const output = slider.closest("label")?.querySelector("output");
  if (slider.matches("[data-shown]") && output) output.textContent = slider.value;
  if (!slider.matches("[data-slider]")) return;
  const steps = slider.dataset.steps.split(" ").map(Number);
  const near = steps.reduce((best, step) => Math.abs(step - slider.value) < Math.abs(best - slider.value) ? step : best);
  if (output) output.textContent = near;
  for (const tile of all("[data-file]")) {
    tile.dataset.after = `/sample/${tile.closest("[data-run]").dataset.run}/${near}/${tile.dataset.file}`;
    Object.assign(find(".after", tile), { src: tile.dataset.after, alt: `${tile.dataset.text}, step ${near}` });
  }
});
