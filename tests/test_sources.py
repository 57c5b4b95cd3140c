"""Sources: what a spec names, what is read from it, and the sentence for every broken file."""

import bz2
import gzip
import json
import lzma
import os
import re
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.data.files import DEAL
from jaxchat.data.source import Reading
from jaxchat.data.sources import documents, find, held_out
from jaxchat.errors import UserError


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def jsonl(*texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))


def read(path, split="train", parts=1, **reading):
    sources = find(str(path), split)
    return [
        text
        for source in sources
        for part in range(parts)
        for text in documents(source, Reading(part=part, parts=parts, **reading))
    ]


def parquet(path, column, groups=2, name="text"):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({name: column}), path, row_group_size=max(1, len(column) // groups))
    return path


def test_a_text_file_is_one_document(tmp_path):
    text = "two\r\nlines \u2581 \U0001f600\n"
    assert read(write(tmp_path / "a.txt", text)) == [text]


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfword")) == ["word"]
    assert read(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + jsonl("word").encode())) == ["word"]


def test_json_lines_hold_a_document_each_and_blank_lines_none(tmp_path):
    lines = jsonl("one", "") + "\n  \n" + jsonl("t\u00e9xt")
    assert read(write(tmp_path / "a.jsonl", lines)) == ["one", "", "t\u00e9xt"]
    assert read(write(tmp_path / "a.jsonl.gz", gzip.compress(lines.encode()))) == ["one", "", "t\u00e9xt"]
    assert read(write(tmp_path / "no_newline.jsonl", lines.rstrip("\n"))) == ["one", "", "t\u00e9xt"]


def test_another_column_can_hold_the_text(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"story": "once"}\n')
    assert read(path, text_column="story") == ["once"]


def test_surrogates_that_json_can_hold_become_text(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude00 \\ud800."}\n')
    assert read(path) == ["\U0001f600 \ufffd."]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_an_encoding_can_be_named(tmp_path, encoding):
    text = "na\u00efve caf\u00e9\n"
    assert read(write(tmp_path / "a.txt", text.encode(encoding)), encoding=encoding) == [text]
    lines = '{"text": "caf\u00e9"}\n{"text": "two"}\n'
    for name, data in (("a.jsonl", lines.encode(encoding)), ("a.jsonl.gz", gzip.compress(lines.encode(encoding)))):
        assert read(write(tmp_path / name, data), encoding=encoding, parts=2) == ["caf\u00e9", "two"]


@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=40), parts=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_parts_of_json_lines_hold_every_document_once(tmp_path_factory, lengths, parts):
    texts = [f"{i}:" + "x" * length for i, length in enumerate(lengths)]
    path = write(tmp_path_factory.mktemp("parts") / "a.jsonl", jsonl(*texts))
    assert read(path, parts=parts) == texts


def test_parts_of_other_files_hold_every_document_once(tmp_path):
    texts = [f"text {i}" for i in range(3 * DEAL + 5)]
    for path in (
        write(tmp_path / "a.jsonl.gz", gzip.compress(jsonl(*texts).encode())),
        parquet(tmp_path / "a.parquet", texts, groups=5),
    ):
        dealt = read(path, parts=3)
        assert dealt != texts
        assert sorted(dealt) == sorted(texts)
    assert read(write(tmp_path / "a.txt", "one"), parts=3) == ["one"]


def test_tiny_world_documents_are_dealt_without_loss():
    assert sorted(read("tinyworld:val:5", parts=2)) == sorted(read("tinyworld:val:5"))
    assert len(read("tinyworld:train:5")) == 5


def test_a_directory_gives_train_files_to_training_and_val_files_to_validation(tmp_path):
    for name in (
        "train-0.jsonl",
        "x/TRAIN.jsonl",
        "val.jsonl",
        "y/dev_1.jsonl",
        "other.txt",
        "SOURCE.md",
        ".cache/train.txt",
    ):
        write(tmp_path / name, jsonl(name))
    assert read(tmp_path) == ["train-0.jsonl", "x/TRAIN.jsonl"]
    assert read(tmp_path, "val") == ["val.jsonl", "y/dev_1.jsonl"]


