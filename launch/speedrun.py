"""Runs every stage: python -m launch.speedrun --config=configs/tiny.py [--field=value ...] [--sft:field=value ...]

Runs pretraining, SFT and RL, and writes runs/NAME/report.md. --field=value applies to every stage, --sft:field=value to
one; --dollars_per_hour=3 adds the cost to the report. Run it again to resume; finished stages are skipped.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxchat import command_line, launcher
from jaxchat.experiment import SPEEDRUN, STAGES


@dataclass(frozen=True)
class Speedrun:
    """Options of launch.speedrun."""

    dollars_per_hour: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= (self.dollars_per_hour or 0.0) < math.inf:
            raise ValueError(f"--dollars_per_hour={self.dollars_per_hour} must be finite and not negative")


def main(argv: list[str]) -> Mapping[str, object] | None:
    price, rest = command_line.parse_known(Speedrun, argv)
    arguments = [command_line.stage_arguments(rest, stage, STAGES) for stage in SPEEDRUN]
    stages = [command_line.load(words, description=__doc__) for words in arguments]
    from jaxchat import compilation, processes, speedrun

    with processes.joined():
        compilation.prepare_backend(stages[0])
        result = speedrun.run(stages, launcher.log, dollars_per_hour=price.dollars_per_hour)
        return processes.from_first(result)


if __name__ == "__main__":
    launcher.run(main, resumes=True)
