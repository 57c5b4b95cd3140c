// The shell of the page: panels, models and steps, the sides, light and dark.

import { api, whyNot } from "./api.js";
import { openChat } from "./chat.js";
import { $, el } from "./dom.js";
import { openList } from "./list.js";
import { openSettings } from "./settings.js";
import { bus, keepSettings, settings, emit } from "./store.js";

const PHONE = matchMedia("(max-width: 760px)"), WIDE = matchMedia("(min-width: 1180px)");
const THEMES = { "": "dark", dark: "light", light: "" };
/** The sides, and whether each is open at first. */
const SIDES = { list: () => !PHONE.matches, settings: () => WIDE.matches };

/** All models of the server, in the order of the pipeline: {id, stage, step, chats, loaded}. */
let models = [];

function openSide(name, open, chosen = true) {
  $(name).hidden = !open;
  $(`open-${name}`).setAttribute("aria-expanded", open);
  if (chosen && !PHONE.matches) {
    settings.open = { ...settings.open, [name]: open };
    keepSettings();
  }
  $("shade").hidden = !(PHONE.matches && Object.keys(SIDES).some((side) => !$(side).hidden));
  if (chosen && open) $(name).querySelector("button, textarea").focus();
}

function closeSides() {
  for (const name of Object.keys(SIDES)) if (!$(name).hidden && PHONE.matches) openSide(name, false);
}

function arrange() {
  for (const name of Object.keys(SIDES)) openSide(name, !PHONE.matches && (settings.open?.[name] ?? SIDES[name]()), false);
}

/** Shows a panel: the chat, or another section of main that has a button in #panels. */
export function showPanel(name) {
  for (const node of document.querySelectorAll("main > .panel")) node.hidden = node.id !== name;
  for (const node of $("panels").children) node.setAttribute("aria-current", node.dataset.panel === name);
  emit("panel", name);
}

/** Adds a panel: the section of main with this id, its label, and what is called when it is shown. */
export function addPanel(id, label, shown) {
  $("panels").append(el("button", { "data-panel": id }, label));
  $("panels").hidden = false;
  bus.addEventListener("panel", ({ detail }) => detail === id && shown($(id)));
  if (location.hash === `#${id}`) showPanel(id);
}

async function loadModels() {
  const found = await api("v1/models");
  models = found.data;
  const names = [...new Set(models.map(({ id }) => id.split("@")[0]))];
  if (!models.some(({ id }) => id === settings.model)) settings.model = found.default;
  $("model").replaceChildren(...names.map((name) => el("option", { value: name }, name)));
  showModel();
  emit("presets", found.presets);
  emit("models", found);
}

function showModel() {
  const [name] = settings.model.split("@");
  const steps = models.filter(({ id }) => id.startsWith(`${name}@`)), latest = models.find(({ id }) => id === name);
  $("model").value = name;
  $("step").replaceChildren(
    ...(latest ? [el("option", { value: name }, `latest (${latest.step})`)] : []),
    ...steps.map(({ id, step }) => el("option", { value: id }, step)),
  );
  $("step").value = settings.model;
}

function chooseModel(id) {
  settings.model = id;
  showModel();
  keepSettings();
}

/** Waits until the server answers, saying why it does not yet. */
async function becomeReady() {
  for (let wait = 200; ; wait = Math.min(2000, wait * 1.5)) {
    try {
      if (!models.length) await loadModels();
      await api("ready");
      return emit("notice", "");
    } catch {
      emit("notice", await whyNot());
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

$("panels").addEventListener("click", ({ target }) => {
  if (!target.dataset.panel) return;
  history.replaceState(null, "", `#${target.dataset.panel}`);
  showPanel(target.dataset.panel);
});
$("model").onchange = ({ target: { value } }) => {
  chooseModel(models.some(({ id }) => id === value) ? value : models.findLast(({ id }) => id.startsWith(`${value}@`)).id);
};
$("step").onchange = () => chooseModel($("step").value);
$("theme").onclick = () => {
  const next = THEMES[document.documentElement.dataset.theme] ?? "dark";
  document.documentElement.dataset.theme = next;
  if (next) localStorage.setItem("jaxchat.theme", next);
  else localStorage.removeItem("jaxchat.theme");
  $("theme").title = `Scheme: ${next || "the system's"}`;
};
for (const name of Object.keys(SIDES)) $(`open-${name}`).onclick = () => openSide(name, $(name).hidden);
$("shade").onclick = closeSides;
addEventListener("keydown", (event) => event.key === "Escape" && closeSides());
bus.addEventListener("opened", closeSides);
for (const width of [PHONE, WIDE]) width.addEventListener("change", arrange);

arrange();
openChat();
openList();
openSettings();
becomeReady();
