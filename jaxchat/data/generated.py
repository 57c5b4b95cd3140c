"""Sources that are generated instead of read."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from jaxchat.data import tinyworld
from jaxchat.data.cache import Log
from jaxchat.data.source import Content, Kind, Object, Reading, Source, Split
from jaxchat.errors import UserError


class TinyWorld(Kind):
    """Documents (tinyworld:train[:N], tinyworld:val[:N]) and conversations (tinyworld:chat[:N]) of the tiny world."""

    mark = "tinyworld:"
    shuffled = True
    shard_bytes = 4 << 20
    conversations = 1  # Later versions read these alike.

    def find(self, spec: str, split: Split, content: Content, downloads: Path | None, log: Log) -> list[Source]:
        names = ("chat",) if content == "objects" else ("train", "val")
        match = re.fullmatch(rf"tinyworld:({'|'.join(names)})(?::([1-9]\d*))?", spec)
        if not match:
            known = " or ".join(f"tinyworld:{name}" for name in names)
            raise UserError(f"{spec} is not {known}, or such a name and a number, such as tinyworld:{names[0]}:100")
        # A run resumes only if these paths stay as they are: the hash of a source includes its path.
        if content == "objects":
            count = int(match[2] or tinyworld.CONVERSATIONS[split])
            return [Source("tinyworld", f"tinyworld:chat-{split}:{count}", count * 400)]  # about 400 bytes each
        return [Source("tinyworld", spec, _documents(spec)[1] * 330)]

    def documents(self, source: Source, reading: Reading) -> Iterator[str]:
        split, count = _documents(source.path)
        return (tinyworld.document(split, i) for i in reading.deal(count))

    def objects(self, source: Source, reading: Reading, columns: list[str] | None = None) -> Iterator[Object]:
        _, name, count = source.path.split(":")
        split = name.removeprefix("chat-")
        return ((i + 1, {"messages": tinyworld.conversation(split, i)}) for i in reading.deal(int(count)))

    def hash(self, source: Source) -> str:
        """Hexadecimal SHA-256 of the spec and of the code that generates its content."""
        is_chat = source.path.startswith("tinyworld:chat")
        files = Path(tinyworld.__file__).parent.glob("*.py")
        code = sorted(path for path in files if is_chat or path.name != "talk.py")  # talk.py generates no documents
        return hashlib.sha256(b"\0".join([source.path.encode(), *(path.read_bytes() for path in code)])).hexdigest()


def _documents(spec: str) -> tuple[str, int]:
    """The split and number of documents of a spec."""
    _, split, *count = spec.split(":")
    return split, int(count[0]) if count else tinyworld.DOCUMENTS[split]
