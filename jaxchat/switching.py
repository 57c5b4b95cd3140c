"""Names on the command line that mean several fields, and parts that are switched by the name of their type.

The members of a tuple of dataclasses are numbered: `model.pattern.0.mlp.hidden`. Without the number a name means all
members, and a dataclass without a field of some name passes it to the members of its tuples: `model.mlp.hidden` is that
of every layer. A field whose type is a union of dataclasses is set by the name of one: `--model.mlp=moe`.

This module knows no field names.
"""

import ast
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxchat.errors import UserError


class Word(NamedTuple):
    """A flag: its name without hyphens, its value after `=` (None without), and the words that follow it."""

    name: str
    value: str | None
    following: tuple[str, ...]

    @property
    def values(self) -> tuple[str, ...]:
        return (() if self.value is None else (self.value,)) + self.following


def apply(default: Any, argv: Sequence[str]) -> tuple[Any, list[str]]:
    """The value with parts switched as the arguments say, and the other arguments with full names of fields.

    Raises:
        UserError: a part is set to what is not the name of a type, or its new type refuses the sizes.
    """
    before, words = _words(argv)
    switches = []
    for word in sorted(words, key=lambda word: word.name.count(".")):  # A part before the parts in it.
        paths = [path for path in find(default, word.name) if kinds(default, path)]
        for path in paths:
            default = _switched(default, path, word, words)
        switches += [word] if paths else []
    for word in words:
        paths = find(default, word.name)
        if not paths:
            _check_kind(default, word.name)
        for path in (paths or [word.name]) if word not in switches else []:
            before += [f"--{path}" if word.value is None else f"--{path}={word.value}", *word.following]
    return default, before


def find(value: Any, name: str) -> list[str]:
    """The full names of the fields that a name means, [] if there are none."""
    if not name:
        return [""]
    head, _, rest = name.partition(".")
    if _has_members(value):
        if head.isdigit():
            return _joined(head, find(value[int(head)], rest)) if int(head) < len(value) else []
        return [path for i, member in enumerate(value) for path in _joined(str(i), find(member, name))]
    if not dataclasses.is_dataclass(value):
        return []
    fields = [field.name for field in dataclasses.fields(value)]
    if head in fields:
        return _joined(head, find(getattr(value, head), rest))
    tuples = [field for field in fields if _has_members(getattr(value, field))]
    return [path for field in tuples for path in _joined(field, find(getattr(value, field), name))]


def kinds(value: Any, path: str) -> dict[str, Any]:
    """The types, by name, of which a field of a part can be, by its full name; {} unless they are dataclasses."""
    owner, _, name = path.rpartition(".")
    holder = _values(value, owner)[-1]
    return _choices(type(holder), name) if owner and dataclasses.is_dataclass(holder) else {}


def _choices(cls: type, name: str) -> dict[str, Any]:
    hint = typing.get_type_hints(cls)[name]
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()
    parts = all(dataclasses.is_dataclass(choice) or choice is type(None) for choice in choices)
    return {"None" if one is type(None) else one.__name__: one for one in choices} if parts else {}


def listed(default: Any, part: str) -> list[str]:
    """For `--help`: a text for each field in a `part` of a value that can be switched, by its shortest name."""
    texts: dict[str, str] = {}
    for path in _paths(getattr(default, part, None), part + "."):
        if choices := kinds(default, path):
            short = re.sub(r"\w+\.\d+\.", "", path)
            short = short if path in find(default, short) else re.sub(r"\.\d+", "", path)
            texts.setdefault(short, f"--{short}={'|'.join(choices)} (now {type(_values(default, path)[-1]).__name__})")
    return [text.replace("NoneType", "None") for text in texts.values()]


def _paths(value: Any, prefix: str) -> Iterator[str]:
    """The full names of all fields of a dataclass and of the dataclasses in it."""
    for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
        part, path = getattr(value, field.name), prefix + field.name
        yield path
        for i, member in enumerate(part) if _has_members(part) else ():
            yield from _paths(member, f"{path}.{i}.")
        yield from _paths(part, path + ".")


