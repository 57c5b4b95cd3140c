"""The command line over frozen dataclasses, and their JSON.

A config file is Python: `get_config(stage)` returns a frozen dataclass. Any field of it can be overridden by
`--field=value` or `--part.field=value`; types are checked and a misspelt name gets a suggestion. A config file may
also define `DIAL`, a frozen dataclass of the few numbers that everything else is derived from: overrides of those are
read first and handed to `get_config(stage, dial)`, so that what is derived follows; the other overrides come after.
`DIALS` may give single stages a dial of their own.

This module knows no field names.
"""

import ast
import dataclasses
import difflib
import errno
import importlib.util
import io
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import tyro


class UserError(Exception):
    """A mistake of the user's; the message is one sentence that names the remedy."""


def say(text: str) -> None:
    """A line for whoever runs a launcher; stdout is for its result."""
    print(text, file=sys.stderr, flush=True)


def run(main: Callable[[list[str]], Mapping[str, Any] | None]) -> None:
    """Runs a launcher: prints its result as one line of JSON, or a user's mistake as one sentence (exit status 2)."""
    for stream in (sys.stdin, sys.stdout):  # What is no text, or what a terminal cannot show, is no reason to stop.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        result = main(sys.argv[1:])
        if result is not None:
            print(json_line(result, ascii_only=False), flush=True)
    except BrokenPipeError:  # Whoever read the output has seen enough; Python would complain again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        what = f"{error.filename} cannot be written" if error.filename else "a file cannot be written"
        print(f"error: {what} ({error.strerror}): free some space and start again", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def json_line(value: Any, *, ascii_only: bool = True) -> str:
    """One compact line of JSON, which has no word for a number that is not finite: it reads null."""
    return json.dumps(_without_infinities(value), separators=(",", ":"), ensure_ascii=ascii_only, allow_nan=False)


def _without_infinities(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_infinities(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flags(cls: type, argv: Sequence[str]) -> list[str]:
    """The arguments, `--name` of a yes or no alone meaning yes."""
    switches = {f.name for f in dataclasses.fields(cls) if f.type in (bool, "bool")}
    following = [*argv[1:], ""]
    return [
        f"{word}=True" if word[2:].replace("-", "_") in switches and after not in ("True", "False") else word
        for word, after in zip(argv, following)
    ]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a sentence; its type's name where it has none."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def check_local(name: str, place: str | None) -> None:
    """Raises ValueError where a place is a URL: runs are files that are locked, renamed and added to."""
    if place and "://" in place:
        raise ValueError(
            f"{name}={place} is not a directory: mount the bucket (gcsfuse, say) and name where, see docs/launch"
        )


def parse(
    cls: type, argv: Sequence[str], *, default: Any = None, description: str | None = None, more: Sequence[str] = ()
) -> Any:
    """Reads `--field=value` arguments into dataclass `cls`; a mistake becomes a `UserError`, `--help` exits with 0.

    `more` are names beside the fields that a misspelt name may have meant.
    """
    return _parsed(cls, _flags(cls, argv), default, more, description=description)


def parse_known(
    cls: type, argv: Sequence[str], *, default: Any = None, description: str | None = None
) -> tuple[Any, list[str]]:
    """Reads the fields of dataclass `cls` out of `argv`; returns its value and the arguments that belong to others."""
    found: tuple[Any, list[str]] = _parsed(cls, argv, default, description=description, return_unknown_args=True)
    return found


def _parsed(cls: type, argv: Sequence[str], default: Any, more: Sequence[str] = (), **settings: Any) -> Any:
    if default is not None:
        settings["default"] = default
    options = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    text = io.StringIO()
    try:
        with redirect_stderr(text):
            return tyro.cli(cls, args=list(argv), config=options, use_underscores=True, **settings)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_mistake(text.getvalue(), [*_names(cls, default), *more])) from None
    except ValueError as error:
        raise UserError(str(error)) from None


def load(argv: Sequence[str], *, description: str | None = None) -> Any:
    """Reads `--config=FILE[:STAGE]`, then every override, into what the file's `get_config` returns.

    `description` is the launcher's own, for `--help` where no configuration says which fields there are.
    """
    if _asks_help(argv) and not any(word.partition("=")[0] == "--config" for word in argv):
        _print_help(description)
    path, stage, rest = _config_argument(argv)
    module = _import(path)
    known: dict[str, Any] = {} if stage is None else {"stage": stage}
    dial: dict[str, Any] = {}
    about = "\n\n".join(text.strip() for text in (description, module.__doc__) if text)
    if hasattr(module, "DIAL"):
        start = getattr(module, "DIALS", {}).get(stage, module.DIAL)
        known["dial"], rest = _read_dial(start, rest)
        dial = _dial_flags(start)
        told = " ".join(f"--{name}={value}" for name, value in dial.items())
        about += f"\n\nRead first, and what is derived follows: {told}"
    try:
        default = module.get_config(**known)
    except ValueError as error:
        raise UserError(str(error)) from None
    return parse(type(default), rest, default=default, description=about, more=list(dial))


def flags(dataclass_value: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a nested dataclass by its dotted name."""
    leaves: dict[str, Any] = {}
    for field in dataclasses.fields(dataclass_value):
        value, name = getattr(dataclass_value, field.name), prefix + field.name
        parts = value if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]) else None
        if dataclasses.is_dataclass(value):
            leaves |= flags(value, name + ".")
        elif parts is not None:
            for i, part in enumerate(parts):
                leaves |= flags(part, f"{name}.{i}.")
        else:
            leaves[name] = value
    return leaves


def difference(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """The leaves in which two dataclass values differ: name -> (before, after); a missing leaf reads None.

    A part that is of another type, or there in one alone, differs by its type's name.
    """
    old, new, was, kinds = flags(before), flags(after), _types(before), _types(after)
    types = {name: (was.get(name), kinds.get(name)) for name in [*was, *kinds] if was.get(name) != kinds.get(name)}
    names = [*old, *(name for name in new if name not in old)]
    return types | {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def _types(value: Any) -> dict[str, str]:
    """The type's name of every dataclass within a dataclass value, by its dotted name."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        parts = {f"{field.name}.{i}": one for i, one in enumerate(part)} if isinstance(part, tuple) else {}
        for name, one in (parts or {field.name: part}).items():
            if dataclasses.is_dataclass(one):
                found |= {name: type(one).__name__, **{f"{name}.{n}": kind for n, kind in _types(one).items()}}
    return found


def to_json(value: Any) -> Any:
    """Plain JSON values of a dataclass; every dataclass carries its type's name, so that a union can be read back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **named}
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    return value


def from_json(hint: Any, value: Any, name: str = "config") -> Any:
    """Reads what `to_json` wrote back into type `hint`; raises `UserError` naming the first field that does not fit."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return from_json(typing.get_args(hint)[0], value, name)
    if origin in (typing.Union, types.UnionType):
        return _from_union(typing.get_args(hint), value, name)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise UserError(f"{name}={value!r} is none of {', '.join(map(repr, typing.get_args(hint)))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise UserError(f"{name}={value!r} is not a list")
        item = typing.get_args(hint)[0]
        return tuple(from_json(item, part, f"{name}.{i}") for i, part in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return _from_object(hint, value, name)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise UserError(f"{name}={value!r} is not of type {hint.__name__}")
    return value


def _from_union(choices: tuple[Any, ...], value: Any, name: str) -> Any:
    if value is None and type(None) in choices:
        return None
    named = {c.__name__: c for c in choices if isinstance(c, type) and dataclasses.is_dataclass(c)}
    if isinstance(value, dict) and named:
        kind = value.get("type")
        if kind not in named:
            raise UserError(f"{name} has type {kind!r}, which is none of {', '.join(named)}")
        return from_json(named[kind], value, name)
    for choice in choices:
        if choice is not type(None) and not dataclasses.is_dataclass(choice):
            try:
                return from_json(choice, value, name)
            except UserError:
                continue
    raise UserError(f"{name}={value!r} fits none of its types")


def _from_object(cls: Any, value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{name}={value!r} is not an object of {cls.__name__}")
    hints = typing.get_type_hints(cls, include_extras=True)
    unknown = [key for key in value if key != "type" and key not in hints]
    if unknown:
        raise UserError(f"{name}.{unknown[0]} is not a field of {cls.__name__}: was it written by another version?")
    fields = {key: from_json(hints[key], part, f"{name}.{key}") for key, part in value.items() if key != "type"}
    try:
        return cls(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: {error}") from None


def _asks_help(argv: Sequence[str]) -> bool:
    return "--help" in argv or "-h" in argv


def _print_help(description: str | None) -> None:
    """Which configurations there are, and how to see the fields of one; ends the program."""
    print((description or "").strip())
    print("\nusage: --config=FILE[:STAGE] [--field=value ...]; the fields of one: --config=FILE --help\n")
    for path in _configs(Path("configs")):
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        print(f"  --config={path}  {about.splitlines()[0] if about else ''}")
    raise SystemExit(0)


def _configs(directory: Path) -> list[Path]:
    """The Python files of a directory that define `get_config`."""
    files = sorted(directory.glob("*.py"))
    return [path for path in files if "def get_config(" in path.read_text(encoding="utf-8", errors="replace")]


def _config_argument(argv: Sequence[str]) -> tuple[Path, str | None, list[str]]:
    rest, spec = [], None
    words = iter(argv)
    for word in words:
        if word == "--config":
            spec = next(words, None)
        elif word.startswith("--config="):
            spec = word.removeprefix("--config=")
        else:
            rest.append(word)
    if not spec:
        raise UserError("which configuration? name one with --config=configs/tiny.py")
    name, _, stage = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        near = [str(file) for file in _configs(path.parent)]
        guess = difflib.get_close_matches(str(path), near, n=1)
        hint = f"did you mean {guess[0]}?" if guess else f"there are {', '.join(near) or 'none'} in {path.parent}/"
        raise UserError(f"no configuration file {path}: {hint}")
    return path, stage or None, rest


def _import(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from None
    except ImportError as error:
        raise UserError(f"{path} imports what is not there: {first_line(error)}") from None
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} has no function get_config(stage)")
    return module


def _read_dial(default: Any, argv: list[str]) -> tuple[Any, list[str]]:
    """The dial with its overrides, and the arguments that are not the dial's."""
    return (default, argv) if _asks_help(argv) else parse_known(type(default), argv, default=default)


def _dial_flags(dial: Any) -> dict[str, Any]:
    """The dial's flags and values; an annotation may give a field another name on the command line."""
    named = {}
    for field, hint in typing.get_type_hints(type(dial), include_extras=True).items():
        given = [note.name for note in typing.get_args(hint)[1:] if getattr(note, "name", None)]
        named[given[0] if given else field] = getattr(dial, field)
    return named


def _names(cls: type, default: Any) -> list[str]:
    """The dotted names of every field."""
    return [field.name for field in dataclasses.fields(cls)] if default is None else list(flags(default))


def _mistake(report: str, names: list[str]) -> str:
    """One sentence out of tyro's framed report."""
    # Where standard output is not UTF-8, lines of hyphens are the whole frame.
    lines = [re.sub(r"[│╭╮╰╯─]+|^\s*-{3,}\s*$", " ", line).strip() for line in report.splitlines()]
    text = re.sub(r"\s+", " ", " ".join(line for line in lines if line))
    text = re.sub(
        r"^(Parsing error|Unrecognized options|Required options|Value error|Missing argument|Invalid choice)\s*",
        "",
        text,
    )
    text = re.sub(r"\s*For full helptext.*$", "", text).strip()
    unknown = re.search(r"^Unrecognized (?:options|arguments): (\S+?),?(?:\s|$)", text)
    if unknown and unknown.group(1).startswith("--"):
        name = unknown.group(1).removeprefix("--").split("=")[0].replace("-", "_")
        guess = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        return f"there is no field --{name}" + (f": did you mean --{guess[0]}?" if guess else "; see --help")
    if unknown:
        return f"{unknown.group(1)!r} belongs to no field: write --field=value; see --help"
    missing = re.search(r"^Missing from \S+ (--\S+) (\S+)", text)
    if missing:
        return f"{missing.group(1)} is missing: give it as {missing.group(1)}={missing.group(2)}; see --help"
    typed = re.search(r"^Error parsing (--[\w.]+): (.*?)(?: Got errors:.*)? Argument helptext:", text)
    if typed:
        name, reason = typed.groups()
        value = re.search(r"'.*'", reason)
        kind = next(line for line in lines if line.startswith(name + " ")).removeprefix(name + " ")
        return f"{name} takes {kind}, not {value.group(0)}" if value else f"{name}: {reason}"
    # A check of a dataclass: the name of the whole says nothing, that of a part says where.
    return (
        re.sub(r"^Error parsing (?:[A-Z]\w*: |(\w+): (?=\1\b))?", "", text)
        or "the arguments could not be read; see --help"
    )
