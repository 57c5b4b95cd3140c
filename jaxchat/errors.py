"""Errors that a user can correct."""

import importlib.util


class UserError(Exception):
    """An error that the user can correct; the message is one sentence and names the remedy."""


def require(module: str, problem: str, extra: str) -> None:
    """Raises `missing` if a module is not installed. Call it before anything slow."""
    if importlib.util.find_spec(module) is None:
        raise missing(problem, extra)


def missing(problem: str, extra: str) -> UserError:
    """The refusal for want of a package: the problem, and the command that installs the `extra` of this clone."""
    return UserError(f"{problem}: pip install -e '.[{extra}]'")


NOT_FINITE = (
    "the model's probabilities are not finite (NaN or infinity): its parameters are damaged or too large, so use an "
    "earlier checkpoint or another one"
)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters; the name of its type if it has no message."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
