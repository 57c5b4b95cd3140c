"""Paths that a user writes: ~ is the home directory wherever one is given, and names need not be UTF-8."""

import gzip
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from documents import settings, silent, texts, write

import launch.convert
import launch.evaluate
import launch.plot
import launch.prepare
from jaxchat import checkpoint, command_line
from jaxchat.data.prepare import ensure_tokenizer, ensure_tokenizer_directory
from jaxchat.data.source import Reading
from jaxchat.data.sources import documents, find
from jaxchat.errors import UserError
from jaxchat.evaluation import evaluate, multiple_choice
from jaxchat.experiment import Experiment
from jaxchat.inspection import report
from jaxchat.paths import check_local, user_path
from jaxchat.serve.models import find_models
from jaxchat.tasks import load_task
from jaxchat.tokenizer import TokenizerConfig, load_tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory; nothing may be made in the working directory, which is another."""
    place, here = tmp_path / "home", tmp_path / "here"
    place.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.chdir(here)
    yield place
    assert list(here.iterdir()) == []


def test_a_tilde_is_the_home_directory(home):
    assert user_path("~") == home and user_path("~/a b") == home / "a b"
    assert user_path("a/~") == Path("a/~") and user_path("/x~") == Path("/x~")
    with pytest.raises(UserError, match=r"~nobody-here/x: no such home directory is known; write the path from / on"):
        user_path("~nobody-here/x")


def test_the_directories_of_an_experiment(home):
    (home / "mine.py").write_text((ROOT / "configs/tiny.py").read_text())
    flags = ["--directory=~/runs", "--data.cache=~/cache", "--start_from=~/runs/a/pretrain@3"]
    e = command_line.load(["--config=~/mine.py", *flags])
    assert (e.stage_directory, e.cache_directory) == (home / "runs/tiny/pretrain", home / "cache")
    checkpoint.write_experiment(home / "runs/a/pretrain", e)
    (home / "runs/a/pretrain/checkpoints/3").mkdir(parents=True)
    assert checkpoint.locate(e.start) == checkpoint.locate("~/runs/a/pretrain") == (home / "runs/a/pretrain", 3)
    assert find_models(["~/runs/a"]).keys() == {"a/pretrain", "a/pretrain@3"}
    (home / "runs/a").rename(home / "runs/a@b")
    (home / "runs/a@b/pretrain").rename(home / "runs/a@b/x@y")
    assert checkpoint.locate("~/runs/a@b/x@y") == (home / "runs/a@b/x@y", 3)
    assert report._out(SimpleNamespace(out="~/seen"), home, "x") == home / "seen"


def test_documents_tokenizers_and_rows(home):
    path = write(home / "a.jsonl", texts(200))
    assert [source.path for spec in ("~/a.jsonl", "~/*.jsonl", "~") for source in find(spec, "train")] == [
        str(path)
    ] * 3
    tokenizer = ensure_tokenizer(settings("~/a.jsonl"), "~/cache", 0, silent)
    assert (home / "cache/tokenizers").is_dir()
    tokenizer.save(home / "saved")
    assert load_tokenizer("~/saved").hash == tokenizer.hash
    data = settings(path, tokenizer=TokenizerConfig(path="~/saved"))
    assert ensure_tokenizer_directory(data, "~/cache", 0, silent) == home / "saved"


def test_the_files_of_tasks(home):
    (home / "t.py").write_text("class T:\n    name, tools = 't', ()\n    problems = score = None\n")
    assert load_task("~/t.py:T").name == "t"
    (home / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    assert len(list(load_task("gsm8k:~").problems("test"))) == 1
    bundle = home / "eval_data/world_knowledge"
    bundle.mkdir(parents=True)
    row = {"question": "q", "choices": ["a", "b"], "answer": 0, "query": "q", "gold": 0}
    (bundle / "arc_easy.jsonl").write_text(json.dumps(row) + "\n")
    assert len(multiple_choice.read("arc_easy", "~", home)) == 1
    (job,) = evaluate.parse_tasks(["core/arc_easy:~"], evaluate.Settings("text"), home)
    assert job.name == "core/arc_easy"


REFUSED = {
    "convert": (launch.convert, ["--checkpoint=~/none", "--from=huggingface", "--out=~/x/pretrain"]),
    "evaluate": (launch.evaluate, ["--compare", "~/none", "~/none"]),
    "plot": (launch.plot, ["--runs", "~/none"]),
    "config": (launch.prepare, ["--config=~/none"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_options_look_at_home(home, name):
    launcher, argv = REFUSED[name]
    with pytest.raises(UserError, match=str(home / "none")):
        launcher.main(argv)


BYTES = os.fsdecode(b"caf\xe9")


def test_files_with_names_that_are_not_utf8_are_read(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    place = tmp_path / BYTES
    place.mkdir()
    line = b'{"text": "x"}\n'
    contents = {".txt": b"x", ".jsonl": line, ".json": line, ".jsonl.gz": gzip.compress(line)}
    for suffix, content in contents.items():
        (place / f"{BYTES}{suffix}").write_bytes(content)
    with open(place / f"{BYTES}.parquet", "wb") as file:
        pq.write_table(pa.table({"text": ["x"]}), file)
    for suffix in (*contents, ".parquet"):
        (source,) = find(str(place / f"{BYTES}{suffix}"), "train")
        assert list(documents(source, Reading())) == ["x"]
    assert len(find(str(place), "train")) == 4


def test_a_run_on_such_files_is_prepared_and_described(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    paths = [write(tmp_path / f"{BYTES}{i}.jsonl", texts(count, seed=i)) for i, count in enumerate((300, 9))]
    flags = [f"--directory={tmp_path}/runs", "--data.vocab=300", "--data.row_length=16", "--data.workers=2"]
    argv = ["--config=configs/tiny.py", *flags, "--data.train", str(paths[0]), "--data.val", str(paths[1])]
    told = launch.prepare.main(argv)
    assert told["documents"] == 300
    e = command_line.load(argv)
    checkpoint.write_experiment(e.stage_directory, e)
    assert checkpoint.read_experiment(e.stage_directory, Experiment) == e


@pytest.mark.parametrize("name", ["directory", "data.cache", "start_from", "name"])
def test_directories_that_libraries_cannot_open_are_refused(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=rf"^{name}=a/caf.udce9 is not a path in UTF-8: rename it, or give another"):
        command_line.load(["--config=configs/tiny.py", f"--{name}=a/{BYTES}"])


def test_a_working_directory_that_libraries_cannot_open_is_refused(tmp_path, monkeypatch):
    (tmp_path / BYTES).mkdir()
    monkeypatch.chdir(tmp_path / BYTES)
    with pytest.raises(ValueError, match="directory=runs is not a path in UTF-8"):
        check_local("directory", "runs")
    with pytest.raises(UserError, match="out=x is not a path in UTF-8"):
        launch.convert.main(["--checkpoint=x", "--out=x", "--to=stablehlo"])
    with pytest.raises(UserError, match="checkpoint=x is not a path in UTF-8"):
        checkpoint.locate("x")
