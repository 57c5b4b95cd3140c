"""Cached generation: a prompt is prefilled in pieces of fixed lengths, then tokens come in chunks of compiled steps."""

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat import checkpoint
from jaxchat.config import UserError
from jaxchat.decode.sampling import SamplingParams, sample
from jaxchat.model.transformer import Cache, Params, Transformer
from jaxchat.tokenizer import Tokenizer

CHUNK = 16  # Steps a dispatch.
PIECE = 256  # The longest piece of a prompt that one call takes.


@dataclass(frozen=True)
class Completion:
    """What a request got; `finish_reason` is "stop" at an end token, "length" at max_tokens, "context" when full."""

    text: str
    tokens: tuple[int, ...]
    seconds: float
    finish_reason: str


class Engine:
    """Continues texts with one model. Shapes are fixed by `length`: requests of any kind share their programs."""

    def __init__(self, transformer: Transformer, params: Params, tokenizer: Tokenizer, *, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length
        self._transformer = transformer
        self._params = jax.jit(transformer.unstack)(params)
        self._piece = min(PIECE, length)
        self._prefill = jax.jit(functools.partial(prefill, transformer), donate_argnums=3)
        self._decode = jax.jit(functools.partial(decode, transformer), donate_argnums=2)
        self._sample = jax.jit(sample)
        ends = ("<|bos|>", "<|assistant_end|>")
        self._stops = {tokenizer.specials[name] for name in ends if name in tokenizer.specials}

    def complete(self, prompt: str, sampling: SamplingParams) -> Completion:
        """The text that follows `prompt` in a document of its own."""
        ids = [self.tokenizer.bos, *self.tokenizer.encode(prompt)]
        if len(ids) >= self.length:
            raise UserError(f"the prompt has {len(ids)} tokens and the context {self.length}: shorten it")
        start = time.perf_counter()
        logits_BV, cache = self._read(ids)
        types = {"temperature": np.float32, "top_k": np.int32, "top_p": np.float32}
        row = {name: np.array([getattr(sampling, name)], dtype) for name, dtype in types.items()}
        key = jax.random.key(sampling.seed)
        first_B = self._sample(logits_BV, jax.random.fold_in(key, len(ids) - 1)[None], row)
        state = (first_B, jnp.asarray([len(ids)]))
        most = min(sampling.max_tokens, self.length - len(ids))
        out = [int(state[0][0])]
        while len(out) < most and out[-1] not in self._stops:
            tokens_KB, state, cache = self._decode(self._params, state, cache, row, key)
            for token in np.asarray(tokens_KB)[:, 0].tolist():
                out.append(token)
                if len(out) == most or token in self._stops:
                    break
        reason = "stop" if out[-1] in self._stops else "length" if most == sampling.max_tokens else "context"
        tokens = out[:-1] if reason == "stop" else out
        text = self.tokenizer.decode(ids[1:] + tokens)[len(self.tokenizer.decode(ids[1:])) :]
        return Completion(text, tuple(tokens), time.perf_counter() - start, reason)

    def _read(self, ids: list[int]) -> tuple[jax.Array, Cache]:
        """The logits after a prompt, and its cache."""
        cache = self._transformer.empty_cache(1, self.length, write=self._piece)
        for first in range(0, len(ids), self._piece):
            piece = ids[first : first + self._piece]
            size = min(self._piece, 1 << (len(piece) - 1).bit_length())
            tokens_BT = np.zeros((1, size), np.int32)
            positions_BT = np.full((1, size), -1, np.int32)
            tokens_BT[0, : len(piece)] = piece
            positions_BT[0, : len(piece)] = range(first, first + len(piece))
            logits_BV, cache = self._prefill(self._params, tokens_BT, positions_BT, cache)
        return logits_BV, cache


def prefill(
    transformer: Transformer, params: Params, tokens_BT: jax.Array, positions_BT: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Reads prompt tokens into the cache; returns the logits after each row's last one, (B, V)."""
    hidden_BTM, after = transformer.apply(params, tokens_BT, positions_BT=positions_BT, cache=cache)
    assert after is not None
    last_B11 = jnp.argmax(positions_BT, axis=1)[:, None, None]
    return transformer.logits(params, jnp.take_along_axis(hidden_BTM, last_B11, axis=1))[:, 0], after


def decode(
    transformer: Transformer, params: Params, state: tuple[jax.Array, jax.Array], cache: Cache, row: Any, key: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], Cache]:
    """CHUNK steps: each reads the last token (B,) at its position (B,) and samples the next. Returns tokens (K, B).

    Noise is a function of the request's key and the position alone.
    """

    def step(carry: Any, _: None) -> Any:
        token_B, position_B, cache = carry
        hidden_BTM, cache = transformer.apply(
            params, token_B[:, None], positions_BT=position_B[:, None].astype(jnp.int32), cache=cache
        )
        keys_B = jax.vmap(lambda position: jax.random.fold_in(key, position))(position_B)
        next_B = sample(transformer.logits(params, hidden_BTM)[:, 0], keys_B, row)
        return (next_B, position_B + 1, cache), next_B

    (token_B, position_B, cache), tokens_KB = jax.lax.scan(step, (*state, cache), None, length=CHUNK)
    return tokens_KB, (token_B, position_B), cache


def load_engine(path: str, experiment_class: type) -> Engine:
    """The engine of a checkpoint such as runs/tiny/pretrain or runs/tiny/pretrain@300, on the first device."""
    directory, step = checkpoint.locate(path)
    experiment = checkpoint.read_experiment(directory, experiment_class)
    tokenizer = Tokenizer.load(Path(directory).parent / "tokenizer")
    if tokenizer.vocab_size != experiment.model.vocab:
        raise UserError(
            f"the tokenizer in {directory.parent / 'tokenizer'} has {tokenizer.vocab_size} ids and the model of "
            f"{directory} {experiment.model.vocab}: restore the run's own tokenizer"
        )
    device = jax.devices()[0]
    dtype = jnp.float32 if device.platform == "cpu" or experiment.dtype == "float32" else jnp.bfloat16
    transformer = Transformer(experiment.model, dtype)
    shapes = transformer.shapes()
    placed = jax.sharding.SingleDeviceSharding(device)
    abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=placed), shapes)
    params = checkpoint.load_params(directory, step, abstract)
    return Engine(transformer, params, tokenizer, length=experiment.data.row_length)
