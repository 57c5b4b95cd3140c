"""Shards: the plan, worker processes, and a start after a kill."""

import os
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
from documents import environment, settings, silent, talks, texts, write, write_rows

from jaxchat.data import files, shards, workers
from jaxchat.data.prepare import ensure_rows, ensure_tokenizer
from jaxchat.data.source import Source
from jaxchat.errors import UserError


@pytest.fixture
def many_shards(monkeypatch):
    """Small corpora are dealt to many shards and to processes."""
    monkeypatch.setattr(workers, "SMALL", 0)
    monkeypatch.setattr(shards, "LEAST_PART", 1)


@pytest.fixture
def corpus(tmp_path):
    return write(tmp_path / "train.jsonl", texts(300))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizer")
    return ensure_tokenizer(settings(write(place / "t.jsonl", texts(300))), place / "cache", 0, silent)


def write_some(path, count, form, seed=0):
    return write(path, texts(count, seed)) if form == "text" else write_rows(path, talks(count, seed))


@pytest.mark.parametrize("form", ["text", "chat"])
def test_processes_make_the_same_rows_as_one(tmp_path, tokenizer, many_shards, form):
    files = [write_some(tmp_path / f"{i}.jsonl.gz", 60, form, seed=i) for i in range(3)]
    one, two = (tmp_path / name for name in ("one", "two"))
    for directory, processes in ((one, 1), (two, 2)):
        data = settings(*files, workers=processes, format=form, row_length=128)
        assert len(ensure_rows(data, tokenizer, "train", directory, silent)) == 3
    names = sorted(path.relative_to(one) for path in one.rglob("shard-*"))
    assert len(names) > 20
    assert [(one / name).read_bytes() for name in names] == [(two / name).read_bytes() for name in names]


def test_a_mistake_in_a_worker_is_the_users_sentence(tmp_path, tokenizer, many_shards):
    path = write(tmp_path / "a.jsonl", texts(50))
    with path.open("a") as file:
        file.write("oops\n")
    with pytest.raises(UserError, match=r"a.jsonl line 51 is not valid JSON"):
        ensure_rows(settings(path, workers=2), tokenizer, "train", tmp_path / "cache", silent)


def test_processes_count_what_they_skip_as_one_does(tmp_path, tokenizer, many_shards):
    rows = talks(120)
    for i in (5, 70, 71):
        rows[i]["messages"][0]["role"] = "robot"
    rows[90]["messages"].pop()
    path = write_rows(tmp_path / "a.jsonl", rows)
    manifests = []
    for processes in (1, 2):
        data = settings(path, format="chat", row_length=256, workers=processes)
        made = ensure_rows(data, tokenizer, "train", tmp_path / str(processes), silent)
        manifests.append(made[0].manifest)
    one, two = manifests
    assert one["skipped"] == two["skipped"]
    assert one["examples"] == two["examples"]
    assert one["skipped"]["unknown role"] == 3
    assert one["examples"]["unknown role"].startswith(f"{path} line 6: message 0 has the role 'robot'")


class Then:
    """A tokenizer that calls a function when a worker reads it."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (Then(sys.exit, 3), "a worker ended with status 3 while preparing a.txt; start again, "),
        (
            Then(signal.raise_signal, signal.SIGKILL),
            "ended with signal 9 (perhaps out of memory) while preparing a.txt; start again, with fewer --data.workers",
        ),
        (Then(os._exit, 0), "a worker ended with status 0 while preparing a.txt; start again, "),
        (
            Then(time.sleep, 999),
            "a worker did nothing for 3 s while preparing a.txt; see whether its disk answers, and",
        ),
    ],
    ids=["exits", "is killed", "ends", "hangs"],
)
def test_a_worker_that_ends_or_hangs_is_one_sentence(tmp_path, tokenizer, said, many_shards, monkeypatch):
    if "did nothing" in said:
        monkeypatch.setattr(workers, "SILENT_SECONDS", 3.0)
    jobs = [shards.ShardJob(i, ((Source("text", "a.txt", 1000), 0, 1),)) for i in range(2)]
    with pytest.raises(UserError, match=re.escape(said)):
        workers.run(jobs, tmp_path, None, tokenizer, processes=2)
    monkeypatch.setattr(workers, "make_shard", lambda job, *_: job.shard)
    assert workers.run(jobs, tmp_path, None, tokenizer, processes=1) == {0: 0, 1: 1}, "in this process"


def test_worker_processes_start_without_jax():
    code = "import sys, jaxchat.data.workers; assert not {'jax', 'grain', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


KILLED_AFTER_TWO_SHARDS = """
import os, signal, sys
from jaxchat.data import prepare, shards, workers
from jaxchat.tokenizer import load_tokenizer

