"""Conversations in files of every kind, and what is skipped there."""

import gzip
import json
from collections import Counter

import pytest
from test_conversations import said

from jaxchat.data.conversations import opening
from jaxchat.data.formats import FORMATS
from jaxchat.data.source import Reading
from jaxchat.data.sources import find
from jaxchat.errors import UserError


def rows_of(count):
    return [{"messages": said(("user", f"Hello {i}"), ("assistant", f"Hi {i}"))} for i in range(count)]


def write(path, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        path.write_bytes(lines)
    return path


def found(path, parts=1, form="chat", **reading):
    """Conversations, and what was skipped: (reason, place)."""
    skipped = []
    skip = lambda _row, error, where: skipped.append((error.reason, where()))  # noqa: E731
    read_them = [
        example.value
        for source in find(str(path), "train", "objects")
        for n in range(parts)
        for example in FORMATS[form].examples(source, Reading(part=n, parts=parts, **reading), skip)
    ]
    return read_them, skipped


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.json"])
@pytest.mark.parametrize("parts", [1, 3])
def test_every_kind_of_file_holds_every_conversation_once(tmp_path, name, parts):
    read_them, skipped = found(write(tmp_path / name, rows_of(7)), parts)
    assert Counter(map(opening, read_them)) == Counter(f"Hello {i}" for i in range(7))
    assert skipped == []


@pytest.mark.parametrize(
    ("name", "where"),
    [("a.jsonl", "line 4"), ("a.jsonl.gz", "line 4"), ("a.parquet", "row 4"), ("a.json", "row 4")],
)
@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_skipped_is_named_by_file_and_place(tmp_path, name, where, parts):
    rows = rows_of(6)
    rows[3]["messages"][1]["content"] = ""
    read_them, skipped = found(write(tmp_path / name, rows), parts)
    assert len(read_them) == 5
    assert skipped == [("empty content", f"{tmp_path / name} {where}")]


def test_a_file_of_another_format_is_refused_at_its_place(tmp_path):
    path = write(tmp_path / "a.jsonl", [*rows_of(2), {"text": "once"}])
    with pytest.raises(UserError, match=r"a.jsonl line 3 holds no conversation \(its keys are text\)"):
        found(path)
    with pytest.raises(UserError, match=r"a.json row 1 is not an object"):
        found(write(tmp_path / "a.json", [[1]]))


def test_a_json_file_may_hold_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + write(tmp_path / "a.jsonl", rows_of(3)).read_bytes() + b"\n \n")
    assert len(found(path)[0]) == 3
    path.write_text(json.dumps(rows_of(2)[0], indent=1) + "\n" + json.dumps(rows_of(2)[1], indent=1))
    assert len(found(path)[0]) == 2
    for broken in ("[1, 2", '{"messages": [\n', "Hello"):
        path.write_text(broken)
        with pytest.raises(UserError, match=r"a.json is neither a JSON array nor JSON objects: Expecting"):
            found(path)
    path.write_bytes(b"[\xe9]")
    with pytest.raises(UserError, match=r"a.json is not utf-8 at byte 1 .*--data.encoding .*latin-1"):
        found(path)
    path.write_bytes(json.dumps(rows_of(2)).encode("utf-16"))
    assert len(found(path, encoding="utf-16")[0]) == 2


def test_a_text_file_holds_no_conversations(tmp_path):
    (tmp_path / "a.txt").write_text("once")
    expected = rf"{tmp_path}/a.txt has an unsupported suffix; expected one of: .jsonl, .jsonl.gz, .parquet, .json; "
    with pytest.raises(UserError, match=rf"{expected}text:{tmp_path}/a.txt reads it as documents"):
        found(tmp_path / "a.txt")
