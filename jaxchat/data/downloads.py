"""Downloads and unpacks a zip archive."""

import http.client
import shutil
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from jaxchat import signals
from jaxchat.data.cache import locked
from jaxchat.errors import UserError

TIMEOUT_SECONDS = 30.0


def unpacked(url: str, place: Path, *, log: Callable[[str], None]) -> Path:
    """Downloads a zip archive and unpacks it to the directory `place`, unless that exists; returns `place`.

    Raises:
        UserError: the file cannot be downloaded, or is not a complete zip archive.
    """
    with locked(place.parent, log), signals.waiting():
        if place.is_dir():
            return place
        log(f"downloading {url} to {place}")
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            archive, contents = Path(scratch, "archive.zip"), Path(scratch, "contents")
            try:
                with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer, archive.open("wb") as file:
                    shutil.copyfileobj(answer, file)
                with zipfile.ZipFile(archive) as packed:
                    packed.extractall(contents)  # Verifies checksums and writes nothing outside the directory.
            except (OSError, http.client.HTTPException) as error:
                remedy = "start again, or download and unpack it yourself and pass the directory"
                raise UserError(f"{url} cannot be downloaded to {place} ({error}): {remedy}") from None
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
                raise UserError(f"{url} sent an incomplete or invalid zip archive ({error}): start again") from None
            contents.replace(place)
        return place
