"""A lossless subword tokenizer on sentencepiece: train, encode, decode, save, load.

Only sentencepiece's segmentation is used, not its lossy steps. Text is split where no piece can cross: before spaces,
and between letters and punctuation. This leaves the segmentation unchanged and allows repeated words to be cached.
U+2581, which sentencepiece reads as a space, is encoded as its three bytes. Ids are decoded by a table of their bytes.
"""

import hashlib
import heapq
import io
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import sentencepiece

from jaxchat.errors import UserError
from jaxchat.tokenizer import saved
from jaxchat.tokenizer.chat_format import CHAT_FORMATS, NANOCHAT, ChatFormat, FormatName
from jaxchat.tokenizer.protocol import Tokenizer

FORMAT = "jaxchat-tokenizer-1"

SPACE_MARK = "\u2581"  # sentencepiece's symbol for a space
_RUN_OF_SPACES = re.compile(r"(?<! ) ")
# Spaces and ASCII letters, or spaces and other ASCII, or spaces and anything; no piece crosses, as each has one script.
_PART = re.compile(r" *+(?:[A-Za-z]++(?![^\0-\x7f])|[\0-\x1f!-@\[-`{-\x7f]++(?![^\0-\x7f])|[^ ]++)| ++")
_CROSSING = re.compile(r"[^\u2581]\u2581|[A-Za-z][\0-\x1f!-@\[-`{-\x7f]|[\0-\x1f!-@\[-`{-\x7f][A-Za-z]")
_UNTRAINABLE = re.compile("[\u2581\u2585\0]")  # sentencepiece skips or misreads sentences with one of these
# ASCII, and what programs cut, join, normalize or read in their own way.
PROBES = [*map(chr, range(128)), *"\xa0\xad\u2581\u2585\ufeff\u0301\u212b\ufb01\uff21\u3000\U0001f9f6", "  "]
_BLOCK_CHARACTERS = 2000
_COVERAGE = 0.9995
_CACHED_CHARACTERS, _CACHED_ENTRIES = 64, 1 << 18


@dataclass(frozen=True)
class TokenizerConfig:
    """How to train a tokenizer, or the directory of a saved one."""

    algorithm: Literal["bpe", "unigram"] = "bpe"  # sentencepiece's algorithm.
    extra_specials: tuple[str, ...] = ()
    """Further special tokens, numbered after those of the chat format and written like them."""
    sample_bytes: int = 20_000_000
    """Bytes of text to train on, sampled evenly from all documents."""
    path: str | None = None
    """Directory of a saved tokenizer to use instead of training one."""
    chat_format: FormatName = "nanochat"
    """Special tokens around turns and tool calls."""

    def __post_init__(self) -> None:
        for name in self.extra_specials:
            if not re.fullmatch(r"<\|[A-Za-z0-9_]*[A-Za-z_][A-Za-z0-9_]*\|>", name):
                raise ValueError(f"extra_specials has {name!r}: write special tokens like {NANOCHAT.bos}")
        names = self.specials
        if len(set(names)) != len(names):
            raise ValueError(f"extra_specials repeats a special token: {', '.join(self.extra_specials)}")
        if self.sample_bytes < 1:
            raise ValueError(f"sample_bytes={self.sample_bytes} must be positive")

    @property
    def specials(self) -> tuple[str, ...]:
        """All special tokens, in the order of their ids."""
        return CHAT_FORMATS[self.chat_format].specials + self.extra_specials


class _Cache(dict[str, tuple[int, ...]]):
    """Ids by text; a missing text is segmented, and stored if it is short. Cleared when full."""

    def __init__(self, segment: Callable[[str], Iterable[int]]) -> None:
        super().__init__()
        self._segment = segment

    def __missing__(self, text: str) -> tuple[int, ...]:
        ids = tuple(self._segment(text))
        if len(text) <= _CACHED_CHARACTERS:
            if len(self) >= _CACHED_ENTRIES:
                self.clear()
            self[text] = ids
        return ids