def _check_kind(default: Any, name: str) -> None:
    """Raises UserError for a field that a part would have if it were switched."""
    part, _, field = name.rpartition(".")
    for path in find(default, part) if part else []:
        for kind in kinds(default, path).values():
            if field in getattr(kind, "__dataclass_fields__", {}):
                raise UserError(f"--{name} is a field of {kind.__name__}: add --{part}={kind.__name__}")


def _switched(default: Any, path: str, word: Word, words: Sequence[Word]) -> Any:
    """The value with a part of the type that the word names."""
    choices, owners = kinds(default, path), _values(default, path)
    old = owners.pop()
    by_name = {_plain(name): kind for name, kind in choices.items()}
    text = " ".join(word.values)
    if _plain(text) not in by_name:
        near = difflib.get_close_matches(_plain(text), by_name, n=1)
        guess = next((f"did you mean {name}? " for name in choices if [_plain(name)] == near), "")
        raise UserError(f"--{word.name}={text} is not a kind of part: {guess}It is one of {', '.join(choices)}")
    kind = by_name[_plain(text)]
    if kind is type(None) or type(old) is kind:
        return _put(default, path, None if kind is type(None) else old)
    given = {
        other.name.rpartition(".")[2]: _literal(other.values[0])
        for other in words
        if other.values and path in find(default, other.name.rpartition(".")[0])
    }
    known = {field.name for field in dataclasses.fields(kind) if not _choices(kind, field.name)}
    given = {name: value for name, value in given.items() if name in known}
    try:
        return _put(default, path, _made(kind, old, owners, given))
    except TypeError:  # A value of a wrong type, which the parser reports.
        return _put(default, path, _made(kind, old, owners, {}))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _plain(name: str) -> str:
    return name.replace("_", "").casefold()


def _made(kind: Any, old: Any, owners: Sequence[Any], given: dict[str, Any]) -> Any:
    """A part in place of `old`: with the fields given, those that its owners add in `sizes_of`, and for other fields
    without a default what `old` has."""
    needed = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
    fields = dict(given)
    for owner in owners:
        if hasattr(owner, "sizes_of"):
            fields |= owner.sizes_of(kind, old, fields)
    fields = {name: getattr(old, name) for name in needed if hasattr(old, name)} | fields
    if missing := [name for name in needed if name not in fields]:
        raise ValueError(f"{kind.__name__} needs {', '.join(missing)}: set {'them' if missing[1:] else 'it'} as well")
    return kind(**fields)


def _put(value: Any, path: str, part: Any) -> Any:
    """The value with another part at a full name."""
    head, _, rest = path.partition(".")
    if isinstance(value, tuple):
        i = int(head)
        return (*value[:i], _put(value[i], rest, part), *value[i + 1 :])
    return dataclasses.replace(value, **{head: _put(getattr(value, head), rest, part) if rest else part})


def _values(value: Any, path: str) -> list[Any]:
    """The values on the way to a full name, from the outermost to the one that it names."""
    found = [value]
    for name in path.split(".") if path else ():
        found.append(found[-1][int(name)] if isinstance(found[-1], tuple) else getattr(found[-1], name))
    return found


def _words(argv: Sequence[str]) -> tuple[list[str], list[Word]]:
    """The words before the first flag, and the flags."""
    before: list[str] = []
    words: list[Word] = []
    for text in argv:
        if text.startswith("--"):
            name, equals, value = text[2:].partition("=")
            words.append(Word(name.replace("-", "_"), value if equals else None, ()))
        elif words and text != "-h":
            words[-1] = words[-1]._replace(following=(*words[-1].following, text))
        else:
            before.append(text)
    return before, words


def _has_members(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and dataclasses.is_dataclass(value[0])


def _joined(head: str, paths: Sequence[str]) -> list[str]:
    return [f"{head}.{path}" if path else head for path in paths]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
