"""Exports prefill and decode as StableHLO programs (jax.export), with weights, that run without jaxchat.

Both are the same function at two lengths: it adds tokens to a cache and returns the logits after the last token.
Arguments are a dictionary and tuples of arrays, so that a caller needs only JAX.
"""

from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jaxchat import signals
from jaxchat.decode import programs
from jaxchat.export.files import whole, write_json, write_weights
from jaxchat.model.transformer import Params, Transformer
from jaxchat.tokenizer import Tokenizer

PLATFORMS = ("cpu", "cuda", "tpu")


def write(
    directory: Path,
    transformer: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    *,
    rows: int,
    length: int,
    prefill_chunk: int,
) -> int:
    """Writes prefill.bin, decode.bin, weights, signature, tokenizer and a README; returns the number of parameters.

    The programs decode `rows` sequences at once in a context of `length` tokens; a call of prefill takes
    `prefill_chunk` tokens of each.
    """
    unstacked = jax.jit(transformer.unstack)(params)
    cache = jax.eval_shape(lambda: transformer.empty_cache(rows, length, write=prefill_chunk))
    leaves, tree = jax.tree.flatten(cache)
    named = named_leaves(unstacked)

    def step(named: Mapping[str, jax.Array], tokens_RT: jax.Array, positions_RT: jax.Array, cache: Any) -> Any:
        params = jax.tree.unflatten(jax.tree.structure(unstacked), [named[name] for name in order])
        empty_RV = jnp.zeros((rows, transformer.config.vocab), jnp.float32)
        cache, logits_RV = programs.prefill(
            transformer, params, tokens_RT, positions_RT, jax.tree.unflatten(tree, cache), empty_RV
        )
        return logits_RV, tuple(jax.tree.leaves(cache))

    order = list(named)
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in named.items()}
    with whole(directory) as place:
        for name, tokens in (("prefill", prefill_chunk), ("decode", 1)):
            signals.check()
            ids = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
            exported = export.export(jax.jit(step), platforms=PLATFORMS)(shapes, ids, ids, tuple(leaves))
            (place / f"{name}.bin").write_bytes(exported.serialize())
        signature = {
            "rows": rows,
            "length": length,
            "prefill_chunk": prefill_chunk,
            "vocab": transformer.config.vocab,
            "cache": [[list(leaf.shape), leaf.dtype.name] for leaf in leaves],
            "platforms": list(PLATFORMS),
            "end_tokens": sorted(tokenizer.ends),
        }
        write_json(place / "signature.json", signature)
        tokenizer.save(place / "tokenizer")
        facts = {"bos": tokenizer.chat_format.bos, "last": length - 1, "platforms": ", ".join(PLATFORMS)}
        (place / "README.md").write_text(Template(README).substitute(signature | facts), encoding="utf-8")
        return write_weights(place, {name: np.asarray(leaf) for name, leaf in named.items()})


def named_leaves(params: Params) -> dict[str, Any]:
    """Leaves by dotted names such as layer.0.mixer.q, in tree order."""

    def part(key: Any) -> str:
        return str(key.key if hasattr(key, "key") else key.idx)

    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {".".join(map(part, path)): leaf for path, leaf in leaves}


README = """\
# A chat model as two programs

`prefill.bin` and `decode.bin` are StableHLO made by jax.export, for ${platforms}. They need JAX, but not jaxchat:
`pip install jax flatbuffers safetensors`.

    prefill(parameters, tokens (${rows}, ${prefill_chunk}) int32, positions (${rows}, ${prefill_chunk}) int32, cache)
    decode(parameters, tokens (${rows}, 1) int32, positions (${rows}, 1) int32, cache)
        -> logits (${rows}, ${vocab}) float32 after the last token of each row, cache

`parameters` are the arrays of `model.safetensors` by name. `cache` is a tuple of arrays, zeros at first, whose shapes
and types are in `signature.json`. Positions count from 0 to ${last} in each row; -1 marks padding, which is neither
written nor seen. A prompt begins with the id of ${bos} (`tokenizer/tokenizer.json`, a jaxchat tokenizer around the
sentencepiece model `tokenizer/tokenizer.model`); an answer ends at one of `end_tokens`.

```python
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from safetensors.numpy import load_file

here = Path(".")
signature = json.loads((here / "signature.json").read_text())
parameters = load_file(here / "model.safetensors")
programs = [export.deserialize((here / f"{name}.bin").read_bytes()) for name in ("prefill", "decode")]
prefill, decode = (jax.jit(program.call, donate_argnums=3) for program in programs)


def greedy(prompt, count):
    rows, prefill_chunk = signature["rows"], signature["prefill_chunk"]
    cache = tuple(jnp.zeros(shape, dtype) for shape, dtype in signature["cache"])
    read, answer = 0, []

    def place(ids, width):
        tokens, positions = np.zeros((rows, width), np.int32), np.full((rows, width), -1, np.int32)
        tokens[0, : len(ids)] = ids
        positions[0, : len(ids)] = range(read, read + len(ids))
        return tokens, positions

    while read < len(prompt):
        ids = prompt[read : read + prefill_chunk]
        logits, cache = prefill(parameters, *place(ids, prefill_chunk), cache)
        read += len(ids)
    while True:
        answer.append(int(logits[0].argmax()))
        if len(answer) == count or answer[-1] in signature["end_tokens"]:
            return answer
        logits, cache = decode(parameters, *place(answer[-1:], 1), cache)
        read += 1
```
"""
