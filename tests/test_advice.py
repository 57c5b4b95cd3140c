"""What a message about data advises is followed here, and works; what a stage never uses is not made."""

import dataclasses
import re

import pytest
from documents import settings, silent, talks, texts, write, write_rows
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import launch.prepare
import launch.tokenizer
from jaxchat import checkpoint, command_line
from jaxchat.data.prepare import ensure_rows, ensure_tokenizer
from jaxchat.errors import UserError
from jaxchat.stages.rows import MOST_PASSES, FromText
from jaxchat.stages.scores import TaskScores
from jaxchat.stages.stage import inherited, not_used


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizer")
    return ensure_tokenizer(settings(write(place / "t.jsonl", texts(300))), place / "cache", 0, silent)


def load(*argv, config="configs/tiny.py"):
    return command_line.load([f"--config={config}", *argv])


def followed(data, tokenizer, place):
    """The sentence by which rows are refused, and the rows with the share that it advises."""
    with pytest.raises(UserError) as caught:
        for split in ("train", "val"):
            ensure_rows(data, tokenizer, split, place / "cache", silent)
    said = str(caught.value)
    found = re.search(r"set --data\.val_fraction=([\d.e-]+), or --data\.val$", said)
    if not found:
        return said, None
    data = dataclasses.replace(data, val_fraction=float(found.group(1)))
    return said, [ensure_rows(data, tokenizer, split, place / "cache", silent) for split in ("train", "val")]


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
@pytest.mark.parametrize("count", [2, 3, 40])
def test_the_share_that_is_advised_divides_the_documents(tmp_path, tokenizer, fraction, count):
    path = write(tmp_path / "a.jsonl", texts(count))
    said, rows = followed(settings(path, val_fraction=fraction), tokenizer, tmp_path)
    assert f"--data.val_fraction={fraction} holds out {'no' if fraction < 0.5 else 'every'} document: set" in said
    assert sum(part.manifest["documents"] for split in rows for part in split) == count


def test_the_share_that_is_advised_divides_every_entry(tmp_path, tokenizer):
    paths = [write(tmp_path / f"{i}.jsonl", texts(9, seed=i)) for i in range(3)]
    said, rows = followed(settings(*paths, val_fraction=0.999999), tokenizer, tmp_path)
    assert rows is not None and len(rows[0]) == 3, said


UNDIVIDED = {
    "one document": (["alone"], "a.jsonl is one document, which cannot be divided; set --data.val"),
    "alike": (["same", "same"], "its 2 documents are the same, so that they are held out together; set --data.val"),
}


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
@pytest.mark.parametrize("name", UNDIVIDED)
def test_what_cannot_be_divided_is_said(tmp_path, tokenizer, name, fraction):
    documents, reason = UNDIVIDED[name]
    path = write(tmp_path / "a.jsonl", documents)
    said, _ = followed(settings(path, val_fraction=fraction), tokenizer, tmp_path)
    assert said.endswith(reason)
    if fraction > 0.5:
        with pytest.raises(UserError, match=r"no text to train a tokenizer on: .*; set --data\.val$"):
            ensure_tokenizer(settings(path, val_fraction=fraction), tmp_path / "cache", 0, silent)
    data = settings(path, val=(str(write(tmp_path / "v.jsonl", ["other"])),))
    for split in ("train", "val"):
        assert len(ensure_rows(data, tokenizer, split, tmp_path / "cache", silent)) == 1


def test_conversations_that_begin_alike_cannot_be_divided(tmp_path, tokenizer):
    rows = [{"prompt": "Go", "completion": str(i)} for i in range(5)]
    data = settings(write_rows(tmp_path / "a.jsonl", rows), format="chat", val_fraction=0.1)
    said, _ = followed(data, tokenizer, tmp_path)
    assert "its 5 conversations begin with the same words, so that they are held out together; set --data.val" in said


def test_one_document_beside_others_cannot_be_divided(tmp_path, tokenizer):
    one, other = (write(tmp_path / f"{i}.jsonl", [text]) for i, text in enumerate(("x", "y")))
    said, _ = followed(settings(one, other, val_fraction=0.999999), tokenizer, tmp_path)
    assert "no share leaves every entry of --data.train something and holds out something; set --data.val" in said


@given(batch=st.integers(1, 24), length=st.integers(2, 300), micro=st.integers(1, 3), least=st.integers(2, 5000))
@example(batch=8, length=256, micro=8, least=1419)
@hypothesis_settings(max_examples=8, deadline=None)
def test_the_row_length_that_is_advised_is_accepted(batch, length, micro, least):
    flags = [f"--data.row_length={length}", f"--batch_tokens={batch * length}", "--depth=1", "--head_dim=8"]
    flags += [f"--micro_rows={micro if batch % micro == 0 else 'auto'}"]
    longer = load(*flags, *load(*flags).longer_rows(least).split())
    assert least <= longer.data.row_length < 2 * least


