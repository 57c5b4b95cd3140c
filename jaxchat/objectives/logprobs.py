"""Log-probabilities of targets, computed in chunks, so that no array of (B, T, V) ever exists.

Chunks divide the tokens of each row, which is padded if no number of chunks near the smallest divides it. Rows are
grouped by batch shard (axis S), so that each device works on its own tokens and the gradient of the head is summed over
devices once, after the last chunk.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxchat import sharding

CHUNK_TOKENS = {"cpu": 256, "gpu": 4096, "tpu": 4096}  # Maximum tokens per device and chunk.


class _Shape(NamedTuple):
    """Static facts of one call."""

    vocab: int
    softcap: float | None
    length: int
    chunks: int
    temperature: float = 1.0


class TokenScores(NamedTuple):
    """For every target, (B, T): its log-probability and the entropy of the distribution, both in nats, and whether no
    other token is more probable."""

    logprob_BT: jax.Array
    entropy_BT: jax.Array
    greedy_BT: jax.Array


def weighted_nll(
    hidden_BTM: jax.Array,
    head_MV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    vocab: int,
    softcap: float | None,
    chunk_tokens: int | None = None,
) -> jax.Array:
    """Sum over tokens of weight * -log softmax(z)[target], z = softcap * tanh(hidden head / softcap), a float32 scalar.

    `head_MV` may be padded beyond `vocab`; padded logits get probability 0. The forward pass also computes the
    gradients of hidden and head, chunk by chunk, so logits are computed only once. Log-sum-exp and softmax are in
    float32. Weights get no gradient.
    """
    shape = _Shape(vocab, softcap, hidden_BTM.shape[1], _chunks(hidden_BTM, chunk_tokens))
    return _nll(shape, _sharded(hidden_BTM), head_MV, _sharded(targets_BT), _sharded(weights_BT))


def token_logprobs(
    hidden_BTM: jax.Array,
    head_MV: jax.Array,
    targets_BT: jax.Array,
    *,
    vocab: int,
    softcap: float | None,
    temperature: float = 1.0,
    support_BTC: jax.Array | None = None,
    chunk_tokens: int | None = None,
) -> jax.Array:
    """log softmax(z / temperature)[target] of every token, (B, T) in float32 nats, z as in `weighted_nll`.

    `support_BTC`, uint8 with C = ceil(vocab / 8) bytes, has one bit per vocabulary token, lowest bit first. If given,
    the softmax is over the target and the tokens whose bit is set: the probability with which a truncating sampler
    (top-k, top-p, min-p) drew the target. The backward pass recomputes logits by chunk; the support gets no gradient.
    """
    shape, support_SBTC = _prepare(hidden_BTM, vocab, softcap, temperature, support_BTC, chunk_tokens)
    logprobs = _logprobs(shape, _sharded(hidden_BTM), head_MV, _sharded(targets_BT), support_SBTC)
    return logprobs.reshape(targets_BT.shape)


def score_tokens(
    hidden_BTM: jax.Array,
    head_MV: jax.Array,
    targets_BT: jax.Array,
    *,
    vocab: int,
    softcap: float | None,
    temperature: float = 1.0,
    support_BTC: jax.Array | None = None,
    chunk_tokens: int | None = None,
) -> TokenScores:
    """The results of `token_logprobs` with further scores of the same distribution; without gradients."""
    shape, support_SBTC = _prepare(hidden_BTM, vocab, softcap, temperature, support_BTC, chunk_tokens)
    h_SBTM, w_MV, targets_SBT = jax.lax.stop_gradient((_sharded(hidden_BTM), head_MV, _sharded(targets_BT)))

    def step(_: Any, chunk: Any) -> Any:
        h, targets, support = chunk
        z, _ = _logits(shape, h, w_MV, targets, support)
        norm = jax.nn.logsumexp(z, axis=-1)
        log_p = z - norm[..., None]
        entropy = -jnp.sum(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0), axis=-1)
        target = _pick(z, targets)
        return (), TokenScores(target - norm, entropy, target >= z.max(axis=-1))

    scores = _scan(shape, step, (), h_SBTM, targets_SBT, support_SBTC)[1]
    return jax.tree.map(lambda x: _whole(shape, x).reshape(targets_BT.shape), scores)


def _prepare(
    hidden_BTM: jax.Array,
    vocab: int,
    softcap: float | None,
    temperature: float,
    support_BTC: jax.Array | None,
    chunk_tokens: int | None,
) -> tuple[_Shape, jax.Array | None]:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be positive and finite")
    shape = _Shape(vocab, softcap, hidden_BTM.shape[1], _chunks(hidden_BTM, chunk_tokens), temperature)
    if support_BTC is None:
        return shape, None
    expected = (*hidden_BTM.shape[:2], -(-vocab // 8))
    if support_BTC.shape != expected or support_BTC.dtype != jnp.uint8:
        raise ValueError(f"support masks are {support_BTC.dtype}{list(support_BTC.shape)}, not uint8{list(expected)}")
    return shape, _sharded(support_BTC)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(shape: _Shape, h_SBTM: Any, w_MV: Any, targets_SBT: Any, support_SBTC: Any) -> jax.Array:
    return _logprobs_forward(shape, h_SBTM, w_MV, targets_SBT, support_SBTC)[0]


def _logprobs_forward(shape: _Shape, h_SBTM: Any, w_MV: Any, targets_SBT: Any, support_SBTC: Any) -> Any:
    def step(_: Any, chunk: Any) -> Any:
        h, targets, support = chunk
        z, _ = _logits(shape, h, w_MV, targets, support)
        norm = jax.nn.logsumexp(z, axis=-1)
        return (), (_pick(z, targets) - norm, norm)

    logprobs, norms = _scan(shape, step, (), h_SBTM, targets_SBT, support_SBTC)[1]
    return _whole(shape, logprobs), (h_SBTM, w_MV, targets_SBT, support_SBTC, _whole(shape, norms))


def _logprobs_backward(shape: _Shape, saved: Any, g_SBT: jax.Array) -> Any:
    h_SBTM, w_MV, targets_SBT, support_SBTC, norms_SBT = saved

    def step(dw_SMV: jax.Array, chunk: Any) -> Any:
        h, targets, support, norms, g = chunk
        z, slope = _logits(shape, h, w_MV, targets, support)
        g = g[..., None]
        dz = (jnp.where(_is_target(targets, w_MV), g, 0) - jnp.exp(z - norms[..., None]) * g) * slope
        return _product_gradients(h, w_MV, dz, dw_SMV)

    columns = (h_SBTM, targets_SBT, support_SBTC, norms_SBT, g_SBT)
    dw_SMV, dh = _scan(shape, step, _no_gradient(h_SBTM, w_MV), *columns)
    return _whole(shape, dh), sharding.add_shards(dw_SMV, ("embed", "vocab")).astype(w_MV.dtype), None, None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(shape: _Shape, h_SBTM: Any, w_MV: Any, targets_SBT: Any, weights_SBT: Any) -> jax.Array:
    def step(total_S: jax.Array, chunk: Any) -> Any:
        h, targets, weights = chunk
        z, _ = _logits(shape, h, w_MV, targets)
        nll = jax.nn.logsumexp(z, axis=-1) - _pick(z, targets)
        return total_S + jnp.sum(nll * weights, axis=(1, 2)), None

    start = jnp.zeros(h_SBTM.shape[0], _wide(h_SBTM))
    return jnp.sum(_scan(shape, step, start, h_SBTM, targets_SBT, weights_SBT)[0])


def _nll_forward(shape: _Shape, h_SBTM: Any, w_MV: Any, targets_SBT: Any, weights_SBT: Any) -> Any:
    def step(carry: Any, chunk: Any) -> Any:
        total_S, dw_SMV = carry
        h, targets, weights = chunk
        z, slope = _logits(shape, h, w_MV, targets)
        top = jnp.max(z, axis=-1, keepdims=True)
        e = jnp.exp(z - top)
        norm = jnp.sum(e, axis=-1, keepdims=True)
        nll = jnp.log(norm[..., 0]) + top[..., 0] - _pick(z, targets)
        weight = weights[..., None]
        dz = (e * (weight / norm) - jnp.where(_is_target(targets, w_MV), weight, 0)) * slope
        dw_SMV, dh = _product_gradients(h, w_MV, dz, dw_SMV)
        return (total_S + jnp.sum(nll * weights, axis=(1, 2)), dw_SMV), dh

    start = (jnp.zeros(h_SBTM.shape[0], _wide(h_SBTM)), _no_gradient(h_SBTM, w_MV))
    (total_S, dw_SMV), dh = _scan(shape, step, start, h_SBTM, targets_SBT, weights_SBT)
    return jnp.sum(total_S), (_whole(shape, dh), sharding.add_shards(dw_SMV, ("embed", "vocab")).astype(w_MV.dtype))


def _nll_backward(shape: _Shape, saved: Any, g: jax.Array) -> Any:
    dh_SBTM, dw_MV = saved
    return dh_SBTM * g.astype(dh_SBTM.dtype), dw_MV * g.astype(dw_MV.dtype), None, None


_nll.defvjp(_nll_forward, _nll_backward)


def _product_gradients(h: jax.Array, w_MV: jax.Array, dz: jax.Array, dw_SMV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Given the gradient `dz` of a chunk's product h w, adds the gradient of w to `dw_SMV` and returns it with h's."""
    dz = dz.astype(h.dtype)
    dh = jnp.einsum("SBTV,MV->SBTM", dz, w_MV.astype(h.dtype))
    dw_SMV = dw_SMV + jnp.einsum("SBTM,SBTV->SMV", h, dz, preferred_element_type=_wide(h))
    return sharding.constrain(dw_SMV, ("shards", None, "vocab")), dh


