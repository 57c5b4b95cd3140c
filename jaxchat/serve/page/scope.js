// The microscope: a text or a conversation as tokens coloured by loss, and views of one token and of the model.

import { api } from "./api.js";
import { addPanel, showPanel } from "./app.js";
import { current, offerLook } from "./chat.js";
import { $, el } from "./dom.js";
import { MOST_LOSS, arcs, bar, heatmap, label, percent, scatter, table } from "./pictures.js";
import { steps, unpack } from "./sampling.js";
import { CONTROLS, OFF, bus, keepSettings, sent, settings } from "./store.js";

const EXAMPLE = "On Saturday Omar took a basket and went to the market. The market was full of colours.";
const VIEWS = {
  candidates: ["Candidates", candidates], tokens: ["Tokens", tokenTable], attention: ["Attention", attention],
  lens: ["Layers", lens], embedding: ["Embedding", embedding], merges: ["Merges", merges], cache: ["Cache", cache],
  checkpoints: ["Checkpoints", checkpoints],
};

/** What is looked at: the source ({prompt} or {messages}), its tokens with losses, and the place of the chosen one, which
    is the number of tokens for the one that would follow. */
const scope = { source: { prompt: EXAMPLE }, tokens: [], losses: [], at: 1, view: "candidates", layer: 0, head: 0, about: null };
const ids = () => scope.tokens.map(({ id }) => id);
const note = (...content) => el("p", { className: "note" }, ...content);
const known = new Map();
let redraw = () => {};

/** A view of the server; the latest answers are kept. */
async function ask(view, body = {}) {
  const whole = { model: settings.model, ...body }, key = view + JSON.stringify(whole);
  if (!known.has(key)) known.set(key, await api(`inspect/${view}`, whole));
  if (known.size > 64) known.delete(known.keys().next().value);
  return known.get(key);
}

/** Fills a node with what `make` returns, unless another call began meanwhile; a failure is shown as its sentence. */
async function fill(node, make) {
  const turn = (node.turn = (node.turn ?? 0) + 1);
  node.ariaBusy = true;
  const nodes = await make().catch((error) => el("p", { className: "failure", role: "alert" }, error.message));
  if (node.turn !== turn) return;
  node.ariaBusy = false;
  node.replaceChildren(...[nodes].flat());
}

async function look(source, at = Infinity) {
  Object.assign(scope, { source, tokens: [] });
  $("scope-text").value = source.prompt ?? "";
  await fill($("scope-tokens"), async () => {
    const { tokens, count } = await ask("tokens", source), about = await ask("about");
    const all = tokens.map(({ id }) => id), losses = all.length > 1 ? (await ask("losses", { ids: all })).tokens : [];
    if (scope.source === source) Object.assign(scope, { tokens, count, about, losses, at: Math.min(at, all.length) });
    return chips();
  });
  if (scope.source !== source) return;
  if (!scope.tokens.length) return $("scope-view").replaceChildren();
  paint(scope.losses);
  select(scope.at);
}

function chips() {
  const chip = (text, name, i) => el("button", {
    type: "button", tabIndex: -1, "aria-label": name, onclick: () => select(i), onfocus: () => tell(i), onpointerenter: () => tell(i),
  }, text);
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
  const mean = losses.reduce((sum, { loss }) => sum + loss, 0) / losses.length;
  const cut = scope.count > scope.tokens.length ? `. The context has room for ${scope.tokens.length} of ${scope.count} tokens.` : "";
  $("scope-mean").textContent = losses.length ? `Mean loss ${mean.toFixed(3)} nats per token${cut}` : "";
}

const hex = (bytes) => bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" ");

/** Says the numbers of a token. */
function tell(i) {
  const token = scope.tokens[i], found = scope.losses[i - 1];
  const said = token ? [`Token ${i}`, token.name, `id ${token.id}`, `bytes ${hex(token.bytes)}`] : [`Token ${i}`, "would follow"];
  if (found) {
    said.push(`loss ${found.loss.toFixed(3)} nats (${percent(Math.exp(-found.loss))})`);
    said.push(found.expected.name === token.name ? "the most likely one" : `expected ${found.expected.name} (${percent(found.expected.probability)})`);
  }
  $("scope-told").textContent = said.join(" · ");
}

