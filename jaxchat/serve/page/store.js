// Conversations and settings, kept in this browser: one entry of localStorage a conversation.

const CHAT = "jaxchat.chat.", SETTINGS = "jaxchat.settings";

/** Tells other parts of the page: "settings" (sampling, model), "conversation" (another one, or it changed). */
export const bus = new EventTarget();
export const emit = (name, detail) => bus.dispatchEvent(new CustomEvent(name, { detail }));

/** Sampling controls: label, smallest and largest value, step, value that turns it off. */
export const CONTROLS = {
  temperature: ["Temperature", 0, 2, 0.05, 1],
  top_k: ["Top-k", 0, 200, 1, 0],
  top_p: ["Top-p", 0.01, 1, 0.01, 1],
  min_p: ["Min-p", 0, 0.5, 0.01, 0],
  repetition_penalty: ["Repetition penalty", 1, 2, 0.05, 1],
};
export const OFF = Object.fromEntries(Object.entries(CONTROLS).map(([name, row]) => [name, row[4]]));

const read = (key) => JSON.parse(localStorage.getItem(key));
const kept = read(SETTINGS) ?? { model: "", max_tokens: "", seed: "", stop: "" };
/** Fields of the request, and which sides are open. The temperature at first is that of launch.chat. */
export const settings = { ...kept, sampling: { ...OFF, temperature: 0.8, ...kept.sampling } };

export function keepSettings() {
  write(SETTINGS, settings);
  emit("settings", settings);
}

const stored = Object.keys(localStorage).filter((key) => key.startsWith(CHAT));
export const conversations = new Map(stored.map((key) => [key.slice(CHAT.length), read(key)]));

/** Those of the list, the last used first. */
export const listed = () => [...conversations.values()].sort((a, b) => b.used - a.used);

const newId = () => crypto.getRandomValues(new Uint32Array(2)).join("-");
export const create = () => ({ id: newId(), title: "", system: "", messages: [], used: 0 });

export function keep(conversation) {
  conversation.used = Date.now();
  conversations.set(conversation.id, conversation);
  write(CHAT + conversation.id, conversation);
}

export function forget(conversation) {
  conversations.delete(conversation.id);
  localStorage.removeItem(CHAT + conversation.id);
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch {
    emit("notice", "The browser's storage is full: export and delete some conversations.");
  }
}

/** Adds a delta of a stream to the parts of an answer. A part that is no text begins with an empty delta. */
export function add(message, delta) {
  const given = [...(delta.content ? [{ type: "text", text: delta.content }] : []), ...(delta.parts ?? [])];
  for (const { type, text } of given) {
    const last = message.parts.at(-1);
    if (!text || last?.type !== type) message.parts.push({ type, text });
    else last.text += text;
  }
  message.content = message.parts.map((part) => (part.type === "text" ? part.text : "")).join("");
}

/** The messages of a request. */
export function sent({ system, messages }) {
  const said = messages.map(({ role, content, parts }) => ({ role, content, ...(parts?.length && { parts }) }));
  return system.trim() ? [{ role: "system", content: system }, ...said] : said;
}

/** A conversation as a line of training data, up to its last answer; "" if it has none. */
export function trainingLine({ system, messages }) {
  const said = messages.map(({ role, content, parts }) => ({
    role, content: parts?.some((part) => part.type !== "text") ? parts : content,
  }));
  while (said.at(-1)?.role === "user") said.pop();
  if (!said.length) return "";
  if (system.trim()) said.unshift({ role: "system", content: system });
  return JSON.stringify({ messages: said }) + "\n";
}
