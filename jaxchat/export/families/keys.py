"""Keys of config.json. Each is read, known to change no logits (`NEUTRAL`), or refused by name."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxchat.errors import UserError
from jaxchat.model import Linear, Llama3, RoPE, YaRN
from jaxchat.model.part import HUGE, TINY

Config = Mapping[str, Any]


class Key(NamedTuple):
    """A key of config.json: the test of its value, the valid values in words, and the value if the key is missing."""

    valid: Callable[[Any], bool]
    meaning: str
    default: Any = ...  # The key must be there.

    def or_null(self) -> "Key":
        """The same key, which may be null or missing."""
        return Key(lambda value: value is None or self.valid(value), f"{self.meaning}, or null", None)


def only(*values: Any) -> Key:
    """A key that must have one of these values; if it is missing, it has the first."""
    return Key(lambda value: value in values, " or ".join(map(json.dumps, values)), values[0])


def whole(least: int = 1, most: int = 2**31 - 1) -> Key:
    """A key that must be a whole number in this range."""
    return Key(lambda value: type(value) is int and least <= value <= most, f"a whole number from {least} to {most}")


def flag(default: bool) -> Key:
    """A key that is true or false."""
    return Key(lambda value: isinstance(value, bool), "true or false", default)


WHOLE = whole()
POSITIVE = Key(
    lambda value: type(value) in (int, float) and TINY <= value <= HUGE, f"a number from {TINY:.2g} to {HUGE:.2g}"
)
OBJECT = Key(lambda value: isinstance(value, dict), "an object").or_null()
WINDOW = whole(least=2)  # transformers counts the query's own key, our window does not, and has at least one.
KINDS = ("full_attention", "sliding_attention")
LAYER_TYPES = Key(
    lambda value: isinstance(value, list) and all(one in KINDS for one in value), f"a list of {' and '.join(KINDS)}"
).or_null()

# Settings of training, generation, dtypes and classifiers, which do not change the logits of a language model.
NEUTRAL_LINES = (
    "model_type architectures dtype torch_dtype transformers_version name_or_path _name_or_path num_labels",
    "attention_dropout initializer_range use_cache bos_token_id eos_token_id pad_token_id id2label label2id",
    "attn_implementation _attn_implementation output_attentions output_hidden_states return_dict problem_type",
    "chunk_size_feed_forward pretraining_tp task_specific_params auto_map cache_implementation output_router_logits",
    "router_aux_loss_coef router_jitter_noise transformers.js_config is_llama_config attn_pdrop embd_pdrop resid_pdrop",
    "summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout aux_loss_alpha",
    "seq_aux ep_size num_nextn_predict_layers num_mtp_layers",
)
NEUTRAL = frozenset(name for line in NEUTRAL_LINES for name in line.split())


def read_keys(
    config: Config, keys: Mapping[str, Key], place: str, neutral: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """The values of `keys` in a JSON object, which may also have `neutral` keys; `place` names the object.

    Raises:
        UserError: a key is unknown, missing or has a value that our model does not have; the message names it.
    """
    values = {name: config.get(name, key.default) for name, key in keys.items()}
    if missing := [name for name, value in values.items() if value is ...]:
        raise UserError(f"{place} has no {missing[0]}: check that the file is complete")
    for name, key in keys.items():
        if name in config and not key.valid(config[name]):
            raise UserError(f"{place} has {name}={config[name]!r}, but jaxchat supports only {key.meaning}")
    if unknown := sorted(set(config) - set(keys) - neutral):
        name = unknown[0]
        raise UserError(
            f"{place} has {name}={config[name]!r}, which jaxchat does not know: remove {name} if the model has the "
            "same logits without it"
        )
    return values


THETA = POSITIVE._replace(default=None)
NO_PART = only(None, 1)  # No family here rotates a part of the channels.
LENGTH = WHOLE.or_null()
# Keys of config.json around RoPE, and within its objects by type.
ROPE: Mapping[str, Key] = {
    "rope_theta": THETA,
    "partial_rotary_factor": NO_PART,
    "rope_parameters": OBJECT,
    "rope_scaling": OBJECT,
}
SCALED: Mapping[str, Mapping[str, Key]] = {
    "default": {},
    "linear": {"factor": POSITIVE},
    "llama3": {
        "factor": POSITIVE,
        "low_freq_factor": POSITIVE,
        "high_freq_factor": POSITIVE,
        "original_max_position_embeddings": LENGTH,
    },
    "yarn": {
        "factor": POSITIVE,
        "original_max_position_embeddings": LENGTH,
        "attention_factor": POSITIVE.or_null(),
        "beta_fast": POSITIVE.or_null(),
        "beta_slow": POSITIVE.or_null(),
        "mscale": POSITIVE.or_null(),
        "mscale_all_dim": POSITIVE.or_null(),
        "truncate": flag(True),
    },
}


def read_rope(
    c: Config,
    direction: int = 1,
    *,
    base: float = 10_000.0,
    kinds: tuple[str, ...] = tuple(SCALED),
    scores: bool = False,
) -> RoPE:
    """The rotary positions of the keys `ROPE` and `max_position_embeddings`.

    The base stands in rope_parameters, in rope_scaling (its older name) or beside them, as in transformers; `base` is
    used if it stands nowhere. `kinds` are the types of scaling that the family has. With `scores`, YaRN's
    mscale_all_dim is a factor of the scores, too, as in DeepSeek.
    """
    named = {name: c[name] for name in ("rope_parameters", "rope_scaling") if c[name]}
    parts = [_read_part(part, name, kinds) for name, part in named.items()]
    bases = {float(part["rope_theta"]) for part in (*parts, c) if part["rope_theta"] is not None}
    if len(parts) > 1 or len(bases) > 1:
        raise UserError(
            f"config.json has rope_theta={c['rope_theta']}, rope_parameters={c['rope_parameters']} and "
            f"rope_scaling={c['rope_scaling']}: keep the one that the model was trained with"
        )
    part: dict[str, Any] = parts[0] if parts else {}
    try:
        scaling = _scaling(part, part.get("original_max_position_embeddings") or c["max_position_embeddings"], scores)
        return RoPE(bases.pop() if bases else base, direction, scaling)
    except ValueError as error:
        raise UserError(f"{next(iter(named))} in config.json has {part}, but {error}") from None


def _read_part(part: Config, name: str, kinds: tuple[str, ...]) -> dict[str, Any]:
    kind = part.get("rope_type", part.get("type", "default"))
    if kind not in kinds or part.get("type", kind) != kind:
        key = "rope_type" if "rope_type" in part else "type"
        raise UserError(f"{name} in config.json has {key}={kind!r}, but jaxchat supports only {' or '.join(kinds)}")
    keys = {"rope_theta": THETA, "partial_rotary_factor": NO_PART, **SCALED[kind]}
    return {"kind": kind, **read_keys(part, keys, f"{name} in config.json", frozenset(("rope_type", "type")))}


def _scaling(part: Config, length: int, scores: bool) -> Linear | Llama3 | YaRN | None:
    kind = part.get("kind", "default")
    if kind == "default":
        return None
    factor = float(part["factor"])
    if kind == "linear":
        return Linear(factor)
    if kind == "llama3":
        return Llama3(factor, part["low_freq_factor"], part["high_freq_factor"], length)

    def mscale(name: str) -> float:
        return 0.1 * part[name] * math.log(factor) + 1 if part[name] and factor > 1 else 1.0

    both = part["mscale"] and part["mscale_all_dim"]
    amplitude = part["attention_factor"] or (mscale("mscale") / mscale("mscale_all_dim") if both else None)
    turns = (part["beta_fast"] or 32.0, part["beta_slow"] or 1.0)
    on_scores = mscale("mscale_all_dim") ** 2 if scores else 1.0
    return YaRN(factor, length, *turns, amplitude, part["truncate"], on_scores)


def write_rope(rope: RoPE) -> dict[str, Any]:
    """The object rope_parameters of rotary positions."""
    found: dict[str, Any] = {"rope_theta": rope.base}
    match rope.scaling:
        case None:
            return {"rope_type": "default", **found}
        case Linear(factor):
            return {"rope_type": "linear", "factor": factor, **found}
        case Llama3(factor, low, high, length):
            found |= {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": length}
            return {"rope_type": "llama3", "factor": factor, **found}
        case YaRN(factor, length, fast, slow, attention, whole, scores):
            found |= {"original_max_position_embeddings": length, "beta_fast": fast, "beta_slow": slow}
            found |= {"truncate": whole} if attention is None else {"truncate": whole, "attention_factor": attention}
            if scores != 1:
                found |= {"mscale_all_dim": (math.sqrt(scores) - 1) / (0.1 * math.log(factor))}
            return {"rope_type": "yarn", "factor": factor, **found}
    raise TypeError(f"rotary positions with {rope.scaling} have no rope_type")
