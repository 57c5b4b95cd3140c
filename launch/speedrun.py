"""Runs every stage: python -m launch.speedrun --config=configs/tiny.py [--field=value ...] [--sft:field=value ...]

Text to base model, conversations to chat model, rewards to a better one, and runs/NAME/report.md. --field=value goes to
every stage, --sft:field=value to one. Started again it goes on where it stopped; a stage that is finished stays so.
"""

import sys
from collections.abc import Mapping, Sequence

from jaxchat import command_line, launcher, signals
from jaxchat.errors import UserError

ROAD = ("pretrain", "sft", "rl")


def joined(argv: Sequence[str]) -> list[str]:
    """The arguments with `--config FILE` as one word, as `--config=FILE` is; so too the price."""
    words, out = iter(argv), []
    for word in words:
        value = next(words, None) if word in ("--config", "--dollars_per_hour") else None
        out.append(word if value is None else f"{word}={value}")
    return out


def stage_arguments(argv: Sequence[str], stage: str) -> list[str]:
    """The arguments that concern a stage, for launch.train."""
    kept, mine = [], True
    for word in joined(argv):
        if word.startswith("--"):
            owner, colon, rest = word[2:].partition(":")
            mine = not (colon and owner in ROAD) or owner == stage
            word = f"--{rest}" if colon and owner in ROAD else word
        if mine:
            kept.append(word)
    if any(":" in word for word in kept if word.startswith("--config=")):
        raise UserError("launch.speedrun runs every stage: name the file alone, such as --config=configs/tiny.py")
    return [f"{word}:{stage}" if word.startswith("--config=") else word for word in kept]


def main(argv: list[str]) -> Mapping[str, object] | None:
    price, rest = None, []
    for word in joined(argv):
        if word.startswith("--dollars_per_hour="):
            try:
                price = float(word.partition("=")[2])
            except ValueError:
                raise UserError(f"{word} is not a number of dollars: --dollars_per_hour=2.5") from None
        else:
            rest.append(word)
    try:
        with signals.raised() as stopped:
            road = [command_line.load(stage_arguments(rest, stage), description=__doc__) for stage in ROAD]
            from jaxchat import compilation, processes, speedrun

            with processes.joined():
                compilation.prepare_backend(road[0])
                return processes.from_first(speedrun.run(road, stopped, launcher.log, dollars_per_hour=price))
    except signals.Interrupted as stop:
        print(f"stopped by a signal; {stop}: start again to continue", file=sys.stderr)
        raise SystemExit(75) from None


if __name__ == "__main__":
    launcher.run(main)
