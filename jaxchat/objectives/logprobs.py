"""Log-probabilities of targets, computed in chunks: no array of (B, T, V) ever exists.

Chunks run along the tokens of a row, and rows stay apart by the mesh's batch shard, so that each device works on its
own tokens and the gradient of the head is summed over devices once, after the last chunk.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxchat import sharding

CHUNK_TOKENS = {"cpu": 256, "gpu": 4096, "tpu": 4096}  # Tokens of a device per chunk.


class _Shape(NamedTuple):
    """Static facts of one call."""

    vocab: int
    softcap: float | None
    chunks: int


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

    `head_MV` may be padded beyond `vocab`; padded logits get no probability. The gradient with respect to hidden and
    head is made in the forward pass, while a chunk's logits are there, so logits are computed once; log-sum-exp and
    softmax are float32. Weights are data: they get no gradient.
    """
    B, T, _ = hidden_BTM.shape
    shards = sharding.batch_shards()
    if B % shards:
        raise ValueError(f"{B} rows do not divide over {shards} batch shards")
    most = chunk_tokens or CHUNK_TOKENS.get(jax.default_backend(), 1024)
    length = max(n for n in range(1, T + 1) if T % n == 0 and (n == 1 or n * (B // shards) <= most))
    shape = _Shape(vocab, softcap, T // length)
    split = (shards, B // shards, T)
    return _nll(
        shape,
        hidden_BTM.reshape(*split, -1),
        head_MV,
        targets_BT.reshape(split),
        weights_BT.reshape(split),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(shape: _Shape, h_SBTM: Any, w_MV: Any, targets_SBT: Any, weights_SBT: Any) -> jax.Array:
    def step(total_S: jax.Array, chunk: Any) -> Any:
        h, targets, weights = chunk
        z, _ = _logits(shape, h, w_MV)
        nll = jax.nn.logsumexp(z, axis=-1) - _pick(z, targets)
        return total_S + jnp.sum(nll * weights, axis=(1, 2)), None

    chunks = (_chunked(shape, h_SBTM), _chunked(shape, targets_SBT), _chunked(shape, weights_SBT))
    return jnp.sum(jax.lax.scan(step, jnp.zeros(h_SBTM.shape[0], _wide(h_SBTM)), chunks)[0])


def _nll_forward(shape: _Shape, h_SBTM: Any, w_MV: Any, targets_SBT: Any, weights_SBT: Any) -> Any:
    S, _, _, M = h_SBTM.shape
    wide, V = _wide(h_SBTM), w_MV.shape[1]

    def step(carry: Any, chunk: Any) -> Any:
        total_S, dw_SMV = carry
        h, targets, weights = chunk
        z, slope = _logits(shape, h, w_MV)
        top = jnp.max(z, axis=-1, keepdims=True)
        e = jnp.exp(z - top)
        norm = jnp.sum(e, axis=-1, keepdims=True)
        nll = jnp.log(norm[..., 0]) + top[..., 0] - _pick(z, targets)
        hit = targets[..., None] == jnp.arange(V)[None, None, None]
        dz = (e * (weights[..., None] / norm) - jnp.where(hit, weights[..., None], 0)) * slope
        dz = dz.astype(h.dtype)
        dh = jnp.einsum("SBTV,MV->SBTM", dz, w_MV.astype(h.dtype))
        dw_SMV = dw_SMV + jnp.einsum("SBTM,SBTV->SMV", h, dz, preferred_element_type=wide)
        dw_SMV = sharding.constrain(dw_SMV, ("shards", None, "vocab"))
        return (total_S + jnp.sum(nll * weights, axis=(1, 2)), dw_SMV), dh

    chunks = (_chunked(shape, h_SBTM), _chunked(shape, targets_SBT), _chunked(shape, weights_SBT))
    start = (jnp.zeros(S, wide), jnp.zeros((S, M, V), wide))
    (total_S, dw_SMV), dh = jax.lax.scan(step, start, chunks)
    dh_SBTM = jnp.moveaxis(dh, 0, 2).reshape(h_SBTM.shape)
    return jnp.sum(total_S), (dh_SBTM, jnp.sum(dw_SMV, axis=0).astype(w_MV.dtype))


def _nll_backward(shape: _Shape, saved: Any, g: jax.Array) -> Any:
    dh_SBTM, dw_MV = saved
    return dh_SBTM * g.astype(dh_SBTM.dtype), dw_MV * g.astype(dw_MV.dtype), None, None


_nll.defvjp(_nll_forward, _nll_backward)


def _logits(shape: _Shape, h: jax.Array, w_MV: jax.Array) -> tuple[jax.Array, jax.Array | float]:
    """Logits after the softcap in float32, and their slope with respect to the product h w."""
    z = jnp.einsum("SBTM,MV->SBTV", h, w_MV.astype(h.dtype), preferred_element_type=_wide(h))
    slope: jax.Array | float = 1.0
    if shape.softcap is not None:
        bent = jnp.tanh(z / shape.softcap)
        z, slope = shape.softcap * bent, 1 - jnp.square(bent)
    if w_MV.shape[1] != shape.vocab:
        z = jnp.where(jnp.arange(w_MV.shape[1]) < shape.vocab, z, -jnp.inf)
    return z, slope


def _pick(z: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]


def _chunked(shape: _Shape, x: jax.Array) -> jax.Array:
    """(S, B, T, ...) to (chunks, S, B, T / chunks, ...)."""
    S, B, T = x.shape[:3]
    return jnp.moveaxis(x.reshape(S, B, shape.chunks, T // shape.chunks, *x.shape[3:]), 2, 0)


def _wide(x: jax.Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
