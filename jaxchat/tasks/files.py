"""Tasks whose problems are rows of files, from a local directory or from the hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxchat.data import sources
from jaxchat.errors import UserError
from jaxchat.paths import user_path


class FromFiles:
    """Base class of tasks that read files in `directory`; if that is empty, hub:`name`, downloaded to `downloads`."""

    name: str

    def __init__(self, directory: str = "", downloads: Path | None = None) -> None:
        self._directory, self._downloads = directory, downloads

    def _read(self, file: str, side: sources.Split) -> Iterator[tuple[str, Any]]:
        return read_rows(self.name, file, self._directory, self._downloads, side)


def read_rows(
    task: str, file: str, directory: str, downloads: Path | None, side: sources.Split, *, hub: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yields (location, row) pairs from `file`[.gz] in `directory`; if that is empty, from split `side` of the hub's
    data set `hub`, by default the one with the name of the task.

    Raises:
        UserError: the file is missing, or there is neither a directory nor one to download to.
    """
    spec = f"hub:{hub or task}"
    if directory:
        path = sources.plain_or_gzipped(user_path(directory) / file)
        if path is None:
            raise UserError(f"no {file} or {file}.gz in {directory}: {task}:DIRECTORY must name their directory")
        spec = str(path)
    elif downloads is None:
        raise UserError(f"the task {task} needs files: name their directory with {task}:DIRECTORY")
    yield from sources.rows(spec, side, downloads=downloads)
