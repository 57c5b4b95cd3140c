"""The texts of --help: every field has one, and no backend is imported for them."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
from jaxchat import command_line

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


HELP = {
    "train": (
        launch.train,
        ["--config=configs/tiny.py"],
        ["--save_every", "--help=data", "--help=optimizer"],
    ),
    "prepare": (launch.prepare, ["--config=configs/tiny.py"], ["--help=data", "--seed"]),
    "tokenizer": (launch.tokenizer, ["--config=configs/tiny.py"], ["--help=data", "--data.vocab"]),
    "chat": (launch.chat, [], ["--checkpoint", "--temperature", "--top_p"]),
    "bench": (launch.bench, ["train"], ["--peer", "--blocks"]),
    "compare": (launch.compare, [], ["--variants", "--seeds", "--equal", "--measure"]),
    "inspect": (launch.inspect, [], ["--checkpoint", "--text", "--run", "--step", "--replay", "--top_p"]),
    "serve": (launch.serve, [], ["--checkpoint", "--api_key", "--drain_seconds", "--tools"]),
    "plot": (launch.plot, [], ["--runs", "--out"]),
    "evaluate": (launch.evaluate, [], ["--checkpoint", "--tasks", "--limit", "--compare", "core:DIRECTORY"]),
    "convert": (launch.convert, [], ["--checkpoint", "--to", "--from", "--out", "--dtype"]),
    "harness": (launch.harness, [], ["--checkpoint", "--tasks", "--include_path"]),
    "plan": (launch.plan, ["--config=configs/tiny.py"], ["--topology", "--mfu", "--dollars_per_chip_hour", "--seed"]),
    "speedrun": (launch.speedrun, ["--config=configs/tiny.py"], ["--help=model", "--seed"]),
}


@pytest.mark.parametrize("name", HELP)
def test_help_names_the_fields(name, capsys):
    module, argv, fields = HELP[name]
    with pytest.raises(SystemExit) as stop:
        module.main([*argv, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(field in out for field in fields)


@pytest.mark.parametrize("name", ["train", "prepare", "tokenizer", "bench", "plan", "speedrun"])
def test_help_without_a_configuration_says_which_there_are(name, capsys):
    with pytest.raises(SystemExit) as stop:
        HELP[name][0].main(["--help"])
    assert stop.value.code == 0
    assert f"python -m launch.{name}" in capsys.readouterr().out


def test_help_lists_a_configuration_that_python_cannot_read(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    texts = {"a": '"""Good."""\ndef get_config(): ...', "b": "def get_config(:", "c": "def get_config(): ...\0"}
    for name, text in texts.items():
        (tmp_path / "configs" / f"{name}.py").write_text(text)
    with pytest.raises(SystemExit):
        command_line.load(["--help"])
    shown = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if "--config=configs" in line]
    assert shown == ["Good.", "(not valid Python)", "(not valid Python)"]


def test_every_launcher_has_a_help_test():
    assert {path.stem for path in (ROOT / "launch").glob("[a-z]*.py")} == set(HELP)


def test_reading_a_configuration_imports_no_backend():
    code = "import jaxchat.command_line, sys; assert 'jax' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


PARTS = ("", "model", "optimizer", "data", "mesh", "rl")


def helped(main, argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert not stop.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("part", PARTS)
def test_help_is_short_and_every_field_has_a_text(part, capsys):
    said = helped(launch.train.main, ["--config=configs/tiny.py:rl", f"--help={part}" if part else "--help"], capsys)
    assert f"--{part or 'steps'}" in said and re.findall(NO_TEXT, said) == []
    if not part:
        assert len(said.splitlines()) < 100 and "--optimizer" not in said
        assert all(f"--help={name} (" in said for name in PARTS[1:])


NO_TEXT = r"(--[\w.]+) (?:\{[^}]*\}\S*|\[[^\n]*?\]\]|[A-Z|{}\w,]+)\s+\((?:default|required)"


@pytest.mark.parametrize("name", ["chat", "evaluate", "convert", "compare", "harness", "plot"])
def test_every_option_has_a_text(name, capsys):
    assert re.findall(NO_TEXT, helped(importlib.import_module(f"launch.{name}").main, ["--help"], capsys)) == []
