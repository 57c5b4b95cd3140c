"""Compares variants: python -m launch.compare --config=configs/tiny.py --variants "base:" "deep: --depth=4"

Every variant is trained with every seed, on the same rows, for as many tokens as the first one (or, with --equal=time,
for as long). The result is a table of paired differences with 95 percent intervals, compare.md with curves in
runs/NAME, and one line of JSON. Other options go to every variant, as for launch.train; start it again to continue.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxchat import command_line, errors, launcher, signals
from jaxchat.experiment import Experiment


@dataclass(frozen=True)
class Compare:
    """What is compared."""

    variants: tuple[str, ...] = ()
    """"NAME: --field=value ..." each; the others are compared with the first, whose flags may be empty."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each variant is trained once with each seed; differences are taken seed by seed."""
    equal: Literal["tokens", "time"] = "tokens"
    """What the variants have in common with the first one, unless a variant names its own --steps."""
    measure: str = "val_bpb"
    """The number compared, by its name in the last line of launch.train."""


def main(argv: list[str]) -> Mapping[str, object] | None:
    try:
        with signals.raised() as stopped:
            options, rest = command_line.parse_known(Compare, argv, description=__doc__)

            if any(word.partition("=")[0] == "--seed" for word in rest):
                raise errors.UserError("a comparison trains every variant with each of --seeds; leave --seed out")

            def load(flags: Sequence[str]) -> Experiment:
                return command_line.load(["--name=compare", *rest, *flags])

            from jaxchat import comparison, compilation, processes

            variants = comparison.read_variants(options.variants, load)
            with processes.joined():
                compilation.prepare_backend(load([]))
                found = comparison.run(
                    variants,
                    load,
                    seeds=options.seeds,
                    equal=options.equal,
                    measure=options.measure,
                    stopped=stopped,
                    log=launcher.log,
                )
                return processes.from_first(found)
    except signals.Interrupted as stop:
        print(f"stopped by a signal; {stop}: start again to continue", file=sys.stderr)
        raise SystemExit(75) from None


if __name__ == "__main__":
    launcher.run(main)
