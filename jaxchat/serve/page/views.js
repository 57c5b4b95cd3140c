// The views of the microscope. Each returns its nodes; `page` has what they do to the rest: select, paint, showView.

import { api } from "./api.js";
import { $, el } from "./dom.js";
import { ask, fill, hex, ids, lossesOf, mean, note, scope } from "./looking.js";
import { MOST_LOSS, arcs, bar, heatmap, label, percent, scatter, scrolled, table } from "./pictures.js";
import { steps, unpack } from "./sampling.js";
import { controls } from "./settings.js";
import { CONTROLS, OFF, settings } from "./store.js";

export const VIEWS = {
  candidates: ["Candidates", candidates], tokens: ["Tokens", tokens], attention: ["Attention", attention],
  lens: ["Layers", lens], embedding: ["Embedding", embedding], merges: ["Merges", merges], cache: ["Cache", cache],
  checkpoints: ["Checkpoints", checkpoints],
};

function range(name, most, value, oninput) {
  return el("input", { type: "range", min: 0, max: most, step: 1, value, "aria-label": name, oninput });
}

/** A table of candidates that follows the sliders, after the ids `before` them. */
function live({ logits, candidates: found }, before) {
  const unpacked = unpack(logits), box = el("div", { className: "bars" });
  scope.redraw = () => {
    const { sampling } = settings, shares = steps(unpacked, before, sampling);
    const isOn = (name) => ["model", "temperature"].includes(name) || sampling[name] !== OFF[name];
    const used = Object.keys(shares).filter(isOn);
    const heads = used.map((name) => (name === "model" ? "In the model" : `${CONTROLS[name][0]} ${sampling[name]}`));
    const rows = found.map(({ token, name, logit }) => [
      label(name), logit.toFixed(3), ...used.map((step) => bar(shares[step][token])),
    ]);
    const caption = "Candidates before and after each step of sampling";
    box.replaceChildren(table(caption, ["Token", "Logit", ...heads], rows, (i) => found[i].chosen));
  };
  scope.redraw();
  return box;
}

async function candidates() {
  if (!scope.at) return note("Nothing comes before the first token, so it has no candidates: choose another above.");
  const found = await ask("candidates", { ids: ids(), position: scope.at, count: 12 });
  const marked = scope.at < scope.tokens.length ? "; the one that is in the text is marked" : "";
  const what = note(`What the model would say for token ${scope.at}${marked}.`);
  return [what, el("div", { className: "sliders" }, ...controls()), live(found, ids().slice(0, scope.at))];
}

async function tokens() {
  const rows = scope.tokens.map(({ id, name, bytes }, i) => {
    const loss = scope.losses[i - 1]?.loss;
    const lossBar = loss === undefined ? "" : bar(loss / MOST_LOSS, loss.toFixed(3));
    return [String(i), label(name, 40), String(id), lossBar, hex(bytes)];
  });
  const heads = ["Place", "Token", "Id", "Loss (nats)", "Bytes"];
  return table("Tokens with ids, bytes and losses", heads, rows, (i) => i === scope.at);
}

/** The first tokens of the text, as many as a view takes, with a note if there are more: a token reads those before. */
function part() {
  const { most_tokens: most } = scope.about, cut = scope.tokens.length > most;
  const row = Math.min(scope.at, scope.tokens.length - 1, most - 1);
  return { row, all: ids().slice(0, most), notes: cut ? [note(`Only the first ${most} tokens are shown.`)] : [] };
}

function choice(title, name, options, showView) {
  const onchange = async () => {
    scope[name] = Number(select.value);
    await showView();
    $("scope-view").querySelector(`select[name=${name}]`)?.focus();
  };
  const one = (i) => el("option", { value: i, selected: i === scope[name] }, i);
  const select = el("select", { onchange, name }, ...options.map(one));
  return el("label", {}, title, select);
}

