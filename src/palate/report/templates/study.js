"use strict";
const study = document.getElementById("study").dataset.study;
const pairs = [...document.querySelectorAll("section.pair")];
const session = [...crypto.getRandomValues(new Uint8Array(8))].map(b => b.toString(16).padStart(2, "0")).join("");
const choices = new Map();
let at = 0, since = performance.now(), saved = true;

function show(place) {
  at = place;
  since = performance.now();
  pairs.forEach((pair, i) => { pair.hidden = i !== at; });
  document.getElementById("end").hidden = at < pairs.length;
  document.getElementById("place").textContent = at < pairs.length ? (at + 1) + " of " + pairs.length : choices.size + " choices made";
  document.getElementById("done").value = choices.size;
  document.getElementById("back").disabled = at === 0;
  document.getElementById("save").disabled = choices.size === 0;
}

function choose(choice) {
  if (at >= pairs.length) return;
  choices.set(at, { choice: choice, seconds: Math.round(performance.now() - since) / 1000 });
  pairs[at].querySelectorAll("button").forEach(b => b.classList.toggle("chosen", b.dataset.choice === choice));
  saved = false;
  show(at + 1);
}

function lines() {
  return [...choices].sort((a, b) => a[0] - b[0])
    .map(([pair, made]) => JSON.stringify({ study: study, session: session, pair: pair, ...made }) + "\n").join("");
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines()], { type: "application/jsonl" }));
  link.download = "choices-" + session + ".jsonl";
  link.click();
  saved = true;
}

pairs.forEach(pair => pair.querySelectorAll("button").forEach(b => b.addEventListener("click", () => choose(b.dataset.choice))));
document.getElementById("back").addEventListener("click", () => { if (at > 0) show(at - 1); });
document.getElementById("save").addEventListener("click", save);
document.addEventListener("keydown", event => {
  const choice = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie" }[event.key];
  if (event.repeat || event.altKey || event.ctrlKey || event.metaKey) return;
  if (choice) { event.preventDefault(); choose(choice); }
  else if (event.key === "Backspace" && at > 0) { event.preventDefault(); show(at - 1); }
});
window.addEventListener("beforeunload", event => { if (!saved) event.preventDefault(); });
show(0);
