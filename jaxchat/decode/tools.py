"""Tools that a model may call: a calculator that evaluates a parsed expression and never runs code."""

import ast
import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxchat.errors import UserError
from jaxchat.tokenizer.chat_format import ChatFormat

MOST_CHARACTERS = 256
MOST_DEPTH = 32
MOST_BITS = 256  # Of any intermediate integer.
MOST_EXACT = 2**53  # Larger floats are not exact integers.

_BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: Mapping[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class Calculator:
    """nanochat's calculator: arithmetic, and `"text".count("part")`, in a python part.

    Supports numbers, + - * / // % **, and parentheses; commas in numbers are ignored. Returns None for anything else,
    and for what is too long, too deep or too large. Unlike nanochat, a float that is an integer has no decimal point:
    48 / 2 is 24, as in the solutions of GSM8K.
    """

    call_part, output_part = "python", "python_output"

    def __call__(self, call: str) -> str | None:
        if len(call) > MOST_CHARACTERS:
            return None
        expression = call.strip() if '"' in call or "'" in call else call.strip().replace(",", "")
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(expression, mode="eval")
            value = evaluate(tree.body, MOST_DEPTH)
            whole = isinstance(value, float) and value.is_integer() and abs(value) < MOST_EXACT
            return str(int(value) if whole else value)
        except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
            return None


def evaluate(node: ast.expr, depth: int) -> int | float:
    """Evaluates an expression; raises `ValueError` if it is not arithmetic, too deep or too large."""
    if depth == 0:
        raise ValueError("too deep")
    match node:
        case ast.Constant(value=bool()):
            raise ValueError("not a number")
        case ast.Constant(value=int() | float() as value):
            return _bounded(value)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](evaluate(operand, depth - 1))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(evaluate(left, depth - 1), evaluate(right, depth - 1))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(_BINARY[type(op)](evaluate(left, depth - 1), evaluate(right, depth - 1)))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            return text.count(part)
    raise ValueError("not arithmetic")


def _power(base: int | float, exponent: int | float) -> int | float:
    """A power. Only powers of two integers can take long; `_bounded` refuses the results of others."""
    if isinstance(base, int) and isinstance(exponent, int) and (abs(base).bit_length() - 1) * exponent > MOST_BITS:
        raise ValueError("too large")
    value = base**exponent
    if isinstance(value, complex):
        raise ValueError("not a number")
    return _bounded(value)


def _bounded(value: int | float) -> int | float:
    if (isinstance(value, int) and value.bit_length() > MOST_BITS) or not math.isfinite(value):
        raise ValueError("too large")
    return value


TOOLS = {"calculator": Calculator}


def usable_tools(chat_format: ChatFormat) -> list[Calculator]:
    """Creates every tool whose parts the chat format has."""
    tools = [make() for make in TOOLS.values()]
    return [tool for tool in tools if {tool.call_part, tool.output_part} <= set(chat_format.parts)]


def named_tools(names: Sequence[str]) -> list[Calculator]:
    """Creates the named tools; raises `UserError` for an unknown name."""
    if unknown := [name for name in names if name not in TOOLS]:
        raise UserError(f"unknown tool {unknown[0]!r}; available tools: {', '.join(TOOLS)}")
    return [TOOLS[name]() for name in names]