def _no_gradient(h_SBTM: jax.Array, w_MV: jax.Array) -> jax.Array:
    return jnp.zeros((h_SBTM.shape[0], *w_MV.shape), _wide(h_SBTM))


def _logits(
    shape: _Shape, h: jax.Array, w_MV: jax.Array, targets: jax.Array, support: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | float]:
    """Logits in float32 after softcap and temperature, and their derivative with respect to the product h w.

    Outside the support, which always contains the target, logits are -inf.
    """
    z = jnp.einsum("SBTM,MV->SBTV", h, w_MV.astype(h.dtype), preferred_element_type=_wide(h))
    slope: jax.Array | float = 1.0
    if shape.softcap is not None:
        tanh = jnp.tanh(z / shape.softcap)
        z, slope = shape.softcap * tanh, 1 - jnp.square(tanh)
    if shape.temperature != 1:
        z, slope = z / shape.temperature, slope / shape.temperature
    if w_MV.shape[1] != shape.vocab:
        z = jnp.where(jnp.arange(w_MV.shape[1]) < shape.vocab, z, -jnp.inf)
    if support is None:
        return z, slope
    bits = (support[..., None] >> jnp.arange(8, dtype=jnp.uint8)[None, None, None, None]) & 1
    bits = bits.reshape(*support.shape[:-1], -1)[..., : shape.vocab]
    bits = jnp.pad(bits, [(0, 0)] * 3 + [(0, w_MV.shape[1] - shape.vocab)])
    return jnp.where((bits == 1) | _is_target(targets, w_MV), z, -jnp.inf), slope