async function attention({ select, showView }) {
  const { heads } = scope.about, layers = [...heads.keys()].filter((i) => heads[i]);
  if (!layers.length) return note("No layer of this model has attention.");
  if (!heads[scope.layer]) scope.layer = layers[0];
  scope.head = Math.min(scope.head, heads[scope.layer] - 1);
  const { row, all, notes } = part(), { layer, head } = scope;
  const { weights } = await ask("attention", { ids: all, layer, head });
  const names = scope.tokens.slice(0, all.length).map(({ name }) => label(name, 12));
  const what = `Attention of layer ${layer}, head ${head}`;
  const status = el("p", { className: "note", role: "status" }, "Row: the token that reads. Column: the one it reads.");
  const say = (t, s) => {
    status.textContent = `Token ${t} (${names[t]}) takes ${percent(weights[t][s])} from token ${s} (${names[s]}).`;
  };
  const most = [...weights[row].keys()].sort((a, b) => weights[row][b] - weights[row][a]).slice(0, 10);
  const rows = most.map((s) => [`${s} ${names[s]}`, bar(weights[row][s])]);
  const about = "Each token on the right takes from those on the left; the arcs of the chosen one are coloured.";
  return [
    el("div", { className: "row" }, choice("Layer", "layer", layers, showView),
      choice("Head", "head", [...Array(heads[layer]).keys()], showView)),
    ...notes,
    el("div", { className: "pictures" },
      el("figure", {}, scrolled(`${what}, as a map`, heatmap(what, weights, names, row, say, select)), status),
      el("figure", {}, scrolled(`${what}, as arcs`, arcs(what, weights, names, row), "tall"), note(about)),
      table(`What token ${row} takes`, [`Token ${row} takes from`, "Weight"], rows)),
  ];
}

async function lens() {
  const { row, all, notes } = part(), places = Math.min(16, scope.about.most_places);
  const start = Math.max(0, Math.min(row - 8, all.length - places));
  const { rows } = await ask("lens", { ids: all, start, places, count: 5 });
  const cell = ({ candidates: said, entropy }) => {
    const all5 = said.map(({ name, probability }) => `${name} ${percent(probability)}`);
    const title = [...all5, `entropy ${entropy.toFixed(2)} nats`].join("\n"), [{ name, probability }] = said;
    const td = el("td", { className: "said", title }, label(name, 10), el("small", {}, percent(probability)));
    td.style.setProperty("--heat", `${100 * probability}%`);
    return td;
  };
  const heads = rows[0].map((_, i) => `${start + i} ${label(scope.tokens[start + i].name, 10)}`);
  const shown = rows.map((cells, n) => [`${n} layer${n === 1 ? "" : "s"}`, ...cells.map(cell)]);
  const what = "What the model would say after each token if it ended after so many layers. The top row is the model.";
  const box = table("Logit lens", ["After", ...heads], shown.reverse()), chosen = shown[0][row - start + 1];
  setTimeout(() => (box.scrollLeft = chosen.offsetLeft - box.clientWidth / 2)); // Once it is in the page.
  return [note(what), ...notes, box];
}

async function embedding() {
  const token = scope.tokens[Math.min(scope.at, scope.tokens.length - 1)];
  const near = (await ask("neighbours", { token: token.id })).neighbours;
  const shown = new Set([...ids().slice(0, 500), ...near.map((one) => one.token)]);
  const { points, variance } = await ask("map", { tokens: [...shown] });
  const mine = new Set([token.id, ...near.map((one) => one.token)]), status = note("Point at a dot for its name.");
  const say = ({ name, token: id }) => (status.textContent = `${name}, id ${id}`);
  const [right, up] = variance.map(percent);
  const title = `Map of the embeddings: ${right} of the variance to the right, ${up} up`;
  const rows = near.map((one) => [label(one.name), String(one.token), bar(one.cosine, one.cosine.toFixed(3))]);
  return el("div", { className: "pictures" },
    table(`Tokens near ${token.name}`, [`Near ${label(token.name)}`, "Id", "Cosine"], rows),
    el("figure", {}, scatter(title, points, (point) => mine.has(point.token), say),
      note(`${title}. Blue: the chosen token and those near it.`), status));
}

async function merges() {
  const { prompt, messages } = scope.source, text = [...(prompt ?? messages.at(-1).content ?? "")];
  const { most_letters: most } = scope.about;
  const { parts } = await ask("merges", { prompt: text.slice(0, most).join("") });
  const last = Math.max(0, ...parts.map((one) => one.steps.length - 1));
  const shown = el("div", { className: "pieces" }), status = el("output");
  const piece = (name, rank) => el("span", {
    className: rank === undefined ? "" : "fresh", title: rank === undefined ? "" : `merge ${rank} of the tokenizer`,
  }, name);
  const draw = () => {
    const now = Number(slider.value);
    shown.replaceChildren(...parts.map(({ steps: done, names }) => {
      const { pieces, merged } = done[Math.min(now, done.length - 1)], fresh = now < done.length ? merged : null;
      const inBytes = now === last && pieces.length !== names.length;
      const letters = inBytes ? names.map((name) => label(name)) : pieces.map((one) => one.replaceAll("▁", "␣"));
      const nodes = letters.map((name, i) => piece(name, fresh?.index === i ? fresh.rank : undefined));
      return el("span", { className: "part" }, ...nodes);
    }));
    status.textContent = `${now} of ${last}`;
  };
  const slider = range("Merges done", last, last, draw);
  draw();
  return [
    note("Each part of the text begins as characters. At every step those neighbours are joined whose pair the " +
      "tokenizer learned first; new pieces are marked. Characters without a piece become bytes in the end."),
    el("label", { className: "long" }, "Merges done", slider, status), shown,
    ...(text.length > most ? [note(`Only the first ${most} letters are shown.`)] : []),
  ];
}

