"""Tools that a model may call: a calculator on a parsed expression, which evaluates no code."""

import ast
import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxchat.errors import UserError

MOST_CHARACTERS = 256
MOST_DEPTH = 32
MOST_BITS = 256  # of an integer on the way
MOST_EXACT = 2**53  # a float beyond has digits that nobody calculated

_BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: Mapping[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


@dataclass(frozen=True)
class Calculator:
    """Arithmetic, and `"text".count("part")`, between the python tokens, as nanochat's calculator answers them.

    But a whole number has no point: 48 / 2 is 24, as in the solutions of GSM8K.

    Numbers, + - * / // % ** with small exponents and parentheses; commas within numbers are read over. Anything else,
    and anything too long, too deep or too large, gets no answer.
    """

    begin: str = "<|python_start|>"
    end: str = "<|python_end|>"
    answer_begin: str = "<|output_start|>"
    answer_end: str = "<|output_end|>"

    def __call__(self, call: str) -> str | None:
        if len(call) > MOST_CHARACTERS:
            return None
        expression = call.strip() if '"' in call or "'" in call else call.strip().replace(",", "")
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(expression, mode="eval")
            value = evaluate(tree.body, MOST_DEPTH)
            # As people write it, and GSM8K's own marks do: 48 / 2 is 24, not 24.0.
            whole = isinstance(value, float) and value.is_integer() and abs(value) < MOST_EXACT
            return str(int(value) if whole else value)
        except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
            return None


def evaluate(node: ast.expr, depth: int) -> int | float:
    """The value of an expression; raises ValueError for what is not arithmetic, or is too deep or too large."""
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
    if abs(exponent) > MOST_BITS or (isinstance(base, int) and base.bit_length() * abs(exponent) > MOST_BITS):
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


def named_tools(names: Sequence[str]) -> list[Calculator]:
    """The tools of these names; raises UserError for a name of none."""
    if unknown := [name for name in names if name not in TOOLS]:
        raise UserError(f"there is no tool {unknown[0]!r}: name {' or '.join(TOOLS)}, or none")
    return [TOOLS[name]() for name in names]
