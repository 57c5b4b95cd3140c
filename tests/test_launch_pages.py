"""README and docs: every link leads to something, and every command is one that its launcher reads."""

import importlib
import io
import json
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import runs
from documents import environment

import launch.chat
import launch.compare
import launch.convert
import launch.evaluate
import launch.harness
import launch.inspect
import launch.plan
import launch.plot
import launch.serve
import launch.speedrun
from jaxchat import command_line, comparison, processes
from jaxchat.errors import UserError
from jaxchat.experiment import SPEEDRUN, STAGES
from jaxchat.planning.chips import topology

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Pages without commands, or with old ones.
RECORDS = ["log.md", "claims.md", "decisions.md", "small_models.md", "glossary.md", "code.md", "removed_tests.md"]
RECIPES = sorted((ROOT / "docs/launch").glob("*.md"))
OPTIONS = {
    "chat": launch.chat.Chat,
    "convert": launch.convert.Convert,
    "evaluate": launch.evaluate.Evaluate,
    "harness": launch.harness.Harness,
    "inspect": launch.inspect.Inspect,
    "plot": launch.plot.Plot,
    "serve": launch.serve.Serve,
}


def anchors(page):
    """The names by which a page's headings are linked to."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_something(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for target in targets:
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def code(page):
    """The lines of a page's code, those of a shell joined."""
    text = page.read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")


def commands(page, *, here=False):
    """The launchers of a page's code with their arguments, also in a list of YAML.

    With `here` those that need nothing but what commands before them made: what others need stands in the line before.
    """
    text = re.sub(r"\[python, (.*?)\]", lambda found: "python " + found[1].replace(",", ""), code(page))
    text = re.sub(r"^# Needs .*\n.*\n", "", text, flags=re.MULTILINE) if here else text
    return re.findall(r"""python -m (launch\.(?:[^\n;&|<>"']|"[^"\n]*"|'[^'\n]*')*)""", text)