def test_a_directory_without_train_files_gives_everything_but_val_and_test_files(tmp_path):
    for name in ("b/valley.jsonl", "a.jsonl", "valid.jsonl", "my-test.jsonl", "val/1.jsonl"):
        write(tmp_path / name, jsonl(name))
    assert read(tmp_path) == ["a.jsonl", "b/valley.jsonl"]
    assert read(tmp_path, "val") == ["val/1.jsonl", "valid.jsonl"]
    assert read(tmp_path / "b", "val") == ["b/valley.jsonl"]


def test_a_glob_names_files_in_a_fixed_order(tmp_path):
    for name in ("x/2.jsonl", "x/10.jsonl", "1.jsonl", "1.txt"):
        write(tmp_path / name, jsonl(name))
    assert read(tmp_path / "**" / "*.jsonl") == ["1.jsonl", "x/10.jsonl", "x/2.jsonl"]


def test_holding_out_depends_on_the_text_alone():
    texts = [f"document {i}" for i in range(4000)]
    chosen = [text for text in texts if held_out(text, 0.1)]
    assert chosen == [text for text in reversed(texts) if held_out(text, 0.1)][::-1]
    assert 300 < len(chosen) < 500
    assert {text for text in texts if held_out(text, 0.05)} < set(chosen)


