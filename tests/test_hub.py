"""Downloads from the hub, against a small server that speaks as the hub does and fails on demand."""

import functools
import hashlib
import io
import json
import random
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from documents import settings, silent, texts, write

pytest.importorskip("huggingface_hub")

from jaxchat.data import downloads, hub
from jaxchat.data.prepare import ensure_rows, ensure_tokenizer
from jaxchat.errors import UserError
from jaxchat.evaluation import multiple_choice

REPOSITORY = "owner/texts"
FILES = {f"data/shard_{i}.parquet": bytes([65 + i]) * (70_000 + i) for i in range(4)}


class FakeHub:
    """Serves files of a data set; `faults` maps a path to what goes wrong with its next requests."""

    def __init__(self, repository=REPOSITORY, files=FILES):
        self.repository, self.files = repository, files
        self.requests: list[tuple[str, str | None]] = []
        self.faults: dict[str, list[str]] = {}
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                owner.answer(self)

            def do_HEAD(self):
                path = self.path.split("?")[0]
                owner.requests.append((path, "HEAD"))
                body = owner.files[path.split("/c0ffee/")[1]]
                owner.send(self, 200, body, body_too=False)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, handler):
        path = handler.path.split("?")[0]
        self.requests.append((path, handler.headers.get("Range")))
        if path.startswith(f"/api/datasets/{self.repository}/tree/"):
            self.send(
                handler, 200, json.dumps([self.entry(name) for name in sorted(self.files, reverse=True)]).encode()
            )
        elif path == f"/api/datasets/{self.repository}":
            self.send(handler, 200, json.dumps({"id": self.repository, "sha": "c0ffee"}).encode())
        elif path.startswith(f"/datasets/{self.repository}/resolve/c0ffee/"):
            self.file(handler, path.split("/c0ffee/")[1])
        elif path.startswith("/plain/"):
            self.file(handler, path.removeprefix("/plain/"))
        else:
            self.send(handler, 404, b"{}")

    def entry(self, name):
        sha256 = hashlib.sha256(self.files[name]).hexdigest()
        size = len(self.files[name])
        lfs = {"oid": sha256, "size": size, "pointerSize": 100}
        return {"type": "file", "path": name, "size": size, "oid": "a" * 40, "lfs": lfs}

    def file(self, handler, name):
        fault = self.faults.get(name, [])
        fault = fault.pop(0) if fault else ""
        body, asked = self.files[name], handler.headers.get("Range")
        if fault.isdigit():
            return self.send(handler, int(fault), b"")
        if fault == "garbage":
            body = b"?" * len(body)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(body) - start))
        handler.send_header("X-Repo-Commit", "c0ffee")
        handler.end_headers()
        handler.wfile.write(body[start : 50_000 if fault == "cut" else None])
        if fault == "cut":
            handler.wfile.flush()
            handler.connection.close()
        return None

    def send(self, handler, status, body, *, body_too=True):
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("X-Repo-Commit", "c0ffee")
        handler.send_header("ETag", hashlib.sha256(body).hexdigest())
        handler.end_headers()
        if body_too:
            handler.wfile.write(body)


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """Another test of this process may have imported the library offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def server():
    fake = FakeHub()
    yield fake
    fake.close()


def fetch(server, directory, spec=f"hub:{REPOSITORY}:2", split="train"):
    return hub.download(spec, split, directory, log=lambda _: None, endpoint=server.endpoint)


def test_the_first_shards_are_for_training_and_the_last_for_validation(server, tmp_path):
    assert [path.name for path in fetch(server, tmp_path)] == ["data--shard_0.parquet", "data--shard_1.parquet"]
    assert [path.name for path in fetch(server, tmp_path, split="val")] == ["data--shard_3.parquet"]
    assert [path.read_bytes()[:1] for path in fetch(server, tmp_path)] == [b"A", b"B"]
    assert len(fetch(server, tmp_path, f"hub:{REPOSITORY}")) == 3  # all but the last


def test_files_that_are_there_need_no_network(server, tmp_path):
    paths = fetch(server, tmp_path)
    server.requests.clear()
    assert fetch(server, tmp_path) == paths
    assert server.requests == []


def test_a_broken_connection_is_tried_again(server, tmp_path):
    server.faults["data/shard_0.parquet"] = ["cut"]
    (path,) = fetch(server, tmp_path, f"hub:{REPOSITORY}:1")
    assert path.read_bytes() == FILES["data/shard_0.parquet"]
    assert [asked for path, asked in server.requests if path.endswith("shard_0.parquet")] == ["HEAD", None, None]


def test_a_start_after_an_error_downloads_only_what_is_missing(server, tmp_path):
    server.faults["data/shard_1.parquet"] = ["404"]
    with pytest.raises(UserError, match=r"data/shard_1.parquet of owner/texts cannot be downloaded \(404\)"):
        fetch(server, tmp_path)
    assert [path.name for path in tmp_path.rglob("*.parquet")] == ["data--shard_0.parquet"]
    assert not list(tmp_path.rglob("*.incomplete"))
    server.requests.clear()
    assert len(fetch(server, tmp_path)) == 2
    assert {path for path, _ in server.requests} == {f"/datasets/{REPOSITORY}/resolve/c0ffee/data/shard_1.parquet"}


def test_a_busy_hub_is_asked_again_and_a_failing_one_is_reported(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "RETRY_SECONDS", (0.0, 0.0))
    server.faults = {"data/shard_0.parquet": ["429", "500", "502"], "data/shard_1.parquet": ["503"] * 99}
    with pytest.raises(UserError, match=r"shard_1.parquet of owner/texts cannot be downloaded \(503\): start again"):
        fetch(server, tmp_path)
    assert [path.name for path in tmp_path.rglob("*.parquet")] == ["data--shard_0.parquet"]


def test_a_file_with_a_wrong_checksum_is_refused_and_removed(server, tmp_path):
    server.faults["data/shard_0.parquet"] = ["garbage"]
    with pytest.raises(UserError, match=r"shard_0\.parquet of owner/texts has another checksum than the hub states"):
        fetch(server, tmp_path, f"hub:{REPOSITORY}:1")
    assert not list(tmp_path.rglob("*.parquet"))
    (path,) = fetch(server, tmp_path, f"hub:{REPOSITORY}:1")
    assert path.read_bytes() == FILES["data/shard_0.parquet"]


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (
            "hub:nothing",
            "unknown data set 'nothing'; expected one of: fineweb-edu, fineweb-edu-100bt, climbmix, smoltalk",
        ),
        ("hub:climbmix:0", "is not hub:NAME or hub:NAME:SHARDS"),
        ("hub:owner/missing:1", r"owner/missing cannot be downloaded \(404\): check its name"),
        (f"hub:{REPOSITORY}:4", "hub:owner/texts:4: owner/texts has only 3 training shards; ask for fewer"),
    ],
)
def test_a_wrong_name_is_refused_in_one_sentence(server, tmp_path, spec, sentence):
    with pytest.raises(UserError, match=sentence):
        fetch(server, tmp_path, spec)


def test_a_forbidden_file_names_the_token(server, tmp_path):
    server.faults["data/shard_0.parquet"] = ["403"]
    with pytest.raises(UserError, match="HF_TOKEN"):
        fetch(server, tmp_path)


def serve(repository, names):
    return FakeHub(repository, {name: name.encode() for name in names})


@pytest.mark.parametrize(
    ("name", "repository", "files"),
    [
        (
            "smoltalk",
            "HuggingFaceTB/smol-smoltalk",
            {"data/train-0.parquet": "train", "data/train-1.parquet": "train", "data/test-0.parquet": "val"},
        ),
        (
            "gsm8k",
            "openai/gsm8k",
            {"main/train-0.parquet": "train", "main/test-0.parquet": "val", "socratic/train-0.parquet": ""},
        ),
        (
            "mmlu",
            "cais/mmlu",
            {
                "all/auxiliary_train-0.parquet": "train",
                "all/validation-0.parquet": "val",
                "all/test-0.parquet": "",
                "all/dev-0.parquet": "",
            },
        ),
        ("a/b", "a/b", {"train-0.parquet": "train", "train-1.parquet": "val", "test-0.parquet": ""}),
        ("a/b", "a/b", {"train-0.parquet": "train", "validation-0.parquet": "val", "test-0.parquet": ""}),
        ("a/b", "a/b", {"train-0.parquet": "train", "test-0.parquet": "val"}),
        ("a/b", "a/b", {"data.parquet": "train", "x/test-0.parquet": "val", "x/test-1.parquet": "val"}),
    ],
)
def test_a_data_sets_own_parts_are_kept_apart(tmp_path, name, repository, files):
    server = serve(repository, files)
    try:
        for split in ("train", "val"):
            paths = fetch(server, tmp_path, f"hub:{name}", split)
            assert [path.read_text() for path in paths] == sorted(file for file, part in files.items() if part == split)
    finally:
        server.close()


def test_a_data_set_without_files_for_a_split_is_refused(tmp_path):
    server = serve("a/b", ["validation-0.parquet", "test-0.parquet"])
    try:
        with pytest.raises(UserError, match="hub:a/b has no parquet file to train on"):
            fetch(server, tmp_path, "hub:a/b")
    finally:
        server.close()


def test_a_data_set_of_one_file_can_be_trained_on_and_is_not_to_validate_on(tmp_path):
    server = serve("a/b", ["train-0.parquet"])
    try:
        assert len(fetch(server, tmp_path, "hub:a/b")) == 1
        with pytest.raises(UserError, match=r"hub:a/b has no parquet file to validate on: leave --data\.val out"):
            fetch(server, tmp_path, "hub:a/b", "val")
    finally:
        server.close()


def test_conversations_of_the_hub_become_rows(monkeypatch, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"question": f"{i} + 1?", "answer": f"<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"} for i in range(20)]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    file = sink.getvalue()
    pq.write_table(pa.Table.from_pylist(rows[:3]), sink := io.BytesIO())
    server = FakeHub("openai/gsm8k", {"main/train-0.parquet": file, "main/test-0.parquet": sink.getvalue()})
    monkeypatch.setattr(hub, "download", functools.partial(hub.download, endpoint=server.endpoint))
    try:
        corpus = write(tmp_path / "t.jsonl", texts(300))
        tokenizer = ensure_tokenizer(settings(corpus), tmp_path / "cache", 0, silent)
        data = settings("hub:gsm8k", val=("hub:gsm8k",), format="chat", row_length=64)
        counted = [ensure_rows(data, tokenizer, split, tmp_path / "cache", silent) for split in ("train", "val")]
        assert [part.manifest["documents"] for (part,) in counted] == [20, 3]
    finally:
        server.close()


ARC = [
    {
        "id": "a",
        "question": "Which is hot?",
        "choices": {"text": ["ice", "fire"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    {
        "id": "b",
        "question": "Which is wet?",
        "choices": {"text": ["sea", "sand"], "label": ["1", "2"]},
        "answerKey": "1",
    },
]
MMLU = [{"question": "Which?", "subject": "small_things", "choices": ["a", "b", "c", "d"], "answer": 2}]


def test_questions_with_choices_come_from_the_hub(monkeypatch, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def table(rows):
        pq.write_table(pa.Table.from_pylist(rows), sink := io.BytesIO())
        return sink.getvalue()

    arc = {"ARC-Easy/test-0.parquet": table(ARC), "ARC-Easy/train-0.parquet": table(ARC[:1])}
    mmlu = {"all/test-0.parquet": table(MMLU), "all/dev-0.parquet": table(MMLU * 2), "all/validation-0.parquet": b""}
    for repository, files in (("allenai/ai2_arc", arc), ("cais/mmlu", mmlu)):
        server = FakeHub(repository, files)
        with monkeypatch.context() as patch:
            patch.setattr(hub, "download", functools.partial(hub.download, endpoint=server.endpoint))
            try:
                if files is arc:
                    found = multiple_choice.read("arc_easy", "", tmp_path)
                    assert [(one.question, one.choices, one.gold) for one in found] == [
                        ("Which is hot?", ("ice", "fire"), 1),
                        ("Which is wet?", ("sea", "sand"), 0),
                    ]
                else:
                    assert multiple_choice.read("test", "", tmp_path) == [
                        multiple_choice.Choice("Which?", tuple("abcd"), 2, "small_things")
                    ]
                    assert len(multiple_choice.read("dev", "", tmp_path)) == 2
            finally:
                server.close()


def test_an_archive_is_fetched_once_and_unpacked(server, tmp_path):
    with zipfile.ZipFile(sink := io.BytesIO(), "w") as archive:
        archive.writestr("eval_bundle/eval_data/a.jsonl", "{}\n" * 30_000)
    server.files["bundle.zip"] = sink.getvalue()
    place = tmp_path / "downloads" / "core"
    server.faults["bundle.zip"] = ["503"]
    with pytest.raises(UserError, match=r"bundle.zip cannot be downloaded to .*503.*: start again, or download"):
        downloads.unpacked(f"{server.endpoint}/plain/bundle.zip", place, log=silent)
    for _ in range(2):
        assert downloads.unpacked(f"{server.endpoint}/plain/bundle.zip", place, log=silent) == place
    assert (place / "eval_bundle/eval_data/a.jsonl").read_text() == "{}\n" * 30_000
    assert len(server.requests) == 2
    with zipfile.ZipFile(packed := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", random.Random(0).randbytes(1000))
    damaged = packed.getvalue()[:60] + b"\xff" * 40 + packed.getvalue()[100:]
    for body in (b"no archive", damaged, sink.getvalue()[:-30]):
        server.files["bad.zip"] = body
        with pytest.raises(UserError, match="sent an incomplete or invalid zip archive"):
            downloads.unpacked(f"{server.endpoint}/plain/bad.zip", tmp_path / "bad", log=silent)
        assert not list(tmp_path.glob("bad*"))
