"""Loads a saved tokenizer of any kind; `KINDS` lists them by the format of their metadata."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from jaxchat.errors import UserError
from jaxchat.paths import user_path
from jaxchat.tokenizer.outside import Outside
from jaxchat.tokenizer.protocol import Tokenizer
from jaxchat.tokenizer.saved import METADATA_FILE, MODEL_FILE
from jaxchat.tokenizer.sentencepiece import SentencePiece

KINDS: Mapping[str, Callable[[bytes, Mapping[str, Any]], Tokenizer]] = {
    kind.FORMAT: kind.from_saved for kind in (SentencePiece, Outside)
}


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Reads a saved tokenizer; raises `UserError` if it is missing or damaged."""
    directory = user_path(directory)
    for name in (MODEL_FILE, METADATA_FILE):
        if not (directory / name).is_file():
            raise UserError(f"no tokenizer in {directory} ({name} is missing); train one with launch.tokenizer")
    model = (directory / MODEL_FILE).read_bytes()
    try:
        metadata = json.loads((directory / METADATA_FILE).read_bytes())
        return KINDS[metadata["format"]](model, metadata)
    except (ValueError, LookupError, TypeError):
        message = f"the tokenizer in {directory} is damaged or of another format; delete it and train again"
        raise UserError(message) from None
    except UserError as error:
        problem = str(error).removesuffix(": train it again")
        if not problem.startswith("the tokenizer is "):
            raise  # Such as a package that is not installed.
        problem = problem.removeprefix("the tokenizer ")
        raise UserError(f"the tokenizer in {directory} {problem}: delete that directory and train again") from None
