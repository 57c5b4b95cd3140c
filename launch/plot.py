"""Plots the curves of runs: python -m launch.plot --runs runs/tiny/pretrain [MORE ...] --out=curves.png"""

from dataclasses import dataclass

from jaxchat import command_line, launcher
from jaxchat.paths import user_path


@dataclass(frozen=True)
class Plot:
    """Options of launch.plot."""

    runs: tuple[str, ...]  # Stage directories.
    out: str = "curves.png"  # Picture to write; the extension sets the format (.png, .svg, .pdf).


def main(argv: list[str]) -> dict[str, object]:
    plot = command_line.parse(Plot, argv, description=__doc__)
    from jaxchat.evaluation.curves import draw

    return {"out": plot.out, "val_bpb": draw([*map(user_path, plot.runs)], user_path(plot.out))}


if __name__ == "__main__":
    launcher.run(main)
