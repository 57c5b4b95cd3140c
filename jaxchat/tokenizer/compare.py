"""Measures a tokenizer's compression: bytes per token, also per script, and that of a peer trained on the same text."""

import importlib.util
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from jaxchat.tokenizer.chat_format import NANOCHAT
from jaxchat.tokenizer.protocol import Tokenizer

# nanochat's split pattern: that of GPT-4, but numbers are split into at most two digits.
NANOCHAT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

FEW_BYTES_PER_TOKEN = 1.5
_RARE = 0.001
_NOT_SCRIPTS = frozenset({"digits", "whitespace", "punctuation", "symbols", "marks", "other"})


class Share(NamedTuple):
    """Bytes and tokens of one script; a token that spans several scripts is divided among them by bytes."""

    bytes: int
    tokens: float

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class Report:
    """Bytes and tokens of texts, in total and by script, largest first."""

    total: Share
    scripts: dict[str, Share]

    def warnings(self) -> list[str]:
        """A sentence for every script, except rare ones, that is mostly encoded as single bytes."""
        return [
            f"{name} takes {share.bytes_per_token:.2f} bytes per token (below {FEW_BYTES_PER_TOKEN}): "
            "train the tokenizer on more of it, or raise --data.vocab"
            for name, share in self.scripts.items()
            if name not in _NOT_SCRIPTS
            and share.bytes >= _RARE * self.total.bytes
            and share.bytes_per_token < FEW_BYTES_PER_TOKEN
        ]


def report(tokenizer: Tokenizer, texts: Iterable[str]) -> Report:
    """Bytes per token of texts, by script."""
    shares: dict[str, Share] = {}
    for text in texts:
        ids = np.asarray(tokenizer.encode(text), np.int64)
        ids = ids[tokenizer.bytes_per_token[ids] > 0]  # An imported tokenizer has one for what it does not know.
        lengths = tokenizer.bytes_per_token[ids]
        points = np.frombuffer(tokenizer.decode(ids.tolist()).encode("utf-32-le"), np.uint32)
        widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)  # Bytes in UTF-8.
        distinct, which = np.unique(points, return_inverse=True)
        names = [_script(int(point)) for point in distinct]
        scripts = sorted(set(names))
        script_of_byte = np.repeat(np.array([scripts.index(name) for name in names], np.int64)[which], widths)
        bytes_of_script = np.bincount(script_of_byte, minlength=len(scripts))
        tokens_of_script = np.bincount(script_of_byte, np.repeat(1 / lengths, lengths), minlength=len(scripts))
        for name, size, tokens in zip(scripts, bytes_of_script, tokens_of_script):
            before = shares.get(name, Share(0, 0.0))
            shares[name] = Share(before.bytes + int(size), before.tokens + float(tokens))
    ordered = dict(sorted(shares.items(), key=lambda item: (-item[1].bytes, item[0])))
    total = Share(sum(share.bytes for share in ordered.values()), sum(share.tokens for share in ordered.values()))
    return Report(total, ordered)


def peer_bytes_per_token(train: Sequence[str], held_out: Sequence[str], *, vocab: int) -> float | None:
    """Bytes per token of rustbpe with nanochat's pattern and specials at the same `vocab`; None if not installed."""
    if not all(map(importlib.util.find_spec, ("rustbpe", "tiktoken"))):
        return None
    import rustbpe
    import tiktoken

    # No model is trained on its ids, so it is not made a `Tokenizer`.
    trained = rustbpe.Tokenizer()
    trained.train_from_iterator(iter(train), vocab_size=vocab - len(NANOCHAT.specials), pattern=NANOCHAT_PATTERN)
    ranks = {bytes(piece): rank for piece, rank in trained.get_mergeable_ranks()}
    encoding = tiktoken.Encoding("peer", pat_str=NANOCHAT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    tokens = sum(map(len, encoding.encode_ordinary_batch(list(held_out))))
    return sum(len(text.encode("utf-8")) for text in held_out) / tokens


@cache
def _script(point: int) -> str:
    """Script of a letter by its Unicode name; digits, whitespace and the like by category."""
    character = chr(point)
    category = unicodedata.category(character)
    if category[0] == "N":
        return "digits"
    if character.isspace() or category == "Cc":
        return "whitespace"
    if category[0] in "PS":
        return "punctuation" if category[0] == "P" else "symbols"
    words = unicodedata.name(character, "").split()
    if not words or category[0] == "C":
        return "other"
    first = words[1] if words[0] in ("FULLWIDTH", "HALFWIDTH") and len(words) > 1 else words[0]
    if first in ("MASCULINE", "FEMININE"):  # ordinal indicators
        return "Latin"
    if first in ("COMBINING", "MODIFIER"):
        return "marks"
    return "Han" if first == "CJK" else first.capitalize()
