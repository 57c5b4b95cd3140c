"""Errors that a user can correct."""


class UserError(Exception):
    """A mistake of the user's; the message is one sentence that names the remedy."""


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
