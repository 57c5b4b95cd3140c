// Building the page. What the model writes only ever becomes text nodes.

export const $ = (id) => document.getElementById(id);

/** An element with properties (aria-* and data-* as attributes) and children: nodes or texts. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (/^(aria|data)-|^role$/.test(name)) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const icon = (name) => svg("svg", { "aria-hidden": true }, svg("use", { href: `#i-${name}` }));

export const button = (name, label, onclick) =>
  el("button", { type: "button", className: "icon", title: label, "aria-label": label, onclick }, icon(name));

/** Replaces only the children that differ, so that a selection in the others stays. */
export function patch(parent, nodes) {
  nodes.forEach((node, i) => {
    const old = parent.childNodes[i];
    if (!old) parent.append(node);
    else if (!old.isEqualNode(node)) old.replaceWith(node);
  });
  while (parent.childNodes.length > nodes.length) parent.lastChild.remove();
}

/** A text as a sentence. */
export const sentence = (text, end = ".") => text[0].toUpperCase() + text.slice(1) + (/[.?!]$/.test(text) ? "" : end);

/** Says a sentence to screen readers. */
export const announce = (text) => ($("said").textContent = text);

/** Copies a text, and shows on a button that it was done. */
export async function copy(text, node) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // Only pages of this machine and of https have a clipboard.
    const area = el("textarea", { value: text, className: "unseen" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  announce("Copied");
  const use = node?.querySelector("use");
  use?.setAttribute("href", "#i-check");
  setTimeout(() => use?.setAttribute("href", "#i-copy"), 1500);
}

export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

/** Asks a question; returns what was entered (or "yes" if nothing can be), or null. */
export function ask(question, agree, value) {
  const dialog = $("dialog"), reply = $("reply");
  $("question").textContent = question;
  $("agree").textContent = agree;
  reply.hidden = value === undefined;
  reply.value = value ?? "yes";
  dialog.returnValue = "";
  $("cancel").onclick = () => dialog.close();
  dialog.showModal();
  if (value !== undefined) reply.select();
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue && reply.value.trim() ? reply.value.trim() : null);
  });
}