function select(i, focus = false) {
  scope.at = Math.max(0, Math.min(i, scope.tokens.length));
  chipNodes().forEach((node, k) => {
    node.tabIndex = k === scope.at ? 0 : -1;
    node.setAttribute("aria-pressed", k === scope.at);
    if (focus && k === scope.at) node.focus();
  });
  tell(scope.at);
  showView();
}

function showView(view = scope.view) {
  if (scope.view !== view) paint(scope.losses);
  scope.view = view;
  redraw = () => {};
  for (const tab of $("scope-tabs").children) {
    tab.setAttribute("aria-selected", tab.dataset.view === view);
    tab.tabIndex = tab.dataset.view === view ? 0 : -1;
  }
  $("scope-view").setAttribute("aria-labelledby", `scope-tab-${view}`);
  return scope.tokens.length ? fill($("scope-view"), VIEWS[view][1]) : undefined;
}

/** The sliders of sampling, the same as those of the chat. */
function sliders() {
  return el("div", { className: "sliders" }, ...Object.entries(CONTROLS).map(([name, [title, min, max, step]]) => {
    const range = el("input", { type: "range", min, max, step, value: settings.sampling[name], "data-name": name, oninput: () => {
      settings.sampling[name] = Number(range.value);
      keepSettings();
    } });
    return el("label", {}, el("span", {}, title), range, el("output", {}, settings.sampling[name]));
  }));
}

/** A table of candidates that follows the sliders, after their `before`, which are ids. */
function live(found, before) {
  const logits = unpack(found.logits), box = el("div", { className: "bars" });
  redraw = () => {
    const { sampling } = settings, shares = steps(logits, before, sampling);
    const used = Object.keys(shares).filter((name) => !(name in OFF) || name === "temperature" || sampling[name] !== OFF[name]);
    const heads = used.map((name) => (name === "model" ? "In the model" : `${CONTROLS[name][0]} ${sampling[name]}`));
    const rows = found.candidates.map(({ token, name, logit }) => [label(name), logit.toFixed(3), ...used.map((step) => bar(shares[step][token]))]);
    box.replaceChildren(table("Candidates before and after each step of sampling", ["Token", "Logit", ...heads], rows, (i) => found.candidates[i].chosen));
    for (const range of $("scope-view").querySelectorAll("[data-name]")) {
      range.value = range.nextSibling.value = sampling[range.dataset.name];
    }
  };
  redraw();
  return box;
}

async function candidates() {
  if (!scope.at) return note("Nothing comes before the first token, so it has no candidates. Choose another one above.");
  const found = await ask("candidates", { ids: ids(), position: scope.at, count: 12 });
  const marked = scope.at < scope.tokens.length ? "; the one that is in the text is marked" : "";
  return [note(`What the model would say for token ${scope.at}${marked}.`), sliders(), live(found, ids().slice(0, scope.at))];
}

async function tokenTable() {
  const rows = scope.tokens.map(({ id, name, bytes }, i) => {
    const loss = scope.losses[i - 1]?.loss;
    return [String(i), label(name, 40), String(id), hex(bytes), loss === undefined ? "" : bar(loss / MOST_LOSS, loss.toFixed(3))];
  });
  return table("Tokens with ids, bytes and losses", ["Place", "Token", "Id", "Bytes", "Loss (nats)"], rows, (i) => i === scope.at);
}

/** The first tokens of the text, as many as a view takes, with a note if there are more; a token reads only those before. */
function part() {
  const { most_tokens } = scope.about, cut = scope.tokens.length > most_tokens;
  const row = Math.min(scope.at, scope.tokens.length - 1, most_tokens - 1);
  return { row, all: ids().slice(0, most_tokens), notes: cut ? [note(`Only the first ${most_tokens} tokens are shown.`)] : [] };
}

