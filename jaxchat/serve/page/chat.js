// The chat: sends, streams, stops, answers again, edits.

import { stream } from "./api.js";
import { $, announce, el, sentence } from "./dom.js";
import { article, fill } from "./messages.js";
import { add, bus, conversations, create, keep, listed, sent, settings, emit } from "./store.js";

let shown = listed()[0] ?? create();
/** Answers under way: the AbortController of each by the id of its conversation. */
const running = new Map();
/** Why the last answer of a conversation failed, by its id. */
const failures = new Map();
/** Names of models that have not learned to chat. */
let untaught = new Set();
/** Called with a message and its conversation to look into it, if a panel can. */
let look = null;

export const current = () => shown;
export const offerLook = (open) => ((look = open), show());

/** Fields of a request as the controls stand, without the messages. */
export function controls() {
  const { model, sampling, max_tokens, seed, stop } = settings;
  return {
    model, ...sampling, ...(max_tokens && { max_tokens: Number(max_tokens) }),
    ...(seed && { seed: Number(seed) }), ...(stop && { stop }),
  };
}

export function open(conversation) {
  shown = conversation;
  show();
  scrollDown(true);
  emit("opened", conversation);
  $("input").focus();
}

export const stop = (conversation) => running.get(conversation.id)?.abort();

function show() {
  const { messages, id } = shown, last = messages.at(-1), busy = running.has(id);
  const actions = (message) => ({
    edit: busy ? null : edited,
    again: message === last && message.role === "assistant" && !busy ? again : null,
    look: look && ((one) => look(one, shown)),
  });
  $("messages").replaceChildren(...messages.map((one) => article(one, busy && one === last, actions(one))));
  $("messages").ariaBusy = busy;
  const heading = el("h1", {}, "What do you want to say?");
  const about = settings.model + (untaught.has(settings.model) ? " continues texts: it has not learned to answer." : "");
  if (!messages.length) $("messages").append(el("div", { className: "empty" }, heading, el("p", {}, about)));
  const failure = failures.get(id) ?? last?.incomplete ?? (last?.role === "user" && "This message has no answer yet.");
  const retry = el("button", { type: "button", onclick: () => again(last) }, "Try again");
  if (failure && !busy) $("messages").append(el("div", { className: "failure", role: "alert" }, failure, retry));
  showButton();
}

function showButton() {
  const busy = running.has(shown.id), send = $("send");
  send.setAttribute("aria-label", busy ? "Stop" : "Send");
  send.querySelector("use").setAttribute("href", busy ? "#i-stop" : "#i-send");
  send.disabled = !busy && !$("input").value.trim();
  document.title = `${busy ? "… " : ""}jaxchat`;
}

function submit() {
  const text = $("input").value;
  if (!text.trim() || running.has(shown.id)) return;
  // Two messages of the user in a row are no conversation: what has no answer is joined with what follows.
  const before = shown.messages.at(-1)?.role === "user" ? `${shown.messages.pop().content}\n\n` : "";
  shown.messages.push({ role: "user", content: before + text });
  $("input").value = "";
  resize();
  answer(shown);
}

/** Drops an answer, or what is left of one, and asks for another. */
function again(message) {
  if (message.role === "assistant") shown.messages.pop();
  answer(shown);
}

/** A changed message of the user is answered anew, without what came after it; one of the model is kept as written. */
function edited(message, text) {
  const index = shown.messages.indexOf(message);
  shown.messages.splice(index, message.role === "user" ? Infinity : 1, { role: message.role, content: text });
  if (message.role === "user") return answer(shown);
  keep(shown);
  show();
}

async function answer(conversation) {
  const body = { ...controls(), messages: sent(conversation) }, abort = new AbortController();
  const message = { role: "assistant", content: "", parts: [], model: body.model, pieces: 0 };
  message.incomplete = "The page was left before the answer ended.";
  conversation.messages.push(message);
  failures.delete(conversation.id);
  running.set(conversation.id, abort);
  keep(conversation);
  if (conversation === shown) open(conversation);
  announce("Answering");
  const start = performance.now(), since = () => (performance.now() - start) / 1000;
  const shows = (chunk) => {
    take(message, chunk, since());
    draw(conversation, message);
  };
  const { usage, finish_reason, failure } = await stream(body, shows, abort.signal).catch((error) => ({ failure: error.message }));
  Object.assign(message, { usage, finish_reason, seconds: since() });
  finish(conversation, message, failure, abort.signal.aborted);
}

function take(message, { choices, seed }, seconds) {
  Object.assign(message, { seed, seconds });
  for (const { delta } of choices) {
    if (!delta.content && !delta.parts) continue;
    message.first ??= seconds;
    message.pieces++;
    add(message, delta);
  }
}

function finish(conversation, message, failure, stopped) {
  running.delete(conversation.id);
  if (message.parts.at(-1)?.type === "python") message.parts.pop(); // A call without its result is not training data.
  if (!message.parts.some(({ text }) => text.trim())) {
    conversation.messages.splice(conversation.messages.indexOf(message), 1);
    failure ||= stopped ? "Stopped before the first word." : "The model ended its turn without a word.";
    failures.set(conversation.id, failure);
  }
  message.incomplete = failure;
  if (conversations.has(conversation.id)) keep(conversation);
  emit("kept", conversation);
  announce(failure ? "" : stopped ? "Stopped" : message.content); // A failure is an alert.
  if (conversation !== shown) return;
  const typing = document.activeElement === $("input") || document.activeElement === $("send");
  show();
  scrollDown();
  if (typing) $("input").focus();
}

let drawing = 0;
function draw(conversation, message) {
  if (conversation !== shown || drawing) return;
  drawing = requestAnimationFrame(() => {
    drawing = 0;
    const node = $("messages").querySelector("article:last-of-type");
    if (conversation !== shown || !running.has(conversation.id) || !node) return;
    fill(node, message, true);
    scrollDown();
  });
}

let following = true;
function scrollDown(always = false) {
  following ||= always;
  if (following) $("scroll").scrollTop = $("scroll").scrollHeight;
}

function resize() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${Math.min(200, input.scrollHeight)}px`;
  showButton();
}

export function openChat() {
  $("composer").onsubmit = (event) => {
    event.preventDefault();
    if (running.has(shown.id)) stop(shown);
    else submit();
  };
  $("input").oninput = resize;
  $("input").onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // Enter chooses a syllable of Hangul.
    event.preventDefault();
    submit();
  };
  addEventListener("keydown", (event) => event.key === "Escape" && !$("dialog").open && stop(shown));
  addEventListener("pagehide", () => {
    for (const id of running.keys()) keep(conversations.get(id));
  });
  $("scroll").onscroll = () => {
    const { scrollHeight, scrollTop, clientHeight } = $("scroll");
    following = scrollHeight - scrollTop - clientHeight < 60;
  };
  bus.addEventListener("notice", ({ detail }) => {
    $("notice").hidden = !detail;
    $("notice").textContent = detail && sentence(detail, " …");
  });
  bus.addEventListener("models", ({ detail: { data } }) => {
    untaught = new Set(data.filter(({ chats }) => !chats).map(({ id }) => id));
  });
  for (const name of ["models", "settings"]) bus.addEventListener(name, () => shown.messages.length || show());
  show();
  scrollDown(true);
}
