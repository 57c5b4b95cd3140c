"""Errors that a user can correct."""


class UserError(Exception):
    """An error that the user can correct; the message is one sentence and names the remedy."""


NOT_FINITE = (
    "the model's probabilities are not finite (NaN or infinity): its parameters are damaged or too large, so use an "
    "earlier checkpoint or another one"
)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters; the name of its type if it has no message."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