def read(command):
    """Raises where a launcher does not know the arguments of a command."""
    name, *argv = shlex.split(command.removeprefix("launch."), comments=True)
    if name in OPTIONS:
        command_line.parse(OPTIONS[name], argv)
    elif name == "plan":
        options, rest = command_line.parse_known(launch.plan.Plan, argv)
        for words in launch.plan.stages(rest):
            command_line.load(words)
        for named in filter(None, options.topology.split(",")):
            topology(named)
    elif name == "compare":
        options, rest = command_line.parse_known(launch.compare.Compare, argv)
        comparison.read_variants(options.variants, lambda flags: command_line.load([*rest, *flags]))
    elif name == "speedrun":
        _, argv = command_line.parse_known(launch.speedrun.Speedrun, argv)
        for stage in SPEEDRUN:
            command_line.load(command_line.stage_arguments(argv, stage, STAGES))
    elif name != "bench" and "--help" not in argv:
        assert name in ("train", "prepare", "tokenizer"), command
        command_line.load(argv)


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in RECORDS], ids=lambda page: page.name)
def test_every_command_is_one_that_its_launcher_reads(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = list(commands(page))
    assert found
    for command in found:
        try:
            read(command)
        except UserError as error:
            pytest.fail(f"python -m {command}: {error}")


SMALL = {"depth": 1, "head_dim": 8, "steps": 2, "batch_tokens": 640, "data.vocab": 400, "data.row_length": 160}
SMALL |= {"micro_rows": 2, "data.workers": 1, "mesh.data": 1, "eval_problems": 2, "eval_tokens": 4, "keep": 9}
DATA = {"": ("tinyworld:train:150", "tinyworld:val:4"), "sft": ("tinyworld:chat:60", "tinyworld:chat:20")}
ROLLOUTS = {"rl:rl.prompts": 2, "rl:rl.samples": 4, "rl:rl.max_tokens": 8}


def shortened(name, argv):
    """The arguments of a command with more, so that it takes seconds."""
    if name in ("chat", "evaluate"):
        return [word.replace("@375", "@2") for word in argv] + ["--max_tokens=4"] + ["--limit=2"] * (name == "evaluate")
    if name == "inspect":
        return [re.sub(r"--step=\d+", "--step=2", word) for word in argv]
    if name not in ("train", "speedrun", "prepare", "tokenizer") or "--help" in argv:
        return argv
    small = SMALL | (ROLLOUTS if name == "speedrun" else {})
    stages = ("", "sft") if name == "speedrun" else ("",)
    config = next(word for word in argv if word.startswith("--config"))
    for stage in stages:
        prefix = f"{stage or 'pretrain'}:" if name == "speedrun" else ""
        train, val = DATA[stage or config.partition(":")[2]]
        small |= {f"{prefix}data.train": train, f"{prefix}data.val": val}
    epochs = ["--sft:data.epochs"] if name == "speedrun" else ["--data.epochs"] if ":sft" in config else []
    return [*argv, *(f"--{key}={value}" for key, value in small.items()), *epochs]


RUN = [p for p in PAGES if p.name not in RECORDS and p not in RECIPES]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory with the configurations."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    before = jax.config.jax_compilation_cache_dir
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def programs(page):
    """Blocks of Python, and what is given to `python -c`."""
    text = page.read_text(encoding="utf-8")
    kinds = (r"^```python\n(.*?)^```", r"^python -c '\n(.*?)^'")
    found = [program for kind in kinds for program in re.findall(kind, text, re.MULTILINE | re.DOTALL)]
    return [program for program in found if not program.startswith("# Needs ")]


def order(page):
    """README first, which trains what the other pages use."""
    return page.name != "README.md", page.name != "pipeline.md", page.name


@pytest.mark.slow
def test_commands_run_with_few_steps(elsewhere, monkeypatch):
    """All that need nothing, in the order in which they need each other; once each."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    seen = set()
    for page in sorted(RUN, key=order):
        for command in commands(page, here=True):
            name, *argv = shlex.split(command.removeprefix("launch."))
            # tests/test_compare.py trains the variants of one comparison; a server does not end.
            if command in seen or name in ("compare", "serve"):
                continue
            seen.add(command)
            main = importlib.import_module(f"launch.{name}").main
            try:
                main(runs.last_of_each(shortened(name, argv)))
            except (UserError, SystemExit) as error:
                assert isinstance(error, SystemExit) and not error.code, f"{page.name}: {command}: {error}"
        for program in programs(page):
            exec(program, {})
    assert len(seen) > 15


@pytest.mark.nightly
def test_commands_run_verbatim(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    done = set()
    for page in sorted(RUN, key=order):
        for command in commands(page, here=True):
            if command not in done and not command.startswith("launch.serve"):  # A server does not end.
                done.add(command)
                line = f"{shlex.quote(sys.executable)} -m {command} < /dev/null"
                ran = subprocess.run(line, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True)
                assert ran.returncode == 0, f"{page.name}: {command}: {ran.stderr[-2000:]}"


def test_the_checkpoint_that_a_page_names_is_there_at_the_end():
    (step,) = set(re.findall(r"runs/tiny/pretrain@(\d+)", (ROOT / "docs/chatting.md").read_text(encoding="utf-8")))
    e = command_line.load(["--config=configs/tiny.py"])
    due = [n for n in range(1, e.steps + 1) if n == e.steps or not n % e.save_every or not n % e.eval_every]
    assert int(step) in due[-e.keep :]


def test_a_command_that_is_wrong_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = tmp_path / "page.md"
    page.write_text("```\nsrun python -m launch.train --config=configs/tiny.py \\\n    --stepps=3 && echo\n```\n")
    (command,) = commands(page)
    with pytest.raises(UserError, match="--stepps: did you mean --steps"):
        read(command)


@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.name)
def test_every_recipe_says_what_was_run(page):
    second = page.read_text(encoding="utf-8").splitlines()[2]
    assert re.match(r"(Not run|Run here)", second), second


@pytest.mark.slow
def test_the_two_terminals_are_one_run(tmp_path):
    """The two commands of by_hand.md as they stand, on a model of one layer."""
    lines = [line for line in (ROOT / "docs/launch/by_hand.md").read_text().splitlines() if "localhost:1234" in line]
    assert len(lines) == 2
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    small = {"depth": 1, "head_dim": 8, "steps": 3, "data.vocab": 300, "data.row_length": 96, "batch_tokens": 8 * 96}
    small |= {"data.train": "tinyworld:train:50", "data.val": "tinyworld:val:20", "directory": tmp_path, "mesh.data": 2}
    group = []
    for line in lines:
        words = shlex.split(line)
        given = dict(word.split("=", 1) for word in words if word.startswith("JAX_"))
        argv = words[words.index("launch.train") + 1 :] + [f"--{name}={value}" for name, value in small.items()]
        group.append(runs.launch(*argv, **(given | {processes.ADDRESS: address})))
    (out, err), (silent, _) = runs.finish_group(group)
    assert json.loads(out.splitlines()[-1])["step"] == 3
    assert [line for line in silent.splitlines() if not line.startswith("[Gloo]")] == [], "a library's line alone"
    assert "data=2 x fsdp=1 x tensor=1" in err
    assert runs.records(tmp_path / "two/pretrain")[-1]["step"] == 3
