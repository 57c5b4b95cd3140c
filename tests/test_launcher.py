"""What a launcher prints at its end, and how a mistake ends its process."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import refusal
from documents import environment

import launch.bench
import launch.chat
import launch.compare
import launch.convert
import launch.evaluate
import launch.harness
import launch.inspect
import launch.plan
import launch.plot
import launch.prepare
import launch.serve
import launch.speedrun
import launch.tokenizer
import launch.train
from jaxchat import launcher
from jaxchat.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_a_closed_stderr_ends_no_run(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as closed:
        monkeypatch.setattr(sys, "stderr", closed)
        launcher.log("step 1")
        with pytest.raises(BrokenPipeError):  # The line is still in the buffer.
            closed.flush()
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)


def test_a_result_is_the_last_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launcher"])
    launcher.run(lambda argv: {"loss": 1.5, "text": "né"})
    assert capsys.readouterr().out == '{"loss":1.5,"text":"né"}\n'
    launcher.run(lambda argv: {"loss": float("nan"), "scores": [1.5, {"a": float("-inf")}]})
    assert capsys.readouterr().out == '{"loss":null,"scores":[1.5,{"a":null}]}\n'


def test_a_mistake_exits_with_two_and_one_sentence(capsys, monkeypatch):
    def main(argv):
        raise UserError("no such thing")

    monkeypatch.setattr(sys, "argv", ["launcher"])
    with pytest.raises(SystemExit) as stop:
        launcher.run(main)
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "error: no such thing\n")


def test_a_full_disk_is_a_sentence_and_other_errors_are_not_hidden(capsys, monkeypatch):
    def full(argv):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    def broken(argv):
        raise OSError(errno.EIO, "Input/output error", "metrics.jsonl")

    monkeypatch.setattr(sys, "argv", ["launcher"])
    with pytest.raises(SystemExit) as stop:
        launcher.run(full)
    assert stop.value.code == 2
    said = "error: metrics.jsonl cannot be written (No space left on device): free some space and start again\n"
    assert capsys.readouterr().err == said
    with pytest.raises(OSError, match="Input/output"):
        launcher.run(broken)


def test_a_launcher_reads_and_prints_what_is_no_text():
    code = (
        "from jaxchat import launcher\nlauncher.run(lambda argv: print(launcher.sys.stdin.read()) or {'said': argv[0]})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, b"a\xff\xf0\x9f\x91\xa9"],
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)},
        input=b"b\xff\n",
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(b'{"said":"a?')


def test_a_reader_that_has_seen_enough_gets_no_traceback() -> None:
    program = "from jaxchat import launcher; launcher.run(lambda argv: print('x' * 100_000, flush=True) or {'a': 1})"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def command(module, *argv, variables=None, **more):
    """A launcher in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", f"launch.{module}", *argv],
        cwd=ROOT,
        env=environment() | {"JAX_PLATFORMS": "cpu"} | (variables or {}),
        capture_output=True,
        text=True,
        **more,
    )


@pytest.mark.parametrize(
    "module, argv, said",
    [
        ("train", ["--config=configs/tiny.py", "--save_evry=3"], "did you mean --save_every?"),
        (
            "train",
            ["--config=configs/tiny.py", "--model.pattern.0.mixer.rope.base=5"],
            "did you mean --model.pattern.0.mixer.positions.base?",
        ),
        ("train", ["--config=configs/tiny.py", "--data.train=nowhere.txt"], "nowhere.txt does not exist"),
        ("chat", ["--checkpoint=nowhere", "--prompt=a"], "no checkpoint in nowhere"),
    ],
)
def test_a_process_ends_with_two_and_one_sentence(tmp_path, module, argv, said):
    more = [f"--directory={tmp_path}"] if module == "train" else []
    done = command(module, *argv, *more)
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("error: ") and said in lines[-1] and "Traceback" not in done.stderr


def test_a_part_that_is_none_is_refused():
    said = refusal(launch.train.main, ["--config=configs/tiny.py", "--help=optimiser"])
    assert said == "--help=optimiser is not a part of the configuration: choose one of model, optimizer, data, mesh"


@pytest.mark.parametrize("columns", ["20", "40", "80"])
@pytest.mark.parametrize(
    "wrong, said",
    [
        ("--optimizer.value_embeddings.learning_rate=fast", "value_embeddings.learning_rate takes FLOAT, not 'fast'"),
        ("--data.packing=bestfit", "'bestfit'"),
        ("--save_evry=3", "did you mean --save_every?"),
        ("--steps", "--steps"),
    ],
)
def test_a_narrow_terminal_changes_no_message(monkeypatch, columns, wrong, said):
    monkeypatch.delenv("COLUMNS", raising=False)
    wide = refusal(launch.train.main, ["--config=configs/tiny.py", wrong])
    monkeypatch.setenv("COLUMNS", columns)
    assert refusal(launch.train.main, ["--config=configs/tiny.py", wrong]) == wide and said in wide
    assert os.environ["COLUMNS"] == columns


@pytest.mark.parametrize("platform", ["cuda", "tpu", "nonsense"])
def test_a_backend_that_cannot_start_is_a_sentence(tmp_path, platform):
    argv = ["--config=configs/tiny.py", "--depth=1", f"--directory={tmp_path}"]
    variables = environment() | {"JAX_PLATFORMS": platform, "TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", *argv], cwd=ROOT, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: JAX cannot start with JAX_PLATFORMS={platform} (")
    assert done.stderr.rstrip().endswith("unset it, or set JAX_PLATFORMS=cpu")


@pytest.mark.parametrize(
    ("module", "name", "value"), [("chat", "JAX_ENABLE_X64", "maybe"), ("train", "JAX_NUM_CPU_DEVICES", "abc")]
)
def test_a_variable_that_jax_cannot_read_is_named(module, name, value):
    argv = ["--checkpoint=x"] if module == "chat" else ["--config=configs/tiny.py"]
    done = command(module, *argv, variables={name: value})
    assert done.returncode == 2
    assert done.stderr == f"error: JAX does not know the value of {name}={value}: correct it, or unset {name}\n"


def test_a_variable_that_jax_does_not_name_is_known_by_its_value(monkeypatch):
    config = compile("int(value)", "site-packages/jax/_src/config.py", "eval")
    monkeypatch.setenv("JAX_OF_SOME_KIND", "abc")
    with pytest.raises(ValueError) as caught:
        eval(config, {"value": "abc"})
    assert launcher.sentence(caught.value).startswith("JAX does not know the value of JAX_OF_SOME_KIND=abc:")
    assert launcher.sentence(ValueError("invalid literal 'abc'")) is None, "of another cause"
