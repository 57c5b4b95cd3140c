// Markdown as nodes: paragraphs, headings, lists, quotes, rules, code; bold, italic, struck, code and links in lines.
// Everything else, tables and HTML included, is text.

import { button, copy, el } from "./dom.js";

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)/, HEADING = /^(#{1,6})\s+(.*?)\s*#*$/, RULE = /^ {0,3}([-*_])( *\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/, QUOTE = /^ {0,3}> ?(.*)$/;
const DEEPEST = 6; // Of lists and quotes in each other.

/** The nodes of a text. Code that has not ended goes to the end. */
export function markdown(text, depth = 0) {
  const lines = text.split("\n"), nodes = [];
  for (let i = 0; i < lines.length;) {
    const block = BLOCKS.find(({ begins }) => begins(lines, i, depth));
    const [node, next] = block ? block.read(lines, i, depth) : paragraph(lines, i, depth);
    if (node) nodes.push(node);
    i = next;
  }
  return nodes;
}

const BLOCKS = [
  { begins: (lines, i) => !lines[i].trim(), read: (lines, i) => [null, i + 1] },
  { begins: (lines, i) => FENCE.test(lines[i]), read: fence },
  { begins: (lines, i) => HEADING.test(lines[i]), read: heading },
  { begins: (lines, i) => RULE.test(lines[i]), read: (lines, i) => [el("hr"), i + 1] },
  { begins: (lines, i, depth) => depth < DEEPEST && QUOTE.test(lines[i]), read: quote },
  { begins: (lines, i, depth) => depth < DEEPEST && ITEM.test(lines[i]), read: list },
];

function fence(lines, i) {
  const [, mark, language] = FENCE.exec(lines[i]);
  let end = i + 1;
  while (end < lines.length && !(lines[end].trim().startsWith(mark) && !lines[end].trim().replaceAll(mark[0], ""))) end++;
  const code = lines.slice(i + 1, end).join("\n"), copying = button("copy", "Copy code", () => copy(code, copying));
  const head = el("div", { className: "head" }, el("span", {}, language || "code"), copying);
  return [el("div", { className: "code" }, head, el("pre", { tabIndex: 0 }, el("code", {}, code))), end + 1];
}

function heading(lines, i) {
  const [, marks, text] = HEADING.exec(lines[i]);
  return [el(`h${Math.min(6, marks.length + 2)}`, {}, ...inline(text)), i + 1]; // h1 and h2 are the page's.
}

function quote(lines, i, depth) {
  let end = i;
  while (end < lines.length && QUOTE.test(lines[end])) end++;
  const inner = lines.slice(i, end).map((line) => QUOTE.exec(line)[1]).join("\n");
  return [el("blockquote", {}, ...markdown(inner, depth + 1)), end];
}

function list(lines, i, depth) {
  const [, indent, mark] = ITEM.exec(lines[i]), numbered = /\d/.test(mark);
  const node = el(numbered ? "ol" : "ul", numbered ? { start: parseInt(mark, 10) } : {});
  while (i < lines.length) {
    const item = ITEM.exec(lines[i]);
    if (!item || item[1].length !== indent.length || /\d/.test(item[2]) !== numbered) break;
    const inner = [item[3]];
    // A line that is indented more, or continues without a marker, belongs to the item.
    for (i++; i < lines.length; i++) {
      const line = lines[i], deeper = line.length - line.trimStart().length > indent.length;
      if (line.trim() ? !deeper && (ITEM.test(line) || !lines[i - 1].trim() || starts(lines, i)) : !lines[i + 1]?.trim()) break;
      if (!line.trim() && !/^\s{2}/.test(lines[i + 1]) && !ITEM.test(lines[i + 1])) break;
      inner.push(line.slice(Math.min(indent.length + 2, line.length - line.trimStart().length)));
    }
    while (i < lines.length && !lines[i].trim() && ITEM.test(lines[i + 1] ?? "")) i++;
    const nodes = markdown(inner.join("\n"), depth + 1);
    if (nodes[0]?.tagName === "P") nodes.splice(0, 1, ...nodes[0].childNodes);
    node.append(el("li", {}, ...nodes));
  }
  return [node, i];
}

const starts = (lines, i, depth) => BLOCKS.some(({ begins }) => begins(lines, i, depth));

function paragraph(lines, i, depth) {
  let end = i + 1;
  while (end < lines.length && !starts(lines, end, depth)) end++;
  return [el("p", {}, ...inline(lines.slice(i, end).join("\n"))), end];
}

const link = (text, href) => el("a", { href, target: "_blank", rel: "noopener noreferrer" }, ...text);
const INLINE = [
  [/^(`+)([^`]|[^`][^]*?[^`])\1(?!`)/, (m) => el("code", {}, m[2].replace(/^ (.*) $/, "$1"))],
  [/^\\([!-/:-@[-`{-~])/, (m) => m[1]],
  [/^\*\*(?=\S)([^]{1,2000}?\S)\*\*/, (m, depth) => el("strong", {}, ...inline(m[1], depth))],
  [/^(\*|_)(?![\s*_])([^*_]{0,2000}?[^\s*_])\1(?!\w)/, (m, depth) => el("em", {}, ...inline(m[2], depth))],
  [/^~~(?=\S)([^~]{1,2000})~~/, (m, depth) => el("del", {}, ...inline(m[1], depth))],
  [/^\[([^\][]{1,500})\]\((https?:\/\/[^\s()<>]{1,2000})\)/, (m, depth) => link(inline(m[1], depth), m[2])],
  [/^https?:\/\/[^\s<>"'`*]{1,2000}[^\s<>"'`*.,:;!?)\]]/, (m) => link([m[0]], m[0])],
];

/** The nodes of a line: at every place where a mark may begin, the first rule that matches. */
function inline(text, depth = 0) {
  const nodes = [];
  let plain = "", before = "";
  for (let i = 0; i < text.length;) {
    let length = 1, node = null;
    if (depth < DEEPEST && (/[`\\*~[]/.test(text[i]) || (/[_h]/.test(text[i]) && !/\w/.test(before)))) {
      const rest = text.slice(i, i + 5000);
      for (const [rule, make] of INLINE) {
        const found = rule.exec(rest);
        if (!found) continue;
        [length, node] = [found[0].length, make(found, depth + 1)];
        break;
      }
    }
    before = text[i + length - 1];
    if (node instanceof Node) {
      nodes.push(plain, node);
      plain = "";
    } else plain += node ?? text[i];
    i += length;
  }
  return [...nodes, plain].filter((node) => node !== "");
}
