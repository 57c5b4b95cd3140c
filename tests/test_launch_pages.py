"""README and docs: every link leads to something, and every command is one that its launcher reads."""

import json
import re
import shlex
import socket
from pathlib import Path

import pytest
import runs

import launch.chat
import launch.compare
import launch.convert
import launch.evaluate
import launch.harness
import launch.plan
import launch.plot
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
    "plot": launch.plot.Plot,
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


def commands(page):
    """The launchers of a page's code with their arguments: a shell's joined lines, or a list of YAML."""
    text = page.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    code = re.sub(r"\[python, (.*?)\]", lambda found: "python " + found[1].replace(",", ""), code)
    return re.findall(r"""python -m (launch\.(?:[^\n;&|<>"']|"[^"\n]*"|'[^'\n]*')*)""", code)


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
