"""Imports point down, and importing does nothing: read from the source of every file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from documents import environment

ROOT = Path(__file__).parent.parent

# From the bottom up; a room imports from its own level and from those before.
LEVELS = (
    ("errors", "paths", "serialization", "switching"),
    ("upgrades", "optimizer", "launcher", "command_line", "signals", "machine"),
    ("sandbox", "tokenizer", "xla"),
    ("data", "tasks"),
    ("model", "optim", "metrics", "devices", "sharding", "processes", "unnamed_owners", "integrity"),
    ("objectives", "decode", "checkpoint"),
    ("rl.settings", "experiment", "loading"),
    ("train", "evaluation", "terminal"),
    ("stages", "rl", "inspection", "serve", "export", "compilation", "planning", "speedrun", "ladder"),
    ("comparison",),
    ("configs",),
    ("benchmarks",),
    ("launch",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
WITHOUT_JAX = tuple(room for level in LEVELS[:4] for room in level)
TOPS = ("launch", "benchmarks", "configs")
FILES = sorted(path.relative_to(ROOT) for top in ("jaxchat", *TOPS) for path in (ROOT / top).rglob("*.py"))


def room(module: str) -> str | None:
    """The room of one of our modules; None for the package itself and for others."""
    parts = module.split(".")
    if parts[0] in TOPS:
        return parts[0]
    if module.startswith("jaxchat.rl.settings"):  # Below the experiment, which the rest of its room reads.
        return "rl.settings"
    return parts[1] if parts[0] == "jaxchat" and len(parts) > 1 else None


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> list[str]:
    """Every module that a file imports, also within functions; `from package import name` counts as package.name."""
    found = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_every_room_has_its_level() -> None:
    rooms = {room(module_of(path)) for path in FILES} - {None}
    assert len(rooms) > 10
    assert rooms <= LEVEL.keys(), "give a new room its level here and in docs/code.md"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path: Path) -> None:
    own = room(module_of(path))
    for module in imports(path):
        other = room(module)
        if own is None:
            assert other is None, f"the package itself imports {module}"
        elif other is not None:
            assert LEVEL[other] <= LEVEL[own], f"{own} imports {module}, which is above it"
            assert other != "launch" or own == "launch", f"{own} imports a launcher"
        if own in WITHOUT_JAX:
            assert module.split(".")[0] not in ("jax", "flax", "optax", "orbax", "chex"), f"{own} imports {module}"


def circular(edges: set[tuple[str | None, str | None]]) -> dict[str | None, set[str | None]]:
    """What imports in circles, or imports such, by importer."""
    waits = {own: {b for a, b in edges if a == own and b not in (None, own)} for own, _ in edges}
    while free := [own for own, others in waits.items() if not others & waits.keys()]:
        waits = {own: others for own, others in waits.items() if own not in free}
    return waits


def test_rooms_do_not_import_in_circles() -> None:
    assert not circular({(room(module_of(path)), room(module)) for path in FILES for module in imports(path)})


def test_files_do_not_import_in_circles() -> None:
    """Nor for types only."""
    modules = {module_of(path) for path in FILES}
    file = {name: name if name in modules else name.rpartition(".")[0] for path in FILES for name in imports(path)}
    assert not circular({(module_of(path), file[name]) for path in FILES for name in imports(path)})


def acts(node: ast.stmt) -> bool:
    """Whether a statement at the top of a module does more than name something; a gradient's name counts as one."""
    if isinstance(node, ast.Expr):
        return not (isinstance(node.value, ast.Constant) or ".defvjp(" in ast.unparse(node))
    if isinstance(node, ast.If):
        return ast.unparse(node.test) not in ("__name__ == '__main__'", "TYPE_CHECKING")
    functions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return not isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign | functions)


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] != "launch"], ids=str)
def test_nothing_happens_at_import(path: Path) -> None:
    found = [ast.unparse(node) for node in ast.parse((ROOT / path).read_text()).body if acts(node)]
    assert not found


def fresh(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_importing_everything_starts_no_backend_and_prints_nothing() -> None:
    modules = [module_of(path) for path in FILES]
    code = f"import importlib\nfor name in {modules}: importlib.import_module(name)\n"
    code += "from jax._src.xla_bridge import backends_are_initialized as started\nassert not started()"
    assert fresh(code) == ""


@pytest.mark.parametrize("module", ["jaxchat.decode.engine", "jaxchat.decode.sampling"])
def test_decoding_imports_no_optimizer(module: str) -> None:
    assert (
        fresh(f"import sys, {module}\nprint('optax' in sys.modules, 'jaxchat.optim' in sys.modules)") == "False False\n"
    )


def test_preparing_data_imports_no_jax() -> None:
    assert (
        fresh("import sys, jaxchat.data.prepare, jaxchat.command_line\nprint('jaxchat.model' in sys.modules)")
        == "False\n"
    )


def test_windows_is_told_what_to_use():
    code = "import sys; sys.platform = 'win32'; sys.modules['fcntl'] = None; import launch.chat"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    said = "error: jaxchat runs on Linux and macOS; on Windows, use it in WSL: see README.md\n"
    assert (done.returncode, done.stderr) == (2, said)
