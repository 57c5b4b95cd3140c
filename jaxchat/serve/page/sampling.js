// Sampling as the engine does it (jaxchat/decode/sampling.py), over the logits of the whole vocabulary.

/** Float32 numbers from base64. */
export function unpack(text) {
  return new Float32Array(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
}

function softmax(z) {
  let most = -Infinity, sum = 0;
  for (const value of z) most = Math.max(most, value);
  const shares = Float64Array.from(z, (value) => Math.exp(value - most));
  for (const share of shares) sum += share;
  return shares.map((share) => share / sum);
}

function keep(z, least) {
  for (let i = 0; i < z.length; i++) if (z[i] < least) z[i] = -Infinity;
}

/** The smallest of the largest logits whose probabilities sum to at least p; `z` descends. */
function nucleus(z, p) {
  const shares = softmax(z);
  let sum = 0, i = -1;
  while (sum < p && i + 1 < z.length && shares[i + 1] > 0) sum += shares[++i];
  return z[i];
}

/**
 * Probabilities of all tokens by step of sampling: in the model, after penalty and temperature, and after each filter.
 * `before` has the ids of the text so far, which the penalty makes less likely. Ties with the last one kept are kept.
 */
export function steps(logits, before, { temperature, repetition_penalty, top_k, top_p, min_p }) {
  const z = Float64Array.from(logits), found = { model: softmax(z) };
  for (const id of new Set(before)) z[id] = z[id] > 0 ? z[id] / repetition_penalty : z[id] * repetition_penalty;
  if (temperature === 0) {
    const best = new Float64Array(z.length);
    best[z.indexOf(z.reduce((a, b) => Math.max(a, b)))] = 1;
    return { ...found, temperature: best, top_k: best, top_p: best, min_p: best };
  }
  for (let i = 0; i < z.length; i++) z[i] /= Math.max(temperature, 1e-6);
  found.temperature = softmax(z);
  const ordered = z.slice().sort().reverse();
  if (top_k > 0 && top_k < z.length) {
    keep(z, ordered[top_k - 1]);
    keep(ordered, ordered[top_k - 1]);
  }
  found.top_k = softmax(z);
  if (top_p < 1) keep(z, nucleus(ordered, top_p));
  found.top_p = softmax(z);
  keep(z, ordered[0] + Math.log(min_p));
  return { ...found, min_p: softmax(z) };
}
