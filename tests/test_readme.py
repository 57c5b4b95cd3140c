"""What README and docs say about files, commands and sizes is true."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest
from attacks import ATTACKS

from jaxchat import command_line
from jaxchat.experiment import RESUMABLE
from jaxchat.model.counts import parameter_counts
from launch import serve

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = (ROOT / "docs/code.md").read_text(encoding="utf-8")
TABLE = re.findall(r"^\| (\w+) \| (\d.+) \|$", (ROOT / "docs/comparing.md").read_text(encoding="utf-8"), re.MULTILINE)


def paths_in_tree() -> set[str]:
    """Paths in the annotated tree: two spaces of indent a folder, names, then words."""
    folders: list[str] = []
    paths = set()
    for line in CODE.split("```")[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in line.split():
            if not re.fullmatch(r"\w+/|\w+\.py|\.ci/run", name):
                break
            del folders[depth:]
            paths.add("".join(folders) + name)
            folders += [name] if name.endswith("/") else []
    return paths


def test_every_configuration_is_in_the_table():
    files = {path.stem for path in (ROOT / "configs").glob("*.py") if "def get_config(" in path.read_text()}
    assert {name for name, _ in TABLE} == files


@pytest.mark.parametrize("name, cells", TABLE)
def test_the_table_is_what_the_recipe_derives(name, cells):
    e = importlib.import_module(f"configs.{name}").get_config()
    derived = (e.depth, parameter_counts(e.model)["total"], e.steps * e.batch_tokens, e.data.vocab, e.data.row_length)
    assert cells.split(" | ") == [f"{number:,}" for number in derived]


def test_the_tree_is_the_repository():
    written = paths_in_tree()
    assert [path for path in written if not (ROOT / path).exists()] == []
    rooms = {path.parent for path in (ROOT / "jaxchat").rglob("__init__.py")} - {ROOT / "jaxchat"}
    files = {path for top in ("benchmarks", "configs", "launch", "jaxchat") for path in (ROOT / top).glob("*.py")}
    there = {f"{path.relative_to(ROOT)}/" for path in rooms}
    there |= {str(path.relative_to(ROOT)) for path in files if path.name != "__init__.py"}
    assert there - written == set()


def test_commands_name_what_exists():
    modules = set(re.findall(r"python -m launch\.(\w+)", README))
    configs = set(re.findall(r"--config=(configs/\w+\.py)", README))
    assert modules and configs
    assert [path for path in [*(f"launch/{name}.py" for name in modules), *configs] if not (ROOT / path).exists()] == []


def test_two_commands_lead_to_a_page_in_the_browser():
    """The second serves the run that the first trains, at the address that the text names."""
    first, second, address = re.search(
        r"```\n(pip install .*?launch\.speedrun.*)\n(python -m launch\.serve.*)\n```\n\n.*?(http://[\d.:]+)", README
    ).groups()
    config = command_line.load(first.split("launch.speedrun")[1].split())
    asked = command_line.parse(serve.Serve, second.split("launch.serve")[1].split())
    assert asked.checkpoint == (f"{config.directory}/{config.name}",)
    assert address == f"http://{asked.host}:{asked.port}"


def test_every_field_that_may_differ_is_listed_and_no_other():
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    listed = re.search(r"These may differ when a run is resumed: (.*?)\. So", page)
    assert listed is not None
    named = set(re.findall(r"`--([\w.]+)\*?`", listed[1]))
    assert named == set(RESUMABLE)


def test_the_number_of_attacks_is_theirs():
    assert f"has {len(ATTACKS)} programs" in (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")


def test_every_extra_is_named():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert [name for name in extras if f"`{name}`" not in README and f".[{name}]" not in README] == []
