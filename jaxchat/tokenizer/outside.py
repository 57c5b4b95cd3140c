"""Tokenizers of other projects: tokenizer.json of the `tokenizers` library, or a sentencepiece model.

Their ids are those of their library. Not all are lossless: `Outside.losses` says what comes back otherwise.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import sentencepiece

from jaxchat.errors import UserError, first_line, require
from jaxchat.tokenizer import saved
from jaxchat.tokenizer.chat_format import Malformed, Rendered
from jaxchat.tokenizer.protocol import Tokenizer
from jaxchat.tokenizer.sentencepiece import PROBES, SPACE_MARK, piece_bytes, scalar_values
from jaxchat.tokenizer.template import JinjaFormat

GUARD = "\ufdd0"  # A noncharacter of Unicode, put into names of special tokens that a message contains.
_NONCHARACTERS = re.compile("[\ufdd0-\ufdd2]")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Id(NamedTuple):
    """A token of a text: its id, and the character at which it begins."""

    id: int
    start: int


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


@dataclass(frozen=True)
class About:
    """What files beside a tokenizer say of it.

    Attributes:
        kind: a row of `CORES`.
        vocab_size: number of ids of the model, which may have more than its tokenizer.
        specials: id of each special token by name.
        bos: name of the token that starts every document.
        last: name of the token that ends the assistant's turn.
        ends: names of all tokens that end a text.
        names: what a chat template calls special tokens.
        template: the chat template; None without.
    """

    kind: str
    vocab_size: int
    specials: Mapping[str, int]
    bos: str
    last: str
    ends: tuple[str, ...]
    names: Mapping[str, str]
    template: str | None


class Outside(Tokenizer):
    """A tokenizer of another project around its file, `model`; conversations are written by its chat template."""

    FORMAT = "jaxchat-outside-1"

    def __init__(self, model: bytes, about: About) -> None:
        self.model, self.about = model, about
        self._core = core = CORES[about.kind](model)
        self.vocab_size, self.specials = about.vocab_size, dict(about.specials)
        self.chat_format: JinjaFormat = JinjaFormat(about.bos, {}, {}, about.template, about.last, about.names)
        self.bos, self.end = self.specials[about.bos], self.specials[about.last]
        self._names = {i: name.encode() for name, i in self.specials.items()}
        self._bytes = [b"" if i in self._names else core.pieces.get(i, b"") for i in range(self.vocab_size)]
        self.bytes_per_token = np.array([len(piece) for piece in self._bytes], np.int32)
        self.bytes_per_token.flags.writeable = False
        longest = sorted(self.specials, key=len, reverse=True)
        self._named = re.compile("|".join(map(re.escape, longest)))
        # Names that the library itself would read as these tokens are cut after their first letter.
        loose = [name for name in longest if name not in core.specials]
        cuts = (f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in loose)
        self._cuts = re.compile("|".join(cuts)) if loose else None
        self._special = re.compile("|".join(core.patterns.get(name, re.escape(name)) for name in longest))
        self.hash = _hash(model, about)

    def __reduce__(self) -> tuple[type["Outside"], tuple[bytes, About]]:
        return Outside, (self.model, self.about)

    @property
    def ends(self) -> frozenset[int]:
        return frozenset({self.bos, self.end, *(self.specials[name] for name in self.about.ends)})

    def encode(self, text: str) -> list[int]:
        return [token.id for token in self._letters(scalar_values(text), first=True)]

    def decode_bytes(self, ids: Iterable[int], *, keep_specials: bool = False) -> bytes:
        ids = [int(i) for i in ids]
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            raise ValueError(f"id {min(ids) if min(ids) < 0 else max(ids)} is not in 0..{self.vocab_size - 1}")
        if keep_specials:
            return b"".join(self._names.get(i, self._bytes[i]) for i in ids)
        return b"".join(map(self._bytes.__getitem__, ids))

    def encode_named(self, text: str) -> Iterator[Id]:
        """Ids of a text in which names of special tokens are these tokens, unless they contain `GUARD`."""
        at = 0
        for match in self._special.finditer(text):
            yield from self._plain(text[at : match.start()], at)
            name = match[0] if match[0] in self.specials else match[0].strip()
            yield Id(self.specials[name], match.start())
            at = match.end()
        yield from self._plain(text[at:], at)

    def _plain(self, text: str, at: int) -> Iterator[Id]:
        """Ids of a text between special tokens, which begins at character `at`."""
        kept = [i for i, letter in enumerate(text) if letter != GUARD]
        for i, start in self._letters(text.replace(GUARD, ""), first=at == 0):
            yield Id(i, at + kept[start])

    def _letters(self, text: str, *, first: bool) -> Iterator[Id]:
        """Ids of a text in which names of special tokens are letters."""
        at = 0
        for part in [text] if self._cuts is None else self._cuts.split(text):
            yield from (Id(i, at + start) for i, start in zip(*self._core.encode(part, first=first and not at)))
            at += len(part)

    def render(self, messages: Sequence[Mapping[str, Any]], *, complete: bool, everything: bool) -> Rendered:
        """Ids and loss mask of messages of role, content (a text) and in_loss, as the chat template writes them.

        With `complete`, the ids end where the assistant begins, and nothing is a target. Names of special tokens in
        messages are letters.

        Raises:
            Malformed: the template refuses the conversation, or its targets cannot be found.
            UserError: there is no template.
        """
        spoken = [{"role": one["role"], "content": self._guarded(one["content"])} for one in messages]
        if complete:
            ids = [token.id for token in self.encode_named(self.chat_format.text(spoken, prompt=True))]
            return Rendered(ids, [False] * len(ids))
        silent = [not one.get("in_loss", True) for one in messages]
        text, regions = self.chat_format.targets(spoken, silent, everything=everything)
        wanted = np.zeros(len(text) + 1, bool)
        for start, stop in regions:
            wanted[start:stop] = True
        tokens = list(self.encode_named(text))
        mask = [bool(wanted[token.start]) and token.id != self.bos for token in tokens]
        return Rendered([token.id for token in tokens], mask)

    def _guarded(self, content: str) -> str:
        content = scalar_values(content)
        if found := _NONCHARACTERS.search(content):
            raise Malformed("noncharacters", f"a message contains U+{ord(found[0]):04X}, which is no character")
        return self._named.sub(lambda match: match[0][0] + GUARD + match[0][1:], content)

    def losses(self) -> str | None:
        """A sentence if texts do not come back as they are; None if all that were tried do."""
        backs = {text: self.decode(self.encode(text)) for text in PROBES if text}
        odd = [text for text, back in backs.items() if back.removeprefix(" ") != text != back]
        spaced = any(back == f" {text}" for text, back in backs.items())
        parts = ["puts a space in front of a text"] * spaced
        if odd:
            shown = ", ".join(f"{text!r} as {backs[text]!r}" for text in odd[:3])
            parts.append(f"changes texts ({shown}{' and more' * (len(odd) > 3)})")
        if not parts:
            return None
        return f"the model's tokenizer is not lossless: it {' and '.join(parts)}, so bits per byte are approximate"

    def save(self, directory: str | os.PathLike[str]) -> None:
        metadata = {"format": self.FORMAT, "hash": self.hash, **asdict(self.about)}
        saved.write(directory, self.model, metadata)

    @classmethod
    def from_saved(cls, model: bytes, metadata: Mapping[str, Any]) -> "Outside":
        """Inverts `save`; raises ValueError, LookupError or TypeError if the metadata are others."""
        values = {name: metadata[name] for name in About.__dataclass_fields__}
        about = About(**values | {"ends": tuple(values["ends"])})
        if metadata["hash"] != _hash(model, about):
            raise ValueError("the hash is that of another model")
        return cls(model, about)


def _hash(model: bytes, about: About) -> str:
    facts = json.dumps(asdict(about), sort_keys=True).encode()
    return hashlib.sha256(Outside.FORMAT.encode() + model + facts).hexdigest()


def _without_prefix(value: Any) -> Any:
    """A pre-tokenizer that puts no space at the beginning of a text, where it did so only there."""
    if isinstance(value, dict):
        changed = {key: _without_prefix(part) for key, part in value.items()}
        return changed | {"prepend_scheme": "never"} if value.get("prepend_scheme") == "first" else changed
    return [_without_prefix(part) for part in value] if isinstance(value, list) else value


def _decoder(value: Any) -> Any:
    """The function from a token's name to its bytes that a decoder of tokenizer.json describes."""
    parts = (value or {}).get("decoders") or [value or {}]
    kinds = {part.get("type") for part in parts}
    if unknown := kinds - {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        kind = min(map(str, unknown))
        raise UserError(
            f"tokenizer.json has the decoder {kind}, which is not supported: import its sentencepiece model"
        )
    if "ByteLevel" in kinds:
        letters = _byte_letters()
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


def _byte_letters() -> dict[str, int]:
    """The character that byte-level tokenizers write for each byte: itself where it can be seen, else one from U+0100
    on, in the order of the bytes (GPT-2)."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}
