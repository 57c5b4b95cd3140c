// The side with the system prompt and the controls of sampling.

import { current } from "./chat.js";
import { $, el } from "./dom.js";
import { CONTROLS, OFF, bus, keep, keepSettings, settings } from "./store.js";

const FIELDS = ["max_tokens", "seed", "stop"];
let presets = {};

/** A control of sampling: its name, a number, and a slider, which follow the settings. */
function control([name, [label, min, max, step]]) {
  const about = { min, max, step, value: settings.sampling[name], "data-name": name };
  const range = el("input", { type: "range", ...about, "aria-label": label });
  const number = el("input", { type: "number", ...about, "aria-label": `${label}, as a number` });
  const set = ({ target }) => {
    const value = Number(target.value);
    if (target.value === "" || !(value >= min && value <= max)) return show();
    settings.sampling[name] = name === "top_k" ? Math.round(value) : value;
    keepSettings();
  };
  range.oninput = number.onchange = set;
  return el("div", { className: "slider" }, el("span", {}, label), number, range);
}

export const controls = () => Object.entries(CONTROLS).map(control);

function show() {
  for (const input of document.querySelectorAll("input[data-name]")) input.value = settings.sampling[input.dataset.name];
  for (const node of $("presets").children) {
    const wanted = { ...OFF, ...presets[node.value] };
    node.setAttribute("aria-pressed", Object.keys(OFF).every((name) => wanted[name] === settings.sampling[name]));
  }
}

function showPresets({ detail }) {
  presets = detail;
  const describe = (name) => Object.entries(presets[name]).map(([key, value]) => `${CONTROLS[key][0]} ${value}`).join(", ");
  const onclick = ({ target }) => {
    settings.sampling = { ...OFF, ...presets[target.value] };
    keepSettings();
  };
  $("presets").replaceChildren(
    ...Object.keys(presets).map((name) => el("button", { value: name, title: describe(name), onclick }, name)),
  );
  show();
}

export function openSettings() {
  $("sliders").replaceChildren(...controls());
  for (const name of FIELDS) {
    $(name).value = settings[name];
    $(name).onchange = () => {
      settings[name] = $(name).validity.valid ? $(name).value : "";
      $(name).value = settings[name];
      keepSettings();
    };
  }
  const showSystem = () => ($("system").value = current().system);
  $("system").oninput = () => (current().system = $("system").value);
  $("system").onchange = () => current().messages.length && keep(current());
  bus.addEventListener("opened", showSystem);
  bus.addEventListener("presets", showPresets);
  bus.addEventListener("settings", show);
  showSystem();
  show();
}
