// Pictures of numbers: bars in tables, and drawings whose colours follow the page's.

import { el, svg } from "./dom.js";

/** Largest loss with a colour of its own, in nats, as in launch.inspect. */
export const MOST_LOSS = 8;

export function percent(p) {
  if (p === 0) return "–";
  return p < 0.00005 ? "<0.01 %" : `${(100 * p).toFixed(p < 0.0995 ? 2 : 1)} %`;
}

/** A token's name without its quotes, spaces visible. */
export function label(name, most = 24) {
  const plain = /^(['"]).+\1$/s.test(name) ? name.slice(1, -1) : name;
  const letters = [...plain.replaceAll(" ", "␣")];
  return letters.length > most ? `${letters.slice(0, most - 1).join("")}…` : letters.join("");
}

/** A cell with a bar as long as a share of 1, and its number. */
export function bar(share, text = percent(share)) {
  const fill = el("span", { className: "fill" });
  fill.style.setProperty("--share", Math.min(1, Math.max(0, share)));
  return el("td", { className: "share" }, fill, el("span", {}, text));
}

/** A box that scrolls. */
export function scrolled(name, node, style = "") {
  return el("div", { className: `scroll ${style}`, tabIndex: 0, role: "region", "aria-label": name }, node);
}

/** A table that scrolls: heads of columns (texts), and rows of cells (nodes or texts); the first names the row. */
export function table(caption, heads, rows, marked = () => false) {
  const cell = (content, i) => (content instanceof Node && content.nodeName === "TD" ? content
    : i ? el("td", {}, content) : el("th", { scope: "row" }, content));
  return scrolled(caption, el("table", {},
    el("caption", { className: "unseen" }, caption),
    el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", {}, ...rows.map((row, i) => el("tr", { className: marked(i) ? "marked" : "" }, ...row.map(cell)))),
  ));
}

function drawing(width, height, name, ...children) {
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": name }, ...children);
}

/** Shapes in 20 strengths: `shapes` are pairs of a strength from 0 to 1 and the commands of a path. */
function shaded(shapes, attributes) {
  const paths = Array.from({ length: 21 }, () => []);
  for (const [strength, commands] of shapes) paths[Math.ceil(20 * Math.min(1, strength))].push(commands);
  return paths.flatMap((commands, i) => (commands.length
    ? [svg("path", { ...attributes, d: commands.join(""), opacity: i / 20 })] : []));
}

/** Weights (a row per token, up to itself) as squares; `onhover(row, column)` when the pointer is over one. */
export function heatmap(name, weights, labels, at, onhover, pick) {
  const size = weights.length, cell = Math.max(3, Math.min(20, Math.floor(560 / size))), named = cell >= 10;
  const left = named ? 90 : 4, side = cell * size, text = { "font-size": Math.min(12, cell), class: "word" };
  const square = (t, s) => `M${left + s * cell} ${t * cell}h${cell}v${cell}h${-cell}z`;
  const squares = weights.flatMap((row, t) => row.flatMap((w, s) => (w >= 0.002 ? [[w, square(t, s)]] : [])));
  const words = named ? labels.flatMap((word, i) => [
    svg("text", { ...text, x: left - 6, y: (i + 0.75) * cell, "text-anchor": "end" }, word),
    svg("text", { ...text, transform: `translate(${left + (i + 0.75) * cell} ${side + 6}) rotate(90)` }, word),
  ]) : [];
  const frame = svg("rect", { x: left, y: at * cell, width: (at + 1) * cell, height: cell, class: "frame" });
  const marks = [...words, ...shaded(squares, { class: "solid" }), frame];
  const node = drawing(left + side + 4, side + (named ? 90 : 4), `${name}; the table has numbers`, ...marks);
  const place = ({ offsetX, offsetY }) => {
    const scale = node.viewBox.baseVal.width / node.getBoundingClientRect().width;
    const [t, s] = [Math.floor((offsetY * scale) / cell), Math.floor((offsetX * scale - left) / cell)];
    return t >= 0 && t < size && s >= 0 && s <= t ? [t, s] : null;
  };
  node.onpointermove = (event) => place(event) && onhover(...place(event));
  node.onclick = (event) => place(event) && pick(place(event)[0]);
  return node;
}

/** Weights as curves from every token on the right to those on the left that it takes from; those of one are marked. */
export function arcs(name, weights, labels, at) {
  const line = 20, width = 420, [from, to] = [130, width - 130];
  const curve = (t, s) => {
    const [a, b] = [(s + 0.5) * line, (t + 0.5) * line];
    return `M${from} ${a}C${from + 60} ${a} ${to - 60} ${b} ${to} ${b}`;
  };
  const all = weights.flatMap((row, t) => row.flatMap((w, s) => (w > 0.05 ? [[t, w, curve(t, s)]] : [])));
  const part = (wanted, style) => {
    const shapes = all.filter(([t]) => (t === at) === wanted).map(([, ...shape]) => shape);
    return shaded(shapes, { class: style });
  };
  const word = (text, i, x, anchor) => svg("text", {
    x, y: (i + 0.72) * line, "text-anchor": anchor, "font-size": 12,
    class: i === at && anchor === "start" ? "word chosen" : "word",
  }, text);
  const words = labels.flatMap((text, i) => [word(text, i, from - 8, "end"), word(text, i, to + 8, "start")]);
  return drawing(width, line * labels.length, `${name}, as arcs; the table has numbers`, ...words,
    ...part(false, "faint"), ...part(true, "curve"));
}

/** Points {x, y, name}; those that are marked have names, any has one while the pointer is near. */
export function scatter(name, points, marked, onhover) {
  const width = 640, height = 460, edge = 24;
  const scale = (axis, size) => {
    const values = points.map((point) => point[axis]), least = Math.min(...values), most = Math.max(...values);
    return (value) => edge + ((value - least) / (most - least || 1)) * (size - 2 * edge);
  };
  const [x, y] = [scale("x", width), scale("y", height)];
  const placed = points.map((point) => ({ ...point, at: [x(point.x), height - y(point.y)] }));
  const dots = (chosen, style) => {
    return svg("path", { class: style, d: chosen.map(({ at }) => `M${at.join(" ")}h0`).join("") });
  };
  const word = ({ at: [left, top], name: said }, style = "word") => svg("text", {
    x: left + (left > width - 90 ? -7 : 7), y: top + 4, "text-anchor": left > width - 90 ? "end" : "start",
    "font-size": 16, class: style,
  }, label(said, 14));
  const [named, near] = [placed.filter(marked), svg("g")];
  const words = named.slice(0, 60).map((one) => word(one));
  const node = drawing(width, height, `${name}; the table has the nearest`, dots(placed, "dot"),
    dots(named, "dot strong"), ...words, near);
  node.onpointermove = ({ offsetX, offsetY }) => {
    const ratio = width / node.getBoundingClientRect().width, place = [offsetX * ratio, offsetY * ratio];
    const far = ({ at }) => Math.hypot(at[0] - place[0], at[1] - place[1]);
    const closest = placed.reduce((a, b) => (far(b) < far(a) ? b : a));
    near.replaceChildren(dots([closest], "dot near"), word(closest, "word chosen"));
    onhover(closest);
  };
  return node;
}
