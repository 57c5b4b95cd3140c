"""Preparation: documents to rows without loss, never stale."""

import dataclasses
import io
import json
import os
import re
import sys
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
from documents import settings, silent, texts, write

from jaxchat.data import cache, prepare, shards, workers
from jaxchat.data.prepare import Data, ensure_rows, ensure_tokenizer, summary
from jaxchat.data.sources import KINDS, find
from jaxchat.data.streams import every_row_once
from jaxchat.errors import UserError
from jaxchat.tokenizer import TokenizerConfig


@pytest.fixture
def corpus(tmp_path):
    return write(tmp_path / "train.jsonl", texts(300))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizer")
    return ensure_tokenizer(settings(write(place / "t.jsonl", texts(300))), place / "cache", 0, silent)


def documents_of(rows, tokenizer):
    """The texts in rows that hold whole documents."""
    found = []
    for part in rows:
        for i in range(len(part)):
            ids = [*part.read([i])[0][0].tolist(), tokenizer.bos]
            starts = [place for place, token in enumerate(ids) if token == tokenizer.bos]
            found += [tokenizer.decode(ids[a + 1 : b]) for a, b in pairwise(starts) if b > a + 1]
    return found


@pytest.mark.parametrize("packing", ["best_fit", "concatenate", "crop"])
def test_every_byte_of_validation_is_a_target_once(tmp_path, tokenizer, packing):
    val = [*texts(150, seed=1), "", "x", "word " * 400]
    data = settings(
        write(tmp_path / "a.jsonl", texts(20)), val=(str(write(tmp_path / "v.jsonl", val)),), packing=packing
    )
    rows = ensure_rows(data, tokenizer, "val", tmp_path / "cache", silent)
    scored = sum(
        int((tokenizer.bytes_per_token[batch["targets"]] * (batch["weights"] > 0)).sum())
        for batch in every_row_once(rows, 8)
    )
    assert scored == sum(len(text.encode()) for text in val)
    assert rows[0].manifest["empty"] == 1


def test_rows_hold_the_documents(tmp_path, corpus, tokenizer):
    rows = ensure_rows(settings(corpus, row_length=512), tokenizer, "train", tmp_path / "cache", silent)
    val = ensure_rows(settings(corpus, row_length=512), tokenizer, "val", tmp_path / "cache", silent)
    train_texts, val_texts = documents_of(rows, tokenizer), documents_of(val, tokenizer)
    assert Counter(train_texts + val_texts) == Counter(texts(300))
    assert not set(train_texts) & set(val_texts)


def test_the_manifest_says_what_was_made(tmp_path, corpus, tokenizer):
    data = settings(corpus, val=(str(write(tmp_path / "v.jsonl", ["x"])),))
    (rows,) = ensure_rows(data, tokenizer, "train", tmp_path / "cache", silent)
    tokens = [len(tokenizer.encode(text)) for text in texts(300)]
    manifest = rows.manifest
    assert manifest["documents"] == 300
    assert manifest["tokens"] == sum(tokens)
    assert manifest["bytes"] == sum(len(text.encode()) for text in texts(300))
    assert manifest["discarded"] == 0
    assert manifest["cut"] == sum(n + 1 > 33 for n in tokens)
    assert manifest["rows"] == len(rows) == sum(shard["rows"] for shard in manifest["shards"])
    assert manifest["tokenizer"] == tokenizer.hash
    assert [source["path"] for source in manifest["sources"]] == [str(corpus)]
    assert manifest["sources"][0]["sha256"] == KINDS["jsonl"].hash(*find(str(corpus), "train"))
    assert summary([rows])["tokens"] == sum(tokens)
    assert summary([rows])["trained_fraction"] == 1.0  # A BOS that is a target is no token of a document.
    assert summary([rows])["trained_fraction"] == 1.0  # A BOS that is a target is no token of a document.


def test_crop_reports_what_it_throws_away(tmp_path, corpus, tokenizer):
    said = []
    rows = ensure_rows(settings(corpus, packing="crop"), tokenizer, "train", tmp_path / "cache", said.append)
    result = summary(rows)
    assert 0.1 < result["discarded_fraction"] < 0.9
    assert f"{result['discarded_fraction']:.2%} of tokens discarded" in said[-1]


