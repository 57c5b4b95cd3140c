"""Runs every stage: python -m launch.speedrun --config=configs/tiny.py [--field=value ...] [--sft:field=value ...]

Runs pretraining, SFT and RL, and writes runs/NAME/report.md. --field=value applies to every stage, --sft:field=value to
one. Run the same command again to resume; finished stages are skipped.
"""

import sys
from collections.abc import Mapping

from jaxchat import command_line, launcher, signals
from jaxchat.command_line import joined, stage_arguments
from jaxchat.errors import UserError
from jaxchat.experiment import SPEEDRUN, STAGES


def main(argv: list[str]) -> Mapping[str, object] | None:
    price, rest = None, []
    for word in joined(argv, "dollars_per_hour"):
        if word.startswith("--dollars_per_hour="):
            try:
                price = float(word.partition("=")[2])
            except ValueError:
                raise UserError(f"{word} is not a number: give dollars, such as --dollars_per_hour=2.5") from None
        else:
            rest.append(word)
    try:
        with signals.raised() as stopped:
            stages = [
                command_line.load(stage_arguments(rest, stage, STAGES), description=__doc__) for stage in SPEEDRUN
            ]
            from jaxchat import compilation, processes, speedrun

            with processes.joined():
                compilation.prepare_backend(stages[0])
                return processes.from_first(speedrun.run(stages, stopped, launcher.log, dollars_per_hour=price))
    except signals.Interrupted as stop:
        print(f"stopped by a signal; {stop}: start again to continue", file=sys.stderr)
        raise SystemExit(75) from None


if __name__ == "__main__":
    launcher.run(main)
