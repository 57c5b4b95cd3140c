"""What a user does wrong is one sentence that names the remedy, and costs nothing that was there before."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from commands import flags, refusal
from documents import corpus, environment, texts, write

import launch.chat
import launch.evaluate
import launch.prepare
import launch.tokenizer
import launch.train
from jaxchat import checkpoint, integrity, launcher
from jaxchat.data import cache, prepare
from jaxchat.errors import UserError
from jaxchat.evaluation import asking
from jaxchat.experiment import Experiment
from jaxchat.stages import running, starts

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def as_a_process_would(monkeypatch):
    """At the repository's root; what the launcher sets of JAX, which runs already, is set back."""
    monkeypatch.chdir(ROOT)
    jax.devices()
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("commands"))


@pytest.fixture(scope="module")
def trained(place):
    """A stage directory with one checkpoint."""
    assert len(jax.devices()) == 8  # JAX runs before the launcher could choose how many.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        before = jax.config.jax_compilation_cache_dir
        launch.train.main(flags(place))
        jax.config.update("jax_compilation_cache_dir", before)
    return place / "runs/small/pretrain"


def contents(directory):
    """Every file below a directory with its bytes, except locks."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != "lock")
    return {path: path.read_bytes() for path in files}


def trains_not(place, said, **changes):
    """Training refuses the changed arguments in a sentence that holds `said`, and leaves every run as it was."""
    before, stages = contents(place / "runs"), set((place / "runs").glob("*/pretrain"))
    assert said in refusal(launch.train.main, flags(place, **changes))
    assert contents(place / "runs") == before
    assert set((place / "runs").glob("*/pretrain")) == stages, "a failed start left a directory"


def parquet(path, columns=None):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns or {"text": ["a", "b"]}), path)
    return path.read_bytes()


BAD_FILES = {
    "empty.jsonl": (b"", "empty.jsonl is empty"),
    "empty.txt": (b"", "empty.txt is empty"),
    "binary.txt": (bytes(range(256)) * 20, "binary.txt looks like a binary file"),
    "binary.jsonl": (bytes(range(256)) * 20, "binary.jsonl looks like a binary file"),
    "latin.txt": ("caf\u00e9 ".encode("latin-1") * 50, "--data.encoding"),
    "cut.jsonl.gz": (gzip.compress(b'{"text":"some words"}\n' * 999)[:40], "cut.jsonl.gz is not a complete gzip file"),
    "no.jsonl.gz": (b"not gzip at all", "no.jsonl.gz is not a"),
    "cut.parquet": (b"PAR1" + bytes(100), "cut.parquet is not a complete parquet file"),
    "other.jsonl": (b'{"text":"hi"}\n{"body":"x"}\n', "other.jsonl line 2 has no column 'text' (it has body)"),
    "none.jsonl": (b'{"text":null}\n', "none.jsonl has no text to train a tokenizer on"),
    "number.jsonl": (b'{"text":7}\n', "number.jsonl line 1"),
    "blank.jsonl": (b'{"text":""}\n' * 5, "blank.jsonl has no text to train a tokenizer on"),
    "essay.docx": (b"PK", "essay.docx has an unsupported suffix; expected one of: .txt, .jsonl"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_is_named(place, trained, tmp_path, name):
    content, said = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    trains_not(place, said, **{"data.train": tmp_path / name, "name": "other"})


def test_a_parquet_file_without_text_says_what_it_has(place, trained, tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    parquet(path, {"body": ["a"]})
    trains_not(place, "no column 'text'", **{"data.train": path, "name": "other"})
    path.write_bytes(parquet(path)[:-20])
    trains_not(place, "a.parquet is not a complete parquet file", **{"data.train": path, "name": "other"})


@pytest.mark.parametrize(
    "said, changes",
    [
        ("--data.train nowhere.jsonl does not exist", {"data.train": "nowhere.jsonl"}),
        ("--data.val nowhere.jsonl does not exist", {"data.val": "nowhere.jsonl"}),
        ("is in --data.val and", {"data.val": "{place}/train.jsonl"}),
        ("no tokenizer in {place}/nothing", {"data.tokenizer.path": "{place}/nothing"}),
        (
            "has 300 ids: set --data.vocab=300",
            {"data.tokenizer.path": "{place}/runs/small/tokenizer", "data.vocab": 310},
        ),
        ("--data.vocab=20 is too small", {"data.vocab": 20}),
        ("mesh data=16 fsdp=1 tensor=1 expert=1 does not fit 8 devices", {"mesh.data": 16}),
        (
            "does not divide over data=3 x fsdp=1 x expert=1: set micro_rows and batch_tokens to a multiple of 3 rows",
            {"mesh.data": 3},
        ),
        ("vocab=320 of ends.embed is not a multiple of tensor=3", {"mesh.tensor": 3}),
        ("micro_rows=3 does not divide the batch of 8 rows", {"micro_rows": 3}),
        (
            "heads=3 is not a multiple",
            {"model.pattern.0.mixer.heads": 3, "model.pattern.0.mixer.kv_heads": 2},
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(place, trained, said, changes):
    filled = {key: str(value).format(place=place) for key, value in changes.items()}
    trains_not(place, said.format(place=place), **{"name": "other"} | filled)


@pytest.mark.parametrize(
    "said, changes",
    [
        ("seed was 0 and is now 1; give this one its own --name", {"seed": 1}),
        ("vocab was 300 and is now 310 and 1 more field", {"data.vocab": 310}),
        ("holds another experiment: data.train.0", {"data.train": "{place}/other.jsonl"}),
        ("is already at step 2: give at least --steps=2", {"steps": 1}),
    ],
)
def test_a_run_directory_of_another_experiment_is_left_alone(place, trained, said, changes):
    filled = {key: str(value).format(place=place) for key, value in changes.items()}
    refused = refusal(launch.train.main, flags(place, **filled))
    assert said.replace("data.train.0", "data.train") in refused
    trains_not(place, "", **filled)


@pytest.fixture
def moved(place, trained, tmp_path):
    """The run and its documents in another place, with a function that changes fields of its experiment."""
    copy = Path(shutil.copytree(place, tmp_path / "moved", ignore=shutil.ignore_patterns("cache")))
    path = copy / "runs/small/pretrain/experiment.json"

    def change(**fields):
        experiment = json.loads(path.read_text())
        experiment["data"] |= {"train": [str(copy / "train.jsonl")], "val": [str(copy / "val.jsonl")]}
        experiment["data"]["tokenizer"] |= fields
        path.write_text(json.dumps(experiment))

    change()
    return copy, change


def test_documents_that_changed_under_a_run_do_not_fit_its_tokenizer(moved):
    place, _ = moved
    write(place / "train.jsonl", texts(300, seed=9))
    trains_not(place, "were trained with another tokenizer")


def test_documents_that_changed_under_a_run_are_not_what_it_was_trained_on(moved):
    place, change = moved
    tokenizer = str(place / "runs/small/tokenizer")
    change(path=tokenizer)
    write(place / "train.jsonl", texts(300, seed=9))
    said = "the documents of --data.train are not those that"
    trains_not(place, said, **{"data.tokenizer.path": tokenizer, "steps": 4})


def test_a_second_process_in_a_run_directory_is_refused(place, trained):
    with cache.locked(trained, print):
        trains_not(place, f"another process trains in {trained}: wait until it ends, or give", steps=4)


def test_what_was_refused_may_be_corrected_under_the_same_name(place, trained):
    changes = {"name": "corrected", "data.val": None, "data.val_fraction": 1e-9}
    with pytest.raises(UserError, match="holds out no document"):
        launch.train.main([*flags(place, **changes), "--data.val"])
    told = launch.train.main([*flags(place, **changes | {"data.val_fraction": 0.2}), "--data.val"])
    assert told["step"] == 2
    trains_not(place, "holds another experiment: data.val was ()", **changes | {"data.val": place / "val.jsonl"})
    shutil.rmtree(place / "runs/corrected")


MOMENTS = {
    "tokenizer": (prepare, "ensure_tokenizer"),
    "rows": (prepare, "ensure_rows"),
    "compilation": (running, "compile_step"),
    "restoring": (integrity, "check_files"),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_before_the_first_step_exits_with_75(place, trained, monkeypatch, capsys, moment, number):
    module, name = MOMENTS[moment]
    real, before, handler = getattr(module, name), contents(place / "runs"), signal.getsignal(signal.SIGINT)
    went_on = []

    def interrupted(*args, **named):
        os.kill(os.getpid(), number)
        went_on.append(moment)
        return real(*args, **named)

    monkeypatch.setattr(module, name, interrupted)
    with pytest.raises(SystemExit) as stop:
        launcher.run(lambda _: launch.train.main(flags(place, steps=4)), resumes=True)
    assert stop.value.code == 75 and contents(place / "runs") == before
    said = "stopped by a signal; what was finished is kept: start again to continue"
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1] == said and "damaged" not in err
    assert went_on
    assert signal.getsignal(signal.SIGINT) is handler


COPA = "eval_data/commonsense_reasoning/copa.jsonl"
BAD_TASKS = {
    "core": ("core/copa:{}", COPA, '{"query": "q", "choices": ["a"], "gold": 0}', "it needs at least two choices"),
    "multiple choice": ("arc_easy:{}", "arc_easy.jsonl", '{"question": "q"}', "not a question with text choices"),
    "text": ("bpb:{}/a.jsonl", "a.jsonl", '{"text": "t"}\n{"text": 5}', "has no text in column 'text' but a number"),
    "no text": ("bpb:{}/a.jsonl", "a.jsonl", '{"text": ""}', "has no text: name files with documents"),
    "problems": ("gsm8k:{}", "test.jsonl", '{"question": "q"}', "line 1: "),
}


@pytest.mark.parametrize("name", BAD_TASKS)
def test_files_of_tasks_are_read_before_anything_is_compiled(place, trained, tmp_path, monkeypatch, name):
    spec, file, row, said = BAD_TASKS[name]
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(row + "\n")
    monkeypatch.setattr(running, "compile_step", None)
    monkeypatch.setattr(asking, "load_engine", None)
    before = contents(place / "runs")
    assert said in refusal(launch.train.main, [*flags(place, name="other"), "--tasks", spec.format(tmp_path)])
    evaluated = [f"--checkpoint={trained}", "--tasks", spec.format(tmp_path)]
    assert said in refusal(launch.evaluate.main, evaluated)
    assert contents(place / "runs") == before


def test_a_run_directory_that_cannot_be_written_says_so(place, trained):
    (place / "runs/taken").write_text("a file")
    trains_not(place, "cannot be written (", name="taken")
    trains_not(place, "cannot be written (", directory=place / "runs/taken")
    (place / "runs/taken").unlink()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_directory_without_permission_says_so(place, trained, tmp_path):
    tmp_path.chmod(0o555)
    trains_not(place, "cannot be written (Permission denied)", directory=tmp_path)


@pytest.mark.parametrize("main", [launch.prepare.main, launch.tokenizer.main])
def test_the_other_launchers_refuse_as_training_does(place, main):
    assert "nowhere.txt does not exist" in refusal(main, flags(place, **{"data.train": "nowhere.txt"}))
    assert "did you mean --save_every?" in refusal(main, flags(place, save_evry=3))


@pytest.mark.parametrize(
    "said, argv",
    [
        ("no checkpoint in {place}/nothing: train first", ["--checkpoint={place}/nothing"]),
        ("no checkpoint in {place}/runs/small: did you mean {stage}?", ["--checkpoint={place}/runs/small"]),
        ("no checkpoint 9 in {stage}: there are 2", ["--checkpoint={stage}@9"]),
        ("temperature=-1.0 must be", ["--checkpoint={stage}", "--temperature=-1"]),
        ("top_p=0.0 must be from 1.18e-38 to 1", ["--checkpoint={stage}", "--top_p=0"]),
        ("top_k=-1 must be at least 0", ["--checkpoint={stage}", "--top_k=-1"]),
        ("max_tokens=0 must be at least 1", ["--checkpoint={stage}", "--max_tokens=0"]),
        (
            "tokens, but the context has 16, 1 of them for the answer: shorten it",
            ["--checkpoint={stage}", "--prompt=" + "the fox saw a bear " * 9],
        ),
        ("--prompt is empty: give it a text", ["--checkpoint={stage}", "--prompt=", "--style=chat"]),
        ("--checkpoint is missing", []),
    ],
)
def test_chat_refuses_in_a_sentence(place, trained, said, argv):
    filled = [word.format(place=place, stage=trained) for word in argv]
    if not any(word.startswith("--prompt") for word in argv):
        filled.append("--prompt=the fox")
    assert said.format(place=place, stage=trained) in refusal(launch.chat.main, filled)


def test_chat_refuses_a_tokenizer_that_is_not_the_models(trained, tmp_path):
    run = Path(shutil.copytree(trained.parent, tmp_path / "small"))
    tokenizer = run / "tokenizer"
    model = next(tokenizer.glob("*.model"))
    whole = model.read_bytes()
    model.write_bytes(whole[:-50])
    argv = [f"--checkpoint={run / 'pretrain'}", "--prompt=the"]
    assert "is damaged or of another format" in refusal(launch.chat.main, argv)
    model.unlink()
    assert "tokenizer.model is missing" in refusal(launch.chat.main, argv)


def test_a_moved_run_directory_talks(trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained.parent, tmp_path / "elsewhere"))
    told = launch.chat.main([f"--checkpoint={run / 'pretrain'}@2", "--prompt=the fox", "--max_tokens=3"])
    assert set(told) >= {"text", "tokens", "tokens_per_second", "finish_reason"}
    assert told["tokens"] <= 3 and capsys.readouterr().out == "the fox" + told["text"] + "\n"


def test_a_renamed_run_directory_resumes(place, trained, tmp_path):
    shutil.copytree(trained.parent, tmp_path / "renamed")
    told = launch.train.main(flags(place, directory=tmp_path, name="renamed"))
    assert told["step"] == 2 and told["checkpoint"] == str(tmp_path / "renamed/pretrain")
    assert isinstance(told["loss"], float), "of a run that was started again after its last step"
    assert checkpoint.read_experiment(tmp_path / "renamed/pretrain", Experiment).name == "renamed"


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))  # No file may be larger.
from jaxchat import launcher
import launch.train
launcher.run(launch.train.main)
"""