async function cache() {
  const { lengths, layers, bytes } = await ask("cache"), most = bytes.at(-1), mine = scope.tokens.length;
  const size = (n) => `${(n / 1024).toLocaleString("en", { maximumFractionDigits: 1 })} KiB`;
  const windows = [...new Set(layers.map(({ window }) => window))];
  const kinds = windows.length > 1 ? windows.map((window) => layers.filter((layer) => layer.window === window)) : [];
  const heads = kinds.map(({ length }, i) => {
    const window = windows[i] === null ? "without a window" : `with a window of ${windows[i]}`;
    return `${length} layer${length === 1 ? "" : "s"} ${window}`;
  });
  const rows = lengths.map((length, i) => {
    const sums = kinds.map((kind) => kind.reduce((sum, layer) => sum + layer.bytes[i], 0));
    return [String(length), ...[bytes[i], ...sums].map((n) => bar(n / most, size(n)))];
  });
  const fits = lengths.findIndex((length) => length >= mine);
  return [
    note(`Keys and values of one answer by its number of tokens. This text has ${mine}. ` +
      "The cache of a layer with a window stops growing once the window is full."),
    table("Bytes of the cache", ["Tokens", "All layers", ...heads], rows, (i) => i === fits),
  ];
}

/** What a checkpoint answers to the source, most likely tokens only, and its losses. */
async function answered(model) {
  const { prompt, messages = [] } = scope.source, greedy = { model, temperature: 0, max_tokens: 48 };
  const asked = messages.slice(0, messages.findLastIndex(({ role }) => role === "user") + 1);
  const { choices: [{ message, text }] } = await (prompt === undefined
    ? api("v1/chat/completions", { ...greedy, messages: asked }) : api("v1/completions", { ...greedy, prompt }));
  const losses = await lossesOf(ids(), model);
  return { said: text ?? message.content, losses, loss: mean(losses) };
}

async function checkpoints({ paint }) {
  const name = settings.model.split("@")[0], { data } = await api("v1/models");
  const kept = data.filter(({ id }) => id.startsWith(`${name}@`)), last = kept.length - 1;
  if (last < 0) return note(`Only one step of ${name} is served: start launch.serve with the run or the stage.`);
  const position = Math.max(1, scope.at), { source } = scope, found = [], rows = [];
  const status = el("output"), detail = el("div", { className: "detail" }), list = el("div");
  const at = (i) => (found[i] ??= answered(kept[i].id));
  const show = () => fill(detail, async () => {
    const i = Number(slider.value), { id, step } = kept[i];
    status.textContent = slider.ariaValueText = `step ${step}`;
    const { said, losses } = await at(i);
    const open = await ask("candidates", { model: id, ids: ids(), position, count: 8 });
    if (i !== Number(slider.value) || !detail.isConnected) return [];
    paint(losses);
    const what = note(`Candidates for token ${position} at step ${step}:`);
    return [el("blockquote", {}, said || "(nothing)"), what, live(open, ids().slice(0, position))];
  });
  const slider = range("Step of the run", last, last, show);
  const all = async () => {
    for (const i of kept.keys()) {
      const { said, loss } = await at(i).catch((error) => ({ said: error.message, loss: NaN }));
      if (source !== scope.source || !list.isConnected) return;
      rows.push([String(kept[i].step), bar(loss / MOST_LOSS || 0, loss >= 0 ? loss.toFixed(3) : "–"), said || "(nothing)"]);
      list.replaceChildren(table("Checkpoints", ["Step", "Mean loss", "Answer"], rows));
    }
  };
  setTimeout(() => show().then(all));
  return [
    note(`The same text at each kept step of ${name}: its colours, the most likely answer, and the candidates.`),
    el("label", { className: "long" }, "Step", slider, status), detail, list,
  ];
}
