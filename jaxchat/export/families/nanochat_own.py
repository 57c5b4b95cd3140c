"""nanochat's own checkpoints: its model of October 2025 (until 11 January 2026) and that of July 2026 (since 14 March).

Its code of the weeks between computes differently under some of the same names, so that those models are refused by a
tensor that they lack. Windows and value embeddings follow rules of the code; meta.json has only sizes and the pattern.
"""

import math
from typing import Any, ClassVar

from jaxchat.export.families.family import Family, stacked
from jaxchat.export.families.keys import WHOLE, Config, Key, whole
from jaxchat.export.places import Place
from jaxchat.model import GQA, Backout, Layer, Model, ReluSquared, ResidualScales, RMSNorm, RoPE, Smear, ValueEmbedding

NORM = RMSNorm(2.0**-23)  # torch's default in float32.
SIZES = "model_config; nanochat's models from 12 January to 13 March 2026 are not supported"


def _pattern(letters: str) -> Key:
    """A window pattern of some letters, which models before windows lack."""
    valid = lambda value: isinstance(value, str) and value != "" and set(value.upper()) <= set(letters)  # noqa: E731
    return Key(valid, f"a text of {' and '.join(letters)}", "L")


def _places(**names: str) -> dict[tuple[str, ...], Place]:
    """Places by our paths, in which two underscores join part and parameter, of tensors with these names."""
    return {tuple(path.split("__")): Place(name, keys=SIZES) for path, name in names.items()}


class October2025(Family):
    """Without windows and value embeddings, as transformers' NanoChatForCausalLM."""

    keys: ClassVar[dict[str, Key]] = {
        **dict.fromkeys(("vocab_size", "n_head", "n_kv_head", "n_embd"), WHOLE),
        "n_layer": whole(most=10_000),
        "sequence_len": whole(least=2),
        "window_pattern": _pattern("L"),
    }
    places: ClassVar[dict[tuple[str, ...], Place]] = _places(
        embed="transformer.wte.weight",
        head="lm_head.weight",
        mixer__q="transformer.h.{}.attn.c_q.weight",
        mixer__k="transformer.h.{}.attn.c_k.weight",
        mixer__v="transformer.h.{}.attn.c_v.weight",
        mixer__o="transformer.h.{}.attn.c_proj.weight",
        mlp__in="transformer.h.{}.mlp.c_fc.weight",
        mlp__out="transformer.h.{}.mlp.c_proj.weight",
    )
    extras: ClassVar[dict[str, Any]] = {}

    def read(self, c: Config) -> tuple[Model, int]:
        width, heads, depth = c["n_embd"], c["n_head"], c["n_layer"]
        if width % heads:
            raise ValueError("n_embd is not a multiple of n_head")
        shape = (heads, c["n_kv_head"], width // heads)
        mixers = [GQA(*shape, qk_norm=NORM, **self.attention(c, i)) for i in range(depth)]
        parts = stacked(tuple(Layer(mixer, ReluSquared(4 * width), NORM) for mixer in mixers))
        parts |= {"norm": NORM, "isolate_documents": False, **self.extras}
        return Model(vocab=c["vocab_size"], width=width, depth=depth, **parts), c["sequence_len"]

    def attention(self, c: Config, i: int) -> dict[str, Any]:
        """Fields of the attention of layer i that are not those of jaxchat's default."""
        return {}


class July2026(October2025):
    keys = October2025.keys | {"window_pattern": _pattern("SL")}
    places = October2025.places | _places(
        mixer__value_gate="transformer.h.{}.attn.ve_gate.weight",
        mixer__value_embedding="value_embeds.{}.weight",
        resid_scale="resid_lambdas",
        x0_scale="x0_lambdas",
        smear_gate="smear_gate.weight",
        smear_scale="smear_lambda",
        backout_scale="backout_lambda",
    )
    extras: ClassVar[dict[str, Any]] = {"residual_scales": ResidualScales(), "smear": Smear(), "backout": Backout()}

    def attention(self, c: Config, i: int) -> dict[str, Any]:
        pattern, last = c["window_pattern"].upper(), c["n_layer"] - 1
        short = pattern[i % len(pattern)] == "S" and i != last
        return {
            "window": math.ceil(c["sequence_len"] / 4 / 128) * 128 if short else None,
            "positions": RoPE(100_000.0),
            "qk_scale": 1.2,
            "value_embedding": ValueEmbedding() if i % 2 == last % 2 else None,
        }