BROKEN = {
    "missing.txt": (None, r"--data.train .*missing.txt does not exist"),
    "none/*.txt": (None, r"no file matches --data.train .*none/\*.txt"),
    "empty.jsonl": (b"", r"empty.jsonl is empty"),
    "picture.png": (b"x", r"picture.png has an unsupported suffix; expected one of: .txt, .jsonl, .jsonl.gz, .parquet"),
    "latin.txt": (
        "caf\u00e9".encode("latin-1"),
        r"latin.txt is not utf-8 at byte 3 \(0xe9\).*--data.encoding .*latin-1",
    ),
    "latin.jsonl": (jsonl("one").encode() + b'{"text": "\xe9"}', r"latin.jsonl is not utf-8 at byte 35 \(0xe9\)"),
    "binary.txt": (b"\x7fELF\0\0", r"binary.txt looks like a binary file \(zero byte at offset 4\)"),
    "binary.jsonl": (b"\x7fELF\0\xff\n", r"binary.jsonl looks like a binary file"),
    "broken.jsonl": (jsonl("one") + "\n{oops}\n", r"broken.jsonl line 3 is not valid JSON: Expecting"),
    "list.jsonl": ("[1, 2]\n", r"list.jsonl line 1 is an array instead of an object.* name it \.json"),
    "array.jsonl": ('[\n {"text": "x"}\n]', r"array.jsonl line 1 is not valid JSON: an array .* name it \.json"),
    "long.jsonl": ('[{"text": "x"},\n {"text": "y"}]', r"long.jsonl line 1 is not valid JSON: .* name it \.json"),
    "pretty.jsonl": ('{\n "text": "x"\n}\n', r"pretty.jsonl line 1 is not valid JSON: the object does not end in"),
    "digits.jsonl": ('{"n": ' + "9" * 5000 + "}", r"digits.jsonl line 1 .*digits.*; write it as a string"),
    "gz.jsonl": (gzip.compress(b"x"), r"gz.jsonl is compressed with gzip: name it .jsonl.gz if"),
    "gz.txt": (gzip.compress(b"x"), r"gz.txt is compressed with gzip: .* unpack it, as gunzip <FILE"),
    "zip.jsonl.gz": (b"PK\3\4x", r"zip.jsonl.gz is a zip archive: unpack it"),
    "table.jsonl": (b"PAR1xxxx", r"table.jsonl is a parquet file: name it .parquet"),
    "le.jsonl": (
        jsonl("one").encode("utf-16-le"),
        r"le.jsonl looks like UTF-16-LE text: set --data.encoding=utf-16-le",
    ),
    "be.jsonl": (
        jsonl("one").encode("utf-16-be"),
        r"be.jsonl looks like UTF-16-BE text: set --data.encoding=utf-16-be",
    ),
    "le.txt": ("words\n".encode("utf-16-le"), r"le.txt looks like UTF-16-LE text"),
    "marked.txt": ("words\n".encode("utf-16"), r"marked.txt looks like UTF-16 text: set --data.encoding=utf-16$"),
    "le.json": (b'[{"text": "x"}]'.decode().encode("utf-16-le"), r"le.json looks like UTF-16-LE text"),
    "zero.txt": ("word\n" * 99 + "\0", r"zero.txt has a zero byte at byte 495, in line 100, .* remove it, as tr -d"),
    "zero.jsonl": (
        jsonl("one") + '{"text": "' + "x" * 99 + '\0"}',
        r"zero.jsonl has a zero byte at byte \d+, in line 2",
    ),
    "tail.jsonl": (jsonl("one") + "\0" * 99, r"tail.jsonl has a zero byte at byte \d+, in line 2, .* as tr -d"),
    "number.jsonl": ("7\n", r"number.jsonl line 1 is not an object"),
    "column.jsonl": (jsonl("one") + '{"id": 2, "body": "x"}\n', r"line 2 has no column 'text' \(it has id, body\)"),
    "chat.jsonl": ('{"messages": []}\n', r"line 1 has no column 'text' \(it has messages\).*--data.format=chat"),
    "nulls.jsonl": ("null\n", r"nulls.jsonl line 1 is not an object"),
    "list_text.jsonl": ('{"text": ["x"]}\n', r"list_text.jsonl line 1 has no text in column 'text' but a list"),
    "int_text.jsonl": ('{"text": 7}\n', r"int_text.jsonl line 1 has no text in column 'text' but a number"),
    "plain.jsonl.gz": (
        jsonl("one"),
        r"plain.jsonl.gz is not a complete gzip file \(Not .*; name it .jsonl if it has",
    ),
    "more.jsonl.gz": (gzip.compress(jsonl("one").encode()) + b"more", r"not a complete .*; download or make it again"),
    "cut.jsonl.gz": (gzip.compress(jsonl("one").encode())[:-9], r"cut.jsonl.gz is not a complete gzip file"),
    "flipped.jsonl.gz": (gzip.compress(b"x" * 99)[:-8] + b"\0" * 8, r"flipped.jsonl.gz is not a complete gzip file"),
    "text.parquet": (b"this is text", r"text.parquet is not a complete parquet file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_in_one_sentence(tmp_path, name):
    data, sentence = BROKEN[name]
    if data is not None:
        write(tmp_path / name, data)
    with pytest.raises(UserError, match=sentence) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_directory_without_documents_is_refused(tmp_path):
    write(tmp_path / "README.md", "x")
    with pytest.raises(UserError, match=r"no .txt, .jsonl, .jsonl.gz, .parquet file in --data.train"):
        read(tmp_path)
    write(tmp_path / "val.txt", "x")
    with pytest.raises(UserError, match=r"only validation and test files in --data.train"):
        read(tmp_path)


def test_a_broken_line_is_named_in_every_part(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl(*map(str, range(50))) + "oops\n")
    with pytest.raises(UserError, match=r"a.jsonl line 51 is not valid JSON"):
        read(path, parts=3)


@pytest.mark.parametrize("spec", ["tinyworld:test", "tinyworld:train:0", "tinyworld:train:00", "tinyworld:train:x"])
def test_a_wrong_tiny_world_is_refused(spec):
    with pytest.raises(UserError, match="is not tinyworld:train or tinyworld:val"):
        read(spec)


def test_an_unknown_encoding_is_refused(tmp_path):
    for name in ("latin-99", "rot13", "base64"):
        for path in (write(tmp_path / "a.txt", "x"), write(tmp_path / "a.jsonl", jsonl("x"))):
            with pytest.raises(UserError, match=rf"--data.encoding={name} is not a text encoding"):
                read(path, encoding=name)
    path = write(tmp_path / "b.jsonl", jsonl("one", "two").encode("utf-16-le"))
    with pytest.raises(UserError, match=r"b\.jsonl is not utf-16: .* start with BOM; set --data\.encoding"):
        read(path, encoding="utf-16")
    assert list(read(path, encoding="utf-16-le")) == ["one", "two"]
    with pytest.raises(UserError, match=r"a.txt is not ascii.*set --data.encoding"):
        read(write(tmp_path / "a.txt", "\u00e9"), encoding="ascii")


def test_a_null_is_a_document_without_text(tmp_path):
    lines = jsonl("one") + '{"text": null}\n{"text": NaN}\n' + jsonl("two")
    assert read(write(tmp_path / "a.jsonl", lines)) == ["one", "", "", "two"]
    assert read(parquet(tmp_path / "a.parquet", ["one", None])) == ["one", ""]
    assert read(write(tmp_path / "a.json", '[{"text": null}]')) == [""]


def test_what_a_message_advises_works(tmp_path):
    array = '[\n {"text": "x"}\n]'
    assert read(write(tmp_path / "array.json", array)) == read(write(tmp_path / "b.json", '{\n"text": "x"}\n')) == ["x"]
    assert read(write(tmp_path / "a.jsonl.gz", gzip.compress(jsonl("x").encode()))) == ["x"]
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        assert read(write(tmp_path / "a.jsonl", jsonl("x").encode(encoding)), encoding=encoding) == ["x"]


@pytest.mark.parametrize(
    "packed",
    [
        gzip.compress,
        lzma.compress,
        bz2.compress,
        lambda data: pytest.importorskip("pyarrow").compress(data, "zstd", asbytes=True),
        lambda data: data + b"\0" * 9,
    ],
)
def test_the_command_that_a_message_advises_works(tmp_path, packed):
    path, new = write(tmp_path / "a.jsonl", packed(jsonl("x").encode())), tmp_path / "b.jsonl"
    with pytest.raises(UserError) as caught:
        read(path)
    command = re.search(r", as (\S+.* <FILE >NEW) does", str(caught.value))[1]
    if shutil.which(command.split()[0]) is None:
        pytest.skip(f"{command.split()[0]} is not installed")
    subprocess.run(command.replace("FILE", str(path)).replace("NEW", str(new)), shell=True, check=True)
    assert read(new) == ["x"]


def noted(path, split="train", content="documents"):
    said = []
    sources = find(str(path), split, content, note=said.append)
    return [os.path.relpath(source.path, path) for source in sources], said


def test_what_a_directory_holds_besides_is_counted(tmp_path):
    names = ("a.jsonl", "b.txt", "README.md", "x/NOTES.md", "x/c.csv", "LICENSE", "about.json", ".git/x", "test.txt")
    for name in names:
        write(tmp_path / name, jsonl("x"))
    (tmp_path / "lost.txt").symlink_to("nothing")
    found, said = noted(tmp_path)
    assert found == ["a.jsonl", "b.txt"]
    (line,) = said
    assert line.startswith(f"{tmp_path}: 2 files are read, 7 are not: 2 .md, 1 ")
    for kind in ("1 .csv", "1 without a suffix", "1 .json", "1 of other splits by their names", "1 broken links"):
        assert kind in line
    assert noted(tmp_path, content="objects")[0] == ["a.jsonl", "about.json"]
    assert noted(tmp_path / "a.jsonl")[1] == []
    assert noted(tmp_path / "[abx]*l")[1] == []
    (tmp_path / "more.txt").mkdir()
    assert "more.txt" not in (listed := noted(tmp_path / "*.txt"))[0]
    assert listed[1] == [f"{tmp_path}/*.txt matches 2 directories or other entries, which are not read"]


def test_linked_directories_are_read_once(tmp_path):
    write(tmp_path / "corpus" / "1.jsonl", jsonl("one"))
    write(tmp_path / "other" / "deep" / "2.jsonl", jsonl("two"))
    write(tmp_path / "3.jsonl", jsonl("three"))
    (tmp_path / "corpus" / "a").symlink_to(tmp_path / "other")
    (tmp_path / "corpus" / "again").symlink_to(tmp_path / "other")
    (tmp_path / "corpus" / "3.jsonl").symlink_to(tmp_path / "3.jsonl")
    (tmp_path / "other" / "loop").symlink_to(tmp_path / "corpus")
    assert noted(tmp_path / "corpus") == (["1.jsonl", "3.jsonl", "a/deep/2.jsonl"], [])
    assert sorted(read(tmp_path / "corpus" / "a")) == ["one", "three", "two"]
    write(tmp_path / "corpus" / "val" / "4.jsonl", jsonl("four"))
    (tmp_path / "corpus" / "0").symlink_to(tmp_path / "corpus" / "val")
    assert "four" not in read(tmp_path / "corpus")
    (tmp_path / "all").symlink_to(tmp_path / "corpus")
    assert read(tmp_path / "all") == read(tmp_path / "corpus")
