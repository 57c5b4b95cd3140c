"""Steps of real models compiled for TPUs and GPUs that are not here: memory, collectives, types.

They need the compilers of the extras `tpu` and `cuda` and minutes each:
python -m pytest -n0 -m slow tests/test_ahead.py
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxchat import command_line, compilation
from jaxchat.planning.chips import topology

os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests/golden/memory.json"
# What fits each place, by rows of a micro-batch: d20's state needs its width split.
ASKED = {
    ("d12", "v5e-8"): (32, "--mesh.data=2", "--mesh.fsdp=4"),
    ("d12", "v6e-8"): (64, "--mesh.data=2", "--mesh.fsdp=4"),
    ("d12", "h100x8"): (64, "--mesh.data=2", "--mesh.fsdp=4"),
    ("d20", "v5e-8"): (16, "--mesh.fsdp=8", "--model.remat=attention"),
    ("d20", "v6e-8"): (32, "--mesh.fsdp=8", "--model.remat=attention"),
    ("d20", "h100x8"): (32, "--mesh.fsdp=8", "--model.remat=attention"),
}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def compiler(place: str) -> str:
    """The compiler of a place and its version; skips the test where it is not installed."""
    name = "libtpu" if place.startswith("v") else "jax_cuda12_plugin"
    pytest.importorskip(name)
    package = "libtpu" if name == "libtpu" else "jax-cuda12-plugin"
    return f"{package} {importlib.metadata.version(package)}, jax {jax.__version__}"


def lowered(name: str, place: str) -> tuple[compilation.Setup, Any]:
    rows, *flags = ASKED[name, place]
    e = command_line.load([f"--config=configs/{name}.py:pretrain", f"--micro_rows={rows}", "--dtype=bfloat16", *flags])
    setup = compilation.make_setup(e, print, topology(place).devices())
    with jax.set_mesh(setup.mesh):
        return setup, compilation.lower_step(setup, rows)


def results(text: str, operation: str) -> list[tuple[str, tuple[int, ...]]]:
    """Type and shape of every array that an operation gives, in a program's text; of the operation's start, too."""
    lines = re.findall(rf"= (.*?) {operation}(?:-start)?\(", text)
    found = [array for line in lines for array in re.findall(r"\b([a-z]+\d+|pred)\[([\d,]*)\]", line)]
    return [(kind, tuple(int(n) for n in shape.split(",") if n)) for kind, shape in found]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "place"), ASKED, ids=map("-".join, ASKED))
def test_a_real_step_is_compiled_as_it_is_meant(name: str, place: str, optimized: None) -> None:
    """Gradients are scattered, activations stay where they are, logits are never whole, the state is not copied."""
    version = compiler(place)
    setup, step = lowered(name, place)
    e, chips, rows = setup.experiment, topology(place), ASKED[name, place][0]
    program, needed = compilation.compile_lowered(step, setup, print)
    print(f"{name} on {place}: {needed / 2**30:.2f} GiB of {chips.chip.memory / 2**30:.2f}, {version}")
    assert program is not None and needed <= chips.chip.memory
    text, T, V = program.as_text(), e.data.row_length, e.model.padded_vocab
    assert "reduce-scatter" in text
    gathered = results(text, "all-gather")
    assert gathered, "parameters are gathered"
    assert not [shape for kind, shape in gathered if kind[0] in "bf" and T in shape], "an activation is gathered"
    tokens = rows // chips.chips * T
    arrays = re.findall(r"\b(?:bf16|f32)\[([\d,]+)\]", text)
    sizes = {tuple(int(n) for n in shape.split(",")) for shape in arrays}
    assert not [shape for shape in sizes if V in shape and math.prod(shape) >= tokens * V], "logits of a whole row"
    analysis, state = program.memory_analysis(), compilation.state_bytes(setup)
    assert analysis.alias_size_in_bytes >= 0.99 * state, "the state is donated"
    golden = json.loads(GOLDEN.read_text()).get(version, {}).get(f"{name} {place}")
    if golden is None:
        pytest.skip(f"no golden memory for {version}: {name} {place} needs {int(needed)}")
    assert needed == pytest.approx(golden, rel=0.1)


def test_no_product_is_in_float32_where_bfloat16_is_meant() -> None:
    e = command_line.load(["--config=configs/tiny.py:pretrain", "--depth=4", "--windows=SSSL", "--head_dim=16"])
    for dtype, wide in (("bfloat16", 0), ("float32", 1)):
        setup = compilation.make_setup(dataclasses.replace(e, dtype=dtype, micro_rows=8), print)
        with jax.set_mesh(setup.mesh):
            text = compilation.lower_step(setup, 8).as_text()
        products = re.findall(r"dot_general.*: \((.*?)\) ->", text)
        assert len(products) > 100
        assert sum("xf32" in operands for operands in products) == wide * len(products)