workers.SMALL, shards.LEAST_PART = 0, 1
send, sent = workers._send, []

def send_or_die(worker, message):
    sent.append(message)
    if len(sent) > 2 + 2 + 2:  # two tasks, a shard for each of two workers, and after each of two shards another
        os.kill(os.getpid(), signal.SIGKILL)
    send(worker, message)

workers._send = send_or_die
data = prepare.Data(train=(sys.argv[1],), vocab=300, row_length=128, workers=2, format=sys.argv[4])
prepare.ensure_rows(data, load_tokenizer(sys.argv[2]), "train", sys.argv[3], print)
"""


@pytest.mark.parametrize("form", ["text", "chat"])
def test_a_killed_preparation_continues_with_the_shards_it_has(tmp_path, tokenizer, many_shards, monkeypatch, form):
    path = write_some(tmp_path / "a.jsonl", 300, form)
    tokenizer.save(tmp_path / "tokenizer")
    command = [sys.executable, "-c", KILLED_AFTER_TWO_SHARDS, path, tmp_path / "tokenizer", tmp_path / "cache", form]
    # Its workers hold stderr too: when that ends, so have they.
    assert subprocess.run(command, env=environment(), capture_output=True).returncode == -signal.SIGKILL
    (directory,) = (tmp_path / "cache" / "rows").iterdir()
    finished = {path: path.stat().st_mtime_ns for path in directory.glob("shard-*.json")}
    assert 2 <= len(finished) <= 5
    assert not (directory / "manifest.json").exists()

    made = []
    monkeypatch.setattr(workers, "run", _counting(workers.run, made))
    data = settings(path, format=form, row_length=128)
    (rows,) = ensure_rows(data, tokenizer, "train", tmp_path / "cache", silent)
    assert rows.directory == directory
    assert len(made) == len(rows.manifest["shards"]) - len(finished)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    (fresh,) = ensure_rows(data, tokenizer, "train", tmp_path / "other", silent)
    for name in ("rows", "tokens", "documents", "bytes", "padding", "cut", "trained", "longest", "shards"):
        assert rows.manifest[name] == fresh.manifest[name]


def _counting(run, made):
    def counted(jobs, *arguments, **options):
        made.extend(jobs)
        return run(jobs, *arguments, **options)

    return counted


def test_a_worker_that_dies_is_reported_and_its_shard_made_next_time(
    tmp_path, corpus, tokenizer, many_shards, monkeypatch
):
    start = subprocess.Popen

    def start_and_kill(*arguments, **options):
        process = start(*arguments, **options)
        process.kill()
        return process

    monkeypatch.setattr(workers.subprocess, "Popen", start_and_kill)
    data = settings(corpus, workers=2)
    with pytest.raises(UserError, match=r"a worker ended with signal 9.*--data.workers"):
        ensure_rows(data, tokenizer, "train", tmp_path / "cache", silent)
    monkeypatch.setattr(workers.subprocess, "Popen", start)
    assert ensure_rows(data, tokenizer, "train", tmp_path / "cache", silent)[0].manifest["documents"] > 280


def test_a_full_disk_is_the_users_sentence_and_leaves_no_half_shard(tmp_path, corpus, tokenizer):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"shard-00000.array_record cannot be written .*File too large.*disk full"):
            ensure_rows(settings(corpus), tokenizer, "train", tmp_path / "cache", silent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {"lock"}
    assert len(ensure_rows(settings(corpus), tokenizer, "train", tmp_path / "cache", silent)[0])


def test_small_files_share_a_shard_and_large_ones_are_dealt_to_many():
    small = [shards.Source("text", f"{i}.txt", 100_000) for i in range(100)]
    assert len(shards.assign_shards(small)) == 10
    large = [shards.Source("jsonl", "a.jsonl", 10 << 30), shards.Source("jsonl.gz", "b.jsonl.gz", 1 << 30)]
    plan = shards.assign_shards(large)
    assert 200 < len(plan) <= shards.MOST_SHARDS + 1
    assert {(source.path, part, parts) for job in plan for source, part, parts in job.parts} == {
        (source.path, part, parts)
        for source in large
        for parts in [max(p[2] for job in plan for p in job.parts if p[0] == source)]
        for part in range(parts)
    }
    assert sum(source.kind == "jsonl.gz" for job in plan for source, _, _ in job.parts) == files.MOST_DEALT
    assert len(shards.assign_shards(large[:1], "utf-16")) == files.MOST_DEALT  # every reader reads all of such a file