class SentencePiece(Tokenizer):
    """A tokenizer around a serialized sentencepiece model, `model`."""

    FORMAT = FORMAT

    def __init__(self, model: bytes, chat_format: ChatFormat = NANOCHAT) -> None:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        ids = range(processor.get_piece_size())
        pieces = [processor.id_to_piece(i) for i in ids]
        ordinary = [pieces[i] for i in ids if not (processor.is_control(i) or processor.is_byte(i))]
        if sum(map(processor.is_byte, ids)) != 256 or any(map(_CROSSING.search, ordinary[1:])):
            raise UserError("a sentencepiece model needs byte pieces, and no piece may cross words or scripts")
        self.model, self.chat_format = model, chat_format
        self.vocab_size = len(pieces)
        self.specials = {pieces[i]: i for i in ids if processor.is_control(i)}
        if not set(chat_format.specials) <= set(self.specials):
            raise UserError(f"a sentencepiece model needs the control symbols {' '.join(chat_format.specials)}")
        self.bos, self.end = self.specials[chat_format.bos], self.specials[chat_format.end]
        self.hash = _hash(model, chat_format)
        self._names = {i: name.encode() for name, i in self.specials.items()}
        self._bytes = [piece_bytes(processor, i, pieces[i]) for i in ids]
        self.bytes_per_token = np.array([len(piece) for piece in self._bytes], np.int32)
        self.bytes_per_token.flags.writeable = False
        self._space_mark = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._parts = _Cache(processor.encode)
        self._words = _Cache(lambda word: self._segment(" " + word))
        self._check_lossless()

    def _check_lossless(self) -> None:
        """Raises `UserError` if a byte, a probe or a random text of probes does not come back with all its bytes."""
        rng = random.Random(0)
        texts = [*PROBES, *("".join(rng.choices(PROBES, k=20)) for _ in range(100))]
        for text in texts:
            ids = self.encode(text)
            if (found := self.decode(ids)) != text or self.bytes_per_token[ids].sum() != len(text.encode()):
                raise UserError(f"the tokenizer is not lossless ({text!r} comes back as {found!r}): train it again")

    def __reduce__(self) -> tuple[type["SentencePiece"], tuple[bytes, ChatFormat]]:
        return SentencePiece, (self.model, self.chat_format)  # For the workers that make rows.

    def encode(self, text: str) -> list[int]:
        if not text.isascii():
            text = scalar_values(text)
            if SPACE_MARK in text:
                first, *others = text.split(SPACE_MARK)
                return self.encode(first) + [i for other in others for i in self._space_mark + self.encode(other)]
        first, *words = _RUN_OF_SPACES.split(text) if "  " in text else text.split(" ")
        return list(chain(self._segment(first), chain.from_iterable(map(self._words.__getitem__, words))))

    def _segment(self, text: str) -> Iterator[int]:
        return chain.from_iterable(map(self._parts.__getitem__, _PART.findall(text)))

    def save(self, directory: str | os.PathLike[str]) -> None:
        metadata = {"format": FORMAT, "hash": self.hash, "vocab_size": self.vocab_size, "specials": self.specials}
        saved.write(directory, self.model, metadata | {"chat_format": asdict(self.chat_format)})

    @classmethod
    def from_saved(cls, model: bytes, metadata: Mapping[str, Any]) -> "SentencePiece":
        """Inverts `save`; raises ValueError, LookupError or TypeError if the metadata are others."""
        chat_format = ChatFormat.from_json(upgraded(metadata)["chat_format"])
        if metadata["hash"] != _hash(model, chat_format):
            raise ValueError("the hash is that of another model")
        return cls(model, chat_format)


def parts(text: str) -> list[str]:
    """The parts of a text that `SentencePiece.encode` segments each on its own; joined, they are the text."""
    pieces: list[str] = []
    for number, piece in enumerate(scalar_values(text).split(SPACE_MARK)):
        first, *words = _RUN_OF_SPACES.split(piece)
        marks = [SPACE_MARK] * (number > 0)
        pieces += marks + [part for word in (first, *(" " + word for word in words)) for part in _PART.findall(word)]
    return pieces