def test_a_conversation_that_is_too_long_names_flags_that_fit_it(tmp_path, tokenizer):
    said, long = [], {"prompt": "word " * 300, "completion": "end"}
    path = write_rows(tmp_path / "a.jsonl", [*talks(40), long])
    flags = ["--batch_tokens=1024", "--data.row_length=128", "--data.vocab=300", "--data.format=chat", "--micro_rows=8"]
    e = load(*flags, f"--data.train={path}", "--data.val=tinyworld:chat:3")
    ensure_rows(e.data, tokenizer, "train", tmp_path / "cache", said.append, e.longer_rows)
    (advice,) = (re.search(r"left out; (.*) fits the longest", line).group(1) for line in said if "left out" in line)
    longer = load(*flags, f"--data.train={path}", "--data.val=tinyworld:chat:3", *advice.split())
    (rows,) = ensure_rows(longer.data, tokenizer, "train", tmp_path / "cache", silent, longer.longer_rows)
    assert rows.manifest["too_long"] == 0


@pytest.mark.parametrize("name", ["epochs", "weights"])
def test_shares_for_other_data_name_both_remedies(name):
    flags = ["--data.train", "a", f"--data.{name}", "1", "2"]
    with pytest.raises(UserError, match=rf"data.{name} has 2 .*: give one for each, or --data.{name} without a value"):
        load(*flags)
    assert getattr(load(*flags[:-1]).data, name) == (1.0,)
    assert getattr(load(*flags[:-2]).data, name) == ()


OWN = {
    "pretrain": (["docs.txt"], (), ("", "The", "One day")),
    "sft": (["a.jsonl", "b.jsonl"], (), ("Why is the sky blue?",)),
}


@pytest.mark.parametrize("stage", OWN)
def test_own_data_are_held_out_from_and_prompted_for_themselves(stage):
    train, val, prompts = OWN[stage]
    e = load("--data.train", *train, config=f"configs/tiny.py:{stage}")
    assert (e.data.train, e.data.val, e.data.epochs) == (tuple(train), val, ())
    assert e.prompts[: len(prompts)] == prompts
    given = load("--data.train", *train, "--data.val", "v", "--prompts", "x", config=f"configs/tiny.py:{stage}")
    assert (given.data.val, given.prompts) == (("v",), ("x",))


def test_fewer_of_the_same_data_keep_the_rest():
    assert load("--data.train=tinyworld:train:9") == dataclasses.replace(
        load(), data=dataclasses.replace(load().data, train=("tinyworld:train:9",))
    )
    sft = load("--data.train=tinyworld:chat:9", config="configs/tiny.py:sft")
    assert (sft.data.val, sft.data.epochs) == (("tinyworld:chat",), ())
    assert load("--data.train=hub:climbmix:2", config="configs/d12.py").data.val == ("hub:climbmix",)
    assert load("--data.train=hub:fineweb-edu:2", config="configs/d12.py").data.val == ()


def test_preparation_makes_what_the_stage_uses(tmp_path, tokenizer):
    flags = [
        f"--directory={tmp_path}",
        "--data.workers=1",
        "--data.train=tinyworld:chat:40",
        "--data.val=tinyworld:chat:5",
    ]
    sft = "--config=configs/tiny.py:sft"
    with pytest.raises(UserError, match=r"sft starts from .*tiny/pretrain: no checkpoint.*train that stage first"):
        launch.prepare.main([sft, *flags])
    base = load("--data.vocab=300", f"--directory={tmp_path}")
    checkpoint.write_experiment(base.stage_directory, base)
    tokenizer.save(base.run_directory / "tokenizer")
    (base.stage_directory / "checkpoints/1").mkdir(parents=True)
    assert launch.prepare.main([sft, *flags])["documents"] == 40
    assert not (tmp_path / "cache/tokenizers").exists()
    with pytest.raises(UserError, match=r"takes the tokenizer of .*tiny/pretrain: leave :sft out of --config"):
        launch.tokenizer.main([sft, *flags])
    with pytest.raises(UserError, match=r"stage rl samples its data, so it has no rows: leave :rl out of --config"):
        launch.prepare.main(["--config=configs/tiny.py:rl", f"--directory={tmp_path}"])
    given = load(f"--directory={tmp_path}", "--data.vocab=300", "--data.tokenizer.path=x", config=sft.partition("=")[2])
    assert "data.tokenizer.path='x'" in not_used(given, inherited(given)[0])


def test_rows_that_are_trained_on_many_times_are_said(tmp_path, tokenizer):
    val, three, sixty = (write(tmp_path / f"{n}.jsonl", texts(n)) for n in (9, 3, 60))
    flags = [f"--directory={tmp_path}", f"--data.val={val}", "--data.vocab=300", "--data.row_length=16"]
    flags += ["--batch_tokens=128", "--steps=4000"]

    def told(path, *more):
        said = []
        e = load(*flags, f"--data.train={path}", *more)
        stage = FromText(e, tokenizer, TaskScores(e, tokenizer, said.append), said.append)
        assert stage.steps * 8 <= MOST_PASSES * stage.stream.rows_per_pass or "times" in said[-1]
        return [line for line in said if "times" in line]

    for path in (three, sixty):
        (warning,) = told(path)
        assert told(path, re.search(r"or train for (--steps=\d+);", warning).group(1)) == []