def test_a_full_disk_ends_with_a_sentence_and_the_last_checkpoint_talks(place, trained, tmp_path):
    shutil.copytree(trained.parent, tmp_path / "small")
    before = contents(tmp_path / "small/pretrain/checkpoints")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *flags(place, directory=tmp_path, steps=4)],
        cwd=ROOT,
        env=environment() | {"JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    # Not by lines: TensorStore's threads may write theirs into ours.
    assert done.stderr.count("error: the checkpoint could not be written") == 1
    assert done.stderr.count("the last good one is step 2") == 1
    assert before.items() <= contents(tmp_path / "small/pretrain/checkpoints").items()
    told = launch.chat.main([f"--checkpoint={tmp_path / 'small/pretrain'}", "--prompt=the", "--max_tokens=2"])
    assert told["tokens"] <= 2


@pytest.mark.parametrize("writer", ["wandb", "tensorboard"])
def test_a_writer_that_is_not_installed_is_refused_before_anything_is_made(place, trained, monkeypatch, writer):
    monkeypatch.setitem(sys.modules, writer, None)
    said = f"--{writer}=True needs {writer}: pip install -e '.[{writer}]'"
    trains_not(place, said, **{writer: True, "name": "other"})


def test_checkpoints_that_were_removed_take_no_records_with_them(place, trained, tmp_path):
    run = Path(shutil.copytree(trained.parent, tmp_path / "small")) / "pretrain"
    before = (run / "metrics.jsonl").read_text()
    shutil.rmtree(run / "checkpoints")
    told = launch.train.main(flags(place, directory=tmp_path))
    assert told["step"] == 2 and (run / "metrics-1.jsonl").read_text() == before
    assert (run / "metrics.jsonl").read_text().startswith('{"step":1,')
    assert launch.train.main(flags(place, directory=tmp_path, steps=3))["step"] == 3
    assert not (run / "metrics-2.jsonl").exists() and len(starts.read(run)) == 3
