"""Directories of saved tokenizers: the model of the tokenizer, and what else its ids depend on."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxchat.errors import UserError

MODEL_FILE, METADATA_FILE = "tokenizer.model", "tokenizer.json"


def write(directory: str | os.PathLike[str], model: bytes, metadata: Mapping[str, Any]) -> None:
    """Writes a tokenizer, replacing another one at once or not at all.

    Raises:
        UserError: the directory has other files.
    """
    directory, text = Path(directory), json.dumps(metadata, indent=1) + "\n"
    files = {MODEL_FILE: model, METADATA_FILE: text.encode()}
    if all((path := directory / name).is_file() and path.read_bytes() == content for name, content in files.items()):
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        new.mkdir()
        for name, content in files.items():
            (new / name).write_bytes(content)
        if directory.exists():
            others = sorted({path.name for path in directory.iterdir()} - set(files))
            if others:
                raise UserError(f"{directory} holds other files ({others[0]}); save the tokenizer elsewhere")
            directory.rename(old)
        try:  # Killed here, it leaves no tokenizer, never half of one.
            new.rename(directory)
        except BaseException:
            if old.exists():
                old.rename(directory)
            raise
