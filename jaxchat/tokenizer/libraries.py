"""Libraries of tokenizers: tokenizer.json of `tokenizers`, and models of sentencepiece; `CORES` lists them."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import sentencepiece

from jaxchat.errors import UserError, first_line, require
from jaxchat.tokenizer.sentencepiece import SPACE_MARK, piece_bytes

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Core(Protocol):
    """What a library knows of a tokenizer: `pieces`, the bytes of each id; `specials`, ids by the pattern of a name."""

    pieces: Mapping[int, bytes]
    specials: Mapping[str, int]
    patterns: Mapping[str, str]

    def __init__(self, model: bytes) -> None:
        """Raises `UserError` if it is not such a model."""

    def encode(self, text: str, *, first: bool) -> tuple[Sequence[int], Sequence[int]]:
        """Ids of a text without special tokens, and the character at which each begins; `first`: nothing is before."""


class Fast(Core):
    """tokenizer.json of the `tokenizers` library."""

    def __init__(self, model: bytes) -> None:
        require("tokenizers", "this model's tokenizer.json needs tokenizers", "convert")
        import tokenizers

        def made(value: Any) -> Any:
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(value))
            tokenizer.encode_special_tokens = True  # Names of special tokens are letters.
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return tokenizer

        try:
            value = json.loads(model)
            self._first = made(value)
            # Only a text's beginning gets a space, not what follows a special token.
            later = value | {"pre_tokenizer": _without_prefix(value.get("pre_tokenizer"))}
            self._later = self._first if later == value else made(later)
        except Exception as error:  # The library raises nothing more special.
            raise UserError(f"tokenizer.json cannot be read by tokenizers: {first_line(error)}") from None
        added = {token["content"]: token for token in value.get("added_tokens") or ()}
        self.specials = {name: token["id"] for name, token in added.items() if token["special"]}
        self.patterns = {
            name: r"\s*" * token.get("lstrip", False) + re.escape(name) + r"\s*" * token.get("rstrip", False)
            for name, token in added.items()
        }
        names, to_bytes = set(self.specials), _decoder(value.get("decoder"))
        vocab = self._first.get_vocab(with_added_tokens=True)
        self.pieces = {i: b"" if name in names else to_bytes(name) for name, i in vocab.items()}

    def encode(self, text: str, *, first: bool) -> tuple[Sequence[int], Sequence[int]]:
        found = (self._first if first else self._later).encode(text, add_special_tokens=False)
        return found.ids, [start for start, _ in found.offsets]


class Pieces(Core):
    """A sentencepiece model, with what it normalizes and puts in front of every text."""

    patterns: Mapping[str, str] = {}

    def __init__(self, model: bytes) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            sentence = "tokenizer.model is not a sentencepiece model: restore it, or name another by --tokenizer=DIR"
            raise UserError(sentence) from None
        names = [self._processor.id_to_piece(i) for i in range(self._processor.get_piece_size())]
        self.specials = {name: i for i, name in enumerate(names) if self._processor.is_control(i)}
        self.pieces = {i: piece_bytes(self._processor, i, name) for i, name in enumerate(names)}

    def encode(self, text: str, *, first: bool) -> tuple[Sequence[int], Sequence[int]]:
        ids = self._processor.encode(text)
        sizes = np.array([len(self.pieces[i]) for i in ids], np.int64)
        at = np.cumsum(sizes) - sizes
        data = text.encode()
        at = np.clip(at - (int(sizes.sum()) - len(data)), 0, max(len(data) - 1, 0))  # Less a space in front.
        characters = np.cumsum((np.frombuffer(data, np.uint8) & 0xC0) != 0x80) - 1
        return ids, characters[at].tolist() if data else [0] * len(ids)


CORES: Mapping[str, type[Core]] = {"tokenizers": Fast, "sentencepiece": Pieces}


def _without_prefix(value: Any) -> Any:
    """A pre-tokenizer that puts no space at the beginning of a text, where it did so only there."""
    if isinstance(value, dict):
        changed = {key: _without_prefix(part) for key, part in value.items()}
        return changed | {"prepend_scheme": "never"} if value.get("prepend_scheme") == "first" else changed
    return [_without_prefix(part) for part in value] if isinstance(value, list) else value


def _decoder(value: Any) -> Callable[[str], bytes]:
    """The function from a token's name to its bytes that a decoder of tokenizer.json describes."""
    parts = (value or {}).get("decoders") or [value or {}]
    kinds = {part.get("type") for part in parts}
    if unknown := kinds - {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        kind = min(map(str, unknown))
        raise UserError(
            f"tokenizer.json has the decoder {kind}, which is not supported: import its sentencepiece model"
        )
    if "ByteLevel" in kinds:
        letters = byte_letters()
        return lambda name: bytes(letters[one] for one in name) if letters.keys() >= set(name) else name.encode()
    replaced = [(part["pattern"]["String"], part["content"]) for part in parts if part.get("type") == "Replace"]
    replaced += [(part.get("replacement", SPACE_MARK), " ") for part in parts if part.get("type") == "Metaspace"]

    def to_bytes(name: str) -> bytes:
        if "ByteFallback" in kinds and (match := _BYTE.fullmatch(name)):
            return bytes([int(match[1], 16)])
        for old, new in replaced:
            name = name.replace(old, new)
        return name.encode()

    return to_bytes


def byte_letters() -> dict[str, int]:
    """The character that byte-level tokenizers write for each byte: itself where it can be seen, else one from U+0100
    on, in the order of the bytes (GPT-2)."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}
