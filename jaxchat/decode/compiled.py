"""The engine's programs under `jax.jit`, compiled once per model and shape.

The transformer is a static argument, so a second engine of the same model compiles nothing. Updated caches are donated.
"""

import jax

from jaxchat.decode import programs
from jaxchat.decode.speculative import speculate

_SAMPLING = ("level", "top", "return_support")

unstack = jax.jit(programs.unstack, static_argnums=0)
forward = jax.jit(programs.forward, static_argnums=0)
empty = jax.jit(programs.empty, static_argnums=(0, 1, 2, 3))
prefill = jax.jit(programs.prefill, static_argnums=0, donate_argnums=(4, 5))
recall = jax.jit(programs.recall, donate_argnums=0)
seat = jax.jit(programs.seat, donate_argnums=0)
move = jax.jit(programs.move, static_argnums=0, static_argnames=("length", "write"))
admit = jax.jit(programs.admit, donate_argnums=(0, 1), static_argnames=_SAMPLING)
decode = jax.jit(programs.decode, static_argnums=0, donate_argnums=(2, 3), static_argnames=_SAMPLING)
guess_and_verify = jax.jit(
    speculate, static_argnums=(0, 1), donate_argnums=(3, 4), static_argnames=("settings", "level")
)
