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
from jaxchat.evaluation import choice

REPOSITORY = "owner/texts"
FILES = {f"data/shard_{i}.parquet": bytes([65 + i]) * (70_000 + i) for i in range(4)}


class FakeHub:
    """Serves files of a data set; `faults` maps a path to what goes wrong with its next requests."""

    def __init__(self, repository=REPOSITORY, files=FILES):
        self.repository, self.files = repository, files
        self.requests: list[tuple[str, str | None]] = []
        self.faults: dict[str, list[str]] = {}
        self.wrong_sha: set[str] = set()
        self.ranges = True
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                owner.answer(self)

            def do_HEAD(self):
                name = self.path.removeprefix("/plain/")
                owner.send(self, 200, owner.files[name], body_too=False, sized=name != "endless.zip")

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
        sha256 = "0" * 64 if name in self.wrong_sha else hashlib.sha256(self.files[name]).hexdigest()
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
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.ranges else 0
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(body) - start))
        handler.end_headers()
        handler.wfile.write(body[start : 50_000 if fault == "cut" else None])
        if fault == "cut":
            handler.wfile.flush()
            handler.connection.close()
        return None

    def send(self, handler, status, body, *, body_too=True, sized=True):
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        if sized:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if body_too:
            handler.wfile.write(body)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads, "BACKOFF_SECONDS", 0.001)
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


def test_a_broken_connection_is_resumed_where_it_broke(server, tmp_path):
    server.faults["data/shard_0.parquet"] = ["cut"]
    (path,) = fetch(server, tmp_path, f"hub:{REPOSITORY}:1")
    assert path.read_bytes() == FILES["data/shard_0.parquet"]
    ranges = [asked for path, asked in server.requests if path.endswith("shard_0.parquet")]
    assert ranges == [None, "bytes=50000-"]
    assert not list(path.parent.glob("*.partial"))


def test_a_partial_file_of_an_earlier_process_is_resumed(server, tmp_path):
    server.faults["data/shard_0.parquet"] = ["cut", *["503"] * downloads.ATTEMPTS]
    with pytest.raises(UserError, match=r"could not be fetched in 6 attempts.*503"):
        fetch(server, tmp_path, f"hub:{REPOSITORY}:1")
    server.faults.clear()
    server.requests.clear()
    (path,) = fetch(server, tmp_path, f"hub:{REPOSITORY}:1")
    assert path.read_bytes() == FILES["data/shard_0.parquet"]
    assert [asked for _, asked in server.requests] == ["bytes=50000-"]


def test_a_server_without_ranges_sends_the_file_again(server, tmp_path):
    server.ranges = False
    server.faults["data/shard_0.parquet"] = ["cut"]
    (path,) = fetch(server, tmp_path, f"hub:{REPOSITORY}:1")
    assert path.read_bytes() == FILES["data/shard_0.parquet"]
    assert sum(asked.endswith("shard_0.parquet") for asked, _ in server.requests) == 2


def test_a_wrong_checksum_is_fetched_again_and_in_the_end_refused(server, tmp_path):
    server.faults["data/shard_0.parquet"] = ["garbage"]
    (path,) = fetch(server, tmp_path, f"hub:{REPOSITORY}:1")
    assert path.read_bytes() == FILES["data/shard_0.parquet"]
    server.wrong_sha.add("data/shard_0.parquet")
    with pytest.raises(UserError, match="another size or checksum"):
        fetch(server, tmp_path / "again", f"hub:{REPOSITORY}:1")
    assert not list((tmp_path / "again").rglob("*.parquet"))


def test_a_busy_hub_is_asked_again(server, tmp_path):
    server.faults["data/shard_1.parquet"] = ["500", "429"]
    assert len(fetch(server, tmp_path)) == 2


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (
            "hub:nothing",
            "unknown data set 'nothing'; expected one of: fineweb-edu, fineweb-edu-100bt, climbmix, smoltalk",
        ),
        ("hub:climbmix:0", "is not hub:NAME or hub:NAME:SHARDS"),
        ("hub:owner/missing:1", r"was refused \(404\): check its name"),
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


def serve(monkeypatch, repository, names):
    monkeypatch.setattr(downloads, "BACKOFF_SECONDS", 0.001)
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
    ],
)
def test_a_data_sets_own_parts_are_kept_apart(monkeypatch, tmp_path, name, repository, files):
    server = serve(monkeypatch, repository, files)
    try:
        for split in ("train", "val"):
            paths = fetch(server, tmp_path, f"hub:{name}", split)
            assert [path.read_text() for path in paths] == sorted(file for file, part in files.items() if part == split)
    finally:
        server.close()


def test_a_data_set_without_files_for_a_split_is_refused(monkeypatch, tmp_path):
    server = serve(monkeypatch, "a/b", ["validation-0.parquet", "test-0.parquet"])
    try:
        with pytest.raises(UserError, match="hub:a/b has no parquet file to train on"):
            fetch(server, tmp_path, "hub:a/b")
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
                    found = choice.arc("", "arc_easy", tmp_path)
                    assert [(one.question, one.choices, one.gold) for one in found] == [
                        ("Which is hot?", ("ice", "fire"), 1),
                        ("Which is wet?", ("sea", "sand"), 0),
                    ]
                else:
                    assert choice.mmlu("", "test", tmp_path) == [
                        choice.Choice("Which?", tuple("abcd"), 2, "small_things")
                    ]
                    assert len(choice.mmlu("", "dev", tmp_path)) == 2
            finally:
                server.close()


def test_an_archive_is_fetched_once_and_unpacked(server, tmp_path):
    with zipfile.ZipFile(sink := io.BytesIO(), "w") as archive:
        archive.writestr("eval_bundle/eval_data/a.jsonl", "{}\n" * 30_000)
    server.files["bundle.zip"] = sink.getvalue()
    server.faults["bundle.zip"] = ["cut", "503"]
    place = tmp_path / "downloads" / "core"
    place.parent.mkdir()
    for _ in range(2):
        assert downloads.unpacked(f"{server.endpoint}/plain/bundle.zip", place, log=silent) == place
    assert (place / "eval_bundle/eval_data/a.jsonl").read_text() == "{}\n" * 30_000
    assert [asked for path, asked in server.requests if path == "/plain/bundle.zip"] == [
        None,
        "bytes=50000-",
        "bytes=50000-",
    ]
    with zipfile.ZipFile(packed := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", random.Random(0).randbytes(1000))
    damaged = packed.getvalue()[:60] + b"\xff" * 40 + packed.getvalue()[100:]
    for body in (b"no archive", damaged):
        server.files["bad.zip"] = server.files["endless.zip"] = body
        with pytest.raises(UserError, match="sent an incomplete or invalid zip archive"):
            downloads.unpacked(f"{server.endpoint}/plain/bad.zip", tmp_path / "bad", log=silent)
        assert not list(tmp_path.glob("bad*.zip"))
    with pytest.raises(UserError, match="does not state its size"):
        downloads.unpacked(f"{server.endpoint}/plain/endless.zip", tmp_path / "endless", log=silent)