function choice(title, name, options) {
  const select = el("select", { onchange: () => {
    scope[name] = Number(select.value);
    showView().then(() => $("scope-view").querySelector(`select[name=${name}]`)?.focus());
  }, name }, ...options.map((i) => el("option", { value: i, selected: i === scope[name] }, i)));
  return el("label", {}, title, select);
}

async function attention() {
  const { heads } = scope.about, layers = [...heads.keys()].filter((i) => heads[i]);
  if (!layers.length) return note("No layer of this model has attention.");
  if (!heads[scope.layer]) scope.layer = layers[0];
  scope.head = Math.min(scope.head, heads[scope.layer] - 1);
  const { row, all, notes } = part(), { layer, head } = scope;
  const { weights } = await ask("attention", { ids: all, layer, head });
  const names = scope.tokens.map(({ name }) => label(name, 12)), what = `Attention of layer ${layer}, head ${head}`;
  const told = el("p", { className: "note", role: "status" }, "Row: the token that reads. Column: the one it reads from.");
  const say = (t, s) => (told.textContent = `Token ${t} (${names[t]}) takes ${percent(weights[t][s])} from token ${s} (${names[s]}).`);
  const most = [...weights[row].keys()].sort((a, b) => weights[row][b] - weights[row][a]).slice(0, 10);
  return [
    el("div", { className: "row" }, choice("Layer", "layer", layers), choice("Head", "head", [...Array(heads[layer]).keys()])), ...notes,
    el("div", { className: "pictures" },
      el("figure", {}, el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": `${what}, as a map` }, heatmap(`${what}; the table has the numbers of one token`, weights, names.slice(0, all.length), row, say, select)), told),
      el("figure", {}, el("div", { className: "scroll tall", tabIndex: 0, role: "region", "aria-label": `${what}, as arcs` }, arcs(`${what} as arcs; the table has the numbers of one token`, weights, names.slice(0, all.length), row)),
        note("Arcs: each token on the right takes from those on the left; those of the chosen one are coloured.")),
      table(`What token ${row} takes`, [`Token ${row} takes from`, "Weight"], most.map((s) => [`${s} ${names[s]}`, bar(weights[row][s])]))),
  ];
}

async function lens() {
  const { row, all, notes } = part(), places = Math.min(16, scope.about.most_places), start = Math.max(0, Math.min(row - 8, all.length - places));
  const { rows } = await ask("lens", { ids: all, start, places, count: 5 });
  const cell = ({ candidates: said, entropy }) => {
    const td = el("td", { className: "said", title: `${said.map(({ name, probability }) => `${name} ${percent(probability)}`).join("\n")}\nentropy ${entropy.toFixed(2)} nats` },
      label(said[0].name, 10), el("small", {}, percent(said[0].probability)));
    td.style.setProperty("--heat", `${100 * said[0].probability}%`);
    return td;
  };
  const heads = rows[0].map((_, i) => `${start + i} ${label(scope.tokens[start + i].name, 10)}`);
  const shown = rows.map((cells, n) => [`${n} layer${n === 1 ? "" : "s"}`, ...cells.map(cell)]);
  return [
    note("What the model would say after each token if it ended after so many layers. The top row is the model itself."), ...notes,
    table("Logit lens", ["After", ...heads], shown.reverse()),
  ];
}

async function embedding() {
  const token = scope.tokens[Math.min(scope.at, scope.tokens.length - 1)], near = (await ask("neighbours", { token: token.id })).neighbours;
  const { points, variance } = await ask("map", { tokens: [...new Set([...ids().slice(0, 500), ...near.map((one) => one.token)])] });
  const mine = new Set([token.id, ...near.map((one) => one.token)]), told = note("Point at a dot for its name.");
  const title = `Map of the embeddings: ${percent(variance[0])} of the variance to the right, ${percent(variance[1])} up`;
  return el("div", { className: "pictures" },
    table(`Tokens near ${token.name}`, [`Near ${label(token.name)}`, "Id", "Cosine"], near.map((one) => [label(one.name), String(one.token), bar(one.cosine, one.cosine.toFixed(3))])),
    el("figure", {}, scatter(`${title}; the table has the nearest`, points, (point) => mine.has(point.token), (point) => (told.textContent = `${point.name}, id ${point.token}`)),
      note(`${title}. Blue: the chosen token and those near it.`), told));
}

async function merges() {
  const text = scope.source.prompt ?? scope.source.messages.at(-1).content ?? "", most = scope.about.most_letters;
  const { parts } = await ask("merges", { prompt: [...text].slice(0, most).join("") });
  const last = Math.max(0, ...parts.map(({ steps: found }) => found.length - 1)), shown = el("div", { className: "pieces" });
  const step = el("input", { type: "range", min: 0, max: last, step: 1, value: last, "aria-label": "Merges done" }), told = el("output");
  const draw = () => {
    const now = Number(step.value);
    shown.replaceChildren(...parts.flatMap(({ steps: found, names }) => {
      const { pieces, merged } = found[Math.min(now, found.length - 1)], fresh = now < found.length ? merged : null;
      const letters = now === last && pieces.length !== names.length ? names.map((name) => label(name)) : pieces.map((piece) => piece.replaceAll("▁", "␣"));
      return el("span", { className: "part" }, ...letters.map((piece, i) => el("span", { className: fresh?.index === i ? "fresh" : "", title: fresh?.index === i ? `merge ${fresh.rank} of the tokenizer` : "" }, piece)));
    }));
    told.textContent = `${now} of ${last}`;
  };
  step.oninput = draw;
  draw();
  return [
    note("Each part of the text begins as characters. At every step the neighbours are joined whose pair the tokenizer learned first; new pieces are marked. Characters without a piece become bytes in the end."),
    el("label", { className: "long" }, "Merges done", step, told), shown, ...([...text].length > most ? [note(`Only the first ${most} letters are shown.`)] : []),
  ];
}

async function cache() {
  const { lengths, layers, bytes } = await ask("cache"), most = bytes.at(-1), size = (n) => `${(n / 1024).toLocaleString("en", { maximumFractionDigits: 1 })} KiB`;
  const kinds = [...new Set(layers.map(({ window }) => window))].map((window) => layers.filter((layer) => layer.window === window));
  const heads = kinds.map((kind) => `${kind.length} layer${kind.length === 1 ? "" : "s"} ${kind[0].window === null ? "without a window" : `with a window of ${kind[0].window}`}`);
  const sum = (kind, i) => kind.reduce((total, layer) => total + layer.bytes[i], 0);
  const rows = lengths.map((length, i) => [String(length), ...[bytes[i], ...kinds.map((kind) => sum(kind, i))].map((n) => bar(n / most, size(n)))]);
  return [
    note(`Keys and values of one answer by its number of tokens. This text has ${scope.tokens.length}. A layer with a window stops growing once the window is full.`),
    table("Bytes of the cache", ["Tokens", "All layers", ...heads], rows, (i) => lengths[i] >= scope.tokens.length && !(lengths[i - 1] >= scope.tokens.length)),
  ];
}

/** What a checkpoint answers to the source, most likely tokens only, and its losses. */
async function answered(model) {
  const { prompt, messages = [] } = scope.source, greedy = { model, temperature: 0, max_tokens: 48 }, all = ids();
  const asked = messages.slice(0, messages.findLastIndex(({ role }) => role === "user") + 1);
  const { choices: [{ message, text }] } = await (prompt === undefined ? api("v1/chat/completions", { ...greedy, messages: asked }) : api("v1/completions", { ...greedy, prompt }));
  const losses = all.length > 1 ? (await ask("losses", { model, ids: all })).tokens : [];
  return { said: text ?? message.content, losses, mean: losses.reduce((sum, { loss }) => sum + loss, 0) / losses.length };
}

async function checkpoints() {
  const name = settings.model.split("@")[0], kept = (await api("v1/models")).data.filter(({ id }) => id.startsWith(`${name}@`));
  const position = Math.max(1, scope.at), source = scope.source, found = [];
  const slider = el("input", { type: "range", min: 0, max: kept.length - 1, step: 1, value: kept.length - 1, "aria-label": "Step of the run" });
  const told = el("output"), detail = el("div", { className: "detail" }), list = el("div");
  const at = (i) => (found[i] ??= answered(kept[i].id));
  const show = () => fill(detail, async () => {
    const i = Number(slider.value), { id, step } = kept[i];
    told.textContent = slider.ariaValueText = `step ${step}`;
    const { said, losses } = await at(i), open = await ask("candidates", { model: id, ids: ids(), position, count: 8 });
    if (i === Number(slider.value) && detail.isConnected) paint(losses);
    return [el("blockquote", {}, said || "(nothing)"), note(`Candidates for token ${position} at step ${step}:`), live(open, ids().slice(0, position))];
  });
  slider.oninput = show;
  const rows = async () => {
    for (const i of kept.keys()) {
      const { said, mean } = await at(i).catch((error) => ({ said: error.message, mean: NaN }));
      if (source !== scope.source || !list.isConnected) return;
      const row = [String(kept[i].step), bar(mean / MOST_LOSS, mean ? mean.toFixed(3) : "–"), said];
      list.rows = [...(list.rows ?? []), row];
      list.replaceChildren(table("Checkpoints", ["Step", "Mean loss", "Answer"], list.rows));
    }
  };
  setTimeout(() => show().then(rows));
  return [note(`The same text at each kept step of ${name}: its colours, the most likely answer, and the candidates.`), el("label", { className: "long" }, "Step", slider, told), detail, list];
}

function build(section) {
  const text = el("textarea", { id: "scope-text", rows: 2, "aria-label": "Text to look into", placeholder: "Paste a text" });
  const talk = el("button", { type: "button", onclick: () => current().messages.length && look({ messages: sent(current()) }) }, "Use the conversation");
  const move = (event, node, step) => {
    const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!way || !node) return;
    event.preventDefault();
    step(way);
  };
  const tabs = Object.entries(VIEWS).map(([view, [title]]) => el("button", {
    type: "button", role: "tab", id: `scope-tab-${view}`, "data-view": view, "aria-controls": "scope-view", onclick: () => showView(view),
  }, title));
  section.append(
    el("form", { onsubmit: (event) => {
      event.preventDefault();
      look({ prompt: text.value });
    } }, text, el("div", { className: "row" }, el("button", { className: "main" }, "Look"), talk)),
    el("div", { id: "scope-tokens", role: "group", "aria-label": "Tokens, coloured by loss", onkeydown: (event) => move(event, event.target, (way) => select(chipNodes().indexOf(event.target) + way, true)) }),
    el("div", { className: "legend" }, el("span", { id: "scope-mean" }), el("span", {}, "loss 0", el("i"), `${MOST_LOSS} nats and more`)),
    el("p", { id: "scope-told", role: "status" }),
    el("div", { id: "scope-tabs", role: "tablist", "aria-label": "Views", onkeydown: (event) => move(event, event.target.dataset.view, (way) => {
      const next = tabs[(tabs.indexOf(event.target) + way + tabs.length) % tabs.length];
      showView(next.dataset.view);
      next.focus();
    }) }, ...tabs),
    el("div", { id: "scope-view", role: "tabpanel", tabIndex: -1 }));
}

/** The model that the text was last looked into with. */
let model = "";
function shown() {
  if (model === settings.model) return;
  const talk = !model && current().messages.length;
  model = settings.model;
  look(talk ? { messages: sent(current()) } : { ...scope.source }, scope.tokens.length ? scope.at : Infinity);
}

// A server that was started with --inspect=False has no views, and this page no microscope.
if ((await fetch("inspect").catch(() => null))?.ok) {
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
    redraw();
    if (!$("scope").hidden) shown();
  });
}
