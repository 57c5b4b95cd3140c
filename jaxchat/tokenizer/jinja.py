"""The sandbox in which chat templates of other projects are rendered; imports jinja2, so it is imported when needed."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

SECONDS, MOST_CHARACTERS = 2.0, 1 << 24  # Of one rendering.
MOST_REPEATED = 1 << 20  # Items of a product such as "a" * n.
BEGIN, END = "\ufdd1", "\ufdd2"  # Noncharacters of Unicode around the text of `{% generation %}`.
FILE = "<template>"  # jinja2's file name of a template from a string.
# What a template can raise besides jinja2.TemplateError: its expressions are Python's.
RAISED = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError, MemoryError)


class Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` around what the assistant writes: training targets."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller: Callable[[], str]) -> str:
        return BEGIN + caller() + END


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, which also refuses products and widths that would fill the memory."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(value) if isinstance(value, str | list | tuple) else value for value in (left, right)]
        if operator == "*" and sizes != [left, right] and sizes[0] * sizes[1] > MOST_REPEATED:
            raise SecurityError(f"a product of more than {MOST_REPEATED:,} items")
        if operator == "**" or (isinstance(left, str) and re.search(r"%[^a-zA-Z]*(\d{5}|\*)", left)):
            raise SecurityError(f"the operator {operator}")
        return super().call_binop(context, operator, left, right)


@lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
    """The template of a text, as transformers would read it; raises `jinja2.TemplateError` if it is none."""
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _json
    for name in ("center", "format"):  # They make texts of any width.
        del environment.filters[name]
    environment.globals = {
        "range": environment.globals["range"],
        "dict": dict,
        "namespace": environment.globals["namespace"],
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment.from_string(source)


def render(source: str, values: Mapping[str, Any]) -> str:
    """The text of a template, with `BEGIN` and `END` around what it marks.

    Raises:
        jinja2.TemplateError, or one of `RAISED`: the template refuses the values, or is refused.
    """
    parts, size = [], 0
    template = compiled(source)
    with _time_limit(SECONDS):
        for part in template.generate(values):
            parts.append(part)
            size += len(part)
            if size > MOST_CHARACTERS:
                raise SecurityError(f"it writes more than {MOST_CHARACTERS:,} characters")
    return "".join(parts)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises `SecurityError` at the next line of a template's code after this time, in any thread."""
    deadline, before = time.monotonic() + seconds, sys.gettrace()

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != FILE:
            return None
        if time.monotonic() > deadline:
            raise SecurityError(f"it takes longer than {seconds:g} seconds")
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def _json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
