"""Counts the rooms that an experiment passes in `stages.running.run`: python tests/rooms.py [DEPTH ...], in a clone

A room is a file of jaxchat/. Each function counts once, when it is first called, and at most DEPTH calls below `run`.
Functions of one file after each other are one stay; a climb goes to a file of a higher level (tests/test_imports.py);
a return goes to a file that was left before. The run is one step of pretraining. It works in earlier commits, too.
"""

import ast
import itertools
import os
import sys
import tempfile
from pathlib import Path
from types import FrameType

ROOT = Path.cwd()
FLAGS = (
    "--config=configs/tiny.py --depth=1 --head_dim=8 --data.vocab=400 --data.row_length=160 --data.workers=1 "
    "--micro_rows=2 --mesh.data=1 --batch_tokens=640 --steps=1 --save_every=1 --eval_every=1 --eval_rows=2 "
    "--sample_every=0 --data.train=tinyworld:train:40 --data.val=tinyworld:val:4"
)


def levels() -> dict[str, int]:
    """The level of each room of tests/test_imports.py."""
    tree = ast.parse((ROOT / "tests/test_imports.py").read_text())
    (rows,) = (ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and _named(n, "LEVELS"))
    return {room: level for level, rooms in enumerate(rows) for room in rooms}


def _named(node: ast.Assign, name: str) -> bool:
    return isinstance(node.targets[0], ast.Name) and node.targets[0].id == name


def level(file: str, known: dict[str, int]) -> int:
    parts = file.removesuffix(".py").split("/")
    return known.get(".".join(parts[:2]), known.get(parts[0], -1))


def first_calls(argv: list[str]) -> list[tuple[int, str]]:
    """Depth below `run` and file of every function's first call."""
    import launch.train
    from jaxchat import stages

    calls: list[tuple[int, str]] = []
    inside, seen, depth, real = f"{ROOT}/jaxchat/", set(), 0, stages.run

    def profile(frame: FrameType, event: str, arg: object) -> None:
        nonlocal depth
        code = frame.f_code
        if event in ("call", "return") and code.co_filename.startswith(inside):
            if event == "call" and code not in seen and not code.co_name.startswith("<"):
                calls.append((depth, code.co_filename.removeprefix(inside)))
                seen.add(code)
            depth += 1 if event == "call" else -1

    def run(*args: object) -> object:
        sys.setprofile(profile)
        try:
            return real(*args)
        finally:
            sys.setprofile(None)

    stages.run = run
    launch.train.main(argv)
    return calls


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path[0] = str(ROOT)
    with tempfile.TemporaryDirectory() as place:
        calls = first_calls([*FLAGS.split(), f"--directory={place}"])
    known = levels()
    for limit in map(int, sys.argv[1:] or ("1", "2", "3", "4")):
        files = [file for depth, file in calls if depth <= limit]
        stays = files[:1] + [b for a, b in itertools.pairwise(files) if a != b]
        climbs = sum(level(b, known) > level(a, known) for a, b in itertools.pairwise(stays))
        rooms = len(set(stays))
        print(f"depth {limit}: {len(stays)} stays in {rooms} rooms, {climbs} climbs, {len(stays) - rooms} returns")


if __name__ == "__main__":
    main()
