"""The rows of a task's own file: of a directory that the user names, or of the hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxchat.data import conversations, sources
from jaxchat.data.files import Reading, objects, place
from jaxchat.errors import UserError


def read_rows(
    task: str, file: str, directory: str, downloads: Path | None, side: sources.Split
) -> Iterator[tuple[str, Any]]:
    """Where each row stands, and the row: of `file` or `file`.gz in a directory, else of hub:`task`, its `side`.

    Raises:
        UserError: no directory is named and nothing may be downloaded, or the file is not there.
    """
    if directory:
        path = next((p for p in sorted(Path(directory).glob(f"{file}*")) if p.is_file()), None)
        if path is None:
            raise UserError(f"no {file} or {file}.gz in {directory}: {task}:DIRECTORY names its files")
        spec = str(path)
    elif downloads is None:
        raise UserError(f"which files? name their directory: {task}:DIRECTORY")
    else:
        spec = f"hub:{task}"
    reading = Reading()
    for source in sources.find(spec, side, suffixes=conversations.SUFFIXES, hub_directory=downloads):
        for number, row in objects(source, reading):
            yield place(source, reading, number), row
