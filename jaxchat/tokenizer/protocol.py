"""The interface of a tokenizer."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from jaxchat.tokenizer.chat_format import ChatFormat


class Tokenizer(Protocol):
    """An immutable, picklable tokenizer; `decode(encode(text)) == text` for every Unicode text.

    Tokenizers of other projects may change texts: `Outside.losses` says how.

    Attributes:
        vocab_size: number of ids, special tokens included.
        specials: id of each special token by name; encoding text never produces one.
        chat_format: the meaning of the special tokens.
        bos: id of the special token that starts every document.
        end: id of the special token that ends the assistant's turn.
        bytes_per_token: int32 (vocab_size,), number of UTF-8 bytes of each id's text; 0 for special tokens.
        hash: hexadecimal SHA-256 of everything that the ids depend on, those of rendered conversations included.
    """

    vocab_size: int
    specials: dict[str, int]
    chat_format: ChatFormat
    bos: int
    end: int
    bytes_per_token: np.ndarray
    hash: str
    _bytes: Sequence[bytes]  # The UTF-8 bytes of each id; none for special tokens.
    _names: Mapping[int, bytes]  # The names of special tokens.

    @property
    def ends(self) -> frozenset[int]:
        """Ids of all tokens with which an answer or a text may end."""
        return frozenset({self.bos, self.end})

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens; a lone surrogate is encoded as U+FFFD."""

    def decode_bytes(self, ids: Iterable[int], *, keep_specials: bool = False) -> bytes:
        """UTF-8 bytes of ids, possibly ending inside a character. Special tokens are omitted or, on demand, named.

        Raises ValueError for an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            raise ValueError(f"id {min(ids) if min(ids) < 0 else max(ids)} is not in 0..{self.vocab_size - 1}")
        if keep_specials:
            return b"".join(self._names.get(i, self._bytes[i]) for i in ids)
        return b"".join(map(self._bytes.__getitem__, ids))

    def decode(self, ids: Iterable[int], *, keep_specials: bool = False) -> str:
        """Text of ids; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids, keep_specials=keep_specials).decode("utf-8", errors="replace")

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the tokenizer to a directory, replacing a different one; raises `UserError` if it has other files."""
