"""Choosing the next token: greedy, temperature, top-k, top-p, every parameter an array by row.

Order: temperature, top-k, top-p. What is kept is found by bisection over the bits of the logits, not by a sort.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxchat.config import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How a request samples; temperature 0 is greedy, top_k 0 and top_p 1 keep every token."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature={self.temperature} must be a number from 0 (greedy) up")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} must be 0 (every token) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1 (every token)")
        if self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens} must be at least 1")


def sample(logits_BV: jax.Array, keys_B: jax.Array, rows: dict[str, jax.Array]) -> jax.Array:
    """One token a row, (B,): the most likely at temperature 0, otherwise drawn from what top-k and top-p keep.

    `keys_B` are PRNG keys; `rows` holds temperature, top_k and top_p, each (B,).
    """
    greedy_B = jnp.argmax(logits_BV, axis=-1)
    temperature_B1 = jnp.maximum(rows["temperature"], 1e-6)[:, None]
    z_BV = keep(logits_BV.astype(jnp.float32) / temperature_B1, rows["top_k"], rows["top_p"])
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:], jnp.float32))(keys_B)
    drawn_B = jnp.argmax(z_BV + noise_BV, axis=-1)
    return jnp.where(rows["temperature"] == 0, greedy_B, drawn_B).astype(jnp.int32)


def keep(z_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Logits with all but the k most likely tokens, then all but the smallest set of mass p, set to -inf.

    Ties at the border of top-k are kept; the token that crosses p is kept.
    """
    order_BV = _ordered_bits(z_BV)
    V = z_BV.shape[-1]
    k_B1 = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, V), V)[:, None]
    least_B1 = _largest(order_BV, lambda seen_BV: jnp.sum(seen_BV, axis=-1, keepdims=True) >= k_B1)
    z_BV = jnp.where(order_BV >= least_B1, z_BV, -jnp.inf)
    p_BV = jax.nn.softmax(z_BV, axis=-1)
    mass_B1 = top_p_B[:, None]
    enough = lambda seen_BV: jnp.sum(jnp.where(seen_BV, p_BV, 0), axis=-1, keepdims=True) >= mass_B1  # noqa: E731
    least_B1 = jnp.where(mass_B1 >= 1, jnp.iinfo(jnp.int32).min, _largest(order_BV, enough))
    return jnp.where(order_BV >= least_B1, z_BV, -jnp.inf)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """int32 that order as the float32 they stand for."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _largest(order_BV: jax.Array, enough: Any) -> jax.Array:
    """The largest threshold t, (B, 1), for which the set order >= t is enough; one bit a turn."""
    shape = (*order_BV.shape[:-1], 1)
    lowest = jnp.full(shape, jnp.iinfo(jnp.int32).min, jnp.int32)
    start_B1 = jnp.where(enough(order_BV >= 0), 0, lowest)

    def turn(i: jax.Array, least_B1: jax.Array) -> jax.Array:
        higher_B1 = least_B1 + (jnp.int32(1) << (30 - i))
        return jnp.where(enough(order_BV >= higher_B1), higher_B1, least_B1)

    return jax.lax.fori_loop(0, 31, turn, start_B1)