def _is_target(targets: jax.Array, w_MV: jax.Array) -> jax.Array:
    return targets[..., None] == jnp.arange(w_MV.shape[1])[None, None, None]


def _pick(z: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]


def _chunks(hidden_BTM: jax.Array, chunk_tokens: int | None) -> int:
    """The number of chunks per row, such that a chunk has at most `chunk_tokens` tokens per device if possible: the
    smallest, or one up to twice as large if it divides the row."""
    B, T, _ = hidden_BTM.shape
    shards = sharding.batch_shards()
    if B % shards:
        raise ValueError(f"{B} rows do not divide over {shards} batch shards")
    most = chunk_tokens or CHUNK_TOKENS.get(sharding.platform(), 1024)
    least = -(-T // max(1, most // (B // shards)))
    return next((chunks for chunks in range(least, 2 * least) if T % chunks == 0), least)


def _sharded(x: jax.Array) -> jax.Array:
    """(B, ...) to (batch shards, B / shards, ...)."""
    shards = sharding.batch_shards()
    return x.reshape(shards, x.shape[0] // shards, *x.shape[1:])


def _scan(shape: _Shape, step: Callable[[Any, Any], Any], carry: Any, *columns: jax.Array | None) -> Any:
    """`jax.lax.scan` over chunks of columns: (S, B, T, ...), padded with zeros, is cut to (chunks, S, B, N, ...)."""
    size = -(-shape.length // shape.chunks)
    missing = shape.chunks * size - shape.length

    def cut(x: jax.Array) -> jax.Array:
        if missing:
            x = jnp.pad(x, [(0, 0), (0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(*x.shape[:2], shape.chunks, size, *x.shape[3:]), 2, 0)

    return jax.lax.scan(step, carry, jax.tree.map(cut, columns))


def _whole(shape: _Shape, x: jax.Array) -> jax.Array:
    """(chunks, S, B, N, ...) to (S, B, T, ...), without padding."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, : shape.length]


def _wide(x: jax.Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
