// Requests to the server. A failure is an Error whose message is a sentence for the reader.

import { sentence } from "./dom.js";

const GONE = "The server cannot be reached: is launch.serve still running?";
const LOST = "The connection to the server was lost before the answer ended.";

/** The JSON of a path; with a body it is sent by POST. */
export async function api(path, body) {
  const post = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(path, body && post).catch(() => Promise.reject(new Error(GONE)));
  if (response.ok) return response.json();
  const failure = (await response.json().catch(() => null))?.error ?? { message: `the server answered ${response.status}` };
  throw failed(failure, response.headers.get("retry-after"));
}

/** Why the server does not answer yet, or any more. */
export const whyNot = async () => (await fetch("ready").then((answer) => answer.json()).catch(() => null))?.reason ?? GONE;

function failed({ message, code }, wait) {
  const before = { queue_full: "The server is busy: ", rate_limit_exceeded: "Too fast: " }[code] ?? "";
  return new Error(sentence(before + message + (wait ? `; try again in ${wait} s` : "")));
}

/** Asks for an answer: calls `take` with every chunk, returns {finish_reason, usage}. An aborted `signal` cancels it. */
export async function stream(body, take, signal) {
  const socket = await connect().catch(async () => Promise.reject(failed({ message: await whyNot() })));
  return new Promise((resolve, reject) => {
    socket.onmessage = ({ data }) => {
      const message = JSON.parse(data);
      if (message.type === "error") reject(failed(message.error));
      else if (message.type === "done") resolve(message);
      else if (!signal.aborted) take(message);
    };
    socket.onclose = ({ code }) => reject(new Error(code === 1009 ? "The conversation is too long to send." : LOST));
    signal.addEventListener("abort", () => {
      if (socket.readyState === WebSocket.OPEN) socket.send('{"type": "cancel"}');
      setTimeout(resolve, 1000, {}); // An answer that had not begun sends nothing more.
    });
    if (signal.aborted) resolve({});
    else socket.send(JSON.stringify({ type: "chat", ...body }));
  }).finally(() => socket.close());
}

function connect() {
  const url = new URL("ws/chat", document.baseURI);
  url.protocol = url.protocol.replace("http", "ws");
  url.hash = "";
  return new Promise((resolve, reject) => {
    const socket = new WebSocket(url);
    socket.onopen = () => resolve(socket);
    socket.onerror = reject;
  });
}
