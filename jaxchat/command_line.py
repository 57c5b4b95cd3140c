"""Parses command lines into frozen dataclasses.

A config file is Python: `get_config(stage)` returns a frozen dataclass. Any field of it can be overridden by
`--field=value` or `--part.field=value`; types are checked and a misspelt name gets a suggestion. A config file may
also define `DIAL`, a frozen dataclass of the few numbers from which the others are derived. Overrides of these numbers
are passed to `get_config(stage, dial)`; the other overrides are applied afterwards and take precedence. `DIALS` maps
stages to dials that replace `DIAL`.

This module knows no field names.
"""

import ast
import contextlib
import dataclasses
import difflib
import importlib.util
import io
import os
import re
import types
import typing
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

from jaxchat import switching
from jaxchat.errors import UserError, first_line
from jaxchat.paths import user_path
from jaxchat.serialization import flags


def parse(
    cls: type,
    argv: Sequence[str],
    *,
    default: Any = None,
    description: str | None = None,
    more: Sequence[str] = (),
    **settings: Any,
) -> Any:
    """Parses `--field=value` arguments into dataclass `cls`. Raises `UserError` for a mistake; `--help` exits with 0.

    `more` are further names, besides the fields, to suggest for a misspelt one; `settings` are for `tyro.cli`.
    """
    if default is not None:
        settings["default"] = default
    settings |= {"config": (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff), "use_underscores": True}
    text, helped = io.StringIO(), {"-h", "--help"} & set(argv)
    try:
        with contextlib.nullcontext() if helped else _unwrapped(), contextlib.redirect_stderr(text):
            return tyro.cli(cls, args=_flags(cls, argv), description=description, **settings)
    except SystemExit as stop:
        if not stop.code:
            raise
        names = [field.name for field in dataclasses.fields(cls)] if default is None else flags(default)
        raise UserError(_mistake(text.getvalue(), [*names, *more], argv)) from None
    except ValueError as error:
        raise UserError(str(error)) from None


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """Context manager: tyro reports a mistake in lines that are not wrapped, whatever the width of the terminal."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def parse_known(
    cls: type, argv: Sequence[str], *, default: Any = None, description: str | None = None
) -> tuple[Any, list[str]]:
    """Parses the fields of dataclass `cls` in `argv`; returns its value and the remaining arguments.

    Without a `description`, `--help` is one of the remaining arguments.
    """
    settings: dict[str, Any] = {"return_unknown_args": True, "add_help": description is not None}
    result: tuple[Any, list[str]] = parse(cls, argv, default=default, description=description, **settings)
    return result


def load(argv: Sequence[str], *, description: str | None = None) -> Any:
    """Reads the file of `--config=FILE[:STAGE]`; returns the value of its `get_config` with all overrides applied.

    `description` is the launcher's text for `--help`, which without `--config` lists the configurations.
    """
    path, stage, rest = _config_argument(argv, description)
    module = _import(path)
    known: dict[str, Any] = {} if stage is None else {"stage": stage}
    dial: dict[str, Any] = {}
    about = "\n\n".join(text.strip() for text in (description, module.__doc__) if text)
    if hasattr(module, "DIAL"):
        start = getattr(module, "DIALS", {}).get(stage, module.DIAL)
        known["dial"], rest = parse_known(type(start), rest, default=start)
        dial = _dial_flags(start)
        dial_flags = " ".join(f"--{name}={value}" for name, value in dial.items() if value != ())
        about += f"\n\nApplied first; other fields are derived from these: {dial_flags}"
    try:
        default = module.get_config(**known)
    except ValueError as error:
        raise UserError(str(error)) from None
    default, rest = switching.apply(default, rest)
    if asked := [word for word in rest if word.partition("=")[0] in ("-h", "--help")]:
        _print_fields(default, asked[0].partition("=")[2], about)
    return parse(type(default), rest, default=default, description=about, more=list(dial))


def _flags(cls: type, argv: Sequence[str]) -> list[str]:
    """The arguments, with a boolean `--name` that has no value expanded to `--name=True`."""
    switches = {f"--{f.name}" for f in dataclasses.fields(cls) if f.type in (bool, "bool")}
    following = [*argv[1:], ""]
    return [
        f"{word}=True" if word[:2] + word[2:].replace("-", "_") in switches and after not in ("True", "False") else word
        for word, after in zip(argv, following)
    ]


def joined(argv: Sequence[str]) -> list[str]:
    """The arguments with `--config FILE` joined to one word, `--config=FILE`."""
    words, result = iter(argv), []
    for word in words:
        value = next(words, None) if word == "--config" else None
        result.append(word if value is None else f"{word}={value}")
    return result


def stage_arguments(argv: Sequence[str], stage: str, stages: Container[str]) -> list[str]:
    """The arguments for one of several stages: `--field=value` is for all of them, `--STAGE:field=value` for one."""
    selected, applies = [], True
    for word in joined(argv):
        if word.startswith("--"):
            owner, colon, rest = word[2:].partition(":")
            applies = not (colon and owner in stages) or owner == stage
            word = f"--{rest}" if colon and owner in stages else word
        if applies:
            selected.append(word)
    if any(":" in word for word in selected if word.startswith("--config=")):
        raise UserError("this command runs every stage: give the file without one, such as --config=configs/tiny.py")
    return [f"{word}:{stage}" if word.startswith("--config=") else word for word in selected]


def _print_help(description: str | None) -> None:
    """Prints the usage and the configurations, and exits."""
    print((description or "").strip())
    print("\nusage: --config=FILE[:STAGE] [--field=value ...]; to list the fields: --config=FILE --help\n")
    for path in _configs(Path("configs")):
        about = "(not valid Python)"
        with contextlib.suppress(SyntaxError, ValueError):  # ValueError: a null byte, up to Python 3.11.
            about = ast.get_docstring(ast.parse(path.read_bytes())) or " "
        print(f"  --config={path}  {about.splitlines()[0]}")
    raise SystemExit(0)


def _print_fields(default: Any, part: str, about: str) -> None:
    """Prints the fields of a `part` of a configuration, without a name those in no part, and exits."""
    cls, hints = type(default), typing.get_type_hints(type(default), include_extras=True)
    values = {field.name: getattr(default, field.name) for field in dataclasses.fields(cls)}
    parts = {name: flags(value) for name, value in values.items() if dataclasses.is_dataclass(value)}
    if part and part not in parts:
        raise UserError(f"--help={part} is not a part of the configuration: choose one of {', '.join(parts)}")
    names = [part] if part else [name for name in values if name not in parts]
    fields = [(name, hints[name], dataclasses.field(default=values[name])) for name in names]
    made: Any = dataclasses.make_dataclass(cls.__name__, fields, namespace={"__doc__": cls.__doc__})
    if not part:
        listed = ", ".join(f"--help={name} ({len(own)})" for name, own in parts.items())
        about += f"\n\nFurther fields, and how many: {listed}"
    if switched := switching.listed(default, part):
        about += "\n\nParts, switched by name: " + ", ".join(switched)
    parse(made, ["--help"], default=made(), description=about)


def _configs(directory: Path) -> list[Path]:
    """The Python files of a directory that define `get_config`."""
    return [path for path in sorted(directory.glob("*.py")) if b"def get_config(" in path.read_bytes()]


def _config_argument(argv: Sequence[str], description: str | None) -> tuple[Path, str | None, list[str]]:
    """The file and the stage of `--config=FILE[:STAGE]`, the last one, and the other arguments."""
    words = joined(argv)
    specs = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    if not specs and ("--help" in argv or "-h" in argv):
        _print_help(description)
    if not specs or not specs[-1]:
        raise UserError("no configuration given: choose one, such as --config=configs/tiny.py")
    name, _, stage = specs[-1].partition(":")
    path = user_path(name)
    if not path.is_file():
        raise UserError(f"no configuration file {path}: {_similar(path, stage)}")
    return path, stage or None, [word for word in words if not word.startswith("--config=")]


def _similar(path: Path, stage: str) -> str:
    """A hint for a configuration file that does not exist: one of a similar name, beside it or in a directory configs,
    here or where the program is; else what there is."""
    places = dict.fromkeys((path.parent, Path("configs"), Path(__file__).parents[1] / "configs"))
    near = {file.stem: file for place in reversed(places) for file in _configs(place)}
    if guess := difflib.get_close_matches(path.stem, near, n=1):
        return f"did you mean --config={near[guess[0]]}{f':{stage}' if stage else ''}?"
    return f"choose one of {', '.join(map(str, near.values()))}"


def _import(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{error.filename or path}, line {error.lineno}: {error.msg}") from None
    except ImportError as error:
        raise UserError(f"{path} cannot be imported: {first_line(error)}") from None
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} has no function get_config(stage)")
    return module


def _dial_flags(dial: Any) -> dict[str, Any]:
    """The dial's flag names and values; an annotation may give a field another name on the command line."""
    values = {}
    for field, hint in typing.get_type_hints(type(dial), include_extras=True).items():
        names = [note.name for note in typing.get_args(hint)[1:] if getattr(note, "name", None)]
        values[names[0] if names else field] = getattr(dial, field)
    return values


