// The microscope: a text or a conversation as tokens coloured by loss, and views of one token and of the model.

import { addPanel, showPanel } from "./app.js";
import { current, offerLook } from "./chat.js";
import { $, el } from "./dom.js";
import { ask, fill, hex, lossesOf, mean, scope } from "./looking.js";
import { MOST_LOSS, percent } from "./pictures.js";
import { bus, sent, settings } from "./store.js";
import { VIEWS } from "./views.js";

const EXAMPLE = "On Saturday Omar took a basket and went to the market. The market was full of colours.";
scope.source = { prompt: EXAMPLE };

async function look(source, at = Infinity) {
  Object.assign(scope, { source, tokens: [], losses: [] });
  $("scope-text").value = source.prompt ?? "";
  await fill($("scope-tokens"), async () => {
    const { tokens, count } = await ask("tokens", source), about = await ask("about");
    const losses = await lossesOf(tokens.map(({ id }) => id));
    if (scope.source !== source) return [];
    Object.assign(scope, { tokens, count, about, losses, at: Math.min(at, tokens.length) });
    return chips();
  });
  if (scope.source !== source) return;
  if (!scope.tokens.length) return $("scope-view").replaceChildren();
  paint(scope.losses);
  select(scope.at);
}

function chips() {
  const chip = (text, name, i) => {
    const described = () => describe(i), about = { type: "button", tabIndex: -1, "aria-label": name };
    return el("button", { ...about, onclick: () => select(i), onfocus: described, onpointerenter: described }, text);
  };
  return [
    ...scope.tokens.flatMap(({ text, name, special }, i) => {
      const node = chip(special ? name : text ? text.replaceAll("\n", "↵") : "·", name, i);
      if (special || !text) node.className = "odd";
      return text.endsWith("\n") ? [node, el("br")] : [node];
    }),
    chip("next …", "the token that would follow", scope.tokens.length),
  ];
}

const chipNodes = () => [...$("scope-tokens").querySelectorAll("button")];

/** Colours the text by loss. */
function paint(losses) {
  chipNodes().forEach((node, i) => {
    const loss = losses[i - 1]?.loss;
    node.style.setProperty("--heat", `${(100 * Math.min(loss ?? 0, MOST_LOSS)) / MOST_LOSS}%`);
    node.title = loss === undefined ? "" : `loss ${loss.toFixed(3)}`;
  });
  const { count, tokens: { length } } = scope;
  const cut = count > length ? `. The context has room for ${length} of ${count} tokens.` : "";
  $("scope-mean").textContent = losses.length ? `Mean loss ${mean(losses).toFixed(3)} nats per token${cut}` : "";
}

/** Says the numbers of a token. */
function describe(i) {
  const token = scope.tokens[i], { loss, expected } = scope.losses[i - 1] ?? {};
  const said = [`Token ${i}`];
  said.push(...(token ? [token.name, `id ${token.id}`, `bytes ${hex(token.bytes)}`] : ["would follow"]));
  if (expected) {
    const best = `expected ${expected.name} (${percent(expected.probability)})`;
    said.push(`loss ${loss.toFixed(3)} nats (${percent(Math.exp(-loss))})`);
    said.push(expected.name === token.name ? "the most likely one" : best);
  }
  $("scope-token").textContent = said.join(" · ");
}

function select(i, focus = false) {
  scope.at = Math.max(0, Math.min(i, scope.tokens.length));
  chipNodes().forEach((node, k) => {
    node.tabIndex = k === scope.at ? 0 : -1;
    node.setAttribute("aria-pressed", k === scope.at);
    if (focus && k === scope.at) node.focus();
  });
  describe(scope.at);
  showView();
}

async function showView(view = scope.view) {
  if (scope.view !== view) paint(scope.losses);
  Object.assign(scope, { view, redraw() {} });
  for (const tab of $("scope-tabs").children) {
    tab.setAttribute("aria-selected", tab.dataset.view === view);
    tab.tabIndex = tab.dataset.view === view ? 0 : -1;
  }
  $("scope-view").setAttribute("aria-labelledby", `scope-tab-${view}`);
  if (scope.tokens.length) await fill($("scope-view"), () => VIEWS[view][1]({ select, paint, showView }));
}

/** Calls `step` with 1 or -1 for the arrow keys. */
function arrows(step) {
  return (event) => {
    const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!way || event.target === event.currentTarget) return;
    event.preventDefault();
    step(event.target, way);
  };
}

function build(section) {
  const text = el("textarea", {
    id: "scope-text", rows: 2, "aria-label": "Text to look into", placeholder: "Paste a text",
  });
  const talk = () => current().messages.length && look({ messages: sent(current()) });
  const onsubmit = (event) => {
    event.preventDefault();
    look({ prompt: text.value });
  };
  const tabs = Object.entries(VIEWS).map(([view, [title]]) => el("button", {
    type: "button", role: "tab", id: `scope-tab-${view}`, "data-view": view, "aria-controls": "scope-view",
    onclick: () => showView(view),
  }, title));
  const nextTab = arrows((tab, way) => {
    const next = tabs[(tabs.indexOf(tab) + way + tabs.length) % tabs.length];
    showView(next.dataset.view);
    next.focus();
  });
  const nextToken = arrows((node, way) => select(chipNodes().indexOf(node) + way, true));
  section.append(
    el("form", { onsubmit }, text, el("div", { className: "row" }, el("button", { className: "main" }, "Look"),
      el("button", { type: "button", onclick: talk }, "Use the conversation"))),
    el("div", { id: "scope-tokens", role: "group", "aria-label": "Tokens, coloured by loss", onkeydown: nextToken }),
    el("div", { className: "legend" }, el("span", { id: "scope-mean" }),
      el("span", {}, "loss 0", el("i"), `${MOST_LOSS} nats and more`)),
    el("p", { id: "scope-token", role: "status" }),
    el("div", { id: "scope-tabs", role: "tablist", "aria-label": "Views", onkeydown: nextTab }, ...tabs),
    el("div", { id: "scope-view", role: "tabpanel", tabIndex: -1 }));
}

/** The model that the text was last looked into with. */
let model = "";
function shown() {
  if (!settings.model || model === settings.model) return;
  const talk = !model && current().messages.length;
  model = settings.model;
  look(talk ? { messages: sent(current()) } : { ...scope.source }, scope.tokens.length ? scope.at : Infinity);
}

function begin() {
  build($("scope"));
  addPanel("scope", "Microscope", shown);
  offerLook((message, conversation) => {
    const messages = conversation.messages.slice(0, conversation.messages.indexOf(message) + 1);
    model = settings.model;
    showPanel("scope");
    look({ messages: sent({ ...conversation, messages }) });
  });
  bus.addEventListener("opened", ({ detail }) => {
    if ($("scope").hidden) return;
    if (detail.messages.length) look({ messages: sent(detail) });
    else showPanel("chat");
  });
  bus.addEventListener("settings", () => {
    scope.redraw();
    if (!$("scope").hidden) shown();
  });
}

// A server that was started with --inspect=False has no views, and this page no microscope.
bus.addEventListener("models", ({ detail: { views } }) => views.length && begin(), { once: true });
