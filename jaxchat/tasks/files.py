"""Reads the rows of a task's file from a local directory or from the hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxchat.data import sources
from jaxchat.errors import UserError


def read_rows(
    task: str, file: str, directory: str, downloads: Path | None, side: sources.Split
) -> Iterator[tuple[str, Any]]:
    """Yields (location, row) pairs from `file`[.gz] in `directory`; if that is empty, from split `side` of hub:`task`.

    Raises:
        UserError: the file is missing, or both `directory` and `downloads` are.
    """
    if directory:
        path = next((p for p in sorted(Path(directory).glob(f"{file}*")) if p.is_file()), None)
        if path is None:
            raise UserError(f"no {file} or {file}.gz in {directory}: {task}:DIRECTORY must name their directory")
        spec = str(path)
    elif downloads is None:
        raise UserError(f"the task {task} needs files: name their directory with {task}:DIRECTORY")
    else:
        spec = f"hub:{task}"
    yield from sources.rows(spec, side, downloads=downloads)
