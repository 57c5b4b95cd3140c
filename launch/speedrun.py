"""Runs every stage: python -m launch.speedrun --config=configs/tiny.py [--field=value ...] [--sft:field=value ...]

Text to base model, conversations to chat model, rewards to a better one, and runs/NAME/report.md. --field=value goes to
every stage, --sft:field=value to one. Started again it goes on where it stopped; a stage that is finished stays so.
"""

import sys
from collections.abc import Mapping

from jaxchat import command_line, launcher, signals
from jaxchat.command_line import joined, stage_arguments
from jaxchat.errors import UserError
from jaxchat.experiment import STAGES


def main(argv: list[str]) -> Mapping[str, object] | None:
    price, rest = None, []
    for word in joined(argv, "dollars_per_hour"):
        if word.startswith("--dollars_per_hour="):
            try:
                price = float(word.partition("=")[2])
            except ValueError:
                raise UserError(f"{word} is not a number of dollars: --dollars_per_hour=2.5") from None
        else:
            rest.append(word)
    try:
        with signals.raised() as stopped:
            stages = [command_line.load(stage_arguments(rest, stage, STAGES), description=__doc__) for stage in STAGES]
            from jaxchat import compilation, processes, speedrun

            with processes.joined():
                compilation.prepare_backend(stages[0])
                return processes.from_first(speedrun.run(stages, stopped, launcher.log, dollars_per_hour=price))
    except signals.Interrupted as stop:
        print(f"stopped by a signal; {stop}: start again to continue", file=sys.stderr)
        raise SystemExit(75) from None


if __name__ == "__main__":
    launcher.run(main)
