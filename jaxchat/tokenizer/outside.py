"""A tokenizer of another project. Its ids are those of its library, and it may change texts: see `Outside.losses`."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxchat.tokenizer import saved
from jaxchat.tokenizer.chat_format import ChatFormat, Malformed, Rendered
from jaxchat.tokenizer.libraries import CORES
from jaxchat.tokenizer.protocol import Tokenizer
from jaxchat.tokenizer.sentencepiece import PROBES, scalar_values
from jaxchat.tokenizer.template import JinjaFormat, known

GUARD = "\ufdd0"  # A noncharacter of Unicode, put into names of special tokens that a message contains.
_NONCHARACTERS = re.compile("[\ufdd0-\ufdd2]")


class Id(NamedTuple):
    """A token of a text: its id, and the character at which it begins."""

    id: int
    start: int


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
    """A tokenizer of another project around its file, `model`.

    Its chat template writes conversations, or one of our chat formats, if it is the template of that.
    """

    FORMAT = "jaxchat-outside-1"

    def __init__(self, model: bytes, about: About) -> None:
        self.model, self.about = model, about
        self._core = core = CORES[about.kind](model)
        self.vocab_size, self.specials = about.vocab_size, dict(about.specials)
        self._jinja = JinjaFormat(about.bos, {}, {}, about.template, about.last, about.names)
        form = known(about.template)
        ours = form is not None and {*form.specials} <= {*self.specials} and form.end == about.last
        self.chat_format: ChatFormat = form if form is not None and ours else self._jinja
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
    def templated(self) -> bool:
        """Whether the chat template has to write conversations, because it is none of our chat formats."""
        return self.chat_format is self._jinja

    @property
    def ends(self) -> frozenset[int]:
        return frozenset({self.bos, self.end, *(self.specials[name] for name in self.about.ends)})

    def encode(self, text: str) -> list[int]:
        return [token.id for token in self._letters(scalar_values(text), first=True)]

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
            ids = [token.id for token in self.encode_named(self._jinja.text(spoken, prompt=True))]
            return Rendered(ids, [False] * len(ids))
        silent = [not one.get("in_loss", True) for one in messages]
        text, regions = self._jinja.targets(spoken, silent, everything=everything)
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
