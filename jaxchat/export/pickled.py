"""Reads the tokenizer of nanochat, a pickled `tiktoken.Encoding`, without executing what the pickle may contain.

An encoding is a pattern that cuts texts, tokens with their ranks, and special tokens. tiktoken merges the two
neighbours that form the token of the least rank, the leftmost of equals, and takes a part of a text that is a token as
it is; the merges of tokenizer.json are all pairs of tokens that form a token, in the order of its rank.
"""

import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxchat.errors import UserError, first_line
from jaxchat.export.tokens import bpe_json, merges
from jaxchat.tokenizer.chat_format import NANOCHAT
from jaxchat.tokenizer.libraries import byte_letters
from jaxchat.tokenizer.outside import About, Outside
from jaxchat.tokenizer.sentencepiece import scalar_values
from jaxchat.tokenizer.template import template

FILE = "tokenizer.pkl"
REMEDY = "copy it again from the model's project, or name another tokenizer with --tokenizer=DIR"


def read_pickled(directory: Path) -> Outside:
    """The tokenizer of nanochat in a directory, with nanochat's chat format.

    Raises:
        UserError: its tokenizer.pkl cannot be read, or is something else than an encoding of nanochat.
    """
    path = directory / FILE
    fields = _fields(path)
    pattern, ranks, specials = (fields.get(name, 0) for name in ("pat_str", "mergeable_ranks", "special_tokens"))
    sound = isinstance(pattern, str) and _is_table(ranks, bytes) and _is_table(specials, str)
    if not sound or any(scalar_values(text) != text for text in (pattern, *specials)):
        raise UserError(f"{path} has no pat_str, mergeable_ranks and special_tokens of an encoding: {REMEDY}")
    ids = [*sorted(ranks.values()), *sorted(specials.values())]
    if ids != list(range(len(ids))) or not {bytes([i]) for i in range(256)} <= ranks.keys():
        raise UserError(f"{path} has other ids than 0 to {len(ids) - 1}, special tokens last, or lacks bytes: {REMEDY}")
    if lacking := [name for name in NANOCHAT.specials if name not in specials]:
        raise UserError(f"{path} has no special token {lacking[0]}, as nanochat's tokenizers have: {REMEDY}")
    names = {"bos_token": NANOCHAT.bos, "eos_token": NANOCHAT.end}
    facts = (len(ids), specials, NANOCHAT.bos, NANOCHAT.end, (NANOCHAT.end,), names, template(NANOCHAT))
    content = json.dumps(_tokenizer_json(pattern, ranks, specials), ensure_ascii=False)
    return Outside(content.encode(), About("tokenizers", *facts))


def _fields(path: Path) -> Mapping[str, Any]:
    """The attributes of the pickled encoding. Nothing is imported or called: its class is an empty one."""

    class Encoding:
        pass

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) != ("tiktoken.core", "Encoding"):
                raise pickle.UnpicklingError(f"it names {module}.{name}")
            return Encoding

    try:
        found = Unpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # A damaged pickle raises errors of many kinds.
        raise UserError(f"{path} cannot be read as a tiktoken.Encoding ({first_line(error)}): {REMEDY}") from None
    return vars(found) if isinstance(found, Encoding) else {}


def _is_table(value: Any, kind: type) -> bool:
    """Whether a value maps names of one kind to ids."""
    return isinstance(value, dict) and all(type(key) is kind and type(i) is int for key, i in value.items())


def _tokenizer_json(pattern: str, ranks: Mapping[bytes, int], specials: Mapping[str, int]) -> dict[str, Any]:
    letters = {byte: letter for letter, byte in byte_letters().items()}
    vocab = {"".join(map(letters.__getitem__, token)): rank for token, rank in ranks.items()}
    pairs = merges({token: -rank for token, rank in vocab.items()})
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return bpe_json(
        specials,
        NANOCHAT.bos,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, to_bytes]},
        decoder=to_bytes,
        model={"byte_fallback": False, "ignore_merges": True, "vocab": vocab, "merges": pairs},
    )