def _is_within(name: str, other: str) -> bool:
    """Whether `other` has the parts of a dotted name in their order, and perhaps more."""
    parts = iter(other.split("."))
    return all(part in parts for part in name.split("."))


def _mistake(report: str, names: list[str], argv: Sequence[str]) -> str:
    """Extracts one sentence from tyro's framed report."""
    # If standard output is not UTF-8, the frame consists of lines of hyphens only.
    lines = [re.sub(r"[│╭╮╰╯─]+|^\s*-{3,}\s*$", " ", line).strip() for line in report.splitlines()]
    text = re.sub(r"\s+", " ", " ".join(line for line in lines if line))
    titles = "Parsing error|Unrecognized options|Required options|Value error|Missing argument|Invalid choice"
    text = re.sub(rf"^({titles})\s*", "", text)
    text = re.sub(r"\s*For full helptext.*$", "", text).strip()
    unknown = re.search(r"^Unrecognized (?:options|arguments): (\S+?),?(?:\s|$)", text)
    if unknown and unknown.group(1).startswith("--"):
        name = unknown.group(1).removeprefix("--").split("=")[0].replace("-", "_")
        moved = [other for other in names if other.rpartition(".")[2] == name.rpartition(".")[2]]
        alike = lambda other: difflib.SequenceMatcher(None, other, name).ratio()  # noqa: E731
        deeper = [other for other in moved if _is_within(name, other)]
        guesses = sorted(deeper or moved or names, key=alike, reverse=True)
        if alike(guesses[0]) < 0.5:
            return f"unknown field --{name}; see --help"
        # One of those that differ only in the number of the layer. Two that the name may be a part of are both named.
        first = list({re.sub(r"\.\d+", "", guess): guess for guess in reversed(guesses)}.values())[::-1]
        named = first if deeper and len(first) == 2 else first[:1]
        return f"unknown field --{name}: did you mean {' or '.join(f'--{guess}' for guess in named)}?"
    if unknown:
        return f"unexpected argument {unknown.group(1)!r}: write --field=value; see --help"
    missing = re.search(r"^Missing from \S+ (--\S+) \[?(\S+)", text)
    if missing:
        flag, kind = missing.groups()
        near = difflib.get_close_matches(flag, [word.partition("=")[0] for word in argv], n=1)
        if near and near[0] != flag:
            return f"unknown field {near[0]}: did you mean {flag}?"
        return f"{flag} is missing: give it as {flag}={kind}; see --help"
    invalid = re.search(r"^Error parsing (--[\w.]+): (.*?)(?: Got errors:.*)? Argument helptext:", text)
    if invalid:
        name, reason = invalid.groups()
        value = re.search(r"'.*'", reason)
        kind = next((line.removeprefix(name + " ") for line in lines if line.startswith(name + " ")), "")
        return f"{name} takes {kind}, not {value.group(0)}" if value and kind else f"{name}: {reason}"
    # The error comes from a dataclass's own check: the name of the root class is dropped, that of a part is kept.
    return (
        re.sub(r"^Error parsing (?:[A-Z]\w*: |(\w+): (?=\1\b))?", "", text)
        or "the arguments could not be read; see --help"
    )
