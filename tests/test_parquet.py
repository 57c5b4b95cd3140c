"""Parquet: which columns are read, and the sentence for what cannot be."""

import json
import sys

import pytest
from test_sources import parquet, read, write

from jaxchat.data.source import Reading
from jaxchat.data.sources import KINDS, find
from jaxchat.errors import UserError


def test_a_parquet_row_is_a_document(tmp_path):
    texts = [f"text {i}" for i in range(7)]
    assert read(parquet(tmp_path / "a.parquet", texts)) == texts


def test_a_parquet_file_without_the_column_or_a_text_is_refused(tmp_path):
    path = parquet(tmp_path / "a.parquet", ["x", "y"], name="body")
    with pytest.raises(UserError, match=r"has no column 'text' \(it has body\); set --data.text_column"):
        read(path)
    with pytest.raises(UserError, match=r"row 1 has no text in column 'text' but bytes; write it as text"):
        read(parquet(tmp_path / "b.parquet", [b"a", b"b"]))
    whole = parquet(tmp_path / "c.parquet", [f"some text {i}" for i in range(99)]).read_bytes()
    with pytest.raises(UserError, match=r"cut.parquet is not a complete parquet file"):
        read(write(tmp_path / "cut.parquet", whole[:-50]))


def test_a_parquet_file_that_is_not_utf8_is_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    text = pa.array([b"fine", b"caf\xe9"], pa.binary()).view(pa.string())
    pa.parquet.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet rows 1 to 2 hold text in column 'text' that is not UTF-8"):
        read(tmp_path / "a.parquet")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", ["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install -e '\.\[hub\]'"):
        read(path)


def test_only_the_columns_that_are_read_are_converted(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    times = {
        "ns": pa.array([1], pa.timestamp("ns")),
        "far": pa.array([2**60], pa.timestamp("ms")),
        "date": pa.array([2**30], pa.date32()),
        "clock": pa.array([1], pa.time64("ns")),
        "zone": pa.array([1], pa.timestamp("us", "Mars/Phobos")),
        "latin": pa.array([b"caf\xe9"], pa.binary()).view(pa.string()),
    }
    fields = {"role": pa.string(), "content": pa.string(), "at": pa.timestamp("ns")}
    fields |= {"took": pa.duration("ns"), "steps": pa.list_(pa.struct({"took": pa.duration("s")}))}
    said = [
        {"role": "user", "content": "u", "at": 1, "took": 10**18 + 1, "steps": [{"took": 2**60}]},
        {"role": "assistant", "content": "a", "at": None},
    ]
    within = pa.array([said], pa.list_(pa.struct(fields)))
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x"], "messages": within, **times}), path)
    assert read(path) == ["x"]
    (source,) = find(str(path), "train", "objects")
    ((_, row),) = KINDS["parquet"].objects(source, Reading(), ["messages", "tools"])
    assert row["messages"] == [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    assert set(row) == {"text", "messages", *times}
    with pytest.raises(UserError, match=r"a.parquet rows 1 to 1 hold .*; write the file again"):
        list(KINDS["parquet"].objects(source, Reading()))


def test_the_text_may_be_a_field_of_a_column(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    fields = pa.struct({"text": pa.string(), "by": pa.struct({"name": pa.string()})})
    rows = [{"text": "a", "by": {"name": "A"}}, {"text": None, "by": None}, None]
    table, dotted = tmp_path / "a.parquet", tmp_path / "b.parquet"
    pq.write_table(pa.table({"meta": pa.array(rows, fields), "n": [1, 2, 3]}), table)
    pq.write_table(pa.table({"meta.text": ["a", None]}), dotted)
    lines = write(tmp_path / "a.jsonl", "".join(json.dumps({"meta": row, "n": 1}) + "\n" for row in rows))
    array = write(tmp_path / "a.json", json.dumps([{"meta": row} for row in rows]))
    for path in (table, lines, array):
        assert read(path, text_column="meta.text") == ["a", "", ""]
        assert read(path, text_column="meta.by.name") == ["A", "", ""]
        with pytest.raises(UserError, match=r"\(it has .*meta\.text.*\); set --data.text_column=meta.text"):
            read(path)
        with pytest.raises(UserError, match=r"no column 'meta.title' \(it has"):
            read(path, text_column="meta.title")
    assert read(dotted, text_column="meta.text") == ["a", ""]
    with pytest.raises(UserError, match=r"set --data.text_column=meta.text"):
        read(dotted)
