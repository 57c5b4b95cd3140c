// The side with the conversations: open, rename, delete, export.

import { create as blank, forget, keep, listed, bus, trainingLine } from "./store.js";
import { current, open, stop } from "./chat.js";
import { $, announce, ask, button, download, el } from "./dom.js";

const titleOf = ({ title, messages }) => title || messages[0]?.content.slice(0, 60).trim() || "New chat";

function entry(conversation) {
  const title = titleOf(conversation), shown = { "aria-current": conversation.id === current().id };
  return el("li", {}, el("button", { className: "name", onclick: () => open(conversation), ...shown }, title),
    button("edit", `Rename ${title}`, () => rename(conversation)),
    button("export", `Export ${title}`, () => exportAs(`${fileName(title)}.jsonl`, [conversation])),
    button("delete", `Delete ${title}`, () => remove(conversation)));
}

const fileName = (title) => title.replace(/[^\p{L}\p{N}]+/gu, "_").replace(/^_+|_+$/g, "").slice(0, 40) || "chat";

async function rename(conversation) {
  conversation.title = (await ask("Name of this conversation", "Rename", titleOf(conversation))) ?? conversation.title;
  keep(conversation);
  show();
}

async function remove(conversation) {
  if (!(await ask(`Delete “${titleOf(conversation)}”? It is kept nowhere else.`, "Delete"))) return;
  stop(conversation);
  forget(conversation);
  if (conversation.id === current().id) open(listed()[0] ?? blank());
  show();
  $("new").focus();
}

/** Saves conversations as lines of training data, which launch.train reads. */
function exportAs(name, conversations) {
  const lines = conversations.map(trainingLine).filter(Boolean);
  if (lines.length) download(name, lines.join(""));
  announce(lines.length ? `Saved ${name}` : "There is no answer to export yet");
}

function show() {
  $("conversations").replaceChildren(...listed().map(entry));
  $("export-all").hidden = !listed().length;
}

export function openList() {
  $("new").onclick = () => open(blank());
  $("export-all").onclick = () => exportAs("conversations.jsonl", listed().reverse());
  for (const name of ["opened", "kept"]) bus.addEventListener(name, show);
  show();
}