def test_held_out_documents_do_not_depend_on_files_or_order(tmp_path, tokenizer):
    whole = settings(write(tmp_path / "a.jsonl", texts(300)), row_length=512, val_fraction=0.2)
    halves = write(tmp_path / "b.jsonl", texts(300)[:120:-1]), write(tmp_path / "c.jsonl.gz", texts(300)[:121])
    split = settings(*halves, row_length=512, val_fraction=0.2)
    held = [
        set(documents_of(ensure_rows(data, tokenizer, "val", tmp_path / "cache", silent), tokenizer))
        for data in (whole, split)
    ]
    assert held[0] == held[1]
    assert 30 < len(held[0]) < 90


def test_prepared_rows_are_used_again(tmp_path, corpus, tokenizer, monkeypatch):
    (first,) = ensure_rows(settings(corpus), tokenizer, "train", tmp_path / "cache", silent)
    monkeypatch.setattr(workers, "run", None)
    moved = corpus.rename(tmp_path / "moved.jsonl")
    (second,) = ensure_rows(settings(moved, workers=2), tokenizer, "train", tmp_path / "cache", silent)
    assert second.directory == first.directory


def test_any_change_that_matters_makes_other_rows(tmp_path, corpus, tokenizer, monkeypatch):
    def place(data, tokenizer=tokenizer, split="train"):
        return ensure_rows(data, tokenizer, split, tmp_path / "cache", silent)[0].directory

    val = (str(write(tmp_path / "v.jsonl", ["x"])),)
    other = ensure_tokenizer(settings(corpus, vocab=310), tmp_path / "cache", 0, silent)
    places = [
        place(settings(corpus)),
        place(settings(corpus), split="val"),
        place(settings(corpus, row_length=16)),
        place(settings(corpus, packing="crop")),
        place(settings(corpus, val_fraction=0.02)),
        place(settings(corpus, val=val)),
        place(settings(corpus, encoding="latin-1")),
        place(settings(corpus), tokenizer=other),
    ]
    stat = corpus.stat()
    corpus.write_bytes(corpus.read_bytes().replace(b"fox", b"cat"))
    os.utime(corpus, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same date
    places.append(place(settings(corpus)))
    monkeypatch.setattr(shards, "LEAST_PART", 1)  # documents dealt to shards in another way
    places.append(place(settings(corpus)))
    assert len(set(places)) == len(places)


def test_the_keys_of_text_are_those_of_before_there_were_conversations(tmp_path, corpus, tokenizer):
    (rows,) = ensure_rows(settings(corpus), tokenizer, "train", tmp_path / "cache", silent)
    (source,) = find(str(corpus), "train")
    reading = {"text_column": "text", "encoding": "utf-8", "held_out": 0.01}
    assert rows.directory.name == cache.key(
        format=1,
        tokenizer=tokenizer.hash,
        sources=[("jsonl", KINDS["jsonl"].hash(source))],
        shards=[[(0, 0, 1)]],
        row_length=32,
        packing="best_fit",
        split="train",
        **reading,
    )
    (village,), (talk,) = find("tinyworld:train", "train"), find("tinyworld:chat", "train", "objects")
    assert (village.path, village.size) == ("tinyworld:train", 24_000 * 330)
    assert (talk.path, talk.size) == ("tinyworld:chat-train:16000", 16_000 * 400)
    known = shards.Recipe(32, "best_fit", "text", "utf-8", 0.01, "train").decides([])
    assert cache.key(format=1, tokenizer="abc", sources=[], shards=[], **known) == "7677378ca48d1a6b2a77360d"
    ensure_tokenizer(settings(corpus), tmp_path / "cache", 0, silent)
    (directory,) = (path for path in (tmp_path / "cache" / "tokenizers").iterdir() if path.is_dir())
    config = {"algorithm": "bpe", "extra_specials": (), "sample_bytes": 20_000_000, "path": None}
    sources = [("jsonl", KINDS["jsonl"].hash(source))]
    assert directory.name == cache.key(format=1, vocab=300, config=config, seed=0, sources=sources, **reading)


def test_lost_and_broken_shards_are_made_again(tmp_path, corpus, tokenizer):
    (rows,) = ensure_rows(settings(corpus), tokenizer, "train", tmp_path / "cache", silent)
    shard = rows.directory / rows.manifest["shards"][0]["file"]
    before = shard.read_bytes()
    for damage in (shard.unlink, lambda: shard.write_bytes(before[:-1])):
        damage()
        ensure_rows(settings(corpus), tokenizer, "train", tmp_path / "cache", silent)
        assert shard.read_bytes() == before


def test_a_lost_or_damaged_manifest_is_made_again(tmp_path, corpus, tokenizer):
    (rows,) = ensure_rows(settings(corpus), tokenizer, "train", tmp_path / "cache", silent)
    manifest = rows.directory / "manifest.json"
    for damage in (manifest.unlink, lambda: manifest.write_text("{")):
        damage()
        (again,) = ensure_rows(settings(corpus), tokenizer, "train", tmp_path / "cache", silent)
        assert again.manifest["shards"] == rows.manifest["shards"] and len(again) == len(rows)


def test_a_document_of_many_rows_and_many_of_none_are_prepared(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(shards, "PACKED_TOKENS", 500)  # packed in many blocks
    val = (str(write(tmp_path / "v.jsonl", ["x"])),)
    documents = [*[""] * 50, "long " * 5000, *texts(30)]
    (rows,) = ensure_rows(
        settings(write(tmp_path / "a.jsonl", documents), val=val), tokenizer, "train", tmp_path, silent
    )
    assert (rows.manifest["empty"], rows.manifest["documents"], rows.manifest["discarded"]) == (50, 31, 0)
    assert rows.manifest["tokens"] == sum(len(tokenizer.encode(text)) for text in documents)
    assert rows.manifest["padding"] < 200  # a row's at most for every block, not for every document


def test_the_tokenizer_is_trained_once_on_training_documents_only(tmp_path, corpus):
    said = []
    data = settings(corpus, val_fraction=0.5)
    first = ensure_tokenizer(data, tmp_path / "cache", 0, said.append)
    assert "training a bpe tokenizer of 300 ids" in said[0]
    count = len(said)
    assert ensure_tokenizer(data, tmp_path / "cache", 0, said.append).hash == first.hash
    assert len(said) == count
    held = {text for text in texts(300) if prepare.Recipe(32, "best_fit", "text", "utf-8", 0.5, "val").takes(text)}
    seen = set(prepare._training_texts([prepare.Entry(str(corpus), "text", find(str(corpus), "train"))], data))
    assert 100 < len(held) < 200
    assert seen == set(texts(300)) - held


def test_a_large_corpus_is_sampled_evenly_for_the_tokenizer(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(shards, "LEAST_PART", 1)
    data = settings(corpus, tokenizer=TokenizerConfig(sample_bytes=1000), val_fraction=1e-9)
    entries = [prepare.Entry(str(corpus), "text", find(str(corpus), "train"))]
    seen = list(prepare._training_texts(entries, data))
    assert 0 < sum(map(len, seen)) < corpus.stat().st_size / 2
    places = [texts(300).index(text) for text in seen]
    assert places == sorted(places)
    assert places[0] < 20
    assert places[-1] > 150


def test_a_saved_tokenizer_can_be_named(tmp_path, corpus, tokenizer):
    tokenizer.save(tmp_path / "saved")
    config = TokenizerConfig(path=str(tmp_path / "saved"))
    assert ensure_tokenizer(settings(corpus, tokenizer=config), tmp_path, 0, silent).hash == tokenizer.hash
    with pytest.raises(UserError, match=r"has 300 ids: set --data.vocab=300"):
        ensure_tokenizer(settings(corpus, tokenizer=config, vocab=400), tmp_path, 0, silent)


def test_too_little_to_hold_out_names_the_remedy(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", ["one", "two"])
    with pytest.raises(UserError, match=r"--data.val_fraction=0.01 holds out no document.*--data.val"):
        ensure_rows(settings(path), tokenizer, "val", tmp_path / "cache", silent)
    with pytest.raises(UserError, match=r"no document to use in --data.train .*b.jsonl. 2 documents without text"):
        ensure_rows(settings(write(tmp_path / "b.jsonl", ["", ""])), tokenizer, "train", tmp_path / "cache", silent)
    held_out = settings(path, val_fraction=0.999999)
    with pytest.raises(UserError, match=r"no document to use in .*a.jsonl. --data.val_fraction=.* every document"):
        ensure_rows(held_out, tokenizer, "train", tmp_path / "cache", silent)


def test_a_run_without_documents_names_the_option(tmp_path, tokenizer):
    for make in (
        lambda: ensure_tokenizer(settings(), tmp_path, 0, silent),
        lambda: ensure_rows(settings(), tokenizer, "train", tmp_path, silent),
    ):
        with pytest.raises(UserError, match=r"no documents to train on: .*--data.train"):
            make()


def test_held_out_texts_that_are_trained_on_are_counted(tmp_path, corpus, tokenizer):
    val, said = tmp_path / "val.jsonl", []
    lines = corpus.read_text().splitlines()[:3]
    val.write_text("\n".join([*lines, lines[0], json.dumps({"text": "of its own"})]) + "\n")
    data = settings(corpus, val=(str(val),))
    ensure_rows(data, tokenizer, "val", tmp_path / "cache", said.append)
    assert said[-1].startswith(f"warning: {val}: 3 of 4 different texts are also trained on: ")
    assert said[-1].endswith("remove them from --data.train or --data.val")
    ensure_rows(data, tokenizer, "val", tmp_path / "cache", said.append)
    assert len([line for line in said if "trained on:" in line]) == 1
    val.write_text(json.dumps({"text": "of its own"}) + "\n")
    ensure_rows(data, tokenizer, "val", tmp_path / "cache", said.append)
    assert "warning" not in said[-1]


def test_a_comparison_of_some_shards_says_so(tmp_path, corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(shards, "LEAST_PART", 1)
    val = write(tmp_path / "val.jsonl", texts(300)[:150])
    data = settings(corpus, val=(str(val),), tokenizer=TokenizerConfig(sample_bytes=1000))
    said = []
    ensure_rows(data, tokenizer, "val", tmp_path / "cache", said.append)
    found = re.search(
        r"(\d+) of 150 different texts are also trained on, .* one of (\d+) shards of --data.train", said[-1]
    )
    assert 0 < int(found[1]) < 100 and int(found[2]) > 1


def test_text_in_a_mixture_is_compared_too(tmp_path, corpus, tokenizer):
    talk = tmp_path / "talk.jsonl"
    talk.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    val = write(tmp_path / "val.jsonl", texts(300)[:3])
    data = settings(talk, f"text:{corpus}", val=(f"text:{val}",), format="chat")
    said = []
    ensure_rows(data, tokenizer, "val", tmp_path / "cache", said.append)
    assert "3 of 3 different texts are also trained on: " in said[-1]


def test_a_file_in_both_train_and_val_is_refused_before_anything_is_made(tmp_path, corpus, tokenizer):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(corpus.read_bytes())
    data = settings(corpus, val=(str(copy),))
    for make in (
        lambda: ensure_tokenizer(data, tmp_path / "cache", 0, silent),
        lambda: ensure_rows(data, tokenizer, "train", tmp_path / "cache", silent),
    ):
        with pytest.raises(UserError, match=r"copy.jsonl is in --data.val and, as .*train.jsonl, in --data.train"):
            make()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"weights": (1.0, 2.0)}, "data.weights has 2 entries, but data.train has 1"),
        ({"weights": (0.0,)}, "must be positive"),
        ({"val_fraction": 0.0}, "data.val_fraction=0.0 must lie between 0 and 1"),
        ({"row_length": 1}, "data.row_length=1 must be at least 2"),
        ({"workers": -1}, "data.workers=-1"),
        ({"epochs": (1.0, 2.0)}, "data.epochs has 2 entries, but data.train has 1"),
        ({"epochs": (0.0,)}, "data.epochs=.* must be positive and finite"),
        ({"epochs": (1.0,), "weights": (1.0,)}, "data.weights and data.epochs cannot be combined"),
        ({"format": "chat", "packing": "crop"}, "data.packing=crop is for text only: use best_fit for conversations"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(Data(), **fields)


def test_documents_without_text_are_counted(tmp_path, tokenizer):
    said, path = [], tmp_path / "a.jsonl"
    path.write_text('{"text": "some words"}\n{"text": null}\n{"text": ""}\n')
    (rows,) = ensure_rows(settings(path, val=(str(write(tmp_path / "v.jsonl", texts(2))),)), tokenizer, "train",
                          tmp_path / "cache", said.append)  # fmt: skip
    assert rows.manifest["documents"] == 1
    assert said[-1] == f"warning: {path}: 2 documents without text"
    path.write_text('{"text": null}\n')
    with pytest.raises(UserError, match=r"no document to use in --data.train .*a.jsonl. 1 document without text"):
        ensure_rows(settings(path, val=("tinyworld:val:2",)), tokenizer, "train", tmp_path / "cache", silent)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_for_terminals_even_with_forced_colours(terminal, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    output = io.StringIO()
    output.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", output)
    job = SimpleNamespace(shard=0, size=100.0)
    with workers._progress([job]) as show:
        show(0, 0.5, 50)
    assert ("\x1b[" in output.getvalue()) == terminal
