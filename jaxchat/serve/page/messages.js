// A message of a conversation as an element.

import { button, copy, el, patch } from "./dom.js";
import { markdown } from "./markdown.js";

const NAMES = { user: "You", assistant: "The model" };
const PARTS = { python: "Tool call", python_output: "Result" };

/** The nodes of an answer: markdown, and calls of tools with their results in boxes. */
function body({ content, parts }) {
  if (!parts?.length) return markdown(content);
  const nodes = [];
  for (const { type, text } of parts) {
    if (type === "text") nodes.push(...markdown(text));
    else {
      const box = type === "python_output" && nodes.at(-1)?.className === "tool" ? nodes.pop() : el("dl", { className: "tool" });
      box.append(el("div", {}, el("dt", {}, PARTS[type] ?? type), el("dd", {}, el("code", {}, text))));
      nodes.push(box);
    }
  }
  return nodes;
}

/** Numbers of an answer: its length, speed and seed. */
function facts({ model, usage, pieces, seconds, first, seed, finish_reason }) {
  const tokens = usage?.completion_tokens ?? pieces;
  return [
    model,
    tokens && `${tokens} token${tokens === 1 ? "" : "s"}`,
    tokens && seconds && `${(tokens / seconds).toFixed(tokens > 10 * seconds ? 0 : 1)} tokens/s`,
    first && `first ${first.toFixed(2)} s`,
    usage && `cached ${usage.prompt_tokens_details.cached_tokens}/${usage.prompt_tokens}`,
    seed !== undefined && `seed ${seed}`,
    finish_reason === "length" && "ended at the length limit",
  ].filter(Boolean).join(" · ");
}

/** Shows the present state of an answer in its element. */
export function fill(node, message, running) {
  const nodes = body(message);
  if (running && !nodes.length) nodes.push(el("p", { className: "waiting", "aria-label": "Waiting" }, el("i"), el("i"), el("i")));
  patch(node.querySelector(".body"), nodes);
  const about = node.querySelector(".facts");
  if (about) about.textContent = facts(message);
  node.toggleAttribute("data-running", Boolean(running));
}

/**
 * The element of a message. `actions`: edit(message, text), again(message) for the last answer, look(message); those
 * that are left out have no button.
 */
export function article(message, running, actions) {
  const { role } = message;
  const node = el("article", { className: role, "aria-label": NAMES[role] }, el("div", { className: "body" }));
  const bar = el("div", { className: "bar" });
  if (role === "user") node.firstChild.append(el("p", {}, message.content));
  if (!running) {
    const copying = button("copy", "Copy", () => copy(message.content, copying));
    bar.append(copying);
    if (actions.edit) bar.append(button("edit", "Edit", () => edit(node, message, actions.edit)));
    if (actions.again) bar.append(button("again", "Answer again", () => actions.again(message)));
    if (actions.look) bar.append(button("look", "Look inside", () => actions.look(message)));
  }
  if (role === "assistant") bar.append(el("span", { className: "facts" }));
  node.append(bar);
  if (role === "assistant") fill(node, message, running);
  return node;
}

function edit(node, message, done) {
  const area = el("textarea", { value: message.content, "aria-label": "Text of this message" });
  const before = [...node.childNodes];
  const cancel = () => {
    node.replaceChildren(...before);
    node.querySelector("button[title=Edit]").focus();
  };
  const agree = () => (area.value.trim() && area.value !== message.content ? done(message, area.value) : cancel());
  area.onkeydown = (event) => {
    if (event.key === "Escape") cancel();
    else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && message.role === "user") agree();
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  const label = message.role === "user" ? "Send" : "Save";
  node.replaceChildren(el("div", { className: "editing" }, area, el("menu", {},
    el("button", { type: "button", onclick: cancel }, "Cancel"),
    el("button", { type: "button", className: "main", onclick: agree }, label))));
  area.style.height = `${Math.min(400, area.scrollHeight + 4)}px`;
  area.focus();
}
