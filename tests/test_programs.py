"""The compiled decoding step: nothing of the size of a cache or a matrix is copied, and nothing is sorted."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from jaxchat.decode import programs
from jaxchat.decode.sampling import History, Level, SamplingParams, pack
from jaxchat.model import Transformer

pytestmark = pytest.mark.usefixtures("optimized")

B, LENGTH, VOCAB = 2, 256, 320


def compiled(level: Level, history: bool, attend: Any = None) -> str:
    """The program text of a chunk, for a model whose every matrix and cache is larger than its activations."""
    model = Transformer(small.july2026(width=64, vocab=VOCAB, depth=2))
    params = jax.eval_shape(model.unstack, model.shapes())
    cache = jax.eval_shape(lambda: model.empty_cache(B, LENGTH, write=1))
    whole = jnp.int32
    running = programs.DecodeState(*(jax.ShapeDtypeStruct(shape, whole) for shape in ((B,), (B,), (B,), (B, 4))))
    past = History(*(jax.ShapeDtypeStruct((B, VOCAB), dtype) for dtype in (jnp.bool_, whole, jnp.float32)))
    rows, forced = pack([(SamplingParams(), 0)] * B), jax.ShapeDtypeStruct((4, B), whole)
    lowered = programs.decode.lower(model, params, cache, past if history else None, running, rows, forced, level=level)
    return str(lowered.compile().as_text())


def moved(text: str, least: int) -> list[str]:
    """Copies, transposes and sorts of at least so many numbers."""
    found = []
    # A sort of several arrays at once, as argsort makes it, is named by a tuple; the first is enough.
    for shape, operation in re.findall(r" = \(?\w+\[([\d,]+)\][^=]* (copy|transpose|sort)\(", text):
        if operation == "sort" or np.prod([int(size) for size in shape.split(",")]) >= least:
            found.append(f"{operation} {shape}")
    return found


@pytest.mark.parametrize(("level", "history"), [("greedy", False), ("plain", False), ("full", True)])
def test_a_step_moves_no_cache_and_no_matrix_and_sorts_nothing(level: Level, history: bool) -> None:
    smallest_matrix = 64 * 8  # k and v: width times 2 heads of 4
    assert smallest_matrix <= B * 2 * 5 * 4 * 8
    text = compiled(level, history)
    assert "while" in text, "the steps are not in a loop"
    # A penalty's counts are carried by the loop, once in and once out.
    assert [line for line in moved(text, 1024) if line != f"copy {B},{VOCAB}"] == []


def test_a_copy_of_a_cache_would_be_seen() -> None:
    def flip(x: Any) -> Any:
        return jnp.sort(x.transpose(1, 0), axis=0) @ x

    text = jax.jit(flip).lower(jnp.ones((64, 64))).compile().as_text()
    assert moved(str(text), 1024)
    for sort in (jnp.sort, jnp.argsort):
        text = jax.jit(sort).lower(jnp.ones((2, 64))).compile().as_text()
        assert moved(str(text), 1024) == ["sort 2,64"], sort.__name__


def test_a_chunk_makes_no_second_cache() -> None:
    """What the program needs beside its arguments is less than the cache that it was given and gives back."""
    model = Transformer(small.october2025())
    params = jax.eval_shape(model.unstack, model.shapes())
    cache = jax.eval_shape(lambda: model.empty_cache(8, 4096, write=1))
    running = programs.DecodeState(*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((8,), (8,), (8,), (8, 4))))
    rows, forced = pack([(SamplingParams(), 0)] * 8), jax.ShapeDtypeStruct((4, 8), jnp.int32)
    program = programs.decode.lower(model, params, cache, None, running, rows, forced, level="plain").compile()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert program.memory_analysis().temp_size_in_bytes < held / 3
