"""Reads every conversation below directories and says what became of it: python tests/read_all.py DIRECTORY ...

One line for each file of objects: how many conversations were read, and how many skipped, noted or refused, for which
reason. Each that was read is rendered and compared with its row: every text of a message is in it unless a note says
that something was left out, plain turns are as they were, every answer is a training target, and nothing of weight 0
is. Ends with status 1 if anything differs.
"""

import copy
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from letters import Letters

from jaxchat.data.conversations import COLUMNS, read
from jaxchat.data.messages import WEIGHTS
from jaxchat.data.source import Reading
from jaxchat.data.sources import KINDS, find
from jaxchat.errors import UserError
from jaxchat.tokenizer import chat
from jaxchat.tokenizer.chat import Malformed

EXCLUDED = "\u2297"  # marks texts of weight 0; in no data
FIRST = 2000  # above the ids of special tokens
LEFT_OUT = "left out"  # in the notes of what is not in the rendered conversation


class Characters(Letters):
    """One id a character, from `FIRST` on: nothing is lost, and no training is needed."""

    def encode(self, text: str) -> list[int]:
        return [FIRST + ord(letter) for letter in text]


def text_of(ids: list[int]) -> str:
    """The text of ids; each special token is a control character that no data has."""
    return "".join("\x1e" if i < FIRST else chr(i - FIRST) for i in ids)


def targets(messages: list[dict[str, Any]], everything: bool) -> str:
    """The text of the training targets."""
    rendered = chat.render(messages, Characters(), everything=everything)
    return text_of([i if target else 0 for i, target in zip(*rendered)])


def marked(value: Any, excluded: bool = False) -> Any:
    """A copy of a row in which texts of weight 0 begin with `EXCLUDED`."""
    if isinstance(value, Mapping):
        zero = excluded or any(value.get(key) in (0, False) and value.get(key) is not None for key in WEIGHTS)
        names = ("content", "value", "text")
        return {key: marked(item, zero and key in names) for key, item in value.items()}
    if isinstance(value, list):
        return [marked(item, excluded) for item in value]
    return EXCLUDED + value if excluded and isinstance(value, str) and value else value


def differences(row: Mapping[str, Any], messages: list[dict[str, Any]], notes: list[str]) -> Iterator[str]:
    """What of a row is not in its rendered conversation as it should be."""
    said = row.get("messages") or row.get("conversations") or []
    everything, learned = (targets(messages, everything=one) for one in (True, False))
    if EXCLUDED in everything:
        yield "a text of weight 0 is trained on"
    if any(LEFT_OUT in note for note in notes):
        return
    everything = text_of(chat.render(messages, Characters()).ids)
    plain = all(set(one) == {"role", "content"} and isinstance(one["content"], str) for one in said)
    plain = plain and {one["role"] for one in said} == {"user", "assistant"}
    if said and plain and said != messages and not row.get("tools") and not row.get("system"):
        yield "turns differ"
    for one in said:
        role, content = one.get("role") or one.get("from"), one.get("content") or one.get("value")
        if not isinstance(content, str) or not content.strip():
            continue
        if content not in everything:
            yield f"a text of {role} is missing"
        if role == "assistant" and content not in learned and not content.startswith(EXCLUDED):
            yield "an answer is no target"


def outcomes(path: Path) -> Counter[str]:
    """What became of the rows of a file."""
    found: Counter[str] = Counter()
    for source in find(str(path), "train", "objects"):
        reading = Reading()
        try:
            for _, row in KINDS[source.kind].objects(source, reading, COLUMNS):
                notes: list[str] = []
                try:
                    messages = read(marked(copy.deepcopy(row)), notes.append)
                    wrong = sorted(set(differences(marked(row), messages, notes)))
                    found["read"] += 1
                    found.update([*(f"noted: {note}" for note in set(notes)), *(f"WRONG: {one}" for one in wrong)])
                except Malformed as error:
                    found[f"skipped: {error.reason}"] += 1
        except UserError as error:
            found[refused(error)] += 1
    return found


def refused(error: UserError) -> str:
    return "refused: holds no conversation" if "holds no conversation" in str(error) else f"refused: {error}"


def main(argv: list[str]) -> int:
    wrong, total = 0, Counter[str]()
    endings = tuple(kind.mark for kind in KINDS.values() if kind.mark.startswith(".") and "objects" in kind.contents)
    for path in sorted(path for one in argv for path in Path(one).rglob("*") if path.name.endswith(endings)):
        try:
            found = outcomes(path)
        except UserError as error:
            found = Counter([refused(error)])
        except Exception:
            found = Counter({f"WRONG: {traceback.format_exc().splitlines()[-1]}": 1})
        total += found
        wrong += any(name.startswith("WRONG") for name in found)
        print(f"{path}: {', '.join(f'{number:,} {name}' for name, number in found.items()) or 'nothing'}", flush=True)
    skipped = sum(number for name, number in total.items() if name.startswith("skipped"))
    print(f"in all: {total['read']:,} read, {skipped:,} skipped")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
