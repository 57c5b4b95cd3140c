"""The notebook: its cells run in order on a CPU, and it holds nothing that a run of it left behind."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from documents import environment

from jaxchat import checkpoint

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/colab_tpu.ipynb").read_text(encoding="utf-8")
BOOK = json.loads(TEXT)
CODE = {cell["id"]: "".join(cell["source"]) for cell in BOOK["cells"] if cell["cell_type"] == "code"}
SMALL = {
    "COMMON": "--depth=1 --head_dim=8 --data.vocab=300 --data.row_length=96 --batch_tokens=768 --micro_rows=8 "
    "--mesh.data=1 --data.workers=1 --eval_every=0",
    "PRETRAIN": "--steps=300 --data.train tinyworld:train:150 --data.val tinyworld:val:20",
    "SFT": "--steps=3 --data.train tinyworld:chat:60 --data.epochs 1 --data.val tinyworld:chat:20 --tasks",
}


class Notebook:
    """Runs cells in one namespace: Python as Python, `!command {name}` in a shell, which must succeed."""

    def __init__(self) -> None:
        self.names = {"_shell": self._shell}

    def run(self, source):
        """What a cell printed; its commands on either stream."""
        shell = lambda found: f"{found[1]}_shell({found[2]!r})"  # noqa: E731
        lines = [re.sub(r"^(\s*)!(.*)$", shell, line) for line in source.splitlines()]
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            exec("\n".join(lines), self.names)
        return told.getvalue()

    def _shell(self, command):
        command = re.sub(r"\{(\w+)\}", lambda found: str(self.names[found[1]]), command)
        done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        print(done.stdout)


def test_it_is_a_notebook_without_outputs():
    assert (BOOK["nbformat"], BOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in BOOK["cells"]}) == len(BOOK["cells"])
    for cell in BOOK["cells"]:
        assert cell["metadata"] == {} and (cell["cell_type"] == "markdown") == ("outputs" not in cell)
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None


def test_it_names_no_machine():
    assert re.findall(r"/(?:tmp|home|work|Users|root|mnt)/", TEXT) == []


def test_every_code_cell_is_told_of():
    kinds = [cell["cell_type"] for cell in BOOK["cells"]]
    assert all(kinds[i - 1] == "markdown" for i, kind in enumerate(kinds) if kind == "code")


def test_a_command_in_a_cell_gets_names_and_must_succeed():
    told = Notebook().run('x = 3\nif x:\n    !echo {x} "it\'s"\n')
    assert told.split() == ["3", "it's"]
    with pytest.raises(AssertionError, match="exit 3"):
        Notebook().run("!exit 3")


@pytest.mark.slow
def test_its_cells_train_stop_go_on_and_talk(tmp_path, monkeypatch):
    """Every cell but the one that installs, with sizes of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    bin_directory = Path(sys.executable).parent
    variables = environment() | {"JAX_PLATFORMS": "cpu", "PATH": f"{bin_directory}{os.pathsep}{os.environ['PATH']}"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    shown = []
    display = types.SimpleNamespace(Image=lambda path: Path(path).read_bytes(), display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    book, told, cells = Notebook(), {}, dict(CODE)
    del cells["install"]
    for name, source in cells.items():
        told[name] = book.run(source)
        if name == "settings":
            book.names |= SMALL | {"KEEP": str(tmp_path / "kept")}
        if name == "interrupt":
            assert book.names["status"] == 75 and "saved: start again to continue" in told[name]
            (stopped,) = checkpoint.finished_steps(Path("runs/colab/pretrain"))
            assert 0 < stopped < 300
    assert told["devices"].startswith("cpu ")
    assert '"parameters"' in told["plan"]
    assert f"continuing from step {stopped:,}" in told["resume"] and '"step":300,' in told["resume"]
    assert shown[0].startswith(b"\x89PNG")
    for name in ("continue", "chat"):
        answer = json.loads(told[name].strip().splitlines()[-1])
        assert answer["text"] and answer["tokens"] > 0
    assert {"prefill.bin", "decode.bin", "README.md"} <= set(told["export"].split())
    # The copy is whole, and is taken up where the run itself is gone.
    assert checkpoint.finished_steps(tmp_path / "kept/pretrain")[-1] == 300
    assert checkpoint.locate(str(tmp_path / "kept/sft"))[1] == 3
    Path("runs/colab").rename(tmp_path / "gone")
    (tmp_path / "kept").rename(tmp_path / "kept.new")  # Taken away while it was copied.
    book.run(CODE["settings"].replace('KEEP = ""', f"KEEP = {str(tmp_path / 'kept')!r}"))
    assert checkpoint.locate("runs/colab/sft")[1] == 3
