"""Engines of models that were never trained, and what they are asked, for benchmarks."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.requests import Request
from jaxchat.decode.sampling import SamplingParams
from jaxchat.errors import UserError
from jaxchat.model.transformer import Transformer

BOS = 0


class Ids:
    """A tokenizer of a model that was never trained: ids have no text."""

    bos, specials = BOS, {"<|bos|>": BOS}

    def encode(self, text: str) -> list[int]:
        raise UserError("a benchmark's model has no text")

    def decode(self, ids: Sequence[int]) -> str:
        return ""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b""


def random_weights(transformer: Transformer, seed: int) -> Any:
    """Weights of ordinary size everywhere; fresh ones have zeros in them, which make every token alike."""
    generator = np.random.default_rng(seed)

    def draw(leaf: Any) -> np.ndarray:
        scale = 1.0 if leaf.ndim < 2 else max(leaf.shape[-2:]) ** -0.5
        return (scale * generator.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree.map(draw, transformer.shapes())


def prompts(vocab: int, rows: int, tokens: int) -> list[list[int]]:
    return np.random.default_rng(rows).integers(1, vocab, (rows, tokens)).tolist()


def make_engine(
    transformer: Transformer, weights: Any, *, speculation: Any = None, decoding: str = "auto", **shape: Any
) -> Engine:
    fixed = EngineConfig(**shape, adapt=False)
    return Engine(transformer, weights, Ids(), fixed, speculation=speculation, decoding=decoding)  # type: ignore[arg-type]


def generate(engine: Engine, asked: Sequence[Sequence[int]], params: SamplingParams) -> list[Any]:
    return [answer for (answer,) in engine.generate([Request(prompt, params) for prompt in asked])]
