// What the microscope looks at, and its questions to the server.

import { api } from "./api.js";
import { el } from "./dom.js";
import { settings } from "./store.js";

/**
 * `source` is {prompt} or {messages}; `tokens` are those of its `count` tokens that fit the context, with `losses`.
 * `at` is the place of the chosen one; their number stands for the one that would follow. `redraw` follows the sliders.
 * `about` has the sizes of the model.
 */
export const scope = {
  source: null, tokens: [], count: 0, losses: [], at: 0, view: "candidates", layer: 0, head: 0, about: null,
  redraw() {},
};
export const ids = () => scope.tokens.map(({ id }) => id);
export const mean = (losses) => losses.reduce((sum, { loss }) => sum + loss, 0) / losses.length;
export const hex = (bytes) => bytes.map((byte) => byte.toString(16).padStart(2, "0")).join("\u00a0"); // In one line.
export const note = (text) => el("p", { className: "note" }, text);

const known = new Map();

/** A view of the server; the latest answers are kept. */
export async function ask(view, body = {}) {
  const whole = { model: settings.model, ...body }, key = view + JSON.stringify(whole);
  if (!known.has(key)) known.set(key, await api(`inspect/${view}`, whole));
  if (known.size > 64) known.delete(known.keys().next().value);
  return known.get(key);
}

/** Losses of all tokens but the first. */
export async function lossesOf(all, model = settings.model) {
  return all.length > 1 ? (await ask("losses", { model, ids: all })).tokens : [];
}

/** Fills a node with what `make` returns, unless another call began meanwhile; a failure is shown as its sentence. */
export async function fill(node, make) {
  const turn = (node.turn = (node.turn ?? 0) + 1);
  node.ariaBusy = true;
  const nodes = await make().catch((error) => el("p", { className: "failure", role: "alert" }, error.message));
  if (node.turn !== turn) return;
  node.ariaBusy = false;
  node.replaceChildren(...[nodes].flat());
}