def upgraded(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """Adds the chat format to the metadata of an earlier version, which had no other than nanochat's."""
    return {"chat_format": asdict(NANOCHAT), **metadata}


def _hash(model: bytes, chat_format: ChatFormat) -> str:
    """nanochat's format adds nothing, because tokenizers were saved without it."""
    added = b"" if chat_format == NANOCHAT else json.dumps(asdict(chat_format)).encode()
    return hashlib.sha256(FORMAT.encode() + model + added).hexdigest()


def train_tokenizer(texts: Iterable[str], *, vocab: int, config: TokenizerConfig, seed: int = 0) -> SentencePiece:
    """Trains a tokenizer with exactly `vocab` ids; the result is determined by texts, config and seed.

    Raises:
      UserError: the vocabulary is too small for the bytes and special tokens, or too large for the text.
    """
    free = vocab - (1 + len(config.specials) + 256)
    if free < 2:
        raise UserError(f"--data.vocab={vocab} is too small: bytes and special tokens alone take {vocab - free} ids")
    blocks = sample(texts, config.sample_bytes, seed=seed)
    if not blocks:
        raise UserError("there is no text to train a tokenizer on; set --data.train to documents")
    model = _train(blocks, vocab, config)
    if isinstance(model, bytes):
        return SentencePiece(model, CHAT_FORMATS[config.chat_format])
    # The limit of a vocabulary depends on the vocabulary, because fewer ids get fewer characters: it is tried.
    limit = model
    while limit >= vocab - free + 2 and not isinstance(model := _train(blocks, limit, config), bytes):
        limit = min(limit - 1, model)
    remedy = f"--data.vocab={limit}, or more text" if isinstance(model, bytes) else "more text"
    size = sum(len(block.encode("utf-8")) for block in blocks)
    raise UserError(f"{size:,} bytes of text are too little for a vocabulary of {vocab:,}: use {remedy}")


def _train(blocks: Sequence[str], vocab: int, config: TokenizerConfig) -> bytes | int:
    """The model that sentencepiece trains; if the blocks are too little text, the limit of the vocabulary it names."""
    free = vocab - (1 + len(config.specials) + 256)
    output = io.BytesIO()
    # Only where it is needed, because a model contains its settings, and other models would get another hash.
    more: dict[str, Any] = {} if any(" " in block for block in blocks) else {"required_chars": SPACE_MARK}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_common_characters(blocks, most=free // 2)),
            model_writer=output,
            model_type=config.algorithm,
            vocab_size=vocab,
            control_symbols=list(config.specials),
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            byte_fallback=True,
            character_coverage=1.0,
            **more,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=8 * _BLOCK_CHARACTERS,
            num_threads=16,  # fixed, because the unigram algorithm sums per thread and so depends on it
            minloglevel=2,
        )
    except RuntimeError as error:
        if "Vocabulary size" not in str(error):
            raise
        limit = re.search(r"<= ?(\d+)", str(error))
        return int(limit.group(1)) if limit else 0
    return output.getvalue()


def sample(texts: Iterable[str], most_bytes: int, *, seed: int) -> list[str]:
    """Samples blocks of whole words evenly from the texts, in order, about `most_bytes` of UTF-8 in total."""
    generator = random.Random(seed)
    heap: list[tuple[float, int, int, str]] = []
    total = 0
    for index, block in enumerate(chain.from_iterable(map(_blocks, texts))):
        size = len(block.encode("utf-8"))
        heapq.heappush(heap, (-generator.random(), index, size, block))
        total += size
        while total - heap[0][2] >= most_bytes:
            total -= heapq.heappop(heap)[2]
    return [block for _, _, _, block in sorted(heap, key=lambda item: item[1])]


def _blocks(text: str) -> Iterator[str]:
    for part in _UNTRAINABLE.split(scalar_values(text)):
        start = 0
        while start < len(part):
            stop = start + _BLOCK_CHARACTERS
            if stop < len(part):
                cut = max(part.rfind("\n", start + 1, stop), part.rfind(" ", start + 1, stop))
                stop = cut if cut > start else stop
            block = part[start:stop].rstrip("\r\n")  # as sentencepiece itself does
            if block:
                yield block
            start = stop


def scalar_values(text: str) -> str:
    """Joins surrogate pairs and replaces lone surrogates, which JSON can contain but UTF-8 cannot encode."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _common_characters(blocks: Sequence[str], *, most: int) -> Iterator[str]:
    """The blocks with a tab in place of every character that gets no piece of its own and is encoded as bytes.

    These are the rarest characters except the space, 0.05 percent of the text, and more if over `most` different ones
    remain. A space without a piece would be encoded like U+2581.
    """
    text = np.frombuffer("".join(blocks).encode("utf-32-le"), np.uint32)
    counts = np.bincount(text)
    common_first = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    covering = 1 + int(np.searchsorted(np.cumsum(counts[common_first]), _COVERAGE * len(text)))
    # No piece of sentencepiece crosses a tab.
    rare = dict.fromkeys(common_first[min(covering, most) :].tolist(), "\t")
    rare.pop(ord(" "), None)
    return (block.translate(rare) for block in blocks) if rare else iter(blocks)


def piece_bytes(processor: sentencepiece.SentencePieceProcessor, index: int, piece: str) -> bytes:
    """UTF-8 bytes of a piece; none for control symbols and the unknown."""
    if processor.is_control(index) or processor.is_unknown(index):
        return b""
    if processor.is_byte(index):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE_MARK, " ").encode("utf-8")
