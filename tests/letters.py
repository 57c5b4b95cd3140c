"""A tokenizer of one id a letter, for small models: its special tokens can be any ids, and each id any bytes."""

from collections.abc import Iterable, Mapping

from jaxchat.tokenizer import Tokenizer
from jaxchat.tokenizer.chat_format import NANOCHAT


class Letters(Tokenizer):
    """Id i stands for the character chr(ord("0") + i), or for `pieces[i]`; special tokens stand for nothing.

    A special token that gets no id has one that no model says.
    """

    bos, chat_format = 0, NANOCHAT

    def __init__(self, pieces: Mapping[int, bytes] | None = None, **specials: int) -> None:
        self.specials = {name: 1000 + i for i, name in enumerate(NANOCHAT.specials)} | {"<|bos|>": 0}
        self.specials |= {f"<|{name}|>": number for name, number in specials.items()}
        self.end = self.specials[NANOCHAT.end]
        self._pieces = dict(pieces or {})

    def encode(self, text: str) -> list[int]:
        return [(ord(letter) - ord("0")) % 60 for letter in text]

    def decode_bytes(self, ids: Iterable[int], *, keep_specials: bool = False) -> bytes:
        names = {number: name.encode() if keep_specials else b"" for name, number in self.specials.items()}
        return b"".join(names.get(i, self._pieces.get(i, chr(ord("0") + i).encode())) for i in ids)
