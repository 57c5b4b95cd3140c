"""The cache: what it takes for the same content, and one process at a time."""

import errno
import json
import os
import subprocess
import sys
import time

import pytest
from documents import environment, silent, texts, write

from jaxchat.data import cache, sources
from jaxchat.data.sources import find
from jaxchat.errors import UserError


@pytest.fixture
def corpus(tmp_path):
    return write(tmp_path / "train.jsonl", texts(300))


def test_a_file_changed_behind_its_date_is_read_again(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(sources, "SETTLED_SECONDS", -1.0)  # remember at once
    source = find(str(corpus), "train")
    before, stat = sources.content_hashes(source, tmp_path), corpus.stat()
    assert json.loads((tmp_path / "hashes.json").read_text())[str(corpus)][-1] == before[0]
    time.sleep(0.02)  # a tick of the file system's clock
    corpus.write_bytes(corpus.read_bytes()[::-1])
    os.utime(corpus, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert sources.content_hashes(source, tmp_path) != before


def test_a_fresh_file_is_not_remembered(tmp_path, corpus):
    sources.content_hashes(find(str(corpus), "train"), tmp_path)
    assert not (tmp_path / "hashes.json").exists()


def test_a_second_process_waits_for_the_first(tmp_path):
    code = (
        "import sys, pathlib\nfrom jaxchat.data.cache import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), print): print('in')"
    )
    with cache.locked(tmp_path, silent):
        other = subprocess.Popen(
            [sys.executable, "-c", code, tmp_path], env=environment(), stdout=subprocess.PIPE, text=True
        )
        assert "waiting for it" in other.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.5)
    assert other.communicate()[0] == "in\n"
    assert other.returncode == 0


def test_a_second_process_is_refused_where_waiting_makes_no_sense(tmp_path):
    with cache.locked(tmp_path, silent):
        refused = cache.locked(tmp_path, silent, refusal="taken")
        with pytest.raises(UserError, match="taken"):
            refused.__enter__()
    with cache.locked(tmp_path, silent, refusal="taken"):
        pass


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch):
    def flock(file, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache.fcntl, "flock", flock)
    said = []
    with cache.locked(tmp_path, said.append, refusal="taken"):
        assert len(said) == 1 and "cannot be locked (No locks available)" in said[0]


def test_a_cache_that_cannot_be_written_names_the_option(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file/below"):
        said = rf"{place} cannot be written \(.*\): choose another with --data\.cache"
        with pytest.raises(UserError, match=said), cache.locked(place, silent):
            pytest.fail("it was locked")
        with pytest.raises(UserError, match=said):
            cache.write_json(place / "hashes.json", {})
        assert cache.read_json(place / "hashes.json") is None
